"""When something goes wrong on one rank, all ranks hear of it, and earlier checkpoints stay as they were."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from pathlib import Path
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as distributed
from ranks import RankError, run_ranks
from tiny_engine import HIDDEN, VOCABULARY, Layout, TinyModel, build_engine, engine_config, train
from torch import nn

from deberta_xl.base import durable
from deberta_xl.base.errors import Diverged, UserError
from deberta_xl.base.log import configure_logging
from deberta_xl.checkpoint import store
from deberta_xl.checkpoint.folders import newest_whole_checkpoint, prune_checkpoints
from deberta_xl.checkpoint.fragments import canonical_parameters, engine_fragments, fragment_values
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.store import load_checkpoint, save_checkpoint
from deberta_xl.checkpoint.together import gathered
from deberta_xl.weights.native import read_weights

TWO_RANKS = Layout(2, 2)


def flip_bit(path: Path, position: int) -> None:
    """Damage a file by one bit."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def reason(function, *args, **keywords) -> str:
    """The message of the CheckpointError that a call raises."""
    with pytest.raises(CheckpointError) as caught:
        function(*args, **keywords)
    return str(caught.value)


def visible(folder: Path) -> list[str]:
    """Names in a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


def save_with_a_small_file_limit_on_rank_1(checkpoints: Path) -> tuple[str, list[str]]:
    """Save step 1; let the system refuse rank 1's file for step 2; save step 3. Rank's reason, folders after step 2."""
    engine = build_engine(TWO_RANKS)
    save_checkpoint(engine, checkpoints, {"step": 1}, extra_files={})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    told = reason(save_checkpoint, engine, checkpoints, {"step": 2}, extra_files={})
    distributed.barrier()
    left = visible(checkpoints)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train(engine, 1, 1)
    save_checkpoint(engine, checkpoints, {"step": 3}, extra_files={})
    assert newest_whole_checkpoint(checkpoints, collective=True) == checkpoints / "step-00000003"
    for kind, words in (("exp_avg_sq", "Adam's exp_avg_sq of "), ("master", "")):
        pieces = fragment_values(engine, engine_fragments(engine, canonical_parameters(engine)), kind)
        piece, values = pieces[len(pieces) // 2]
        if distributed.get_rank() == 1:
            values[-1] = float("nan")
        name = list(filter(None, gathered(lambda piece=piece: piece.name)))[1]
        reason_of_all = f"step 4 was not saved: {words}{re.escape(name)} holds values that are not finite numbers"
        with pytest.raises(Diverged, match=reason_of_all):
            save_checkpoint(engine, checkpoints, {"step": 4}, extra_files={})
    return told, left


def test_a_rank_that_cannot_write_or_has_weights_that_are_not_finite_fails_the_save_on_all_ranks(tmp_path):
    for told, left in run_ranks(save_with_a_small_file_limit_on_rank_1, 2, tmp_path):
        assert "step 2 was not saved: rank 1:" in told
        assert "File too large" in told
        assert left == ["step-00000001"]
    assert visible(tmp_path) == ["step-00000001", "step-00000003"]


def save_with_a_full_disk_and_without_permission(checkpoints: Path) -> tuple[str, str]:
    """Save step 1; let rank 0's disk be full for the manifest of step 2, and step 3 be forbidden when it is written."""
    engine = build_engine(TWO_RANKS)
    save_checkpoint(engine, checkpoints, {"step": 1}, extra_files={})
    full = OSError(28, "No space left on device")
    with mock.patch.object(store, "write_manifest", side_effect=full):
        disk = reason(save_checkpoint, engine, checkpoints, {"step": 2}, extra_files={})

    def forbid() -> None:
        raise UserError("the folder is another start's by now")

    return disk, reason(save_checkpoint, engine, checkpoints, {"step": 3}, extra_files={}, before_publishing=forbid)


def test_a_full_disk_at_the_manifest_or_a_folder_lost_meanwhile_fails_the_save_on_all_ranks(tmp_path):
    for disk, lost in run_ranks(save_with_a_full_disk_and_without_permission, 2, tmp_path):
        assert "step 2 was not saved: rank 0:" in disk
        assert "No space left on device" in disk
        assert lost == "step 3 was not saved: rank 0: the folder is another start's by now"
    assert visible(tmp_path) == ["step-00000001"]


def save_with_a_failing_fsync(checkpoints: Path) -> str:
    """Let rank 1's disk report, only when forced, that it is full."""
    engine = build_engine(TWO_RANKS)
    full = OSError(28, "No space left on device")
    with mock.patch.object(durable.os, "fsync", side_effect=full if distributed.get_rank() == 1 else None):
        return reason(save_checkpoint, engine, checkpoints, {"step": 1}, extra_files={})


def test_a_write_that_fails_only_when_forced_to_disk_fails_the_save(tmp_path):
    for told in run_ranks(save_with_a_failing_fsync, 2, tmp_path):
        assert "rank 1: " in told
        assert "No space left on device" in told
        assert "MiB are free" in told
    assert visible(tmp_path) == []


def save_and_die_before_publishing(checkpoints: Path) -> None:
    """Save step 1; be killed in the middle of step 2."""
    engine = build_engine(TWO_RANKS)
    save_checkpoint(engine, checkpoints, {"step": 1}, extra_files={})
    with mock.patch.object(store, "write_manifest", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
        save_checkpoint(engine, checkpoints, {"step": 2}, extra_files={})


def resume_and_save(checkpoints: Path, step: int) -> Path:
    """Load the newest whole checkpoint, save `step`; what was loaded."""
    configure_logging()
    engine = build_engine(TWO_RANKS)
    newest = newest_whole_checkpoint(checkpoints, collective=True)
    load_checkpoint(engine, newest)
    save_checkpoint(engine, checkpoints, {"step": step}, extra_files={})
    return newest


def test_a_job_killed_while_saving_resumes_from_the_checkpoint_before_and_cleans_up(tmp_path):
    with mock.patch("ranks.GRACE_SECONDS", 0.5), pytest.raises(RankError):
        run_ranks(save_and_die_before_publishing, 2, tmp_path)
    left, kept = visible(tmp_path)
    assert re.fullmatch(r"\.step-00000002\.[0-9a-f]+\.partial", left)  # no two starts share the name
    assert kept == "step-00000001"
    assert run_ranks(resume_and_save, 2, tmp_path, 2) == [tmp_path / "step-00000001"] * 2
    assert visible(tmp_path) == ["step-00000001", "step-00000002"]


def save_steps(checkpoints: Path, steps: list[int]) -> None:
    """Train and save each of `steps`."""
    engine = build_engine(TWO_RANKS)
    for step in steps:
        train(engine, step, step)
        save_checkpoint(engine, checkpoints, {"step": step}, extra_files={"notes/a.txt": b"first"})


def test_the_newest_whole_checkpoint_is_used_and_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path, capfd):
    run_ranks(save_steps, 2, tmp_path, [1, 2])
    flip_bit(tmp_path / "step-00000002" / "rank-00001.safetensors", 5000)
    assert run_ranks(resume_and_save, 2, tmp_path, 2) == [tmp_path / "step-00000001"] * 2
    warnings = capfd.readouterr().err
    assert "step-00000002/rank-00001.safetensors is damaged: its sha256 is not the one in the manifest" in warnings
    assert f"using the newest whole checkpoint instead: {tmp_path / 'step-00000001'}" in warnings
    assert run_ranks(resume_and_save, 2, tmp_path, 3) == [tmp_path / "step-00000002"] * 2


def find_newest(checkpoints: Path) -> str:
    """Why there is no checkpoint to go on from."""
    return reason(newest_whole_checkpoint, checkpoints, collective=True)


def test_with_no_whole_checkpoint_left_every_rank_gets_an_error_that_names_each_damage(tmp_path):
    run_ranks(save_steps, 2, tmp_path, [1, 2])
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    (tmp_path / "step-00000002" / "rank-00000.safetensors").unlink()
    first, second = run_ranks(find_newest, 2, tmp_path)
    assert first == second
    assert "none of the 2 checkpoints" in first
    assert "step-00000001/manifest.json is missing" in first
    assert "step-00000002/rank-00000.safetensors is missing" in first


def load_into_other_models(checkpoints: Path) -> list[str]:
    """Reasons why a checkpoint does not fit a larger vocabulary, and a model with one layer more."""
    engine = build_engine(TWO_RANKS)
    folder = save_checkpoint(engine, checkpoints, {"step": 1}, extra_files={})
    larger = TinyModel()
    larger.word_embeddings = nn.Embedding(VOCABULARY + 2, HIDDEN)
    larger.head = nn.Linear(HIDDEN, VOCABULARY + 2)
    larger.head.weight = larger.word_embeddings.weight
    deeper = TinyModel()
    deeper.extra = nn.Linear(3, 3, bias=False)
    return [reason(load_checkpoint, build_engine(TWO_RANKS, model=model), folder) for model in (larger, deeper)]


def test_a_checkpoint_of_another_model_is_refused_with_the_tensors_and_both_shapes(tmp_path):
    for larger, deeper in run_ranks(load_into_other_models, 2, tmp_path):
        assert "word_embeddings.weight is (37, 19) in the checkpoint, (39, 19) in the model" in larger
        assert "head.bias is (37,) in the checkpoint, (39,) in the model" in larger
        assert "norm.weight" not in larger
        assert "extra.weight is missing in the checkpoint, (3, 3) in the model" in deeper


def save_from_unsupported_engines(checkpoints: Path) -> list[str]:
    """Reasons why the engines' state is not saved."""
    told = []
    for changes in ({"stage": 1, "round_robin_gradients": True}, {"stage": 0}):
        model, config = TinyModel(), engine_config(Layout(1, 1))
        config["zero_optimization"] = changes
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        told.append(reason(save_checkpoint, engine, checkpoints, {"step": 1}, extra_files={}))
    model = TinyModel()
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if name != "norm.bias"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(Layout(1, 1)))
    return [*told, reason(save_checkpoint, engine, checkpoints, {"step": 1}, extra_files={})]


def test_engines_whose_state_would_be_misread_are_refused(tmp_path):
    round_robin, stage_0, left_out = run_ranks(save_from_unsupported_engines, 1, tmp_path)[0]
    assert '"round_robin_gradients": true is not supported' in round_robin
    assert "checkpoints need ZeRO" in stage_0
    assert "in no optimizer group: norm.bias" in left_out
    assert visible(tmp_path) == []


def save_before_the_first_step(checkpoints: Path) -> None:
    """Save a fresh engine with extra files at several depths, and train it and its copy."""
    extra_files = {"config.json": b"{}", "tokenizer/spm.model": b"\0model", "tokenizer/inner/more.txt": b"more"}
    state = {"step": 0, "consumed_samples": 12, "fingerprints": {"data": "abc"}}
    for stage in (1, 3):
        engine = build_engine(Layout(2, stage))
        folder = save_checkpoint(engine, checkpoints, state, extra_files=extra_files)
        copy = build_engine(Layout(2, stage), seed=9)
        assert load_checkpoint(copy, folder) == state
        assert train(copy, 1, 2) == train(engine, 1, 2)


def test_a_checkpoint_of_step_0_and_its_extra_files_are_complete(tmp_path):
    run_ranks(save_before_the_first_step, 2, tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step-00000000"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(files) == [
        "config.json",
        "index.safetensors",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "state.json",
        "tokenizer/inner/more.txt",
        "tokenizer/spm.model",
    ]
    assert (folder / "tokenizer" / "spm.model").read_bytes() == b"\0model"
    assert sorted(read_weights(folder)) == sorted(name for name, _ in TinyModel().named_parameters())


def save_a_file_as_a_folder(checkpoints: Path) -> str:
    """Give names that cannot both be written, which only rank 0 notices."""
    engine = build_engine(TWO_RANKS)
    extra_files = {"notes": b"", "notes/a.txt": b""}
    return reason(save_checkpoint, engine, checkpoints, {"step": 1}, extra_files=extra_files)


def test_an_error_that_only_rank_0_can_have_reaches_all_ranks(tmp_path):
    for told in run_ranks(save_a_file_as_a_folder, 2, tmp_path):
        assert "notes" in told


def save_and_prune(checkpoints: Path) -> None:
    """Keep two checkpoints, as a run does."""
    engine = build_engine(TWO_RANKS)
    for step in (1, 2, 3, 4):
        newest = save_checkpoint(engine, checkpoints, {"step": step}, extra_files={})
        prune_checkpoints(newest, keep=2)


def test_pruning_after_each_save_keeps_the_newest(tmp_path):
    run_ranks(save_and_prune, 2, tmp_path)
    assert visible(tmp_path) == ["step-00000003", "step-00000004"]
