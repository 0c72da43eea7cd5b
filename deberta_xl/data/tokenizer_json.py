"""What a `tokenizer.json` does, compared with the `spm.model` beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from deberta_xl.data.tokenizer_files import MODEL_FILE, TOKENIZER_FILE

#: Between characters, while they are normalised (see conversion/tokenizer_export.py).
SPACE_PATTERNS = (r"\s{2,}|[\n\r\t]", " {2,}", r" \z", r"\A ", " ")
FRAMES = {"single": ("[CLS]", "A", "[SEP]"), "pair": ("[CLS]", "A", "[SEP]", "B", "[SEP]")}
LARGEST_SCORE_DIFFERENCE = 1e-4


@dataclass
class Pipeline:
    """The rules in a `tokenizer.json`."""

    lower_case: bool = False
    split_by_punct: bool = False
    first_word_only: bool = False
    problems: list[str] = field(default_factory=list)


def check_pieces(whole: dict[str, Any], pieces: Sequence[tuple[str, float]], user_defined: Set[str]) -> list[str]:
    """What contradicts `pieces`, those of spm.model with their scores; `user_defined` ones are taken at any score."""
    model = whole.get("model") or {}
    if model.get("type", "Unigram") != "Unigram":
        return [f"{TOKENIZER_FILE} holds a {model['type']} model, {MODEL_FILE} a unigram model"]
    found = [tuple(entry) for entry in model.get("vocab") or []]
    if len(found) != len(pieces):
        return [f"{TOKENIZER_FILE} has {len(found)} pieces, {MODEL_FILE} {len(pieces)}"]
    for number, ((theirs, their_score), (ours, score)) in enumerate(zip(found, pieces, strict=True)):
        if theirs != ours:
            return [f"piece {number} is {theirs!r} in {TOKENIZER_FILE}, {ours!r} in {MODEL_FILE}"]
        if ours not in user_defined and abs(their_score - score) > LARGEST_SCORE_DIFFERENCE:
            return [f"piece {ours!r} weighs {their_score} in {TOKENIZER_FILE}, {score} in {MODEL_FILE}"]
    return []


def read_pipeline(whole: dict[str, Any], charsmap: bytes, normalize: Callable[[str], str]) -> Pipeline:
    """The rules of a `tokenizer.json`; `charsmap` is the character map of spm.model, `normalize` applies it."""
    pipeline = Pipeline()
    for step in steps(whole.get("normalizer"), "normalizers"):
        read_normalizer(step, charsmap, normalize, pipeline)
    for step in steps(whole.get("pre_tokenizer"), "pretokenizers"):
        read_pre_tokenizer(step, pipeline)
    template = whole.get("post_processor") or {}
    for name, expected in FRAMES.items():
        found = tuple(
            (part.get("SpecialToken") or part.get("Sequence") or {}).get("id") for part in template.get(name, [])
        )
        if found != expected:
            pipeline.problems.append(f"{TOKENIZER_FILE} frames a {name} text as {' '.join(map(str, found)) or 'it is'}")
    return pipeline


def steps(component: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a component, which may be a sequence of sequences."""
    if component is None:
        return
    if component.get("type") == "Sequence":
        for inner in component.get(key) or []:
            yield from steps(inner, key)
    else:
        yield component


def read_normalizer(step: dict[str, Any], charsmap: bytes, normalize: Callable[[str], str], pipeline: Pipeline) -> None:
    """Note what a step of the normaliser does."""
    kind = step.get("type")
    if kind == "Lowercase":
        pipeline.lower_case = True
    elif kind == "Precompiled":
        if base64.b64decode(step.get("precompiled_charsmap") or "") != charsmap:
            pipeline.problems.append(f"{TOKENIZER_FILE} has another character map than {MODEL_FILE}")
    elif kind == "Replace":
        kind_of_pattern, pattern = next(iter((step.get("pattern") or {}).items()), ("", ""))
        content = step.get("content") or ""
        is_between = {pattern, content} & set(BETWEEN_CHARACTERS)
        is_space = pattern in SPACE_PATTERNS and content in (" ", "")
        if not is_between and not is_space and not (kind_of_pattern == "String" and normalize(pattern) == content):
            pipeline.problems.append(f"{TOKENIZER_FILE} replaces {pattern!r} by {content!r}")
    elif kind not in ("NFC", "Strip", "Prepend"):
        pipeline.problems.append(f"the normaliser of {TOKENIZER_FILE} has a step {kind!r}")


def read_pre_tokenizer(step: dict[str, Any], pipeline: Pipeline) -> None:
    """Note what a step of the pre-tokeniser does."""
    kind = step.get("type")
    if kind == "Punctuation" and step.get("behavior") == "Isolated":
        pipeline.split_by_punct = True
    elif kind == "Metaspace" and step.get("replacement") == "\u2581":
        pipeline.first_word_only = step.get("prepend_scheme", "always") != "always"
    else:
        pipeline.problems.append(f"the pre-tokeniser of {TOKENIZER_FILE} has a step {kind!r}")


#: Characters that stand between the others while an exported tokenizer normalises them.
BETWEEN_CHARACTERS = ("\x01", "\U000e0fff", "\U000e0ffe", "\U000e0ffd")
