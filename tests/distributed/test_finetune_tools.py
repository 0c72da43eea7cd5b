"""A fine-tuned model in use: evaluated and asked, on one rank and on two, alone and averaged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_dataset import SmallDataset
from small_task import write_encoder, write_sentences

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.launch import read_launch
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.public.finetuned import DebertaForTask
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.public.task_predict import Predictor
from deberta_xl.run.joining import join_ranks
from deberta_xl.settings.architecture import HeadConfig
from deberta_xl.tasks.records import TaskDataError
from deberta_xl.tasks.task import load_task
from deberta_xl.weights.head_facts import HeadFacts
from deberta_xl.weights.initial_encoder import load_encoder
from tools import evaluate_task, predict


@pytest.fixture(scope="module")
def models(small_dataset: SmallDataset, tmp_path_factory) -> list[Path]:
    """Two models of SST-2, a third one of CB."""
    folder = tmp_path_factory.mktemp("models")
    config = DebertaForMaskedLM.from_pretrained(write_encoder(small_dataset, folder / "encoder")).config
    for seed, name in ((1, "sst2"), (2, "sst2"), (3, "cb")):
        task = load_task(name)
        head = HeadConfig(kind=task.head, num_labels=len(task.labels))
        model = DebertaForTask(config, head, seed=seed)
        model.facts = HeadFacts(head, list(task.labels), task, 32, 8, False)
        # Fresh heads say nearly the same of everything; these tell texts apart.
        model.classifier.weight.data *= 200
        model.save_pretrained(folder / str(seed), tokenizer=folder / "tokenizer")
    return [folder / str(seed) for seed in (1, 2, 3)]


def predicted(checkpoints: list[Path], path: Path) -> list[str]:
    """Lines for a file, on this rank."""
    launch = read_launch()
    predictor = Predictor(checkpoints, launch, join_ranks(launch), micro_batch_tokens=120)
    return list(predictor.predict_file(path))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eleven texts of different length: ranks cannot share them evenly."""
    rows = [{"id": f"t{n}", "text": "the names of a module " * (n % 4 + 1)} for n in range(11)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "texts.jsonl"


def probabilities(lines: list[str]) -> np.ndarray:
    """Of the second class."""
    return np.array([json.loads(line)["probabilities"]["1"] for line in lines])


def test_predictions_are_the_same_on_two_ranks(models, texts):
    (alone,) = run_ranks(predicted, 1, models[:1], texts, backend=None)
    assert [json.loads(line)["id"] for line in alone] == [f"t{n}" for n in range(11)]
    for lines in run_ranks(predicted, 2, models[:1], texts, backend=None):
        # float32 and six digits in the file.
        assert probabilities(lines) == pytest.approx(probabilities(alone), abs=2e-6)


def test_an_ensemble_averages_logits(models, texts):
    one, two, both = (
        probabilities(run_ranks(predicted, 1, chosen, texts, backend=None)[0])
        for chosen in (models[:1], models[1:2], models[:2])
    )
    logits = [np.log(p / (1 - p)) for p in (one, two)]
    expected = 1 / (1 + np.exp(-(logits[0] + logits[1]) / 2))
    assert np.abs(one - two).max() > 0.05
    assert both == pytest.approx(expected, abs=1e-4)


def test_models_of_different_tasks_are_not_averaged(models):
    launch = read_launch({})
    with pytest.raises(ConfigError, match="only models of one task can be averaged"):
        Predictor([models[0], models[2]], launch, join_ranks(launch), 4)


def test_a_pretrained_model_is_no_fine_tuned_one(models):
    with pytest.raises(CheckpointError, match=r"has no head\.json: it is no fine-tuned model"):
        DebertaForTask.from_pretrained(models[0].parent / "encoder")


def test_a_line_without_text_is_refused_with_its_place(models, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(TaskDataError, match=r"bad\.jsonl:2: no column 'text'.* there are: txt"):
        predicted(models[:1], tmp_path / "bad.jsonl")
    with pytest.raises(TaskDataError, match=r"bad\.jsonl:1: no column 'text_pair'"):  # CB is of pairs
        predicted(models[2:], tmp_path / "bad.jsonl")


def test_an_id_comes_back_as_it_was_given(models, tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"text": "a", "id": 3}\n\n{"text": "b"}\n{"text": "c", "id": null}\n')
    ids = [json.loads(line)["id"] for line in predicted(models[:1], tmp_path / "ids.jsonl")]
    assert ids == [3, 1, None]


def test_a_head_for_the_same_classes_is_taken_in_the_order_of_the_task(models):
    source = DebertaForTask.from_pretrained(models[2])
    assert source.facts.labels == ["entailment", "contradiction", "neutral"]
    model = DebertaForTask(source.config, source.head, seed=9)
    load_encoder(model, models[2], ["neutral", "contradiction", "entailment"])
    for ours, theirs in zip(model.classifier.parameters(), source.classifier.parameters(), strict=True):
        assert torch.equal(ours, theirs[[2, 1, 0]])
    other = DebertaForTask(source.config, source.head, seed=9)
    load_encoder(other, models[2], ["x", "y", "z"])
    assert not torch.equal(other.classifier.weight, source.classifier.weight)
    assert torch.equal(other.pooler.dense.weight, source.pooler.dense.weight)


def test_a_saved_model_is_read_back_bit_for_bit(models, small_dataset, tmp_path):
    model = DebertaForTask.from_pretrained(models[0])
    model.save_pretrained(tmp_path / "copy", tokenizer=models[0] / "tokenizer")
    again = DebertaForTask.from_pretrained(tmp_path / "copy")
    assert again.facts == model.facts
    assert all((p == q).all() for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_tools_write_predictions_and_the_benchmarks_file(models, texts, tmp_path, capsys):
    data = write_sentences(tmp_path / "sentences")
    given = [str(models[0]), "--data", str(data)]
    evaluate_task.run(evaluate_task.parse_arguments([*given, "--output", str(tmp_path / "o")]))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["task"], printed["split"], printed["examples"]) == ("sst2", "valid", 24)
    assert 0 <= printed["accuracy"] <= 1
    assert len((tmp_path / "o" / "SST-2.tsv").read_text().splitlines()) == 25
    predict.run(predict.parse_arguments([str(models[0]), "--input", str(texts), "--output", str(tmp_path / "p")]))
    assert len((tmp_path / "p").read_text().splitlines()) == 11
    other: argparse.Namespace = evaluate_task.parse_arguments([*given, "--task", "cb"])
    with pytest.raises(ConfigError, match="fine-tune for that task, or choose one with the same labels"):
        evaluate_task.run(other)
