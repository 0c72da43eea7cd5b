"""What a call of the fused kernels computes, apart from its tensors: sizes, forms of the kernels, and their programs.

Shape suffixes of this file:
    B batch   S queries   N heads on this rank   H head size
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.kernels.contract import RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.kernels.fused.blocks import Form, Sizes
from deberta_xl.kernels.fused.draws import Draw, draw_of
from deberta_xl.kernels.fused.offsets import Offsets, read_offsets
from deberta_xl.kernels.fused.work_items import WorkItems, work_items
from deberta_xl.kernels.relative_index import Buckets

BANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.float16}
"""As what the products with the relative rows pass shared memory, by the type of queries and keys: float16 is finer
than bfloat16, and they fit its range."""
SMALLEST_WIDTH = 16
"""Of a product's inner dimension, in Triton."""


class Launch(NamedTuple):
    """How Triton compiles a kernel."""

    num_warps: int
    num_stages: int = 1
    """Tiles in flight: more than one has the next tile loaded meanwhile, into shared memory of its own."""


class Tuning(NamedTuple):
    """How tiles are computed."""

    block: int
    """Queries and keys of a tile."""
    launches: dict[str, Launch]


NARROW = Tuning(
    64,
    {
        "far_forward": Launch(4, 2), "forward": Launch(4, 2), "far_query": Launch(4, 2), "far_key": Launch(4),
        "value": Launch(4), "key": Launch(4, 3), "query": Launch(4, 3), "tables": Launch(4),
    },
)  # fmt: skip
"""Heads of up to 128 bytes: of 64 numbers in 16 bits. As measured on an H200."""
WIDE = Tuning(32, dict.fromkeys(NARROW.launches, Launch(4)))


class Plan(NamedTuple):
    """What is computed, and by which programs."""

    items: WorkItems
    offsets: Offsets
    buckets: Buckets
    length: int
    """Positions of a row of the batch."""
    sizes: Sizes
    draw: Draw
    form: Form
    launches: dict[str, Launch]

    def launch(self, kernel: Any, name: str, num_heads: int, *arguments: Any) -> None:
        """A kernel that has a program for each block of a document and each head.

        How many blocks there are the device knows. There are programs for twice as many as the positions would fill;
        of documents so short that there are more, a program has several.
        """
        num_keys = self.sizes.num_keys
        programs = min(2 * triton.cdiv(num_keys, self.form.block), num_keys)
        kernel[(programs, num_heads)](
            *arguments, self.items, self.sizes, self.draw, self.form, **self.launches[name]._asdict()
        )


def make_plan(query_BNSH: Tensor, relative: RelativeRows, where: Where, dropout: DropoutRule) -> Plan:
    """The plan of a call. Raises ConfigError for a type of numbers that the kernels do not read."""
    dtype, head_size = query_BNSH.dtype, query_BNSH.shape[-1]
    if dtype not in BANDS:
        raise ConfigError(f"model.kernel=fused computes in bfloat16, float16 or float32, not in {dtype}")
    tuning = WIDE if head_size * dtype.itemsize > 128 else NARROW
    has_content_to_position, has_position_to_content = (table_NRH is not None for table_NRH in relative)
    length = where.segments_BT.shape[1]
    offsets = read_offsets(length, where.buckets, has_content_to_position or has_position_to_content, tuning.block)
    form = Form(
        tuning.block,
        head_size,
        max(SMALLEST_WIDTH, triton.next_power_of_2(head_size)),
        has_content_to_position,
        has_position_to_content,
        offsets.has_far,
        has_order=where.open_BT is not None,
        has_chosen=where.position_BM is not None,
        has_dropout=dropout.rate > 0,
        band=BANDS[dtype],
        precision="ieee",
    )
    num_queries = len(query_BNSH) * query_BNSH.shape[2]
    sizes = sizes_of(form, offsets, where.segments_BT.numel(), num_queries)
    items = items_of(where, tuning.block)
    return Plan(items, offsets, where.buckets, length, sizes, draw_of(dropout), form, tuning.launches)


def sizes_of(form: Form, offsets: Offsets, num_keys: int, num_queries: int) -> Sizes:
    """As kernels read them."""
    scale = 1 / math.sqrt(form.head_size * (1 + form.has_content_to_position + form.has_position_to_content))
    return Sizes(num_keys, num_queries, 2 * offsets.center + 1, offsets.center, offsets.saturation, offsets.near, scale,
                 scale * math.log2(math.e))  # fmt: skip


def items_of(where: Where, block: int) -> WorkItems:
    """The blocks of its documents, made once for all layers."""
    name = f"{__name__} {block}"
    if name not in where.notes:
        where.notes[name] = work_items(where.segments_BT, where.open_BT, where.position_BM, block)
    return where.notes[name]
