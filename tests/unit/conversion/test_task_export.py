"""Fine-tuned models in transformers: equal logits there, and the same model on the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_dataset import SmallDataset
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.task_export import export_task
from deberta_xl.public.finetuned import DebertaForTask
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.tasks.task import METRICS_OF, Source, Task
from deberta_xl.weights.head_facts import HeadFacts

CASES = {
    "classification": (["no", "maybe", "yes"], AutoModelForSequenceClassification),
    "regression": ([], AutoModelForSequenceClassification),
    "multi_label": (["a", "b", "c"], AutoModelForSequenceClassification),
    "token": (["O", "B-X", "I-X"], AutoModelForTokenClassification),
    "span": ([], AutoModelForQuestionAnswering),
    "choice": ([], AutoModelForMultipleChoice),
}


def fine_tuned(kind: str, dataset: SmallDataset, folder: Path, *, normalized_twice: bool = False) -> DebertaForTask:
    """A model with everything, saved to `folder`."""
    config = DebertaConfig(
        vocab_size=dataset.tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
        position_buckets=8, max_position_embeddings=48, conv_kernel_size=3,
    )  # fmt: skip
    labels, _ = CASES[kind]
    head = HeadConfig(kind=kind, num_labels=len(labels) or (2 if kind == "span" else 1), dropout=0.25)
    task = Task(name="t", head=kind, metrics=[METRICS_OF[kind][0]], labels=labels or None, sources=[Source(files={})])
    model = DebertaForTask(config, head, seed=3).eval()
    model.facts = HeadFacts(head, labels, task, 48, 12, normalized_twice)
    with torch.no_grad():  # fresh weights are too small to tell a mistake from rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    dataset.tokenizer.save(folder.parent / "tokenizer")
    model.save_pretrained(folder, tokenizer=folder.parent / "tokenizer")
    return model


@pytest.mark.parametrize("kind", CASES)
def test_transformers_gives_equal_logits_and_the_way_back_loses_nothing(kind, small_dataset, tmp_path):
    model = fine_tuned(kind, small_dataset, tmp_path / "ours")
    export_task(tmp_path / "ours", tmp_path / "theirs")
    labels, auto_class = CASES[kind]
    theirs, report = auto_class.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert labels in ([], list(theirs.config.id2label.values()))
    ids = torch.randint(4, 500, (4, 20), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(20) < torch.tensor([[20], [7], [13], [20]])).long()
    ids = ids * mask
    shape = (2, 2, 20) if kind == "choice" else (4, 20)
    with torch.no_grad():
        output = theirs.eval()(input_ids=ids.view(shape), attention_mask=mask.view(shape))
        ours = model(ids, mask, num_options=2)
    if kind == "span":
        expected = torch.stack([output.start_logits, output.end_logits], -1)
    else:
        expected = output.logits.squeeze(-1) if kind == "regression" else output.logits
    if kind in ("token", "span"):
        ours, expected = ours[mask.bool()], expected[mask.bool()]
    assert ours.abs().max() > 0.01
    # float32 sums in another order.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    again = DebertaForTask.from_pretrained(tmp_path / "theirs")
    assert (again.facts.head, again.facts.labels) == (model.facts.head, model.facts.labels)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert tokenizer("a name")["input_ids"] == [1, *small_dataset.tokenizer.encode("a name").tolist(), 2]


def test_what_transformers_cannot_compute_is_refused(small_dataset, tmp_path):
    fine_tuned("classification", small_dataset, tmp_path / "ours", normalized_twice=True)
    with pytest.raises(CheckpointError, match=r"normalised twice, which transformers cannot do"):
        export_task(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("num_labels", "kind", "labels"), [(2, "classification", ["LABEL_0", "LABEL_1"]), (1, "regression", [])]
)
def test_a_head_that_transformers_describes_only_by_its_defaults(small_dataset, tmp_path, num_labels, kind, labels):
    fine_tuned("span", small_dataset, tmp_path / "ours")
    export_task(tmp_path / "ours", tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.num_labels = num_labels
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=config).save_pretrained(
        tmp_path / "new"
    )
    model = DebertaForTask.from_pretrained(tmp_path / "new")
    assert (model.facts.head.kind, model.facts.labels) == (kind, labels)
