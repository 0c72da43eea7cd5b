"""Saving and loading the whole state of a training run: layout-free, atomic, verified (safetensors and JSON only).

    checkpoints/step-00001000/
      rank-00000.safetensors …   each rank's own pieces of master weights and Adam moments (rank_file.py)
      state.json                 what the caller gave, and under "engine" what the optimizer needs besides tensors
      …                          the caller's extra files (config.json, tokenizer/)
      index.safetensors          where every element lies, of all rank files (stored_index.py)
      manifest.json              every file with size and hash, written last (manifest.py)

Saving moves no tensor between ranks; loading reads the byte ranges a rank needs. Any ZeRO stage (1, 2, 3), precision,
number of ranks, tensor-parallel size and number of stages can load what any other has saved, bit for bit in the state.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from deberta_xl.base import signs
from deberta_xl.base.durable import remove, sync, write_files
from deberta_xl.base.errors import Diverged
from deberta_xl.base.progress import progress
from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.folders import make_partial_folder
from deberta_xl.checkpoint.fragments import (
    Fragment,
    adam_steps,
    canonical_parameters,
    create_adam_state,
    engine_fragments,
    fragment_values,
    logical_shape,
    loss_scaler_state,
    refresh_model_weights,
    set_adam_steps,
    set_loss_scaler_state,
)
from deberta_xl.checkpoint.manifest import (
    STATE_NAME,
    CheckpointError,
    FileFacts,
    content_facts,
    step_folder_name,
    write_manifest,
)
from deberta_xl.checkpoint.rank_file import (
    KINDS,
    WHOLE,
    check_shapes,
    file_pieces,
    fill,
    rank_file_name,
    read_stored,
    write_rank_file,
)
from deberta_xl.checkpoint.stored_index import INDEX_NAME, FilePieces, Layout, StoredIndex, merged, to_bytes
from deberta_xl.checkpoint.together import gathered, on_rank_zero, rank_and_size, sent_to_rank_zero, together
from deberta_xl.parallel.pipeline import PipelinedModel, is_copy
from deberta_xl.parallel.shard import shard_of


def save_checkpoint(
    engine: DeepSpeedEngine,
    checkpoints: Path,
    state: Mapping[str, Any],
    *,
    extra_files: Mapping[str, bytes],
    tensor_parallel: tuple[int, int] = WHOLE,
    before_publishing: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint of step `state["step"]`; its folder. Collective, between two optimizer steps.

    `state` is the caller's own, JSON values only; `load_checkpoint` gives it back. `extra_files` maps paths inside the
    checkpoint to contents (rank 0's are written). `tensor_parallel` is (size, rank) of this
    process; a parameter that is a shard carries a `Shard`, all others are alike on the tensor-parallel ranks, of which
    the first writes them; of a parameter that two stages of a pipeline share the first stage writes its own. Everything
    is written to a hidden folder beside, forced to the disk and renamed, so there is never half a checkpoint under its
    name; what `before_publishing` raises on rank 0, when all is written, keeps it from that.

    Raises, on every rank, Diverged when a weight or a moment is not finite, and CheckpointError when any rank fails
    (RuntimeError when the cause is a bug); earlier checkpoints are then as they were.
    """
    assert engine.micro_steps % engine.gradient_accumulation_steps() == 0, "gradients are being accumulated"
    broken = [name for name in gathered(lambda: _not_finite(engine, tensor_parallel)) if name is not None]
    if broken:
        raise Diverged(f"step {state['step']} was not saved: {broken[0]} holds values that are not finite numbers")
    folder: Path | None = None
    try:
        folder = on_rank_zero(lambda: make_partial_folder(checkpoints, state["step"]))
        own: list[FilePieces] = []
        written = gathered(lambda: _write_files(engine, folder, state, extra_files, tensor_parallel, own.append))
        files = {name: facts for of_rank in written for name, facts in of_rank.items()}
        pieces = sent_to_rank_zero(own[0])
        layout = Layout(*zip(*_logical_shapes(engine).items(), strict=True))
        target = checkpoints / step_folder_name(state["step"])

        def publish() -> Path:
            index = {
                INDEX_NAME: to_bytes(merged([folder / rank_file_name(n) for n in range(len(pieces))], layout, pieces))
            }
            write_files(folder, index)
            facts = {name: content_facts(content) for name, content in index.items()}
            return _publish(folder, target, files | facts, before_publishing)

        return on_rank_zero(publish)
    except (CheckpointError, RuntimeError) as failure:
        if folder is not None and rank_and_size()[0] == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise type(failure)(f"step {state['step']} was not saved: {failure}") from failure


def load_checkpoint(
    engine: DeepSpeedEngine, folder: Path, *, tensor_parallel: tuple[int, int] = WHOLE
) -> dict[str, Any]:
    """Put a checkpoint into the engine; the caller's `state` of `save_checkpoint`. Collective.

    The engine may be fresh or have run, with any ZeRO stage, precision, number of ranks and tensor-parallel size
    (`tensor_parallel` is as in `save_checkpoint`). Weights, Adam's moments and step, loss scaler and counters are
    restored; learning rates and all other settings are the configuration's, and the padding of shards stays as it is.
    The files are not hashed again: `folder` comes from `newest_whole_checkpoint`, or went through `verify_checkpoint`.

    Raises CheckpointError on every rank, before anything is changed, when parameters are missing or have other shapes.
    """
    state, stored = on_rank_zero(lambda: (read_json(folder / STATE_NAME), read_stored(folder)))
    together(lambda: check_shapes(folder, stored, _logical_shapes(engine)))
    together(lambda: _fill_engine(engine, stored, state["engine"], tensor_parallel))
    refresh_model_weights(engine)
    return _of_caller(state)


def read_state(folder: Path) -> dict[str, Any]:
    """The caller's `state` in a checkpoint, without loading anything."""
    return _of_caller(read_json(folder / STATE_NAME))


def _of_caller(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `state.json` holds, what the caller gave."""
    return {key: value for key, value in state.items() if key != "engine"}


def _logical_shapes(engine: DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the whole model, also where this rank holds only some layers."""
    if isinstance(engine.module, PipelinedModel):
        return engine.module.logical_shapes
    return {name: logical_shape(parameter) for name, parameter in canonical_parameters(engine)}


def _is_written_here(parameter: nn.Parameter, tensor_parallel_rank: int) -> bool:
    """Whether this rank, of those that hold the same elements, writes them."""
    return (shard_of(parameter) is not None or tensor_parallel_rank == 0) and not is_copy(parameter)


def _write_files(
    engine: DeepSpeedEngine,
    folder: Path,
    state: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
    tensor_parallel: tuple[int, int],
    tell: Callable[[FilePieces], None],
) -> dict[str, FileFacts]:
    """Write this rank's files; their facts by name. `tell` is given what its rank file has."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not visible here; the run folder must be on a file system all ranks share")
    rank, _ = rank_and_size()
    fragments = _local_fragments(engine, tensor_parallel)
    written = {name for name, p in canonical_parameters(engine) if _is_written_here(p, tensor_parallel[1])}
    fragments = [fragment for fragment in fragments if fragment.piece.name in written]
    create_adam_state(engine)
    pieces = [fragment.piece for fragment in fragments]
    path, size = folder / rank_file_name(rank), len(KINDS) * 4 * sum(piece.numel for piece in pieces)
    try:
        with progress(f"saving step {state['step']}", size) as advance:
            flat = _snapshot(engine, fragments)
            found = {path.name: write_rank_file(path, pieces, flat, tensor_parallel, advance)}
        numbers = {name: number for number, name in enumerate(_logical_shapes(engine))}
        tell(file_pieces(pieces, {piece.name: piece.cut for piece in pieces}, numbers))
        if rank == 0:
            facts = _engine_facts(engine, tensor_parallel_size=tensor_parallel[0])
            shared = {**extra_files, STATE_NAME: json.dumps({**state, "engine": facts}, indent=1).encode()}
            write_files(folder, shared)
            found |= {name: content_facts(content) for name, content in shared.items()}
        return found
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free
        raise CheckpointError(f"{error} ({free / 2**20:.0f} MiB are free in {folder.parent})") from error


def _local_fragments(engine: DeepSpeedEngine, tensor_parallel: tuple[int, int]) -> list[Fragment]:
    """What this rank holds, checked against its place (size, rank) in the tensor-parallel group."""
    fragments = engine_fragments(engine, canonical_parameters(engine))
    for piece, _, _ in fragments:
        place = piece.shard and (piece.shard.size, piece.shard.rank)
        assert place in (None, tensor_parallel), f"{piece.name} is {piece.shard} on {tensor_parallel}"
    return fragments


def _not_finite(engine: DeepSpeedEngine, tensor_parallel: tuple[int, int]) -> str | None:
    """The first parameter, in words, of which this rank holds a weight or a moment that is not finite."""
    fragments = _local_fragments(engine, tensor_parallel)
    create_adam_state(engine)
    for kind in KINDS:
        for piece, values in fragment_values(engine, fragments, kind):
            # Both are not numbers where any value is not; nothing of the parameter's size is made for it.
            if piece.numel and not all(bound.isfinite() for bound in values.aminmax()):
                return piece.name if kind == "master" else f"Adam's {kind} of {piece.name}"
    return None


def _snapshot(engine: DeepSpeedEngine, fragments: Sequence[Fragment]) -> dict[str, Tensor]:
    """A copy, on the CPU, of this rank's elements: for each kind one flat tensor, in the order of the fragments."""
    total = sum(fragment.piece.numel for fragment in fragments)
    copies = {kind: torch.empty(total, dtype=torch.float32) for kind in KINDS}
    for kind, copy in copies.items():
        position = 0
        for piece, values in fragment_values(engine, fragments, kind):
            copy[position : position + piece.numel].copy_(values)
            signs.moved()
            position += piece.numel
    return copies


def _engine_facts(engine: DeepSpeedEngine, *, tensor_parallel_size: int) -> dict[str, Any]:
    """What the engine needs besides tensors, and the layout it had (which is information only)."""
    return {
        "adam_steps": adam_steps(engine),
        "loss_scaler": loss_scaler_state(engine),
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "layout": {
            "world_size": rank_and_size()[1],
            "tensor_parallel_size": tensor_parallel_size,
            "zero_stage": engine.zero_optimization_stage(),
            "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        },
    }


def _publish(folder: Path, target: Path, files: Mapping[str, FileFacts], before_publishing: Callable[[], None]) -> Path:
    """Write the manifest and give the folder its name; a folder that had the name (a damaged one) is replaced."""
    write_manifest(folder, files)
    before_publishing()
    replaced = target.with_name(f".{target.name}.replaced.partial")
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    sync(target.parent)
    with contextlib.suppress(OSError):
        remove(replaced)
    return target


def _fill_engine(
    engine: DeepSpeedEngine, stored: StoredIndex, facts: Mapping[str, Any], tensor_parallel: tuple[int, int]
) -> None:
    """Copy this rank's elements from the files into the engine, and set its counters."""
    fragments = _local_fragments(engine, tensor_parallel)
    create_adam_state(engine)
    total = len(KINDS) * sum(fragment.piece.numel for fragment in fragments)
    with progress("loading the checkpoint", total) as advance:
        for kind in KINDS:
            fill(fragment_values(engine, fragments, kind), stored, kind, advance)
    set_adam_steps(engine, facts["adam_steps"] if "adam_steps" in facts else {"": facts["adam_step"]})
    set_loss_scaler_state(engine, facts["loss_scaler"])
    engine.global_steps = facts["global_steps"]
    engine.global_samples = facts["global_samples"]
    engine.skipped_steps = facts["skipped_steps"]
    # Not the saved number: with another accumulation it may not lie between two optimizer steps.
    engine.micro_steps = facts["global_steps"] * engine.gradient_accumulation_steps()
