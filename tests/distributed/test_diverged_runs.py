"""Runs that diverge: what is left of their checkpoints, what they say, and how they end, whatever the layout."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from ranks import run_ranks
from small_dataset import SmallDataset
from small_task import finetune_arguments, write_encoder, write_sentences
from test_pretrain_command import arguments

from deberta_xl.base.errors import Diverged
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.commands import finetuning, training_command
from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.commands.training_command import REFUSED, assemble, train_and_report
from deberta_xl.training.loop import Training
from deberta_xl.training.safeguard import PATIENCE

OFTEN = ("checkpoint.interval=2", "evaluation.interval=1000", "train.log_interval=10", "schedule.decay=constant")


class Left(BaseException):
    """A rank would have left with a status."""


class Run(NamedTuple):
    """One start of a run."""

    arguments: list[str]
    is_bad: Callable[[int], bool] = lambda step: False
    """Steps whose gradient the last rank makes not a number."""
    learner: str = ""
    """Whose gradient it is, where there is more than one learner."""


class Ending(NamedTuple):
    """What came of it on one rank."""

    status: int
    log: str


def start(run: Run) -> Ending:
    """The command on this rank, without its end of the process."""
    get_accelerator().is_fp16_supported = lambda: True
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("deberta_xl").addHandler(handler)
    status = 0

    def leave(number: int) -> None:
        raise Left(number)

    true_update = Training.update

    def spoiled(training: Training, *given: object, **named: object) -> object:
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        with contextlib.ExitStack() as stack:
            if is_last and run.is_bad(training.state.step + 1):
                parameters = training.engine.module.named_parameters()
                first = next(parameter for name, parameter in parameters if name.startswith(run.learner))
                stack.callback(first.register_hook(lambda gradient: gradient * float("nan")).remove)
            return true_update(training, *given, **named)

    with (
        mock.patch.object(training_command, "leave", leave),
        mock.patch.object(Training, "update", spoiled),
    ):
        try:
            train_and_report(lambda: assemble(read_inputs(parse_arguments(run.arguments)), StopRequest()))
        except Left as left:
            status = left.args[0]
    logging.getLogger("deberta_xl").removeHandler(handler)
    return Ending(status, log.getvalue())


def start_all(runs: list[Run]) -> list[Ending]:
    """Several starts, one after the other."""
    return [start(run) for run in runs]


def diverge_and_follow_the_advice(good: Run, wild: Run, again: Run) -> list[tuple[Ending, list[int]]]:
    """Three starts of a run and the checkpoints after each; before the last one what the second advised is deleted."""
    folder = Path(good.arguments[-1].removeprefix("run.folder="))
    ended = []
    for run in (good, wild, again):
        if run is again and torch.distributed.get_rank() == 0:
            shutil.rmtree(re.search(r"Delete (\S+), whose weights never gave", ended[-1][0].log)[1])
        ended.append((start(run), checkpoints(folder)))
    return ended


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that are left."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def skipped(folder: Path) -> list[int]:
    """The metric of each logged step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["skipped_steps"] for line in lines if "skipped_steps" in line]


def test_a_run_that_diverges_keeps_its_good_checkpoint_and_goes_on_by_the_advice_it_gives(
    small_dataset: SmallDataset, tmp_path: Path
):
    often = ("checkpoint.interval=1", "checkpoint.keep=1")

    def run(*overrides: str) -> Run:
        words = arguments(small_dataset, tmp_path, *OFTEN, *often, *overrides, engine="zero1_bf16")
        return Run([*words, f"run.folder={tmp_path}"])

    runs = run("train.steps=4"), run("optimizer.learning_rate=1e20", "train.steps=1000"), run("train.steps=5")
    (first, after_first), (second, after_second), (third, after_third) = run_ranks(
        diverge_and_follow_the_advice, 2, *runs, backend=None
    )[0]
    assert (first.status, after_first) == (0, [4])
    # Step 5 made the weights that gave no finite gradient any more.
    assert (second.status, after_second) == (REFUSED, [4, 5])
    assert f"not finite in {PATIENCE} of the last 35 steps, from step 6 on: the run has diverged" in second.log
    assert f"The last good checkpoint is {tmp_path}/checkpoints/step-00000004. Delete " in second.log
    assert (third.status, after_third) == (0, [5])
    assert "the checkpoint saved last, is missing; using" in third.log
    assert (tmp_path / "STATE").read_text() == "done\n"


@pytest.mark.full
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("zero2_bf16", []),
        ("zero3_bf16", []),
        ("cpu_debug", ["parallel.tensor_parallel_size=2"]),
        ("zero1_bf16", ["parallel.pipeline_parallel_size=2"]),
        ("cpu_debug", ["parallel.pipeline_parallel_size=2"]),
    ],
)
def test_every_engine_counts_holds_back_and_ends_in_the_same_way(small_dataset, tmp_path, engine, options):
    def run(name: str, num_steps: int, is_bad: Callable[[int], bool]) -> Run:
        words = (*OFTEN, f"train.steps={num_steps}", *options)
        return Run(arguments(small_dataset, tmp_path / name, *words, engine=engine), is_bad)

    cases = [
        run("once", 20, lambda step: step == 15),
        run("end", 20, lambda step: step > 12),
        run("ever", 1000, lambda step: step > 4),
        run("second", 1000, lambda step: step % 2 == 0),
    ]
    for endings in run_ranks(start_all, 2, cases, backend=None, timeout=300):
        assert [ending.status for ending in endings] == [0, REFUSED, REFUSED, REFUSED]
    assert (skipped(tmp_path / "once"), checkpoints(tmp_path / "once")) == ([0, 0, 1], [16, 18, 20])
    # One more than three are kept while the newest one's weights have given no finite gradient.
    assert (skipped(tmp_path / "end"), checkpoints(tmp_path / "end")) == ([0, 0, 8], [6, 8, 10, 12])
    assert (skipped(tmp_path / "ever"), checkpoints(tmp_path / "ever")) == ([0, 6, 16, 26], [2, 4])
    assert checkpoints(tmp_path / "second") == [53, 55, 57, 59]


@pytest.mark.full
@pytest.mark.parametrize("engine", ["zero1_bf16", "zero3_fp32"])
def test_the_learner_that_diverges_is_named_and_the_others_updates_spoil_no_checkpoint(small_dataset, tmp_path, engine):
    jointly = ["replaced_tokens.sharing=es", "replaced_tokens.training=joint"]

    def run(name: str, num_steps: int, *own: str, **bad: object) -> Run:
        words = (*OFTEN, "train.objective=replaced_tokens", f"train.steps={num_steps}", *own)
        return Run(arguments(small_dataset, tmp_path / name, *words, engine=engine), **bad)

    cases = [
        run("generator", 7, is_bad=lambda step: step > 4, learner="generator"),
        run("discriminator", 7, is_bad=lambda step: step > 4, learner="discriminator"),
        run("both", 7, *jointly, is_bad=lambda step: step > 4, learner="generator"),
    ]
    found = run_ranks(start_all, 2, cases, backend=None, timeout=300)
    assert [[ending.status for ending in endings] for endings in found] == [[REFUSED] * 3] * 2
    whose = {"generator": " of the generator (3 times)", "discriminator": " of the discriminator (3 times)", "both": ""}
    for (name, words), ending in zip(whose.items(), found[0], strict=True):
        assert f"loss or gradient{words} were not finite in the run's last step, 7" in ending.log
        assert checkpoints(tmp_path / name) == [2, 4]


@pytest.mark.full
def test_a_nan_that_is_not_looked_for_spoils_no_checkpoint(small_dataset, tmp_path):
    unchecked = tmp_path / "unchecked.json"
    settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True, "check_grad_overflow": False}}
    unchecked.write_text(json.dumps(settings))
    words = arguments(small_dataset, tmp_path / "run", *OFTEN, "train.steps=1000")
    words[words.index("--deepspeed_config") + 1] = str(unchecked)
    (ending,) = run_ranks(start_all, 2, [Run(words, lambda step: step == 15)], backend=None)[0]
    assert ending.status == REFUSED
    assert f"not finite in {PATIENCE} of the last 44 steps, from step 15 on" in ending.log
    assert checkpoints(tmp_path / "run") == [8, 10, 12, 14]


@pytest.mark.full
def test_the_end_of_the_search_for_a_loss_scale_is_told_in_words(small_dataset, tmp_path):
    words = arguments(small_dataset, tmp_path, *OFTEN, "train.steps=1000", engine="fp16")
    for (ending,) in run_ranks(start_all, 2, [Run(words, lambda step: step > 4)], backend=None):
        assert ending.status == REFUSED
        assert "Traceback" not in ending.log
    assert (tmp_path / "STATE").read_text() == "diverged\n"
    assert checkpoints(tmp_path) == [2, 4]


def fine_tune(words: list[str], bad_steps: list[int]) -> str:
    """A fine-tuning run on this rank whose gradient is not a number in some steps; how it ended."""
    run = assemble(finetuning.read_inputs(finetuning.parse_arguments(words)), StopRequest())
    next(run.engine.module.parameters()).register_hook(
        lambda gradient: gradient * (float("nan") if run.state.step + 1 in bad_steps else 1.0)
    )
    try:
        return run.train()
    except Diverged as error:
        return f"{error}. {run.safeguard.way_out()}"


@pytest.mark.full
def test_fine_tuning_skips_holds_back_and_ends_in_the_same_way(small_dataset, tmp_path):
    encoder = write_encoder(small_dataset, tmp_path / "encoder")
    sentences = write_sentences(tmp_path / "sentences")

    def words(name: str) -> list[str]:
        often = ("checkpoint.interval=1", "evaluation.interval=2", "checkpoint.keep=0", "sift.weight=1")
        return finetune_arguments(encoder, sentences, tmp_path / name, *often)

    assert run_ranks(fine_tune, 2, words("odd"), [1, 3, 5, 7], backend=None) == ["done", "done"]
    assert skipped(tmp_path / "odd")[-1] == 4
    assert checkpoints(tmp_path / "odd") == [2, 4, 6, 8]
    told, _ = run_ranks(fine_tune, 2, words("late"), [6, 7, 8], backend=None)
    assert told.startswith("loss or gradient were not finite in the run's last step, 8 (and in 3 of the last 8)")
    assert f"The last good checkpoint is {tmp_path}/late/checkpoints/step-00000004. Delete " in told
    assert checkpoints(tmp_path / "late") == [1, 2, 3, 4, 5]
    assert not (tmp_path / "late" / "results.json").exists()


@pytest.mark.full
def test_a_search_for_the_loss_scale_in_the_last_step_does_not_lose_the_only_evaluation(small_dataset, tmp_path):
    encoder = write_encoder(small_dataset, tmp_path / "encoder")
    sentences = write_sentences(tmp_path / "sentences")
    words = finetune_arguments(encoder, sentences, tmp_path / "run", "evaluation.interval=100", "train.steps=4")
    engine = tmp_path / "fp16.json"
    engine.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "loss_scale": 0}}))
    words[words.index("--deepspeed_config") + 1] = str(engine)
    assert run_ranks(fine_tune_in_half, 1, words, backend=None) == ["done"]
    assert checkpoints(tmp_path / "run") == [3, 4]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["best_step"] == 4


def fine_tune_in_half(words: list[str]) -> str:
    """A fine-tuning run in fp16 whose last step, the fourth, overflows."""
    get_accelerator().is_fp16_supported = lambda: True
    return fine_tune(words, [4])
