"""From people's text to a dataset: its formats, how it is divided into documents, the tokenizer's training, and
the writing of token stores.
"""
