"""Fine-tuning asks the device for nothing in forward and backward, and an evaluation waits for it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from host_reads import HostReads, OnDevice, on_device
from small_task import finetune_arguments, write_encoder, write_sentences

from deberta_xl.commands.finetuning import parse_arguments, read_inputs
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.task_model import TaskModel
from deberta_xl.objectives.choice import objective_type
from deberta_xl.objectives.evaluation import Evaluation, Evaluator
from deberta_xl.objectives.objective import Objective
from deberta_xl.objectives.sift import build_sift
from deberta_xl.objectives.task_batches import TaskLoss, TaskMicroBatch
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.settings.finetuning import SiftSection
from deberta_xl.settings.presets import load_run_config
from deberta_xl.tasks.features import TaskBatch

ROWS, LENGTH = 4, 10
LABELS = {
    "classification": np.array([0, 2, 1, 1]),
    "regression": np.array([0.5, 4.0, 2.0, 1.0], np.float32),
    "multi_label": np.eye(4, 3, dtype=np.float32),
    "choice": np.array([1, 0]),
    "token": np.where(np.arange(40).reshape(ROWS, LENGTH) % 3, -100, 1),
    "span": np.array([[1, 2], [0, 0], [3, 7], [2, 2]]),
}
NUM_LABELS = {"regression": 1, "choice": 1, "span": 2}
SIFT = [{"weight": 0.0}, {"weight": 1.0, "steps": 2}, {"weight": 1.0, "variant": "original"}]


@pytest.fixture(scope="module")
def architecture() -> DebertaConfig:
    """Two layers with everything that a task's model can have."""
    return DebertaConfig(
        vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=4,
        max_position_embeddings=24, conv_kernel_size=3, attention_dropout=0.0,  # on a CPU its masks are looked at
    )  # fmt: skip


@pytest.mark.parametrize("settings", SIFT, ids=["plain", "sift", "original"])
@pytest.mark.parametrize("kind", LABELS)
def test_no_task_asks_the_device_for_anything_in_forward_and_backward(architecture, kind, settings):
    ids = np.random.default_rng(1).integers(4, 60, (ROWS, LENGTH))
    arrays = TaskBatch(ids, np.ones_like(ids), np.zeros_like(ids), LABELS[kind], 2 if kind == "choice" else 1)
    batch = TaskMicroBatch.of(arrays, kind)
    model = TaskModel(architecture, HeadConfig(kind=kind, num_labels=NUM_LABELS.get(kind, 3))).train()
    model.use_kernel("reference", "bidirectional")  # the CPU's own looks where documents begin
    sift = build_sift(SiftSection(**settings), kind)
    more = {"sift": sift, "sift_weight": 2.0, "class_weights": None, "key": DropoutKey(1)}
    losses = TaskLoss(kind, architecture.hidden_size, batch, share=float(batch.counts[0]), **more)
    with HostReads() as reads:
        model(batch.input_ids_BS, batch.segments_BS, num_options=batch.num_options, objective=losses).total.backward()
    assert reads.found == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: (x > 0).nonzero(), lambda x: bool((x > 0).all()),
        lambda x: torch.bincount(x.long()), lambda x: x.masked_select(x > 0),
    ],
)  # fmt: skip
def test_what_asks_the_device_would_be_seen(ask):
    with HostReads() as reads:
        ask(torch.ones(3))
        torch.ones(3)[torch.tensor([True, False, True])] = 0.0  # is filled without being counted
    assert len(reads.found) == 1
    OnDevice.reads.clear()
    ask(on_device(torch.ones(3)))
    assert len(OnDevice.reads) == 1


def waits_of(evaluate: Callable[[Evaluator], Evaluation], model: Any) -> tuple[int, list[str], Evaluation]:
    """How often an evaluation waits for the device, what it reads before it has, and what it finds."""
    early: list[str] = []
    waits, is_working = 0, False

    def wait(_run: Evaluator) -> None:
        nonlocal waits, is_working
        waits, is_working = waits + 1, False
        early.extend(OnDevice.reads)

    def called(*given: Any, **named: Any) -> Any:
        nonlocal is_working
        if not is_working:  # what was read since the last wait was there
            OnDevice.reads.clear()
        is_working = True
        return on_device(model(*given, **named))

    with mock.patch.object(Evaluator, "wait", wait):
        found = evaluate(Evaluator(model=called, device=torch.device("cpu")))
    return waits, early, found


@pytest.mark.parametrize(
    ("name", "preset", "waits"),
    [("masked_lm", "debug", 1), ("causal", "debug", 1), ("mixed", "debug", 2), ("replaced_tokens", "v3_debug", 1)],
)
def test_pretraining_evaluates_on_the_device_and_reads_once_of_each_kind(small_dataset, name, preset, waits):
    words = ["model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "model.intermediate_size=24"]
    words += ["model.sequence_length=40", "model.max_position_embeddings=48", "evaluation.max_samples=12"]
    config = load_run_config(preset, [*words, "train.micro_batch_size=2", f"train.objective={name}"])
    tokenizer = small_dataset.tokenizer
    data = PretrainingData(TokenStore(small_dataset.valid), tokenizer, config.data, 40, 1)
    architecture = config.model.architecture(tokenizer.vocab_size)
    objective = objective_type(name)(config, architecture, tokenizer, data, data)
    model = objective.build().eval()
    waited, early, found = waits_of(objective.evaluate, model)
    assert (waited, early) == (waits, [])
    plain = objective.evaluate(Evaluator(model=model, device=torch.device("cpu")))
    assert (found.values, found.texts) == (plain.values, plain.texts)
    if name != "mixed":  # what an objective has without saying it
        waited, early, _ = waits_of(lambda run: Objective.evaluate(objective, run), model)
        assert (waited, early) == (1, [])


def test_a_task_is_predicted_on_the_device_and_read_once(small_dataset, tmp_path):
    encoder = write_encoder(small_dataset, tmp_path / "encoder" / "weights")
    given = finetune_arguments(encoder, write_sentences(tmp_path / "sentences"), tmp_path / "run")
    objective = read_inputs(parse_arguments(given)).objective()
    model = objective.build().eval()
    waited, early, found = waits_of(objective.evaluate, model)
    assert (waited, early) == (1, [])
    assert found.values == objective.evaluate(Evaluator(model=model, device=torch.device("cpu"))).values
