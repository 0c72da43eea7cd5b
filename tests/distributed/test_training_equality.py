"""Training on DeepSpeed, under every ZeRO stage, equals a plain loop with torch's AdamW on one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import Case, Layout, evaluate_untrained, run_cases
from plain_run import LENGTH, ROWS, Curve, architecture, assert_equal_curves, batches_from, train_plainly
from ranks import run_ranks
from small_dataset import SmallDataset

from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.token_store import TokenStore

STEPS = 12
TWO_LAYERS = {"num_layers": 2}
TWO_RANKS = Layout(data=2)


def curves_of(dataset: SmallDataset, folder: Path, cases: list[Case], layout: Layout = TWO_RANKS) -> list[list[Curve]]:
    """The curves of all cases, on every rank."""
    return run_ranks(run_cases, layout.world_size, dataset, folder, layout, cases, TWO_LAYERS, STEPS, timeout=300)


def plain_curve_of(dataset: SmallDataset, case: Case) -> Curve:
    """The reference run."""
    config = architecture(dataset.tokenizer.vocab_size, **TWO_LAYERS)
    return train_plainly(dataset, config, STEPS, case.optimizer)[0]


@pytest.fixture(scope="module")
def plain_curve(small_dataset: SmallDataset) -> Curve:
    """The reference run; it must learn something, or its equality with anything would say little."""
    curve = plain_curve_of(small_dataset, Case())
    assert curve.losses[-1] < curve.losses[0] - 0.3
    return curve


def assert_all_equal(actual: list[list[Curve]], expected: Curve, cases: list[Case]) -> None:
    """Every case has the plain curve, on every rank."""
    for rank, curves in enumerate(actual):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, expected, f"{case}, rank {rank} of {len(actual)}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_and_accumulation_gives_the_plain_run(small_dataset, plain_curve, tmp_path, world_size):
    cases = [Case(stage, accumulation) for stage in (1, 2, 3) for accumulation in (1, 4)]
    assert_all_equal(curves_of(small_dataset, tmp_path, cases, Layout(data=world_size)), plain_curve, cases)


def test_recomputing_activations_gives_the_plain_run(small_dataset, plain_curve, tmp_path):
    cases = [Case(stage, 2, recompute=True) for stage in (1, 2, 3)]
    assert_all_equal(curves_of(small_dataset, tmp_path, cases), plain_curve, cases)


@pytest.fixture(scope="module")
def mostly_unknown(small_dataset, tmp_path_factory) -> SmallDataset:
    """Documents of two rows, after each of which nothing can be predicted for four rows: their words are unknown."""
    prefix, num_words, num_documents = tmp_path_factory.mktemp("unknown") / "train", 2 * (LENGTH - 2), 80
    tokens = TokenStore(small_dataset.train).read_stream(0, num_documents * num_words)
    with TokenStoreWriter(prefix, tokenizer=small_dataset.tokenizer) as writer:
        for words in tokens.reshape(num_documents, num_words):
            writer.add(words)
            writer.add(np.full(2 * num_words, small_dataset.tokenizer.unk_id))
        writer.finish()
    return small_dataset._replace(train=prefix)


def test_the_loss_is_the_global_mean_when_ranks_hold_different_numbers_of_labels(mostly_unknown, tmp_path):
    of_ranks = [batches_from(mostly_unknown, ROWS // 2, rank, size=2) for rank in range(2)]
    counts = [[sum(batch.counts[0] for batch in next(batches)) for batches in of_ranks] for _ in range(STEPS)]
    assert any(min(of_step) == 0 < max(of_step) for of_step in counts)  # a rank that has no label at all
    cases = [Case(1, 1), Case(3, 2)]
    assert_all_equal(curves_of(mostly_unknown, tmp_path, cases), plain_curve_of(mostly_unknown, cases[0]), cases)


def test_the_originals_adam_gives_its_plain_run(small_dataset, tmp_path):
    # Without bias correction the first updates are about 1/sqrt(1 - 0.999) = 30 times smaller: another curve.
    cases = [Case(stage, bias_correction=False) for stage in (1, 3)]
    assert_all_equal(curves_of(small_dataset, tmp_path, cases), plain_curve_of(small_dataset, cases[0]), cases)


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_offload", "fp16"])
@pytest.mark.parametrize("tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.full)])
def test_every_shipped_low_precision_configuration_follows_the_plain_run(
    small_dataset, plain_curve, tmp_path, name, tensor_parallel_size
):
    layout = Layout(tensor=tensor_parallel_size, data=2 // tensor_parallel_size)
    # bf16 keeps 8 bits: a relative 2^-8 = 4e-3 per rounding, which is what norms may differ by (measured: 4e-3). Losses
    # average over many roundings (measured: 2e-4). fp16 keeps 11 bits.
    for (curve,) in curves_of(small_dataset, tmp_path, [Case(accumulation=2, shipped=name)], layout):
        assert_equal_curves(curve, plain_curve, name, loss=1e-3, norm=2e-2)


def evaluate_under_zero_3(dataset: SmallDataset, folder: Path, max_samples: int) -> tuple[float, ...]:
    """Loss, accuracy and labels of an untrained model whose every parameter is cut up over the ranks; on rank 0 the
    unigram's loss, too."""
    layout = Layout(data=torch.distributed.get_world_size())
    case, config = Case(3, accumulation=2 // layout.data), architecture(dataset.tokenizer.vocab_size, **TWO_LAYERS)
    found = evaluate_untrained(dataset, folder / layout.label, layout, case, config, max_samples)
    unigram = () if found.unigram_entropy is None else (found.unigram_entropy,)
    return found.loss, found.accuracy, found.num_labels, *unigram


@pytest.mark.parametrize("max_samples", [1, 5])
def test_evaluation_under_zero_3_counts_every_row_once_when_ranks_run_out_of_rows(small_dataset, tmp_path, max_samples):
    (alone,) = run_ranks(evaluate_under_zero_3, 1, small_dataset, tmp_path, max_samples)
    first, second = run_ranks(evaluate_under_zero_3, 2, small_dataset, tmp_path, max_samples)
    assert len(alone) == 4
    assert first == pytest.approx(alone, rel=1e-6)
    assert second == pytest.approx(alone[:3], rel=1e-6)
