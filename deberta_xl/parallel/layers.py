"""megatron-core's divided layers, with the call and the names of the plain layers whose place they take.

Each is built from the plain layer: it keeps this rank's slice of the weights, marked as a slice, since DeepSpeed
otherwise counts it wrongly in the gradient norm.

Shape suffixes of this file:
    B batch   L positions   V vocabulary (this rank's part)   W winners   F figures
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
)
from torch import Tensor, nn

from deberta_xl.kernels.vocabulary import Verdict, Vocabulary, merged
from deberta_xl.parallel.groups import Groups
from deberta_xl.parallel.sequence import sum_to_slice
from deberta_xl.parallel.shard import Shard


def layer_options(groups: Groups) -> dict[str, Any]:
    """What every layer of megatron-core is built with: on the host, and uninitialised; the weights follow."""
    size = groups.grid.tensor_parallel_size
    config = ModelParallelConfig(
        tensor_model_parallel_size=size, use_cpu_initialization=True, perform_initialization=False
    )
    return {"config": config, "init_method": None, "tp_group": groups.tensor_group}


@torch.no_grad()
def keep_slice(parameter: nn.Parameter, full: Tensor, dim: int, groups: Groups) -> None:
    """Fill `parameter` with this rank's slice of `full` along `dim`, and mark it as a slice."""
    grid = groups.grid
    shard = Shard(dim, grid.tensor_parallel_rank, grid.tensor_parallel_size, tuple(full.shape))
    parameter.copy_(shard.cut(full))
    parameter.tensor_model_parallel = True  # read by DeepSpeed; the vocabulary's bias needs it, too
    parameter.tensor_parallel_shard = shard


class ColumnLinear(ColumnParallelLinear):
    """A linear layer of which each rank computes some outputs.

    The gradient of its input is left unsummed: something before it does that, for several layers at once.
    """

    def __init__(self, plain: nn.Linear, groups: Groups):
        super().__init__(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            disable_grad_reduce=True,
            **layer_options(groups),
        )
        keep_slice(self.weight, plain.weight, 0, groups)
        keep_slice(self.bias, plain.bias, 0, groups)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's outputs, bias added."""
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """A linear layer of which each rank reads some inputs; the ranks' results are summed, then the bias is added."""

    def __init__(self, plain: nn.Linear, groups: Groups):
        super().__init__(
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            input_is_parallel=True,
            skip_bias_add=False,
            **layer_options(groups),
        )
        keep_slice(self.weight, plain.weight, 1, groups)
        with torch.no_grad():
            self.bias.copy_(plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The whole output, on every rank."""
        return super().forward(x)[0]


class RowLinearToSlice(RowLinear):
    """The same; of the sum each rank gets its slice of the sequence, dimension 1."""

    def __init__(self, plain: nn.Linear, groups: Groups):
        super().__init__(plain, groups)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """This rank's slice of the output."""
        return sum_to_slice(F.linear(x, self.weight), self.bias, self.groups)


class VocabularyEmbedding(VocabParallelEmbedding):
    """A word table of which each rank holds some rows; rows are padded to a multiple of the ranks."""

    def __init__(self, plain: nn.Embedding, groups: Groups):
        size = groups.grid.tensor_parallel_size
        padded = -(-plain.num_embeddings // size) * size
        super().__init__(padded, plain.embedding_dim, **layer_options(groups))
        keep_slice(self.weight, plain.weight, 0, groups)


class CopyToRanks(nn.Module):
    """The identity; in the backward pass the sum of the ranks' gradients. Where all ranks begin to compute apart."""

    def __init__(self, groups: Groups):
        super().__init__()
        self.group = groups.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        """`x`."""
        return copy_to_tensor_model_parallel_region(x, group=self.group)


def divided_vocabulary(vocab_size: int, groups: Groups) -> Vocabulary:
    """The columns of this rank, whose table has `VocabularyEmbedding`'s rows, and how ranks join what they find."""
    size, rank = groups.grid.tensor_parallel_size, groups.grid.tensor_parallel_rank
    rows = -(-vocab_size // size)
    columns = range(min(rank * rows, vocab_size), min((rank + 1) * rows, vocab_size))
    return Vocabulary(vocab_size, columns, partial(join_verdicts, groups=groups))


def join_verdicts(own: Verdict, groups: Groups) -> Verdict:
    """Of this rank's columns and of all others' what all say, equal on all ranks. Collective, in one exchange."""
    counts = [1, 1, *map(len, own[2:])]
    # float64 holds ids, too.
    sent_FL = torch.cat([own.log_sum_L[None], own.label_logit_L[None], own.value_WL, own.token_WL.double()])
    received = sent_FL.new_empty(groups.grid.tensor_parallel_size * len(sent_FL), sent_FL.shape[1])
    torch.distributed.all_gather_into_tensor(received, sent_FL, group=groups.tensor_group)
    parts = []
    for of_rank_FL in received.chunk(groups.grid.tensor_parallel_size):
        log_sum_1L, label_logit_1L, value_WL, token_WL = of_rank_FL.split(counts)
        parts.append(Verdict(log_sum_1L[0], label_logit_1L[0], value_WL, token_WL.long()))
    found = merged(parts)
    return Verdict(*(there.to(here.dtype) for there, here in zip(found, own, strict=True)))


def join_vocabulary(logits_BV: Tensor, vocab_size: int, groups: Groups) -> Tensor:
    """Logits of the whole vocabulary, on every rank, from those that each rank has. Collective, without gradients."""
    parts = [torch.empty_like(logits_BV) for _ in range(groups.grid.tensor_parallel_size)]
    torch.distributed.all_gather(parts, logits_BV.contiguous(), group=groups.tensor_group)
    return torch.cat(parts, dim=-1)[..., :vocab_size]  # behind it there is padding
