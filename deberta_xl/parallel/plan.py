"""The plan of tensor parallelism: what in the plain model is divided over ranks, and how. The model does not know.

Heads are divided: each rank holds the content and relative projections of its own heads, so all three terms of eq. (4)
stay on a rank. One sum of gradients where states enter the heads serves query, key and value at once, a second one the
relative table; in the forward pass one sum follows the output projection, one the feed-forward block.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.parallel.grid import check_divisible
from deberta_xl.parallel.groups import Groups

#: Ends of module names in the plain model, and what takes their place.
PLAN = {
    "attention.entry": "copy",
    "attention.query_proj": "column",
    "attention.key_proj": "column",
    "attention.value_proj": "column",
    "attention.pos_key_proj": "column",
    "attention.pos_query_proj": "column",
    "attention.out_proj": "row",
    "attention.probability_dropout": "dropout",
    "feed_forward.up": "column_with_sum",
    "feed_forward.down": "row",
    "embeddings.word": "vocabulary",
    "head.entry": "copy",
}


def divide(model: MaskedLanguageModel, groups: Groups) -> None:
    """Replace, in place, what the plan names by this rank's slice of it. Parameters keep their names."""
    if groups.grid.tensor_parallel_size == 1:
        return
    from deberta_xl.parallel import layers  # imports megatron-core, which costs seconds

    check_divisible(model.config, groups.grid.tensor_parallel_size)
    builders: dict[str, Callable[[nn.Module], nn.Module]] = {
        "copy": lambda _: layers.CopyToRanks(groups),
        "column": lambda plain: layers.ColumnLinear(plain, groups, sums_gradient=False),
        "column_with_sum": lambda plain: layers.ColumnLinear(plain, groups, sums_gradient=True),
        "row": lambda plain: layers.RowLinear(plain, groups),
        "dropout": lambda plain: layers.RankDropout(plain, groups),
        "vocabulary": lambda plain: layers.VocabularyEmbedding(plain, groups),
    }
    for name, plain in list(model.named_modules()):
        style = next((PLAN[end] for end in PLAN if name.endswith(end)), None)
        is_here = getattr(plain, "weight", plain) is not None  # another stage's layers have no parameters
        if style is not None and is_here:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, builders[style](plain).train(plain.training))
    full_bias = model.head.bias
    if full_bias is not None:
        model.head.bias = nn.Parameter(full_bias.new_empty(model.embeddings.word.weight.shape[0]))
        layers.keep_slice(model.head.bias, full_bias, 0, groups)
    model.loss = layers.VocabularyLoss(model.config.vocab_size, groups)
