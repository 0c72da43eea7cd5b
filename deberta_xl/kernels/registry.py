"""The kernels: which runs where, why one is refused, and what it costs. Read without torch.

`KERNELS` is the table: `auto` takes the first that does not refuse what is asked (device, numbers, sizes, mask). A new
kernel is a file of this folder with a function `attention` (the contract's `Attend`), and an entry there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.mask import Mask
from deberta_xl.settings.platform import Platform

if TYPE_CHECKING:
    from deberta_xl.kernels.contract import Attend

FLOAT32 = 4
AUTO = "auto"
"""Instead of a name: the first kernel of `KERNELS` that supports what is asked."""
STRIDED_TILE = 64
"""Tokens whose products with the offsets `strided` makes at once."""
STRIDED_COLUMNS = 16
"""Of such products, the number of columns is a multiple of this; rows of whole cache lines are made a third faster."""


class Demand(NamedTuple):
    """What is asked of a kernel. Whatever some kernel cannot do is told here, for it to refuse with its reason."""

    config: DebertaConfig
    """Its sizes, terms and dropout. Rows may have any length; a mask of pairs (`Where.mask_BST`) may come with any."""
    mask: Mask = "bidirectional"
    """What it must compute besides `bidirectional`, which every kernel can: in the contract's `Where` an `open_BT` of
    None; `causal` is one that is False everywhere, `prefix` one that is True in each document's prefix."""
    platform: Platform = Platform()


class AttentionSizes(NamedTuple):
    """One call of a kernel on a rank."""

    rows: float
    """Sequences."""
    queries: float
    """Of each sequence."""
    keys: int
    """Of each sequence."""
    heads: float
    """On this rank."""
    head_size: int
    relative_rows: int
    """Rows of the relative table (2k); 0 without one."""
    has_content_to_position: bool
    has_position_to_content: bool
    element_bytes: int
    """Of queries, keys, values and context."""
    reach: int
    """Farthest distance told apart, plus one."""


class Kernel(NamedTuple):
    """A way to compute disentangled attention."""

    module: str
    """Has the function `attention`; imported when the kernel is chosen."""
    refusal: Callable[[Demand], str | None]
    """Why it cannot do what is asked; None where it can."""
    kept_bytes: Callable[[AttentionSizes], float]
    """What it keeps for the backward pass with dropout on, its inputs included, the context not."""
    working_bytes: Callable[[AttentionSizes], float]
    """What lives besides while it is at work, forward or backward."""


def supports_everything(demand: Demand) -> None:
    """No refusal."""


def reference_kept_bytes(sizes: AttentionSizes) -> float:
    """Scores and what they are made of are float32."""
    e, c2p, p2c = sizes.element_bytes, sizes.has_content_to_position, sizes.has_position_to_content
    queries, keys = sizes.rows * sizes.queries, sizes.rows * sizes.keys
    inner = sizes.heads * sizes.head_size
    query = queries * inner * (1 + c2p) * FLOAT32  # once for each product
    memory = keys * inner * ((1 + p2c) * FLOAT32 + e)
    # Softmax, the probabilities that dropout leaves, its mask; the mask that all heads share, all layers share, too.
    pairs = queries * sizes.keys * sizes.heads * (FLOAT32 + e + 1)
    # Products with the relative rows, before their gather; the rows themselves, for each sequence.
    products = sizes.heads * sizes.relative_rows * FLOAT32 * (c2p * queries + p2c * keys)
    relative = sizes.rows * sizes.relative_rows * inner * (c2p + p2c) * FLOAT32
    return query + memory + pairs + products + relative


def reference_working_bytes(sizes: AttentionSizes) -> float:
    """Four float32 matrices of pair scores live at once in the backward pass, besides what was kept for it."""
    return 4 * FLOAT32 * sizes.rows * sizes.heads * sizes.queries * sizes.keys


def strided_kept_bytes(sizes: AttentionSizes) -> float:
    """Everything is float32; of rows that hold one document each, which is the most."""
    inner, num_tables = sizes.heads * sizes.head_size, sizes.has_content_to_position + sizes.has_position_to_content
    tokens = sizes.rows * (sizes.queries + 2 * sizes.keys) * inner * FLOAT32
    bands = num_tables * (2 * sizes.keys - 1) * inner * FLOAT32
    # The softmax, and dropout's mask.
    return tokens + bands + sizes.rows * sizes.heads * sizes.queries * sizes.keys * (FLOAT32 + 1)


def strided_columns(num_keys: int, num_tokens: int) -> int:
    """How many offsets so many tokens have to all keys, rounded up."""
    return -(-(num_keys + num_tokens - 1) // STRIDED_COLUMNS) * STRIDED_COLUMNS


def strided_working_bytes(sizes: AttentionSizes) -> float:
    """The backward pass has two float32 matrices of one row's pairs, the gradients of all tokens and of both bands; of
    chosen queries also a third, their products with every offset, which are two, and those of a tile of keys."""
    num_tables = sizes.has_content_to_position + sizes.has_position_to_content
    bands = num_tables * (2 * sizes.keys - 1) * sizes.head_size
    pairs = 2 * sizes.queries * sizes.keys
    if sizes.queries < sizes.keys and num_tables:
        highest = min(STRIDED_TILE, sizes.keys)
        pairs += 2 * sizes.queries * sizes.keys + highest * strided_columns(sizes.keys, highest)
    tokens = 2 * sizes.rows * (sizes.queries + sizes.keys) * sizes.head_size
    return FLOAT32 * sizes.heads * (pairs + tokens + bands)


FUSED_HEAD = 128
"""Largest head size of the fused kernels."""
FUSED_TILE = 64
"""Queries and keys of a tile of theirs, at most."""


@cache
def has_triton() -> bool:
    """Builds of torch for GPUs bring it."""
    return importlib.util.find_spec("triton") is not None


def refuses_fused(demand: Demand) -> str | None:
    """Of numbers, head sizes and devices that it does not compute with."""
    if demand.platform.device != "cuda":
        return f"it computes on NVIDIA GPUs, this is {demand.platform.describe()}"
    if demand.platform.element_bytes > FLOAT32:
        return "it has no numbers of 64 bits"
    if demand.config.head_size > FUSED_HEAD:
        return f"head_dim={demand.config.head_size} is more than {FUSED_HEAD}"
    if not has_triton():
        return "Triton is not installed here (a build of torch for CUDA brings it)"
    return None


def fused_offsets(sizes: AttentionSizes) -> int:
    """Offsets that are told apart, in whole tiles: the width of what a query has near it, and of expanded tables."""
    return 2 * min(sizes.keys, sizes.reach) + 2 * FUSED_TILE


def fused_kept_bytes(sizes: AttentionSizes) -> float:
    """Nothing of pairs: queries, keys, values, a row of the projected tables for each offset, and a float32 number for
    each query and head."""
    inner, num_tables = sizes.heads * sizes.head_size, sizes.has_content_to_position + sizes.has_position_to_content
    numbers = sizes.rows * (sizes.queries + 2 * sizes.keys) + num_tables * fused_offsets(sizes)
    return numbers * inner * sizes.element_bytes + sizes.rows * sizes.queries * sizes.heads * FLOAT32


def fused_working_bytes(sizes: AttentionSizes) -> float:
    """The backward pass has the gradients of near tiles' scores, those of queries, keys and values (of far tiles in
    float32, too), and four sums of one table's by offset, float32."""
    inner, offsets = sizes.heads * sizes.head_size, fused_offsets(sizes)
    scores = sizes.rows * sizes.keys * sizes.heads * min(sizes.keys, offsets) * sizes.element_bytes
    tokens = sizes.rows * (sizes.queries + 2 * sizes.keys) * inner
    has_far = sizes.keys > sizes.reach
    return scores + tokens * (sizes.element_bytes + FLOAT32 * has_far) + 4 * offsets * inner * FLOAT32


#: By name; those that `auto` prefers come first. The reference is what the others are compared with.
KERNELS = {
    "fused": Kernel("deberta_xl.kernels.fused.attention", refuses_fused, fused_kept_bytes, fused_working_bytes),
    "strided": Kernel("deberta_xl.kernels.strided", supports_everything, strided_kept_bytes, strided_working_bytes),
    "reference": Kernel(
        "deberta_xl.kernels.reference", supports_everything, reference_kept_bytes, reference_working_bytes
    ),
}


def choose_kernel(name: str, demand: Demand) -> str:
    """The kernel that is meant by `name`, a kernel's or `auto`.

    Raises ConfigError with the names there are, or with the reason why it cannot do what is asked.
    """
    if name != AUTO and name not in KERNELS:
        raise ConfigError(f"model.kernel={name!r} is unknown; choose one of {', '.join([AUTO, *KERNELS])}")
    able = [n for n, kernel in KERNELS.items() if kernel.refusal(demand) is None]
    if name in able:
        return name
    if name == AUTO:
        return able[0]  # there is one: the reference supports everything
    reason = KERNELS[name].refusal(demand)
    raise ConfigError(
        f"model.kernel={name} does not support this model: {reason}; choose one of {', '.join([AUTO, *able])}"
    )


def load_kernel(name: str) -> Attend:
    """The function of a kernel. Imports torch."""
    return importlib.import_module(KERNELS[name].module).attention
