"""A checkpoint made without any engine: two parameters, cut at chosen places into rank files."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from deberta_xl.base.durable import write_files
from deberta_xl.checkpoint.manifest import file_facts, step_folder_name, write_manifest
from deberta_xl.checkpoint.rank_file import KINDS, WHOLE, Piece, rank_file_name, write_rank_file
from deberta_xl.parallel.shard import Shard

State = dict[str, dict[str, Tensor]]
"""Kind → name → tensor."""


def some_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random values for every kind of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for kind in KINDS}


def write_state(folder: Path, state: State, cuts: Sequence[int]) -> list[Path]:
    """Write rank files as if all parameters, end to end, were cut at `cuts` (ZeRO stages 1 and 2 do that)."""
    return write_ranks(folder, state, cuts, {}, WHOLE, first_rank=0)


def write_sharded_state(
    folder: Path, state: State, cuts: Sequence[int], dims: dict[str, int], tensor_parallel_size: int
) -> list[Path]:
    """Write rank files as every tensor-parallel rank would, of all its shards; `dims` says what is cut, and where."""
    paths = []
    for rank in range(tensor_parallel_size):
        shards = {
            name: Shard(dim, rank, tensor_parallel_size, tuple(state["master"][name].shape))
            for name, dim in dims.items()
            if tensor_parallel_size > 1
        }
        paths += write_ranks(folder, state, cuts, shards, (tensor_parallel_size, rank), first_rank=len(paths))
    return paths


def write_ranks(
    folder: Path,
    state: State,
    cuts: Sequence[int],
    shards: dict[str, Shard],
    tensor_parallel: tuple[int, int],
    first_rank: int,
) -> list[Path]:
    """Write the rank files of one tensor-parallel rank, whose elements are cut at `cuts`, padding left out."""
    folder.mkdir(parents=True, exist_ok=True)
    held = [name for name in state["master"] if name in shards or tensor_parallel[1] == 0]
    flats = {kind: {name: flat_part(state[kind][name], shards.get(name)) for name in held} for kind in KINDS}
    total = sum(flat.numel() for flat in flats["master"].values())
    borders = [0, *(min(cut, total) for cut in sorted(cuts)), total]
    paths = []
    for rank, (start, end) in enumerate(pairwise(borders), start=first_rank):
        pieces, position = [], 0
        for name, flat in flats["master"].items():
            first, last = max(start, position), min(end, position + flat.numel())
            if first < last:
                shape = shards[name].local_shape if name in shards else tuple(state["master"][name].shape)
                pieces.append(Piece(name, shape, first - position, last - first, shards.get(name)))
            position += flat.numel()
        values = {kind: torch.cat([torch.zeros(0), *flats[kind].values()])[start:end].clone() for kind in KINDS}
        paths.append(folder / rank_file_name(rank))
        write_rank_file(paths[-1], pieces, values, tensor_parallel)
    return paths


def flat_part(full: Tensor, shard: Shard | None) -> Tensor:
    """What a rank holds of a tensor, without padding."""
    return full.flatten() if shard is None else shard.cut(full).flatten()[: shard.numel]


def write_checkpoint(checkpoints: Path, step: int) -> tuple[Path, State]:
    """A whole checkpoint of two ranks with all its files."""
    folder = checkpoints / step_folder_name(step)
    state = some_state({"embedding.weight": (5, 3), "norm.bias": (4,)}, seed=step)
    names = [path.name for path in write_state(folder, state, [7])]
    extra = {"state.json": b'{"step": 1}', "config.json": b"{}", "tokenizer/spm.model": b"pieces"}
    names += write_files(folder, extra)
    write_manifest(folder, {name: file_facts(folder / name) for name in names})
    return folder, state


@contextlib.contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """The system refuses to write more, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
