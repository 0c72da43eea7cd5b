"""The arithmetic of a step: shares, and what is told of several micro-batches."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.objectives.micro_batch import on_device, with_tensors
from deberta_xl.objectives.objective import Mean, Ratio
from deberta_xl.training.step import check_figures, even_shares, over_micro_batches


class Inner(NamedTuple):
    """Tensors inside a micro-batch."""

    slots: Tensor


class Batch(NamedTuple):
    """A micro-batch with two counts."""

    ids: Tensor
    inner: Inner
    counts: tuple[int, int]


def test_each_count_has_a_share_of_its_own_and_their_means_are_the_global_ones():
    # Two ranks of two micro-batches: (sum of losses, labels) and (sum of losses, tokens) of each.
    first, second = [(6.0, 3), (1.0, 1), (0.0, 0), (8.0, 4)], [(9.0, 9), (5.0, 10), (7.0, 7), (4.0, 4)]
    labels, tokens = (sum(count for _, count in of_all) for of_all in (first, second))
    shares = even_shares({"labels": labels, "tokens": tokens}, 2, 2)
    reports = {"loss": Mean("labels"), "other": Mean("tokens"), "right": Ratio("labels")}
    found = [
        {
            "loss": torch.tensor(a / shares["labels"]),
            "other": torch.tensor(b / shares["tokens"]),
            "right": torch.tensor(number),
        }
        for (a, number), (b, _) in zip(first, second, strict=True)
    ]
    ranks = [over_micro_batches(found[:2], reports), over_micro_batches(found[2:], reports)]
    assert float(ranks[0]["loss"] + ranks[1]["loss"]) / 2 == pytest.approx(15 / labels)
    assert float(ranks[0]["other"] + ranks[1]["other"]) / 2 == pytest.approx(25 / tokens)
    assert [int(rank["right"]) for rank in ranks] == [4, 4]
    assert even_shares({"labels": 0}, 2, 2) == {"labels": 0.25}, "a step without labels divides by something"


def test_a_figure_that_is_not_reported_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"losses give accuracy, but its reports have only loss: say there what each"):
        over_micro_batches([{"loss": torch.zeros(()), "accuracy": torch.zeros(())}], {"loss": Mean("labels")})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"accuracy": torch.zeros(())}, "losses give no loss, which its reports have"),
        ({"loss": torch.zeros(3)}, r"losses give a tensor \[3\] as loss, where one number on the device is needed"),
        ({"loss": torch.zeros(1)}, r"losses give a tensor \[1\] as loss"),  # trains, but is not added up in evaluation
        ({"loss": 0.0}, "losses give a Python float as loss, where one number"),
    ],
)
def test_a_figure_that_is_missing_or_no_number_is_refused_before_the_backward_pass(found, words):
    with pytest.raises(ConfigError, match=words):
        check_figures(found, {"loss": Mean("labels")})
    check_figures({"loss": torch.zeros(())}, {"loss": Mean("labels")})


def test_tensors_of_a_micro_batch_move_wherever_they_are_and_counts_stay():
    batch = Batch(torch.arange(3), Inner(torch.ones(2)), (3, 2))
    moved = on_device(batch, torch.device("meta"))
    assert (moved.ids.device.type, moved.inner.slots.device.type, moved.counts) == ("meta", "meta", (3, 2))
    assert with_tensors(batch, lambda tensor: tensor + 1).ids.tolist() == [1, 2, 3]
