"""A checkpoint means the same in every layout: save in A, load in B, save in B, and nothing has changed by a bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from full_state import FullState, assert_bitwise_equal, full_state, reported_state
from ranks import run_ranks
from tiny_engine import GLOBAL_BATCH, Layout, build_engine, train

from deberta_xl.checkpoint.store import load_checkpoint, save_checkpoint
from deberta_xl.weights.native import read_weights

FP32 = [
    *(Layout(world_size, stage) for world_size in (1, 2) for stage in (1, 2, 3)),
    Layout(2, 3, persistence_threshold=0, sub_group_size=2000),
]
LOW_PRECISION = [
    Layout(2, 1, "bf16"),
    Layout(2, 2, "bf16"),
    Layout(2, 3, "bf16"),
    Layout(1, 3, "bf16", persistence_threshold=0),
    Layout(2, 1, "bf16_fp32_gradients"),
    Layout(2, 2, "bf16_fp32_gradients"),
    Layout(2, 2, "fp16"),
    Layout(2, 3, "fp16"),
]
LAYOUTS = FP32 + LOW_PRECISION
SAVED_STEP, LAST_STEP = 3, 6


class Original(NamedTuple):
    """What a run that was never interrupted did."""

    reported: FullState
    """DeepSpeed's own account of the state at the saved step."""
    losses: list[float]
    """Of the steps after it."""


class Campaign(NamedTuple):
    """Every layout's run, and each of them resumed in every layout."""

    root: Path
    originals: dict[Layout, Original]
    losses: dict[tuple[Layout, Layout], list[float]]
    """(saved in, resumed in) → losses of the steps after the saved one."""


def folder_of(root: Path, saved_in: Layout, resumed_in: Layout | None, step: int) -> Path:
    """The checkpoint of a step of an original run, or of a resumed one."""
    return checkpoints_of(root, saved_in, resumed_in) / f"step-{step:08d}"


def checkpoints_of(root: Path, saved_in: Layout, resumed_in: Layout | None) -> Path:
    """The checkpoints folder of an original run, or of a resumed one."""
    return root / saved_in.label / (resumed_in.label if resumed_in else "original")


def run_originals(layouts: list[Layout], root: Path) -> dict[Layout, Original]:
    """Train each layout without interruption, saving on the way and at the end."""
    originals = {}
    for layout in layouts:
        engine = build_engine(layout)
        train(engine, 1, SAVED_STEP)
        save_checkpoint(engine, checkpoints_of(root, layout, None), {"step": SAVED_STEP}, extra_files={})
        reported = reported_state(engine)
        originals[layout] = Original(reported, train(engine, SAVED_STEP + 1, LAST_STEP))
        save_checkpoint(engine, checkpoints_of(root, layout, None), {"step": LAST_STEP}, extra_files={})
    return originals


def resume_all(layouts: list[Layout], root: Path) -> dict[tuple[Layout, Layout], list[float]]:
    """Load every original in each of `layouts`, save it again, and train on.

    An engine is fresh (other weights, no Adam state) for its own original, and has run when it loads the others'.
    """
    losses = {}
    for layout in layouts:
        engine = build_engine(layout, seed=9)
        for source in sorted(LAYOUTS, key=lambda candidate: candidate != layout):
            state = load_checkpoint(engine, folder_of(root, source, None, SAVED_STEP))
            assert state == {"step": SAVED_STEP}
            assert engine.global_steps == SAVED_STEP
            assert engine.global_samples == SAVED_STEP * GLOBAL_BATCH
            assert all(p.numel() == p.ds_numel for p in engine.parameters() if getattr(p, "ds_persist", False))
            assert (engine.skipped_steps > 0) == (source.precision == "fp16")
            save_checkpoint(engine, checkpoints_of(root, source, layout), state, extra_files={})
            if source == layout or (source in FP32 and layout in FP32):
                losses[source, layout] = train(engine, SAVED_STEP + 1, LAST_STEP)
            if source == layout:
                save_checkpoint(engine, checkpoints_of(root, source, layout), {"step": LAST_STEP}, extra_files={})
    return losses


def by_world_size(layouts: Iterable[Layout]) -> dict[int, list[Layout]]:
    """The layouts that can share one set of ranks."""
    groups = defaultdict(list)
    for layout in layouts:
        groups[layout.world_size].append(layout)
    return groups


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> Campaign:
    """All runs at once, in two sets of ranks each, since starting an engine costs more than a step."""
    root = tmp_path_factory.mktemp("campaign")
    originals, losses = {}, {}
    for world_size, layouts in by_world_size(LAYOUTS).items():
        originals |= run_ranks(run_originals, world_size, layouts, root, timeout=120)[0]
    for world_size, layouts in by_world_size(LAYOUTS).items():
        losses |= run_ranks(resume_all, world_size, layouts, root, timeout=200)[0]
    return Campaign(root, originals, losses)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_a_checkpoint_holds_what_deepspeed_reports(campaign, layout):
    saved = full_state(folder_of(campaign.root, layout, None, SAVED_STEP))
    assert_bitwise_equal(saved, campaign.originals[layout].reported)


@pytest.mark.parametrize("resumed_in", LAYOUTS, ids=lambda layout: layout.label)
@pytest.mark.parametrize("saved_in", LAYOUTS, ids=lambda layout: layout.label)
def test_saved_in_one_layout_and_again_in_another_the_state_is_bitwise_equal(campaign, saved_in, resumed_in):
    original = full_state(folder_of(campaign.root, saved_in, None, SAVED_STEP))
    assert_bitwise_equal(full_state(folder_of(campaign.root, saved_in, resumed_in, SAVED_STEP)), original)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_resumed_in_its_own_layout_a_run_is_bitwise_the_uninterrupted_one(campaign, layout):
    assert campaign.losses[layout, layout] == campaign.originals[layout].losses
    uninterrupted = full_state(folder_of(campaign.root, layout, None, LAST_STEP))
    assert_bitwise_equal(full_state(folder_of(campaign.root, layout, layout, LAST_STEP)), uninterrupted)


@pytest.mark.parametrize("resumed_in", FP32, ids=lambda layout: layout.label)
@pytest.mark.parametrize("saved_in", FP32, ids=lambda layout: layout.label)
def test_resumed_in_another_layout_the_losses_are_those_of_the_uninterrupted_run(campaign, saved_in, resumed_in):
    # Layouts sum gradients in other orders, which float32 rounds differently: some 1e-7, and Adam passes it on.
    expected = pytest.approx(campaign.originals[saved_in].losses, rel=1e-5)
    assert campaign.losses[saved_in, resumed_in] == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_weights_are_read_without_an_engine(campaign, layout):
    weights = read_weights(folder_of(campaign.root, layout, None, SAVED_STEP))
    assert weights.keys() == campaign.originals[layout].reported["master"].keys()
    for name, weight in campaign.originals[layout].reported["master"].items():
        assert torch.equal(weights[name], weight), name


def resume_in_fresh_engine(layout: Layout, folder: Path) -> list[float]:
    """Load into an engine that has never stepped, and train on."""
    engine = build_engine(layout, seed=9)
    load_checkpoint(engine, folder)
    return train(engine, SAVED_STEP + 1, LAST_STEP)


@pytest.mark.parametrize(
    ("saved_in", "resumed_in"),
    [(Layout(2, 1), Layout(1, 3)), (Layout(2, 3), Layout(1, 1)), (Layout(1, 3), Layout(2, 2))],
    ids=lambda layout: layout.label,
)
def test_a_fresh_engine_of_another_layout_goes_on_as_the_uninterrupted_run(campaign, saved_in, resumed_in):
    folder = folder_of(campaign.root, saved_in, None, SAVED_STEP)
    losses = run_ranks(resume_in_fresh_engine, resumed_in.world_size, resumed_in, folder)[0]
    assert losses == pytest.approx(campaign.originals[saved_in].losses, rel=1e-5)  # reason as above
