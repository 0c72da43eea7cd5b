"""Pictures and tables of pretraining, of pieces that mean something to those who draw them."""

from __future__ import annotations

import html
import io
import re

import torch
from tensorboard.plugin_util import markdown_to_safe_html

from deberta_xl.training.figures import confusion_figure, prediction_table

PIECES = ["▁the", "▁$$", "$x$", "$\\frac$", "|", "``", "▁`|", "\\", "*a*", "<b>", "&amp;", "_", "▁"]
ids = torch.arange(len(PIECES))


def test_the_confusion_of_pieces_that_look_like_formulas_is_drawn():
    figure = confusion_figure(ids, ids, PIECES.__getitem__)
    figure.savefig(io.BytesIO(), format="png")
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == PIECES
        assert not any(label.get_parse_math() for label in labels)


def test_the_table_of_predictions_shows_every_piece_as_it_is():
    shown = markdown_to_safe_html(prediction_table(ids, ids.flip(0), PIECES.__getitem__))
    cells = re.findall(r"<td><code>(.*?)</code></td>\s*<td><code>(.*?)</code></td>", shown)
    assert [html.unescape(label) for label, _ in cells] == PIECES
    assert [html.unescape(guess) for _, guess in cells] == PIECES[::-1]
    assert shown.count("<tr>") == 1 + len(PIECES)
