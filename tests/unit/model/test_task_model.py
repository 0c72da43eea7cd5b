"""Heads and their losses: shapes, padding that changes nothing, and the numbers of plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.task_losses import count_items, distribution_logits, hide_padding, task_loss
from deberta_xl.model.task_model import TaskModel
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig

CONFIG = DebertaConfig(
    vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, position_buckets=4,
    max_position_embeddings=24, conv_kernel_size=3,
)  # fmt: skip
SHAPES = {
    "classification": (4, 3, (4, 3)), "regression": (4, 1, (4,)), "multi_label": (4, 5, (4, 5)),
    "token": (4, 3, (4, 9, 3)), "span": (4, 2, (4, 9, 2)), "choice": (4, 1, (2, 2)),
}  # fmt: skip


def model(kind: str, num_labels: int) -> TaskModel:
    """A small model in float64."""
    return TaskModel(CONFIG, HeadConfig(kind=kind, num_labels=num_labels), seed=1).double().eval()


@pytest.mark.parametrize("kind", SHAPES)
def test_logits_have_their_shape_and_more_padding_changes_nothing(kind):
    rows, num_labels, shape = SHAPES[kind]
    ids = torch.randint(4, 60, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7], [2]])).long()
    task_model = model(kind, num_labels)
    logits = task_model(ids * mask, mask, num_options=2)
    assert logits.shape == shape
    longer = task_model(F.pad(ids * mask, (0, 6)), F.pad(mask, (0, 6)), num_options=2)
    if kind in ("token", "span"):
        logits, longer = logits[mask.bool()], longer[:, :9][mask.bool()]
    torch.testing.assert_close(longer, logits, rtol=0, atol=1e-12)


def test_losses_are_sums_of_the_plain_formulas():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1])
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    plain = -log_p[torch.arange(4), labels]
    torch.testing.assert_close(task_loss("classification", logits, labels), plain.sum())
    torch.testing.assert_close(task_loss("choice", logits, labels), plain.sum())
    weighted = (plain * weights[labels]).sum()
    torch.testing.assert_close(task_loss("classification", logits, labels, weights), weighted)
    ones = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    p = logits.sigmoid()
    both = -(ones * p.log() + (1 - ones) * (1 - p).log()).mean(-1).sum()
    torch.testing.assert_close(task_loss("multi_label", logits, ones), both)
    targets = torch.tensor([1.0, 2, 3, 4])
    torch.testing.assert_close(task_loss("regression", logits[:, 0], targets), ((logits[:, 0] - targets) ** 2).sum())
    per_token = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    tags = torch.tensor([[0, 1, -100, 2, -100], [-100, 1, 1, 0, 2]])
    expected = sum(-per_token.log_softmax(-1)[r, c, tags[r, c]] for r in range(2) for c in range(5) if tags[r, c] >= 0)
    torch.testing.assert_close(task_loss("token", per_token, tags), expected)
    assert count_items("token", tags) == 7
    assert count_items("classification", labels) == 4


def test_a_span_competes_over_tokens_only():
    logits = torch.zeros(2, 5, 2, dtype=torch.float64)
    is_token = torch.tensor([[True] * 5, [True, True, False, False, False]])
    hidden = hide_padding("span", logits, is_token)
    labels = torch.tensor([[0, 3], [1, 1]])
    # The first row chooses among 5 tokens, the second among 2.
    expected = torch.log(torch.tensor(5.0, dtype=torch.float64)) + torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(task_loss("span", hidden, labels), expected)
    assert distribution_logits("span", hidden, None).softmax(-1)[2].tolist() == [0.5, 0.5, 0, 0, 0]


def test_only_a_model_with_positions_in_its_input_keeps_their_table():
    names = {name for name, _ in model("classification", 2).named_parameters()}
    assert "embeddings.position.weight" not in names
    biased = TaskModel(
        DebertaConfig(vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, position_biased_input=True),
        HeadConfig(kind="classification", num_labels=2),
    )
    assert biased.embeddings.position is not None


@pytest.mark.parametrize(("kind", "num_labels"), [("regression", 2), ("choice", 4), ("span", 1)])
def test_a_head_with_a_fixed_number_of_outputs_refuses_others(kind, num_labels):
    with pytest.raises(ConfigError, match=f"num_labels={num_labels}"):
        HeadConfig(kind=kind, num_labels=num_labels)
