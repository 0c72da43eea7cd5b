"""SentencePiece's character map as steps of the `tokenizers` library that give the same text.

SentencePiece replaces, from left to right, the longest sequence of characters that its map has. The library's
`Precompiled` looks at a grapheme at a time: of "…" with an accent it replaces the dots and drops the accent, and it
composes nothing of six bytes or more. So characters are first set apart, each a grapheme of its own, and the map's
sequences are put together afterwards:

1. END is put behind every sequence of the map, and behind every other character.
2. Inside a sequence BETWEEN is put between the characters.
3. `Precompiled` maps the characters one by one.
4. BETWEEN is taken out, and form C composes what is before an END, since nothing composes across it.
5. END is taken out.

Whether this gives what the map says is computed for every sequence; one of which it does not gets a step of its own.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from unicodedata import category, is_normalized

import numpy as np
from tokenizers import Regex, normalizers

from deberta_xl.data.tokenizer_json import BETWEEN_CHARACTERS

DELETED, BETWEEN, END, KEPT = BETWEEN_CHARACTERS
"""DELETED is BETWEEN where the map deletes it. The others are no characters: Unicode sets them aside for controls."""
IOTA_SUBSCRIPT = "\u0345"
"""Folded to an iota where it stands alone, but not where it is composed."""
ANY = "(?m:.)"
LAST_LETTER = 0x40000
"""Beyond it are tags and private characters only."""
MOST_STEPS = 64
"""Sequences that get a step of their own, at most."""


class CharacterMap(NamedTuple):
    """Steps that apply a map, and the sequences that they do not treat as the map says."""

    steps: list[normalizers.Normalizer]
    unlike: list[str]


@functools.lru_cache(maxsize=1)
def character_map(charsmap: bytes) -> CharacterMap:
    """The steps for a compiled map of SentencePiece."""
    rules = read_map(charsmap)
    sequences = {key: value for key, value in rules.items() if len(key) > 1}
    between = DELETED if rules.get(DELETED) == "" else BETWEEN
    precompiled = normalizers.Precompiled(charsmap)
    take_out = [] if between == DELETED else [normalizers.Replace(between, "")]
    if not sequences:
        apart = normalizers.Replace(Regex(rf"{ANY}\K(?={ANY})"), between)
        return CharacterMap([apart, precompiled, *take_out], [])
    tails = {character for key in sequences for character in key[1:]}
    kept = tails & {IOTA_SUBSCRIPT} & rules.keys()
    unit = rf"(?>{ANY}(?!{one_of(tails)})|{pattern_of(sequences)}|{ANY})\K"
    inside = f"(?<=[^{END}])"
    steps = [normalizers.Replace(Regex(unit), END)]
    steps += [normalizers.Replace(Regex(f"{inside}{character}"), KEPT) for character in kept]
    steps += [normalizers.Replace(Regex(f"{inside}(?=[^{END}])"), between), precompiled, *take_out]
    steps += [normalizers.Replace(KEPT, character) for character in kept]
    # A map that leaves alone what form C changes does not compose.
    form = [] if changed_by_form_c(rules) else [normalizers.NFC()]
    steps += [*form, normalizers.Replace(END, "")]
    unlike = [key for key in differing(rules, kept, form) if key in sequences]
    if len(unlike) > MOST_STEPS:
        return CharacterMap(steps, unlike)
    own = [normalizers.Replace(key, sequences[key]) for key in sorted(unlike, key=len, reverse=True)]
    return CharacterMap(own + steps, [])


def differing(rules: Mapping[str, str], kept: Iterable[str], form: Sequence[normalizers.Normalizer]) -> list[str]:
    """Keys that steps 3 and 4 do not turn into their values."""
    single = {key: value for key, value in rules.items() if len(key) == 1}
    inside = single | {character: character for character in kept}
    mapped = (single.get(key[0], key[0]) + "".join(inside.get(c, c) for c in key[1:]) for key in rules)
    composed = normalizers.Sequence(list(form)).normalize_str(END.join(mapped)).split(END)
    return [key for key, found in zip(rules, composed, strict=True) if found != rules[key]]


def changed_by_form_c(rules: Mapping[str, str]) -> bool:
    """Whether the map leaves alone single characters that form C does not."""
    planes = map(chr, (*range(1, 0xD800), *range(0xE000, LAST_LETTER)))
    # What Python's Unicode does not know yet the library's may.
    open_question = (c for c in planes if not is_normalized("NFC", c) or category(c) == "Cn")
    alone = [character for character in open_question if character not in rules and character not in BETWEEN_CHARACTERS]
    composed = normalizers.NFC().normalize_str(END.join(alone)).split(END)
    return alone != composed


def read_map(charsmap: bytes) -> dict[str, str]:
    """What a compiled map replaces, and by what: a double-array trie over UTF-8, then its values.

    Its units are those of the darts-clone library: label, offset to the children, whether a value is among them.
    """
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    values = charsmap[4 + size :]
    # A child lies at its parent's base, XOR its label; so its own place and label tell the base.
    bases = np.where(units >> 31 == 0, np.arange(len(units)) ^ (units & 0xFF), -1)
    order = np.argsort(bases, kind="stable")
    sorted_bases = bases[order]
    found: dict[str, str] = {}
    keys, level = [b""], offset_of(units[:1])
    while keys:
        first, behind = (np.searchsorted(sorted_bases, level, side=side) for side in ("left", "right"))
        counts = behind - first
        parents = np.repeat(np.arange(len(level)), counts)
        number_in_family = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
        places = order[first[parents] + number_in_family]
        is_child = units[places] & 0xFF > 0
        parents, places = parents[is_child], places[is_child]
        here, level = units[places], places ^ offset_of(units[places])
        labels = (here & 0xFF).astype(np.uint8)
        keys = [keys[parent] + bytes((label,)) for parent, label in zip(parents.tolist(), labels.tolist(), strict=True)]
        for number in np.flatnonzero(here >> 8 & 1).tolist():
            start = int(units[level[number]]) & 0x7FFFFFFF
            found[keys[number].decode()] = values[start : values.index(b"\0", start)].decode()
    return found


def offset_of(units: np.ndarray) -> np.ndarray:
    """Where the children of units are, relative to them."""
    return (units >> 10) << ((units & 0x200) >> 6)


def pattern_of(sequences: Iterable[str]) -> str:
    """A regular expression for the longest of the sequences; characters that are followed alike share a class."""
    rests: dict[str, set[str]] = defaultdict(set)
    for sequence in sequences:
        if sequence:
            rests[sequence[0]].add(sequence[1:])
    alike: dict[frozenset[str], list[str]] = defaultdict(list)
    for character, rest in rests.items():
        alike[frozenset(rest)].append(character)
    found = [one_of(characters) + (pattern_of(rest) if rest != {""} else "") for rest, characters in alike.items()]
    return f"(?:{'|'.join(found)}){'?' * ('' in sequences)}"


def one_of(characters: Iterable[str]) -> str:
    """A class of characters."""
    runs: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "[" + "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in runs) + "]"
