"""What an evaluation of replaced token detection makes of logits: the area under the curve, and texts with marks."""

import pytest
import torch

from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.model.replaced_tokens import Proposal
from deberta_xl.objectives.detection import BINS, LIMIT, DetectionEvaluation, area_under_curve, marked
from deberta_xl.objectives.evaluation import Evaluator
from deberta_xl.objectives.objective import Mean, Tally
from deberta_xl.objectives.rows import MaskedRows

REPORTS = {"loss": Mean("labels"), "generator_loss": Mean("labels"), "discriminator_loss": Mean("tokens"), "f": Tally()}


def evaluated(logits, is_replaced, loss: float = 1.0) -> dict[str, float | None]:
    """What is found of one row of such tokens."""
    run = Evaluator(model=None, device=torch.device("cpu"), is_first=False)
    found = DetectionEvaluation(run, REPORTS, ("labels", "tokens"))
    logits_BS, is_replaced_BS = torch.tensor([logits]), torch.tensor([is_replaced])
    proposal = Proposal(torch.tensor(1.0), torch.tensor([1]), torch.ones_like(is_replaced_BS).long(), is_replaced_BS)
    segments_BS = torch.ones_like(is_replaced_BS).long()
    rows = MaskedRows(segments_BS, segments_BS, LabelledPositions.of(torch.zeros_like(segments_BS)))
    figures = {name: torch.tensor(loss) for name in REPORTS}
    found.take((1, len(logits)), figures, proposal, logits_BS, rows)
    return dict(found.conclude(lambda totals: {"f1": None}, None).values)


def test_the_area_is_the_share_of_pairs_in_order_equal_ones_counting_half():
    originals, replaced = [-1.0, 0.5, -3.0], [0.5, 2.0, 7.0]
    pairs = [(a, b) for a in replaced for b in originals]
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    found = evaluated(originals + replaced, [False] * 3 + [True] * 3)
    assert found["auc"] == pytest.approx(expected)


def test_far_logits_keep_their_side():
    assert evaluated([1000.0, -1000.0], [True, False])["auc"] == 1
    assert evaluated([1000.0, -1000.0], [False, True])["auc"] == 0
    assert LIMIT < 1000


def test_there_is_no_area_without_both_kinds_nor_of_logits_that_are_no_numbers():
    assert area_under_curve(torch.ones(BINS), torch.zeros(BINS)) is None
    nan = float("nan")
    found = evaluated([nan, 1.0, -1.0], [True, False, True], loss=nan)
    assert found["auc"] is None
    assert found["discriminator_loss"] != found["discriminator_loss"]


def test_marked_neighbours_are_joined_so_that_bytes_make_a_character():
    class Pieces:
        vocab_size = 6

        def id_to_piece(self, token: int) -> str:
            return ["▁a", "<0xE6>", "<0x9D>", "<0xB1>", "▁b", "c"][token]

    text = marked([0, 1, 2, 3, 4, 5, 9], [False, True, True, True, False, False, True], Pieces())
    assert text == "a<strong>東</strong> bc<strong>&#91;ROW 9&#93;</strong>"
