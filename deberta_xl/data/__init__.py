"""From a dataset to masked batches, each a pure function of a number: tokenizer, token store, packing, masking,
order; ranks are plain integers here.
"""
