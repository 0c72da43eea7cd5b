"""A checkpoint of one layout continues in another: the state bit for bit, the losses as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from full_state import assert_bitwise_equal, full_state
from layouts import Case, Layout, Run
from plain_run import Curve, architecture, assert_equal_curves
from ranks import run_ranks
from small_dataset import SmallDataset

SAVED_STEP, LAST_STEP = 2, 4


class Way(NamedTuple):
    """A layout, a ZeRO stage, and whether there is sequence parallelism."""

    layout: Layout
    stage: int = 1
    sliced: bool = False


WAYS = {
    "plain": Way(Layout()),
    "DP2-ZeRO2": Way(Layout(data=2), 2),
    "DP2": Way(Layout(data=2)),
    "DP2-ZeRO3": Way(Layout(data=2), 3),
    "TP2": Way(Layout(tensor=2)),
    "TP4-ZeRO2": Way(Layout(tensor=4), 2),
    "TP2xDP2-ZeRO3": Way(Layout(tensor=2, data=2), 3),
    "TP2xDP2-ZeRO2-SP": Way(Layout(tensor=2, data=2), 2, sliced=True),
    "PP2": Way(Layout(pipeline=2)),
    "PP4": Way(Layout(pipeline=4)),
    "TP2xPP2": Way(Layout(tensor=2, pipeline=2)),
    "PP2xDP2": Way(Layout(pipeline=2, data=2)),
    "TP2xPP2xDP2": Way(Layout(tensor=2, pipeline=2, data=2)),
}

SOURCES = {
    "plain": ["plain", "TP2", "TP2xPP2xDP2", "DP2-ZeRO3"],
    "DP2": ["DP2", "DP2-ZeRO3", "plain", "PP4"],
    "DP2-ZeRO3": ["DP2-ZeRO3", "DP2", "PP2", "TP2xPP2"],
    "TP2": ["TP2", "TP4-ZeRO2", "PP2xDP2"],
    "TP4-ZeRO2": ["TP4-ZeRO2", "plain", "TP2"],
    "TP2xDP2-ZeRO3": ["TP2xDP2-ZeRO3", "TP2xPP2", "PP2"],
    "TP2xDP2-ZeRO2-SP": ["TP2xDP2-ZeRO2-SP", "TP2", "DP2-ZeRO3"],
    "DP2-ZeRO2": ["DP2-ZeRO2", "PP2"],
    "PP2": ["PP2", "PP4", "TP2xDP2-ZeRO3", "plain"],
    "PP4": ["PP4", "PP2", "DP2-ZeRO3", "TP2xDP2-ZeRO2-SP"],
    "TP2xPP2": ["TP2xPP2", "plain", "TP4-ZeRO2"],
    "PP2xDP2": ["PP2xDP2", "TP2xPP2", "PP4"],
    "TP2xPP2xDP2": ["TP2xPP2xDP2", "TP2xDP2-ZeRO3", "plain"],
}
"""Target -> what it continues from; the first is itself. 29 pairs of different layouts."""

SLICE = ("DP2-ZeRO3", "TP2xPP2")

TWO_MODELS = [name for name, way in WAYS.items() if way.layout.pipeline == 1]
"""Ways of replaced token detection: each continues from each."""


def start(dataset: SmallDataset, folder: Path, way: Way, objective: str) -> Run:
    """A start of the run in `folder`."""
    config = architecture(dataset.tokenizer.vocab_size)
    case = Case(way.stage, accumulation=2, sliced=way.sliced, objective=objective)
    words = (f"checkpoint.interval={SAVED_STEP}", "checkpoint.keep=0")
    return Run(dataset, folder, way.layout, case, config, LAST_STEP, words)


def run_original(dataset: SmallDataset, root: Path, name: str, objective: str) -> Curve:
    """Save in the middle, train on; the curve after the save."""
    return start(dataset, root / name, WAYS[name], objective).train().after(SAVED_STEP)


def continue_from(dataset: SmallDataset, root: Path, target: str, sources: list[str], objective: str) -> list[Curve]:
    """Go on from each source's checkpoint: save it again before and after training on."""
    curves = []
    for source in sources:
        folder = folder_of(root, source, target)
        run = start(dataset, folder, WAYS[target], objective)
        assert run.training.state.step == SAVED_STEP
        run.save(folder / "fresh", SAVED_STEP)
        curves.append(run.train())
        # The engine has other weights and moments by now: loading leaves nothing of them.
        run.load(step_folder(folder))
        run.save(folder / "used", SAVED_STEP)
    return curves


def folder_of(root: Path, source: str, target: str) -> Path:
    """The run folder in which a run of `source` goes on as `target`."""
    return root / f"{source}-in-{target}"


def step_folder(run: Path, checkpoints: str = "checkpoints") -> Path:
    """The saved step in a run's folder."""
    return run / checkpoints / f"step-{SAVED_STEP:08d}"


class Originals:
    """Uninterrupted runs, each made when first asked for."""

    def __init__(self, dataset: SmallDataset, root: Path, objective: str):
        self.dataset, self.root, self.objective = dataset, root, objective
        self.curves: dict[str, Curve] = {}

    def curve(self, name: str) -> Curve:
        """The steps after the saved one; the checkpoint is then in `root`."""
        if name not in self.curves:
            world_size = WAYS[name].layout.world_size
            given = (self.dataset, self.root, name, self.objective)
            self.curves[name] = run_ranks(run_original, world_size, *given, timeout=200)[0]
        return self.curves[name]


@pytest.fixture(scope="module")
def originals(small_dataset, tmp_path_factory) -> Originals:
    """Shared by all targets."""
    return Originals(small_dataset, tmp_path_factory.mktemp("originals"), "masked_lm")


@pytest.fixture(scope="module")
def pairs(small_dataset, tmp_path_factory) -> Originals:
    """The same, of replaced token detection."""
    return Originals(small_dataset, tmp_path_factory.mktemp("pairs"), "replaced_tokens")


@pytest.mark.parametrize(
    "target", [name if name in SLICE else pytest.param(name, marks=pytest.mark.full) for name in WAYS]
)
def test_what_other_layouts_saved_continues(small_dataset, originals, target):
    assert SOURCES[target][0] == target
    check_continuing(small_dataset, originals, target, SOURCES[target])


@pytest.mark.full
@pytest.mark.parametrize("target", TWO_MODELS)
def test_two_models_go_on_from_what_every_other_layout_saved(small_dataset, pairs, target):
    others = [name for name in TWO_MODELS if name != target]
    check_continuing(small_dataset, pairs, target, [target, *others])


def check_continuing(dataset: SmallDataset, originals: Originals, target: str, sources: list[str]) -> None:
    """Each source's checkpoint, the first of them the target's own, goes on in the target's layout."""
    expected = [originals.curve(source) for source in sources]
    root, world_size = originals.root, WAYS[target].layout.world_size
    for source in sources:
        shutil.copytree(step_folder(root / source), step_folder(folder_of(root, source, target)))
    given = (dataset, root, target, sources, originals.objective)
    curves = run_ranks(continue_from, world_size, *given, timeout=300)[0]
    assert curves[0] == expected[0], "the same layout continues bit for bit"
    for source, curve, reference in zip(sources, curves, expected, strict=True):
        assert_equal_curves(curve, reference, f"{source} in {target}")
        saved = full_state(step_folder(root / source))
        for engine in ("fresh", "used"):
            assert_bitwise_equal(full_state(step_folder(folder_of(root, source, target), engine)), saved)
