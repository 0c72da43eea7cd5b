"""Replaced token detection through the ordinary command: every layout gives the plain run, and resumes bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from plain_pair import plain_losses
from small_dataset import SmallDataset
from started import PRETRAIN, ROOT, start

from deberta_xl.weights.native import find_weights_folder, open_weights

TINY = [
    "train.objective=replaced_tokens", "model.hidden_size=32", "model.num_layers=3", "model.intermediate_size=64",
    "model.position_buckets=8", "model.sequence_length=48", "model.max_position_embeddings=48", "train.steps=6",
    "train.global_batch_size=8", "train.micro_batch_size=2", "train.log_interval=1", "optimizer.learning_rate=1e-3",
    "generator.learning_rate=5e-4", "optimizer.epsilon=1e-3", "schedule.warmup_steps=2", "schedule.decay=constant",
    "evaluation.interval=3", "evaluation.max_samples=6", "checkpoint.interval=100",
]  # fmt: skip
TP2 = ["parallel.tensor_parallel_size=2"]
# A large epsilon: Adam makes whole steps of what is only rounding where a gradient is zero, and a step that differs in
# rounding alone may, once in a while, draw another token, from where on everything differs.
LAYOUTS = {
    "plain": (1, "cpu_debug", []),
    "ZeRO-2": (2, "zero2_fp32", []),
    "ZeRO-3": (2, "zero3_fp32", []),
    "TP2": (2, "cpu_debug", TP2),
    "TP2 sliced": (2, "cpu_debug", [*TP2, "parallel.sequence_parallel=true"]),
    "recomputed": (1, "cpu_debug", ["train.activation_checkpointing=true"]),
}
"""Ranks, DeepSpeed JSON and overrides. Micro-batches are the same in all of them, so masks and draws are, too."""
WAYS = {
    "gdes": [],
    "gdes jointly": ["replaced_tokens.training=joint"],
    "es": ["replaced_tokens.sharing=es", "replaced_tokens.training=joint"],
    "none": ["replaced_tokens.sharing=none", "generator.hidden_size=16"],
    "positions": ["model.position_biased_input=true"],
}
STOPPED_AFTER = 4


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Path:
    """The repository's DeepSpeed configurations, and ZeRO-2 in float32."""
    folder = tmp_path_factory.mktemp("engines")
    for path in (ROOT / "deepspeed_configs").glob("*.json"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    settings = json.loads((folder / "zero3_fp32.json").read_text(encoding="utf-8"))
    settings["zero_optimization"] = {"stage": 2}
    (folder / "zero2_fp32.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


class Runner:
    """Makes runs, each once."""

    def __init__(self, dataset: SmallDataset, engines: Path, folder: Path):
        self.dataset, self.engines, self.folder = dataset, engines, folder
        self.made: dict[str, Path] = {}

    def start(self, run: str, layout: str, own: list[str], stop_after: int | None = None) -> Path:
        """A start of a run; its folder."""
        ranks, engine, options = LAYOUTS[layout]
        folder = self.folder / run.replace(" ", "-")
        data = [f"data.train={self.dataset.train}", f"data.valid={self.dataset.valid}", f"run.folder={folder}"]
        settings = ["--config", "debug", "--deepspeed_config", str(self.engines / f"{engine}.json")]
        ended = start(PRETRAIN, [*settings, *TINY, *options, *data, *own], ranks, stop_after=stop_after)
        assert ended.returncode == 0, ended.stdout
        return folder

    def whole(self, way: str, layout: str) -> Path:
        """A run from the first to the last step."""
        name = f"{way} {layout}"
        if name not in self.made:
            self.made[name] = self.start(name, layout, WAYS[way])
        return self.made[name]


@pytest.fixture(scope="module")
def runner(small_dataset, engines, tmp_path_factory) -> Runner:
    """Runs shared by the tests of this file."""
    return Runner(small_dataset, engines, tmp_path_factory.mktemp("runs"))


TOLD = re.compile("loss$|accuracy|grad_norm|replaced_share|precision|recall|f1|auc")


def figures(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what was logged of it, in training and on held-out rows."""
    steps: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        steps.setdefault(line["step"], {}).update({name: value for name, value in line.items() if TOLD.search(name)})
    return steps


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, by the names that training gives them."""
    return {name: tensor.read() for name, tensor in open_weights(find_weights_folder(run)).items()}


def differences(actual: Path, expected: Path) -> list[str]:
    """Tensors that are not the same bit for bit."""
    first, second = weights(actual), weights(expected)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


MATRIX = [(way, layout) for way in WAYS for layout in LAYOUTS if layout != "plain"]
ESSENTIAL = [("gdes", "ZeRO-3"), ("es", "TP2")]


@pytest.mark.parametrize(
    ("way", "layout"), [pytest.param(*case, marks=() if case in ESSENTIAL else pytest.mark.full) for case in MATRIX]
)
def test_a_layout_gives_the_plain_run(runner, way, layout):
    expected, actual = figures(runner.whole(way, "plain")), figures(runner.whole(way, layout))
    assert actual.keys() == expected.keys() == set(range(1, 7))
    for step, values in expected.items():
        assert actual[step] == pytest.approx(values, rel=1e-5), step


def test_everything_is_told(runner):
    run = runner.whole("gdes", "plain")
    logged = figures(run)[3]
    both = {
        "loss", "generator_loss", "generator_accuracy", "replaced_share", "discriminator_loss", "recall", "f1",
    }  # fmt: skip
    norms = {"generator_grad_norm", "discriminator_grad_norm"}
    assert both | {f"valid_{name}" for name in both} | norms | {"valid_auc"} <= set(logged)
    for split in ("", "valid_"):
        parts = logged[f"{split}generator_loss"], logged[f"{split}discriminator_loss"]
        assert logged[f"{split}loss"] == pytest.approx(parts[0] + 50 * parts[1])
    assert (run / "STATE").read_text() == "done\n"
    assert (run / "loss.png").is_file()


@pytest.mark.parametrize(
    ("way", "layout"),
    [
        ("gdes", "ZeRO-3"),
        pytest.param("gdes", "plain", marks=pytest.mark.full),
        pytest.param("es", "TP2", marks=pytest.mark.full),
        pytest.param("gdes", "ZeRO-2", marks=pytest.mark.full),
        pytest.param("gdes", "TP2 sliced", marks=pytest.mark.full),
    ],
)
def test_a_stopped_run_resumes_to_identical_figures_and_weights(runner, way, layout):
    name = f"stopped {way} {layout}"
    run = runner.start(name, layout, WAYS[way], stop_after=STOPPED_AFTER)
    assert (run / "STATE").read_text() == "stopped\n"
    assert max(figures(run)) == STOPPED_AFTER + 1, "the step that was agreed on by then is made"
    runner.start(name, layout, WAYS[way])
    assert figures(run) == figures(runner.whole(way, layout))
    assert differences(run, runner.whole(way, layout)) == []


@pytest.mark.parametrize("way", ["gdes", pytest.param("gdes jointly", marks=pytest.mark.full)])
def test_ten_steps_are_those_of_a_loop_written_by_hand(runner, way):
    own = [*WAYS[way], "train.steps=10", "model.dropout=0", "evaluation.interval=100"]
    run = runner.start(f"by hand {way}", "plain", own)
    logged = figures(run)
    names = ("generator_loss", "discriminator_loss", "generator_grad_norm", "discriminator_grad_norm")
    expected = plain_losses(run / "config.toml", is_decoupled=way == "gdes")
    assert len(expected) == 10
    for step, values in enumerate(expected, start=1):
        found = [logged[step][name] for name in names if name in logged[step]]
        assert found == pytest.approx(values[: len(found)], rel=2e-5), step
