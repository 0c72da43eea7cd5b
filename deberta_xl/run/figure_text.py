"""Names in pictures, in any script: by fonts that have their characters, or as numbers, with a legend in text."""

from __future__ import annotations

import functools
import string
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import font_manager
from matplotlib.figure import Figure

LONGEST = 24
"""Columns of a terminal that a name may take; a longer one loses its middle."""
FIRST_FONT = "DejaVu Sans"
"""matplotlib brings it along; it has Latin, Greek, Cyrillic, Arabic, Hebrew and many signs."""
WIDE_FONTS = ("cjk", "noto sans", "source han", "ipa", "wenquanyi", "droid sans fallback", "arial unicode", "unifont")
"""Parts of the names of fonts with many scripts, which are looked into first."""
UNSEEN = ("Cc", "Cs", "Cn", "Co", "Zl", "Zp")
"""Unicode's categories of what has no look: controls, halves, unassigned and private characters, ends of lines."""
PLACEHOLDERS = "last resort"
"""A font that draws the same box for every character."""


class Names(NamedTuple):
    """Names as a picture shows them."""

    shown: list[str]
    """Each different from all others."""
    families: list[str]
    """Fonts that have all their characters, the first choice first."""
    legend: list[tuple[str, str]]
    """What is shown, and the whole name, where the two differ."""


class Picture(NamedTuple):
    """A figure, and what its reader needs beside it."""

    figure: Figure
    legend: list[tuple[str, str]] = []  # noqa: RUF012 (never changed)
    """What is shown, and the whole name, for names that could not be shown."""


def names_for(names: Sequence[str]) -> Names:
    """The names as they can be drawn here: long ones shortened, those without a font as their number."""
    printable = [visible_controls(name) for name in names]
    needed = {c for name in printable for c in name if needs_glyph(c)}
    fonts = fonts_with(frozenset(needed))
    shown: list[str] = []
    for number, name in enumerate(printable, 1):
        short = shortened(name) if all(c in fonts for c in name if needs_glyph(c)) else f"#{number}"
        shown.append(f"{short} #{number}" if short in shown else short)
    used = {fonts[c] for c in needed if c in fonts}
    families = [FIRST_FONT, *sorted(used - {FIRST_FONT})]
    return Names(shown, families, [(a, b) for a, b in zip(shown, names, strict=True) if a != b])


def visible_controls(name: str) -> str:
    """A name whose control characters, halves and unknown characters are escapes."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in UNSEEN else c for c in name)


def needs_glyph(character: str) -> bool:
    """Whether a character is drawn; blanks, joiners and selectors are not."""
    is_selector = 0xFE00 <= ord(character) <= 0xFE0F or ord(character) >= 0xE0000
    return not (character.isspace() or is_selector or unicodedata.category(character) == "Cf")


def columns_of(name: str) -> int:
    """Columns that a name takes on a terminal."""
    wide = ("W", "F")
    return sum(2 if unicodedata.east_asian_width(c) in wide else not unicodedata.combining(c) for c in name)


def shortened(name: str) -> str:
    """A name whose middle is left out where it is long: both ends tell names apart."""
    if columns_of(name) <= LONGEST:
        return name
    head, tail = len(name), 0
    while columns_of(name[:head]) > LONGEST // 2:
        head -= 1
    while columns_of(name[len(name) - tail - 1 :]) < LONGEST // 2:
        tail += 1
    return f"{name[:head]}…{name[len(name) - tail :]}"


KNOWN: dict[str, str | None] = {}
"""Character -> family of a font that has it, None where none has: fonts are opened once for a character."""


def fonts_with(characters: frozenset[str]) -> dict[str, str]:
    """Character -> an installed font that has it; characters that none has are left out."""
    missing = {c for c in characters if c not in KNOWN}
    for entry in installed_fonts() if missing else ():
        try:
            font = font_manager.get_font(entry.fname)
        except (OSError, RuntimeError):  # gone since, or damaged
            continue
        found = {c for c in missing if font.scalable and font.get_char_index(ord(c))}
        KNOWN.update(dict.fromkeys(found, entry.name))
        missing -= found
        if not missing:
            break
    KNOWN.update(dict.fromkeys(missing))
    return {c: family for c in characters if (family := KNOWN[c]) is not None}


@functools.cache
def installed_fonts() -> tuple[font_manager.FontEntry, ...]:
    """One upright font of each family, those with most scripts first."""
    entries = [e for e in font_manager.fontManager.ttflist if PLACEHOLDERS not in e.name.lower()]
    upright = {e.name: e for e in reversed(entries) if e.style == "normal" and str(e.weight) in ("400", "normal")}

    def rank(entry: font_manager.FontEntry) -> tuple[bool, bool, str]:
        name = entry.name.lower()
        return entry.name != FIRST_FONT, not any(wide in name for wide in WIDE_FONTS), name

    return tuple(sorted(upright.values(), key=rank))


def literal(text: str) -> str:
    """A text as code in a Markdown table, whatever it is made of."""
    return f"<code>{plain(text)}</code>"


def plain(text: str) -> str:
    """A text that Markdown and HTML leave as it is: entities mean nothing to either."""
    return "".join(f"&#{ord(c)};" if c in string.punctuation or c in "\n\r\t" else c for c in text)


def legend_table(legend: Sequence[tuple[str, str]]) -> str:
    """A legend as a Markdown table."""
    rows = (f"| {plain(short)} | {literal(name)} |" for short, name in legend)
    return "\n".join(["| in the picture | name |", "|---|---|", *rows])


def legend_lines(legend: Sequence[tuple[str, str]]) -> str:
    """A legend as lines of a text file."""
    return "".join(f"{short}\t{visible_controls(name)}\n" for short, name in legend)
