"""Texts of invented words in several scripts and forms."""

from __future__ import annotations

import random

RANDOM = random.Random(2)
KANA, HAN = "はがをにでのともへかられた", [chr(0x4E00 + n) for n in range(300)]


def word(letters, longest: int) -> str:
    """An invented word."""
    return "".join(RANDOM.choices(letters, k=RANDOM.randint(2, longest)))


ARABIC = [word("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", 5) for _ in range(300)]
GERMAN = [word("aäbcdeéfghijklmnoöprsßtuüvwz", 8) for _ in range(300)]
ENGLISH = [word("etaoinshrdlucmfwypvbg", 7) for _ in range(300)]
KANJI = [word(HAN, 3) for _ in range(200)]


def sentence(language: str) -> str:
    """A sentence of invented words."""
    if language == "ja":
        return "".join(RANDOM.choice(KANJI) + RANDOM.choice(KANA) for _ in range(RANDOM.randint(3, 8))) + "。"
    words = {"ar": ARABIC, "de": GERMAN, "en": ENGLISH}[language]
    return " ".join(RANDOM.choices(words, k=RANDOM.randint(4, 9))).capitalize() + "."


def sample(language: str, form: str) -> str:
    """Some 30,000 characters in a form."""
    if language == "dna":
        text = "".join(RANDOM.choices("ACGT", k=30_000))
        return text if form == "one line" else "\n".join(text[n : n + 60] for n in range(0, len(text), 60))
    separator = {"blank lines": "\n\n", "a line each": "\n", "novel": "\n", "one line": " "}[form]
    count = 1 if form == "novel" else 8 if language != "ja" else 14
    documents = [" ".join(sentence(language) for _ in range(count)) for _ in range(1400 // count)]
    return separator.join(documents)
