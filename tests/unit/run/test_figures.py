"""Pictures and tables of pretraining, of pieces that mean something to those who draw them."""

from __future__ import annotations

import html
import io
import re
import warnings

import pytest
import torch
from matplotlib import font_manager
from tensorboard.plugin_util import markdown_to_safe_html

from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.objectives.masked_examples import MaskedExamples
from deberta_xl.objectives.rows import MaskedRows
from deberta_xl.objectives.task_figures import class_confusion
from deberta_xl.run import figure_text
from deberta_xl.run.figure_text import Names, installed_fonts, legend_lines, legend_table, names_for
from deberta_xl.run.figures import confusion_figure

PIECES = ["▁the", "▁$$", "$x$", "$\\frac$", "|", "``", "▁`|", "\\", "*a*", "<b>", "&amp;", "_", "▁"]
MASK = 99
ids = torch.arange(len(PIECES))


def test_the_confusion_of_pieces_that_look_like_formulas_is_drawn():
    figure = confusion_figure(ids, ids, PIECES.__getitem__).figure
    figure.savefig(io.BytesIO(), format="png")
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == PIECES
        assert not any(label.get_parse_math() for label in labels)


def batch_of(rows: list[list[int]], masked: list[tuple[int, int]]) -> MaskedRows:
    """A batch whose places (row, column) are masked."""
    ids = torch.tensor(rows)
    labels = torch.zeros_like(ids)
    for row, column in masked:
        labels[row, column] = ids[row, column]
    return MaskedRows(ids.masked_fill(labels > 0, MASK), (ids > 0).long(), LabelledPositions.of(labels))


def test_the_table_of_predictions_shows_every_piece_as_it_is_in_its_text():
    examples = MaskedExamples()
    rows = [[1 + number, 20, 0, 0] for number in range(len(PIECES))]
    pieces = ["[PAD]", *PIECES, *["x"] * 8]
    assert len(list(examples.watch([batch_of(rows, [(row, 0) for row in range(len(rows))])]))) == 1
    shown = markdown_to_safe_html(examples.table(ids.flip(0) + 1, pieces.__getitem__))
    cells = re.findall(r"<td><code>(.*?)</code></td>\s*<td><code>(.*?)</code></td>", shown)
    assert [html.unescape(label) for label, _ in cells] == PIECES
    assert [html.unescape(guess) for _, guess in cells] == PIECES[::-1]
    assert shown.count("<tr>") == 1 + len(PIECES)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["[CLS]", "▁The", "▁<b>", "▁cat", "▁|", "▁sat", "[SEP]"], "[CLS] The <b> [MASK] | sat[SEP]"),
        (["[CLS]", "吾輩", "は", "猫", "である", "。", "[SEP]"], "[CLS]吾輩は[MASK]である。[SEP]"),
        (["<0xE9>", "<0xB7>", "<0x97>", "外", "[MASK]", "▁مرحبا", "A"], "鷗[MASK][MASK] مرحباA"),
    ],
)
def test_a_masked_place_stands_in_its_text_in_every_script(pieces, text):
    examples = MaskedExamples()
    row = list(range(1, len(pieces) + 1))
    list(examples.watch([batch_of([[*row, 0, 0]], [(0, 3)])]))
    names = {MASK: "[MASK]", 0: "[PAD]", **dict(zip(row, pieces, strict=True))}
    shown = markdown_to_safe_html(examples.table(torch.tensor([4]), names.__getitem__))
    cell = re.search(r"<td>(.*?)</td>", shown)[1]
    assert html.unescape(re.sub("</?strong>", "", cell)) == text
    assert html.unescape(cell).count("<strong>[MASK]</strong>") == 1


def test_names_without_a_font_are_numbers_with_a_legend_and_nothing_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(figure_text, "KNOWN", {})
    monkeypatch.setattr(figure_text, "installed_fonts", lambda: (dejavu_sans(),))
    labels = [
        "会話",
        "地の文",
        "Щ é ١ ﻻ שלום",
        "a" * 30 + "b",
        "a" * 30 + "c",
        "a" * 25 + "ab",
        "tab\tline\n",
        "$x$",
        "❤\ufe0f",
    ]
    names = names_for(labels)
    assert names.shown[:3] == ["#1", "#2", labels[2]]
    assert names.shown[3] == f"{'a' * 12}…{'a' * 10}b"
    assert names.shown[6:] == ["tab\\tline\\n", "$x$", "❤\ufe0f"]
    assert len(set(names.shown)) == len(labels)
    pairs = zip(names.shown, labels, strict=True)
    assert names.legend == [(short, label) for short, label in pairs if short != label]
    assert legend_lines(names.legend).splitlines()[:2] == ["#1\t会話", "#2\t地の文"]
    assert "会話" in markdown_to_safe_html(legend_table(names.legend))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = [(number, number) for number in range(len(labels))]
        class_confusion(labels, pairs).figure.savefig(tmp_path / "confusion.png")


def test_a_font_that_has_the_characters_is_taken(monkeypatch):
    monkeypatch.setattr(figure_text, "KNOWN", {})
    entry = next(entry for entry in INSTALLED if entry.name == "STIXGeneral")
    monkeypatch.setattr(figure_text, "installed_fonts", lambda: (dejavu_sans(), entry))
    codes = font_manager.get_font(entry.fname).get_charmap()
    lacking = next(chr(code) for code in codes if code < 0xE000 and not has(dejavu_sans(), code))
    names = names_for(["plain", lacking])
    assert names == Names(["plain", lacking], ["DejaVu Sans", "STIXGeneral"], [])


INSTALLED = installed_fonts()


def dejavu_sans() -> font_manager.FontEntry:
    """The font that comes with matplotlib."""
    return next(entry for entry in INSTALLED if entry.name == "DejaVu Sans")


def has(entry: font_manager.FontEntry, code: int) -> bool:
    """Whether a font has a character."""
    return bool(font_manager.get_font(entry.fname).get_char_index(code))
