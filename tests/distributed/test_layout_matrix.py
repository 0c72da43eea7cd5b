"""Every layout trains what one process trains: losses, gradient norms, and the gradient of every parameter."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from full_state import FullState, full_state
from layouts import Case, Layout, run_cases, state_after_first_step
from plain_run import Curve, architecture, assert_equal_curves, assert_equal_gradients, train_plainly
from ranks import run_ranks
from small_dataset import SmallDataset

LAYOUTS = {
    "TP2": Layout(tensor=2),
    "TP4": Layout(tensor=4),
    "PP2": Layout(pipeline=2),
    "PP4": Layout(pipeline=4),
    "PP5": Layout(pipeline=5),
    "TP2xPP2": Layout(tensor=2, pipeline=2),
    "TP2xDP2": Layout(tensor=2, data=2),
    "PP2xDP2": Layout(pipeline=2, data=2),
    "PP4xDP2": Layout(pipeline=4, data=2),
    "TP2xPP2xDP2": Layout(tensor=2, pipeline=2, data=2),
}
"""PP5: as many stages as the model has layers."""

EVERY_TIME = {
    "TP2": [Case(1, 4, sliced=True), Case(3, 1, recompute=True, sliced=True)],
    "TP4": [Case(2, 1, sliced=True)],
    "PP5": [Case(1, 1, recompute=True), Case(1, 4)],
    "TP2xPP2": [Case(1, 1, recompute=True), Case(1, 4, sliced=True)],
    "PP4xDP2": [Case(1, 1, recompute=True), Case(1, 4)],
    "TP2xPP2xDP2": [Case(1, 1, recompute=True), Case(1, 4, sliced=True)],
}
"""Every kind of division with every other one, and every two settings, somewhere; the full matrix has the rest."""

VARIANTS = {
    "own position projections": {"share_att_key": False},
    "c2p without convolution": {"pos_att_type": "c2p", "conv_kernel_size": 0},
    "positions in the input": {"position_biased_input": True, "type_vocab_size": 2},
    "two layers": {"num_layers": 2},
    "content alone and a decoder of its own": {"pos_att_type": "none", "decoder_weights": "own"},
}
"""Other architectures, under tensor and pipeline parallelism at once."""

DECODERS = {
    "own layers, p2c": {"decoder_weights": "own", "pos_att_type": "p2c"},
    "none": {"decoder_passes": 0},
    "three passes over the states": {"decoder_passes": 3, "decoder_input": "states"},
}
"""Other decoders than the released one: a matter of ZeRO-3, which gathers every parameter for each use."""

LOW_PRECISION = {
    "bf16": (2e-3, 3e-2),
    "bf16_fp32_sums": (2e-3, 3e-2),
    "bf16_fp32_sums_at_once": (2e-3, 3e-2),
    "fp16": (5e-4, 5e-3),
    "fp16_fp32_sums": (5e-4, 5e-3),
}
"""Precision -> by how much losses and norms may differ, relatively. bf16 keeps 8 bits: 2^-8 = 4e-3 per rounding, which
is what norms show, while losses average over many roundings; fp16 keeps 11 bits."""

SHIPPED = {("TP2xPP2", "bf16_fp32_sums_at_once"), ("TP2xPP2", "fp16_fp32_sums")}
"""What the files of deepspeed_configs/ ask for."""


def stages_of(layout: Layout) -> tuple[int, ...]:
    """ZeRO stages that go with a layout."""
    return (1,) if layout.pipeline > 1 else (1, 2, 3)


def other_cases(name: str, stage: int) -> list[Case]:
    """Every combination, with and without a divided sequence, and the offloaded optimizer; not those of EVERY_TIME."""
    cuts = (False, True) if LAYOUTS[name].tensor > 1 else (False,)
    cases = [
        Case(stage, accumulation, recompute, sliced=cut)
        for accumulation, recompute, cut in product((1, 4), (False, True), cuts)
    ]
    offloaded = [Case(stage, 2, offload=True, sliced=cut) for cut in cuts]
    return [case for case in cases + offloaded if case not in EVERY_TIME.get(name, ())]


@pytest.fixture(scope="module")
def plain(small_dataset) -> tuple[Curve, FullState]:
    """The reference run; it must learn something, or its equality with anything would say little."""
    curve, state = train_plainly(small_dataset, architecture(small_dataset.tokenizer.vocab_size))
    assert curve.losses[-1] < curve.losses[0] - 0.1
    return curve, state


def compare(
    dataset: SmallDataset,
    folder: Path,
    layout: Layout,
    cases: list[Case],
    plain: tuple[Curve, FullState],
    **options: object,
) -> None:
    """Run `cases` in `layout`; every rank's losses and norms, and all gradients, are those of the plain run."""
    results = run_ranks(run_cases, layout.world_size, dataset, folder, layout, cases, options, timeout=500)
    for rank, curves in enumerate(results):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, plain[0], f"{case} on rank {rank}")
    for case in cases:
        state = full_state(state_after_first_step(folder, layout, case))
        assert_equal_gradients(state, plain[1], case)


@pytest.mark.parametrize("name", EVERY_TIME)
def test_a_layout_gives_the_plain_run(small_dataset, plain, tmp_path, name):
    compare(small_dataset, tmp_path, LAYOUTS[name], EVERY_TIME[name], plain)


@pytest.mark.full
@pytest.mark.parametrize(("name", "stage"), [(name, s) for name, layout in LAYOUTS.items() for s in stages_of(layout)])
def test_every_other_case_of_a_layout_gives_the_plain_run(small_dataset, plain, tmp_path, name, stage):
    compare(small_dataset, tmp_path, LAYOUTS[name], other_cases(name, stage), plain)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_architecture_gives_its_plain_run_over_stages_and_slices(small_dataset, tmp_path, options):
    # An odd vocabulary: the second slice of the table, on both stages that have it, is padded.
    options = {"vocab_size": small_dataset.tokenizer.vocab_size | 1} | options
    plain = train_plainly(small_dataset, architecture(**options))
    compare(small_dataset, tmp_path, Layout(tensor=2, pipeline=2), [Case(accumulation=2)], plain, **options)


@pytest.mark.full
@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
def test_every_decoder_gives_its_plain_run_with_all_of_it_partitioned(small_dataset, tmp_path, options):
    plain = train_plainly(small_dataset, architecture(small_dataset.tokenizer.vocab_size, **options))
    compare(small_dataset, tmp_path, Layout(data=2), [Case(3, 2, recompute=True)], plain, **options)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=() if (name, precision) in SHIPPED else pytest.mark.full)
        for name in ("TP2xPP2", "PP2xDP2")
        for precision in LOW_PRECISION
    ],
)
def test_low_precision_follows_the_plain_run_within_its_rounding(small_dataset, plain, tmp_path, name, precision):
    loss, norm = LOW_PRECISION[precision]
    layout, cases = LAYOUTS[name], [Case(accumulation=a, precision=precision) for a in (1, 4)]
    for curves in run_ranks(run_cases, layout.world_size, small_dataset, tmp_path, layout, cases, {}, timeout=300):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, plain[0], case, loss, norm)
