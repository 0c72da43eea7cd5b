"""A checkpoint made without any engine: two parameters, cut at chosen places into rank files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from deberta_xl.checkpoint.durable import write_files
from deberta_xl.checkpoint.manifest import file_facts, step_folder_name, write_manifest
from deberta_xl.checkpoint.rank_file import KINDS, Piece, rank_file_name, write_rank_file

State = dict[str, dict[str, Tensor]]
"""Kind → name → tensor."""


def some_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random values for every kind of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}


def write_state(folder: Path, state: State, cuts: Sequence[int]) -> list[Path]:
    """Write rank files as if all parameters, end to end, were cut at `cuts` (ZeRO stages 1 and 2 do that)."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.numel() for tensor in state["master"].values())
    borders = [0, *sorted(cuts), total]
    paths = []
    for rank, (start, end) in enumerate(pairwise(borders)):
        pieces, position = [], 0
        for name, tensor in state["master"].items():
            first, last = max(start, position), min(end, position + tensor.numel())
            if first < last:
                pieces.append(Piece(name, tuple(tensor.shape), first - position, last - first))
            position += tensor.numel()
        whole = {kind: torch.cat([tensor.flatten() for tensor in state[kind].values()]) for kind in KINDS}
        paths.append(folder / rank_file_name(rank))
        write_rank_file(paths[-1], pieces, {kind: flat[start:end].clone() for kind, flat in whole.items()})
    return paths


def write_checkpoint(checkpoints: Path, step: int) -> tuple[Path, State]:
    """A whole checkpoint of two ranks with all its files."""
    folder = checkpoints / step_folder_name(step)
    state = some_state({"embedding.weight": (5, 3), "norm.bias": (4,)}, seed=step)
    names = [path.name for path in write_state(folder, state, [7])]
    extra = {"state.json": b'{"step": 1}', "config.json": b"{}", "tokenizer/spm.model": b"pieces"}
    names += write_files(folder, extra)
    write_manifest(folder, {name: file_facts(folder / name) for name in names})
    return folder, state
