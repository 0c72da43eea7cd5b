"""megatron-core's divided layers, with the call and the names of the plain layers whose place they take.

Each is built from the plain layer: it keeps this rank's slice of the weights, marked as a slice, since DeepSpeed
otherwise counts it wrongly in the gradient norm.

Shape suffixes of this file:
    L positions   V vocabulary (this rank's part)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from deberta_xl.kernels.sampling import Drawn, draw_tokens
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


class VocabularyLoss:
    """Cross-entropy and best guesses from logits of which each rank holds some columns (`masked_lm_loss` divided).

    The logits are the largest tensor of a step, so they are not copied: afterwards they are spent.
    """

    def __init__(self, vocab_size: int, groups: Groups):
        self.vocab_size = vocab_size
        self.groups = groups

    def __call__(self, logits_LV: Tensor, label_L: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss, and the guess at each position, equal on all ranks."""
        first = logits_LV.shape[-1] * self.groups.grid.tensor_parallel_rank
        # Unseen by autograd: the probability of -inf is 0, and so is the gradient of the padding.
        logits_LV.detach()[:, max(0, self.vocab_size - first) :] = float("-inf")
        guess_L = self.guess(logits_LV.detach(), first)  # before megatron-core overwrites the logits
        return vocab_parallel_cross_entropy(logits_LV, label_L).sum(), guess_L

    def guess(self, logits_LV: Tensor, first: int) -> Tensor:
        """The id of the largest logit over all ranks; the lowest id of equal ones, as argmax gives."""
        value_L, index_L = logits_LV.max(-1)
        return largest_of_ranks(value_L, index_L + first, self.groups)[1]


def join_vocabulary(logits_BV: Tensor, vocab_size: int, groups: Groups) -> Tensor:
    """Logits of the whole vocabulary, on every rank, from those that each rank has. Collective, without gradients."""
    parts = [torch.empty_like(logits_BV) for _ in range(groups.grid.tensor_parallel_size)]
    torch.distributed.all_gather(parts, logits_BV.contiguous(), group=groups.tensor_group)
    return torch.cat(parts, dim=-1)[..., :vocab_size]  # behind it there is padding


class VocabularyDraw:
    """Tokens drawn from logits of which each rank holds some columns (`draw_tokens` divided), equal on all ranks."""

    def __init__(self, vocab_size: int, groups: Groups):
        self.vocab_size = vocab_size
        self.groups = groups

    def __call__(self, logits_LV: Tensor, position_L: Tensor, seed_L: Tensor, temperature: float) -> Drawn:
        """What one rank would draw from all columns."""
        first = logits_LV.shape[-1] * self.groups.grid.tensor_parallel_rank
        width = max(1, min(logits_LV.shape[-1], self.vocab_size - first))  # without the padding
        columns = {"first_column": first, "num_columns": self.vocab_size}
        drawn = draw_tokens(logits_LV[:, :width], position_L, seed_L, temperature, **columns)
        is_padding = first >= self.vocab_size
        value_L = torch.full_like(drawn.value_L, float("-inf")) if is_padding else drawn.value_L
        return Drawn(*largest_of_ranks(value_L, drawn.token_L, self.groups))


def largest_of_ranks(value_L: Tensor, id_L: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """At each position the largest of the tensor-parallel ranks' values and its id; of equal ones the first rank's."""
    size = groups.grid.tensor_parallel_size
    values, ids = ([torch.empty_like(own) for _ in range(size)] for own in (value_L, id_L))
    torch.distributed.all_gather(values, value_L, group=groups.tensor_group)
    torch.distributed.all_gather(ids, id_L, group=groups.tensor_group)
    value_1L, best_1L = torch.stack(values).max(0, keepdim=True)
    return value_1L.squeeze(0), torch.stack(ids).gather(0, best_1L).squeeze(0)
