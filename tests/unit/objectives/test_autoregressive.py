"""What is predicted and what is seen of a row by the objectives that predict the next token, and how they are mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from deberta_xl.data.loader import Batch, PretrainingData
from deberta_xl.data.random_numbers import derive
from deberta_xl.data.token_store import TokenStore
from deberta_xl.objectives.autoregressive import Causal, Mixed, Prefix, draw_prefixes, next_token_rows, next_tokens
from deberta_xl.objectives.choice import built_in_of, objective_type
from deberta_xl.objectives.evaluation import Evaluator
from deberta_xl.objectives.masked_examples import EXAMPLES, NextExamples
from deberta_xl.objectives.masked_lm import MaskedLM
from deberta_xl.objectives.objective import Objective
from deberta_xl.objectives.rows import KeyedData, MaskedRows
from deberta_xl.planning.workload import pretraining_workload
from deberta_xl.settings.presets import load_run_config
from deberta_xl.training.step import even_shares, over_micro_batches

LENGTH, MICRO = 40, 2
WORDS = [
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.intermediate_size=24",
    f"model.sequence_length={LENGTH}", "model.max_position_embeddings=48", "model.hidden_dropout=0",
    "model.attention_dropout=0", f"train.micro_batch_size={MICRO}", "evaluation.max_samples=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def build(small_dataset):
    """An objective by its name, with further settings."""

    def built(name: str, *words: str) -> MaskedLM:
        config = load_run_config("debug", [*WORDS, f"train.objective={name}", *words])
        tokenizer = small_dataset.tokenizer
        data, valid = (
            PretrainingData(TokenStore(prefix), tokenizer, config.data, LENGTH, config.train.seed)
            for prefix in (small_dataset.train, small_dataset.valid)
        )
        architecture = config.model.architecture(tokenizer.vocab_size)
        return objective_type(name)(config, architecture, tokenizer, data, valid)

    return built


def test_the_next_token_of_the_same_document_is_predicted_and_nothing_closes_a_row():
    ids = np.array([[1, 7, 8, 2, 1, 9, 2], [1, 7, 8, 9, 6, 5, 2], [1, 7, 2, 0, 0, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 2], [1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    expected = [[7, 8, 2, 0, 9, 0, 0], [7, 8, 9, 6, 5, 0, 0], [7, 0, 0, 0, 0, 0, 0]]
    assert next_tokens(ids, segments, np.zeros_like(ids, bool)).tolist() == expected
    is_open = np.array([[1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]], bool)
    behind = [[0, 8, 2, 0, 0, 0, 0], [0] * 7, [7, 0, 0, 0, 0, 0, 0]]
    assert next_tokens(ids, segments, is_open).tolist() == behind


TAIL = 5
"""Tokens by which a document's end is known."""


def test_an_end_is_predicted_only_where_a_document_ends(small_dataset):
    # Rows that begin in a joint of two documents are a token or two short, and are closed by [SEP] before padding.
    store, tokenizer = TokenStore(small_dataset.train), small_dataset.tokenizer
    data = PretrainingData(store, tokenizer, load_run_config("debug").data, 24, seed=1)
    ends = {tuple(store[number][-TAIL:]) for number in range(len(store))}
    ids, segments, labels = data.batch(0, 1000)
    ids = np.where(labels > 0, labels, ids)
    is_end = next_tokens(ids, segments, np.zeros_like(ids, bool)) == tokenizer.sep_id
    found = [tuple(ids[row, last - TAIL + 1 : last + 1]) for row, last in zip(*np.nonzero(is_end), strict=True)]
    whole = [tail for tail in found if len(tail) == TAIL and tokenizer.cls_id not in tail]
    assert len(whole) > 100
    assert set(whole) <= ends
    assert (segments[:, -1] == 0).any()  # there are rows that are short


def test_a_prefix_has_every_length_equally_often_as_its_row_and_visit_have_it():
    segments = np.tile([[1] * 4 + [2] * 6 + [0] * 2], (6000, 1))
    keys = derive(3, 0, np.arange(6000))
    drawn = draw_prefixes(segments, keys)
    assert not drawn[:, 10:].any()
    for part in (drawn[:, :4], drawn[:, 4:10]):
        lengths = part.sum(1)
        assert (part == (np.arange(part.shape[1]) < lengths[:, None])).all()  # the first so many
        counts = np.bincount(lengths, minlength=part.shape[1] + 1)
        assert counts[0] == counts[-1] == 0
        expected = 6000 / (part.shape[1] - 1)
        assert np.abs(counts[1:-1] - expected).max() < 5 * expected**0.5
    assert np.array_equal(draw_prefixes(segments[7:9], keys[7:9]), drawn[7:9])
    assert not np.array_equal(draw_prefixes(segments, derive(3, 1, np.arange(6000))), drawn)


def test_rows_without_documents_draw_nothing():
    assert not draw_prefixes(np.zeros((2, 8), np.int64), derive(1, 0, np.arange(2))).any()


@pytest.mark.parametrize("name", ["causal", "prefix"])
def test_a_row_is_shown_without_masks_and_tells_what_is_open(build, name):
    objective = build(name)
    (micro_batches,) = [next(objective.batches(1, 6, rank=1, size=2))]
    start = 6 + MICRO  # the second rank's first
    batch = objective.data.batch(start, MICRO)
    rows = micro_batches[0]
    assert torch.equal(rows.input_ids_BS, torch.from_numpy(np.where(batch.labels > 0, batch.labels, batch.input_ids)))
    assert rows.open_BS.any() == (name == "prefix")
    key_B = KeyedData(objective.data).batch(start, MICRO).key_B
    expected = next_token_rows(batch, key_B if name == "prefix" else None)
    assert torch.equal(rows.open_BS, expected.open_BS)
    assert torch.equal(rows.labelled.without_padding().label_L, expected.labelled.label_L)
    assert rows.counts == (len(expected.labelled.label_L),)


def test_mixed_draws_as_many_autoregressive_micro_batches_as_stated_whatever_the_layout(build):
    objective = build("mixed", "autoregressive.share=0.25", "train.global_batch_size=32", "model.sequence_length=40")
    steps = [next(objective.batches(1, 32 * step, rank=0, size=1)) for step in range(12)]
    kinds = [objective.kind_of(rows) for step in steps for rows in step]
    assert 24 <= kinds.count("causal") <= 72  # of 192: 48, four deviations wide
    halves = [next(objective.batches(1, 0, rank=rank, size=2)) for rank in range(2)]
    assert [objective.kind_of(rows) for pair in zip(*halves, strict=True) for rows in pair] == kinds[:16]


def step_of(objective: MaskedLM, batches: list[MaskedRows]) -> Mapping[str, torch.Tensor]:
    """The figures of a step, as the loop makes them."""
    torch.manual_seed(0)
    counts = {
        name: sum(of) for name, of in zip(objective.counts, zip(*(b.counts for b in batches), strict=True), strict=True)
    }
    shares = even_shares(counts, len(batches), 1)
    model = objective.build().eval()
    return over_micro_batches([objective.losses(model, b, shares, None) for b in batches], objective.reports)


def test_the_loss_of_mixed_is_each_kinds_mean_weighed_by_its_micro_batches(build):
    objective = build("mixed", "autoregressive.form=prefix", "train.global_batch_size=10")
    batches = next(objective.batches(1, 0, rank=0, size=1))
    kinds = [objective.kind_of(rows) for rows in batches]
    assert {"masked", "prefix"} == set(kinds)
    found = step_of(objective, batches)
    model = objective.build().eval()
    total = 0.0
    for name in ("masked", "prefix"):
        sums = [0.0, 0, 0]
        for rows, kind in zip(batches, kinds, strict=True):
            if kind == name:
                output = model(
                    rows.input_ids_BS, rows.segments_BS, labels=rows.labelled, label_count=1.0, open_BS=rows.open_BS
                )
                used = rows.labelled.without_padding()
                right = int((output.guess_L[: used.num_labels] == used.label_L).sum())
                sums = [a + b for a, b in zip(sums, (output.loss.item(), right, used.num_labels), strict=True)]
        mean = sums[0] / sums[2]
        assert found[f"{name}_loss"].item() == pytest.approx(mean, rel=1e-5)
        assert found[f"{name}_accuracy"] == sums[1]
        total += mean * kinds.count(name) / len(kinds)
    assert found["loss"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_step_of_one_kind_has_that_kinds_loss_and_counts_none_of_the_other(build, kind):
    objective = build("mixed")
    batches = [b for b in next(objective.batches(1, 0, rank=0, size=1)) if objective.kind_of(b) == kind][:2]
    found = step_of(objective, batches)
    assert found["loss"].item() == pytest.approx(found[f"{kind}_loss"].item())
    other = "causal" if kind == "masked" else "masked"
    assert found[f"{other}_loss"] == found[f"{other}_accuracy"] == 0
    assert sum(b.counts[objective.counts.index(f"{other}_labels")] for b in batches) == 0


@pytest.mark.parametrize("name", ["causal", "prefix", "mixed"])
def test_an_evaluation_tells_loss_perplexity_and_accuracy_of_each_kind(build, name):
    objective = build(name)
    run = Evaluator(model=objective.build().eval(), device=torch.device("cpu"))
    found = objective.evaluate(run)
    kinds = [""] if name != "mixed" else ["masked_", "causal_"]
    for kind in kinds:
        assert found.values[f"{kind}perplexity"] == pytest.approx(np.exp(found.values[f"{kind}loss"]))
        assert 0 <= found.values[f"{kind}accuracy"] <= 1
    if name == "mixed":
        means = [build(of).evaluate(run).values["loss"] for of in ("masked_lm", "causal")]
        assert [found.values["masked_loss"], found.values["causal_loss"]] == means
        assert found.values["loss"] == pytest.approx(sum(means) / 2)
    assert found.values == objective.evaluate(run).values
    assert "perplexity" in found.line
    rows = found.texts["predictions" if name != "mixed" else "next_predictions"].splitlines()[2:]
    assert 5 <= len(rows) <= EXAMPLES
    assert all("MASK&#93;</strong> |" in row for row in rows)  # nothing stands behind what is to be guessed
    assert ("confusion" in found.pictures) == (name == "mixed")


@pytest.mark.parametrize("name", ["causal", "prefix", "mixed"])
def test_what_is_held_out_is_drawn_as_it_is_evaluated_and_never_otherwise(build, name):
    objective = build(name)
    rows, again = (next(objective.held_out(rank=0, size=1)) for _ in range(2))
    batch = KeyedData(objective.valid).held_out_batch(0, MICRO)
    is_next = name != "mixed" or objective.kind_of(rows) == "causal"
    next_rows = next_token_rows(*batch) if name == "prefix" else next_token_rows(batch.rows)
    expected = next_rows if is_next else MaskedRows.of(batch.rows)
    for of in (rows, again):
        assert torch.equal(of.labelled.without_padding().label_L, expected.labelled.label_L)
        assert (of.open_BS is None) == (not is_next)
        assert not is_next or torch.equal(of.open_BS, expected.open_BS)
    if name != "mixed":  # which measures both kinds on all rows
        run = Evaluator(model=objective.build().eval(), device=torch.device("cpu"))
        by_losses = Objective.evaluate(objective, run).values
        assert by_losses["loss"] == pytest.approx(objective.evaluate(run).values["loss"], rel=1e-6)


def test_an_example_shows_what_is_read_before_the_next_piece(build):
    objective = build("causal")
    rows = next(objective.held_out(rank=0, size=1))
    examples = NextExamples()
    list(examples.watch([rows, rows]))
    labels = torch.cat([rows.labelled.without_padding().label_L] * 2).tolist()
    for number, place in enumerate(examples.places):
        assert place.label == labels[number * NextExamples.stride]
        seen = [*place.before, place.label]
        assert any(seen == row[i : i + len(seen)] for row in rows.input_ids_BS.tolist() for i in range(len(row)))
    guesses = torch.tensor([label if number % 2 else 5 for number, label in enumerate(labels)])
    table = examples.table(guesses, lambda token: f"<{token}>").splitlines()[2:]
    assert [line.endswith("| yes |") for line in table] == [n * NextExamples.stride % 2 == 1 for n in range(len(table))]


class Sparse(Causal):
    """A user's own: of every other token."""

    def micro_batch(self, batch: Batch) -> MaskedRows:
        rows = super().micro_batch(batch)
        labels = rows.labelled.label_L[::2]
        return rows._replace(labelled=rows.labelled._replace(label_L=labels, slot_L=rows.labelled.slot_L[::2]))


class Both(Mixed):
    """A user's own, mixed."""


@pytest.mark.parametrize(
    ("name", "chosen", "saved"),
    [
        ("causal", Causal, "causal"),
        ("prefix", Prefix, "prefix"),
        ("mixed", Mixed, "mixed"),
        (f"{__name__}:Sparse", Sparse, "causal"),
        (f"{__name__}:Both", Both, "mixed"),
    ],
)
def test_a_checkpoint_says_that_its_model_can_write(build, name, chosen, saved):
    objective = build(name)
    assert type(objective) is chosen
    config = json.loads(objective.checkpoint_files(1)["config.json"])
    assert (config["objective"], config.get("form")) == (saved, "causal" if saved == "mixed" else None)
    assert config["sequence_length"] == LENGTH
    assert built_in_of(name) == saved
    assert objective.fingerprints["objective"] == name
    assert objective.fingerprints.get("autoregressive.form") == ("causal" if saved == "mixed" else None)


def test_the_work_told_at_the_start_counts_the_tokens_that_are_predicted(build):
    labels = {}
    for name in ("masked_lm", "causal", "prefix", "mixed"):
        objective = build(name, "data.mask_probability=0.2", "train.global_batch_size=64")
        work = pretraining_workload(objective.architecture, objective.config, name)
        labels[name] = work.example.labelled / LENGTH
        assert (work.largest is None) == (name == "masked_lm")
        counts = [sum(b.counts[0] for b in next(objective.batches(1, 64 * n, rank=0, size=1))) for n in range(3)]
        # [CLS], [SEP] and the ends of documents are predicted by nobody, which the estimate leaves out.
        assert labels[name] == pytest.approx(np.mean(counts) / (64 * LENGTH), rel=0.25)
    assert labels == {"masked_lm": pytest.approx(0.2), "causal": 1, "prefix": 0.5, "mixed": pytest.approx(0.6)}
