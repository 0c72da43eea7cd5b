"""A checkpoint of one layout continues in another: the state bit for bit, the losses as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from layouts import Case, Curve, Layout, Run, architecture, assert_equal_curves
from ranks import run_ranks
from small_dataset import SmallDataset
from test_checkpoint_layouts import assert_bitwise_equal, full_state

SAVED_STEP, LAST_STEP = 2, 4


class Way(NamedTuple):
    """A layout, a ZeRO stage, and whether there is sequence parallelism."""

    layout: Layout
    stage: int = 1
    sliced: bool = False


WAYS = {
    "plain": Way(Layout()),
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
    "PP2": ["PP2", "PP4", "TP2xDP2-ZeRO3", "plain"],
    "PP4": ["PP4", "PP2", "DP2-ZeRO3", "TP2xDP2-ZeRO2-SP"],
    "TP2xPP2": ["TP2xPP2", "plain", "TP4-ZeRO2"],
    "PP2xDP2": ["PP2xDP2", "TP2xPP2", "PP4"],
    "TP2xPP2xDP2": ["TP2xPP2xDP2", "TP2xDP2-ZeRO3", "plain"],
}
"""Target -> what it continues from; the first is itself. 29 pairs of different layouts."""

SLICE = ("DP2-ZeRO3", "TP2xPP2")


def start(dataset: SmallDataset, folder: Path, way: Way, seed: int) -> Run:
    """A run with fresh weights, of `seed`."""
    config = architecture(dataset.tokenizer.vocab_size)
    return Run(dataset, folder, way.layout.join(), Case(way.stage, accumulation=2, sliced=way.sliced), config, seed)


def run_original(dataset: SmallDataset, root: Path, name: str) -> Curve:
    """Save in the middle, train on; the curve after the save."""
    run = start(dataset, root, WAYS[name], seed=3)
    run.train(1, SAVED_STEP)
    run.save(root / name, SAVED_STEP)
    return run.train(SAVED_STEP + 1, LAST_STEP)


def continue_from(dataset: SmallDataset, root: Path, target: str, sources: list[str]) -> list[Curve]:
    """Load each source into an engine (of other weights at first, then one that has run), save, train on."""
    run = start(dataset, root, WAYS[target], seed=9)
    curves = []
    for source in sources:
        assert run.load(step_folder(root / source)) == {"step": SAVED_STEP}
        run.save(root / f"{source}-in-{target}", SAVED_STEP)
        curves.append(run.train(SAVED_STEP + 1, LAST_STEP))
    return curves


def step_folder(checkpoints: Path) -> Path:
    """The saved step's folder."""
    return checkpoints / f"step-{SAVED_STEP:08d}"


class Originals:
    """Uninterrupted runs, each made when first asked for."""

    def __init__(self, dataset: SmallDataset, root: Path):
        self.dataset, self.root = dataset, root
        self.curves: dict[str, Curve] = {}

    def curve(self, name: str) -> Curve:
        """The steps after the saved one; the checkpoint is then in `root`."""
        if name not in self.curves:
            world_size = WAYS[name].layout.world_size
            self.curves[name] = run_ranks(run_original, world_size, self.dataset, self.root, name, timeout=200)[0]
        return self.curves[name]


@pytest.fixture(scope="module")
def originals(small_dataset, tmp_path_factory) -> Originals:
    """Shared by all targets."""
    return Originals(small_dataset, tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize(
    "target", [name if name in SLICE else pytest.param(name, marks=pytest.mark.full) for name in WAYS]
)
def test_what_other_layouts_saved_continues(small_dataset, originals, target):
    sources = SOURCES[target]
    assert sources[0] == target
    expected = [originals.curve(source) for source in sources]
    root, world_size = originals.root, WAYS[target].layout.world_size
    curves = run_ranks(continue_from, world_size, small_dataset, root, target, sources, timeout=300)[0]
    assert curves[0] == expected[0], "the same layout continues bit for bit"
    for source, curve, reference in zip(sources, curves, expected, strict=True):
        assert_equal_curves(curve, reference, f"{source} in {target}")
        saved, again = step_folder(root / source), step_folder(root / f"{source}-in-{target}")
        assert_bitwise_equal(full_state(again), full_state(saved))
