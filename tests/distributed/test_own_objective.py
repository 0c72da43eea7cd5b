"""The objective that docs/pretraining.md shows, as a file outside the package, through the ordinary command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import rank_environment
from small_dataset import SmallDataset
from started import PRETRAIN, ROOT, start

from deberta_xl.base.errors import ConfigError
from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.weights.native import find_weights_folder, read_weights

TINY = [
    "model.hidden_size=32", "model.num_layers=2", "model.intermediate_size=64", "model.position_buckets=8",
    "model.sequence_length=48", "model.max_position_embeddings=48", "train.steps=6", "train.global_batch_size=8",
    "train.micro_batch_size=2", "train.log_interval=1", "optimizer.learning_rate=3e-3", "schedule.warmup_steps=2",
    "schedule.decay=constant", "evaluation.interval=3", "evaluation.max_samples=6", "checkpoint.interval=100",
]  # fmt: skip
DETECTION = ["train.objective=detection:Detection", "data.replace_with_mask=0", "data.replace_with_random=1"]
LAYOUTS = {
    "plain": (1, "cpu_debug", []),
    "ZeRO-3": (2, "zero3_fp32", []),
    "TP2": (2, "cpu_debug", ["parallel.tensor_parallel_size=2"]),
}
"""Ranks, DeepSpeed JSON and overrides. Micro-batches are the same in all of them, so dropout's masks are, too."""
STOPPED_AFTER = 4


def documented() -> str:
    """The file that the documentation shows."""
    text = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    return re.search(r"## An objective of your own\n.*?```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the user works."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "detection.py").write_text(documented(), encoding="utf-8")
    return folder


def words(dataset: SmallDataset, layout: str, run: str, *own: str) -> list[str]:
    """What the user types for the run `run` in a layout."""
    _, engine, options = LAYOUTS[layout]
    settings = ["--config", "debug", "--deepspeed_config", str(ROOT / "deepspeed_configs" / f"{engine}.json")]
    data = [f"data.train={dataset.train}", f"data.valid={dataset.valid}", f"run.folder={run}"]
    return [*settings, *TINY, *DETECTION, *options, *data, *own]


def pretrain(
    dataset: SmallDataset, folder: Path, layout: str, run: str, *own: str, stop_after: int | None = None
) -> Path:
    """A start of the run `run`; its folder."""
    given = words(dataset, layout, run, *own)
    ended = start(PRETRAIN, given, LAYOUTS[layout][0], folder=folder, stop_after=stop_after)
    assert ended.returncode == 0, ended.stdout
    return folder / run


@pytest.fixture(scope="module")
def uninterrupted(small_dataset, folder) -> dict[str, Path]:
    """Runs from the first to the last step, with dropout, by layout."""
    return {name: pretrain(small_dataset, folder, name, f"whole-{name}") for name in LAYOUTS}


def figures(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what was logged of the loss, its gradient and the right guesses, in training and on held-out rows."""
    steps: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        found = {name: value for name, value in line.items() if re.search("loss$|accuracy|grad_norm", name)}
        steps.setdefault(line["step"], {}).update(found)
    return steps


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    return read_weights(find_weights_folder(run))


def test_the_file_has_at_most_80_lines_and_its_head_is_trained(uninterrupted):
    assert len(documented().splitlines()) <= 80
    assert "detect.weight" in weights(uninterrupted["plain"])
    logged = figures(uninterrupted["plain"])
    assert {"valid_loss", "valid_accuracy", "loss", "accuracy", "grad_norm"} <= logged[3].keys()
    assert logged[6].keys() == logged[3].keys()
    assert (uninterrupted["plain"] / "STATE").read_text() == "done\n"


@pytest.mark.parametrize("name", ["ZeRO-3", "TP2"])
def test_a_layout_gives_the_plain_run(uninterrupted, name):
    expected, actual = figures(uninterrupted["plain"]), figures(uninterrupted[name])
    assert actual.keys() == expected.keys() == set(range(1, 7))
    for step, values in expected.items():
        assert actual[step] == pytest.approx(values, rel=1e-5), step


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stopped_run_resumes_to_identical_figures_and_weights(small_dataset, folder, uninterrupted, name):
    run = pretrain(small_dataset, folder, name, f"stopped-{name}", stop_after=STOPPED_AFTER)
    assert (run / "STATE").read_text() == "stopped\n"
    assert max(figures(run)) == STOPPED_AFTER + 1, "the step that was agreed on by then is made"
    pretrain(small_dataset, folder, name, f"stopped-{name}")
    assert figures(run) == figures(uninterrupted[name])
    actual, expected = weights(run), weights(uninterrupted[name])
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_the_objective_is_learned(small_dataset, folder):
    # Half of the tokens are replaced: a head that reads nothing stays at ln 2 and at half of the guesses.
    own = ["data.mask_probability=0.5", "train.steps=60", "evaluation.interval=60", "evaluation.max_samples=64"]
    end = figures(pretrain(small_dataset, folder, "plain", "learned", *own))[60]
    assert end["valid_loss"] < 0.6
    assert end["valid_accuracy"] > 0.6


REFUSED = {
    "detectoin:Detection": "there is no module detectoin on PYTHONPATH or in ",
    "detection:Detecting": "has no class Detecting below deberta_xl.objectives.pretraining.Pretraining; it has Detect",
    "detection:Detector": "has no class Detector below deberta_xl.objectives.pretraining.Pretraining; it has Detection",
    "detection:Detection": "parallel.pipeline_parallel_size=2 cannot be: leave it at 1, and divide the model by",
}
"""What is asked for, of two stages, and the reason why it cannot be."""


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_cannot_be_is_refused_before_anything_is_started(small_dataset, folder, monkeypatch, name, reason):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for variable, value in rank_environment(0, 2, 29500).items():
        monkeypatch.setenv(variable, value)
    given = words(small_dataset, "plain", "refused", f"train.objective={name}", "parallel.pipeline_parallel_size=2")
    with pytest.raises(ConfigError, match=re.escape(reason)):
        read_inputs(parse_arguments(given))
    assert not (folder / "refused").exists()


def test_a_module_that_is_not_there_is_refused_without_torch(small_dataset, folder):
    program = (
        "import sys; from deberta_xl.commands.pretraining import parse_arguments, read_inputs\n"
        "try: read_inputs(parse_arguments())\n"
        "except ValueError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    given = words(small_dataset, "plain", "refused", "train.objective=detectoin:Detection")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program, *given], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    reason, has_torch = ended.stdout.splitlines()
    assert REFUSED["detectoin:Detection"] in reason
    assert has_torch == "False"
