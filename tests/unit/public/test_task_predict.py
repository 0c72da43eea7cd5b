"""Predictions of fine-tuned models: in the precision asked for, whatever the batch, however little the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_dataset import SmallDataset

from deberta_xl.base.launch import Launch
from deberta_xl.public.finetuned import DebertaForTask
from deberta_xl.public.task_predict import Predictor
from deberta_xl.public.text_batches import TooLittleMemory, memory_advice
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.tasks.task import Source, Task
from deberta_xl.weights.head_facts import HeadFacts


@pytest.fixture
def model(small_dataset: SmallDataset, tmp_path: Path) -> Path:
    """A classifier, so to speak."""
    config = DebertaConfig(
        vocab_size=small_dataset.tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
        position_buckets=8, max_position_embeddings=48,
    )  # fmt: skip
    labels = ["a", "b", "c"]
    model = DebertaForTask(config, HeadConfig(kind="classification", num_labels=3), seed=3)
    task = Task(name="t", head="classification", metrics=["accuracy"], labels=labels, sources=[Source(files={})])
    model.facts = HeadFacts(model.head, labels, task, 48, 12, False)
    with torch.no_grad():  # fresh weights are too small to tell one precision from another
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    small_dataset.tokenizer.save(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    return tmp_path / "model"


def test_predictions_in_bfloat16_are_those_of_float32_up_to_its_rounding(model, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"The {n} of it."}) + "\n" for n in range(9)))
    launch, cpu = Launch(world_size=1), torch.device("cpu")
    found = {}
    for dtype in ("float32", "bfloat16"):
        predictor = Predictor([model], launch, cpu, 64, dtype)
        assert next(predictor.models[0].parameters()).dtype == getattr(torch, dtype)
        found[dtype] = [json.loads(line) for line in predictor.predict_file(tmp_path / "texts.jsonl")]
    exact, rounded = (torch.tensor([list(line["probabilities"].values()) for line in found[dtype]]) for dtype in found)
    assert not torch.equal(exact, rounded)
    # 8 bits of mantissa: 2^-8 = 4e-3 for each rounding, some in a row.
    torch.testing.assert_close(rounded, exact, rtol=0, atol=3e-2)


def test_predictions_are_those_of_each_text_alone_in_the_order_of_the_file(model, tmp_path):
    texts = ["The name of it. " * (n * 7 % 5 + n % 2) for n in range(14)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text, "id": text}) + "\n" for text in texts))
    found = {}
    for tokens in (1, 100, 4096):
        predictor = Predictor([model], Launch(world_size=1), torch.device("cpu"), tokens)
        found[tokens] = [json.loads(line) for line in predictor.predict_file(tmp_path / "texts.jsonl")]
        assert [line["id"] for line in found[tokens]] == texts
    alone, *batched = (
        torch.tensor([list(line["probabilities"].values()) for line in lines]) for lines in found.values()
    )
    assert len(alone.unique(dim=0)) == len(set(texts))
    for probabilities in batched:
        # float32 and six digits in the file.
        torch.testing.assert_close(probabilities, alone, rtol=0, atol=2e-6)


def test_a_forward_that_does_not_fit_says_which_option_takes_less():
    says = "for 4,096 tokens in one forward; give a smaller --micro_batch_tokens"
    with pytest.raises(TooLittleMemory, match=says), memory_advice(4096):
        torch.empty(2**50)  # a million gigabytes
    with pytest.raises(TooLittleMemory, match=says), memory_advice(4096):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="another fault"), memory_advice(4096):
        raise RuntimeError("another fault")
