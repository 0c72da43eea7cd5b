"""Entities in every scheme of tags against conlleval's own rules, and files of a word a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deberta_xl.base.errors import TaskDataError
from deberta_xl.tasks.entity_tags import scheme_of
from deberta_xl.tasks.labels import class_weights, encode_labels, labels_of, labels_to_score
from deberta_xl.tasks.metrics import check_defined, evaluate_metrics
from deberta_xl.tasks.predictions import Prediction
from deberta_xl.tasks.reading import read_split
from deberta_xl.tasks.task import Example, Source, Task, load_task

CONLLEVAL = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
ENDS = {("B", "B"), ("B", "S"), ("B", "O"), ("I", "B"), ("I", "S"), ("I", "O")}
STARTS = {("E", "E"), ("E", "I"), ("S", "E"), ("S", "I"), ("O", "E"), ("O", "I")}


def conlleval(tags: list[tuple[str, str]]) -> set[tuple[str, int, int]]:
    """Chunks by endOfChunk and startOfChunk of conlleval.pl, from its letters and types."""
    found, start = set(), None
    before = ("O", "")
    for number, (tag, kind) in enumerate([*tags, ("O", "")]):
        changes = before[1] != kind
        if start is not None and (before[0] in "ES" or (before[0], tag) in ENDS or (before[0] != "O" and changes)):
            found.add((before[1], start, number))
            start = None
        if tag in "BS" or (before[0], tag) in STARTS or (tag != "O" and changes):
            start = number
        before = (tag, kind)
    return found


@pytest.mark.parametrize("letters", ["I", "BI", "IE", "BIES", "BILU", "BMES", "BMEW"])
@pytest.mark.parametrize("look", ["{0}-{1}", "{1}-{0}", "{0}_{1}", "{1}_{0}", "{0}", "small"])
def test_random_tags_of_every_scheme_delimit_conllevals_entities(letters, look):
    generator = np.random.default_rng(len(letters))
    kinds = [""] if look == "{0}" else ["PER", "product-other"]
    pairs = [(letter, kind) for letter in letters for kind in kinds] + [("O", "")]
    if look == "small":
        written = {(letter, kind): f"{letter.lower()}-{kind}" if kind else "o" for letter, kind in pairs}
    else:
        written = {pair: "O" if pair[0] == "O" else look.format(*pair) for pair in pairs}
    scheme = scheme_of(sorted(written.values()))
    for _ in range(150):
        drawn = [pairs[n] for n in generator.integers(len(pairs), size=9)]
        expected = conlleval([(CONLLEVAL.get(letter, "O"), kind) for letter, kind in drawn])
        assert scheme.entities([written[pair] for pair in drawn]) == expected


def test_types_alone_are_entities_as_long_as_they_last():
    scheme = scheme_of(["LOC", "O", "PER"])
    assert scheme.entities(["PER", "PER", "LOC", "O", "LOC"]) == {("PER", 0, 2), ("LOC", 2, 3), ("LOC", 4, 5)}
    assert scheme_of(["OTHER", "PER"]).entities(["PER", "OTHER"]) == {("PER", 0, 1)}
    assert scheme_of(["_", "B-X"]).entities(["B-X", "_"]) == {("X", 0, 1)}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["B-X", "X", "O"], "'B-X' have letters for a place in an entity, 'X' have none"),
        (["S-X", "U-X", "O"], "in no known scheme"),
        (["BPER", "IPER", "O"], "nothing separates them"),
        (["0", "1", "2"], "are numbers: give their names by label_names"),
        (["(PER*", "*)", "*"], "none of them is for words outside"),
        (["(PER*", "*)", "O"], "have brackets"),
        (["NN", "VB"], "none of them is for words outside entities"),
        (["NE=B-PER", "NE=I-PER", "_"], "have letters"),
        (["B-PER", "I-per", "O"], "the types 'PER' and 'per' differ only in capital letters"),
    ],
)
def test_tags_of_no_known_scheme_are_refused_before_they_are_measured(labels, message):
    task = Task(name="t", head="token", metrics=["span_f1"], sources=[Source(files={})])
    with pytest.raises(TaskDataError, match=message):
        check_defined(task, labels, [Example("0", ("x",), (0,))], where="here")


def test_wrong_predictions_of_other_schemes_are_not_right():
    task = Task(name="t", head="token", metrics=["span_f1"], sources=[Source(files={})])
    for labels in (["PER-B", "PER-I", "O"], ["B_PER", "I_PER", "O"], ["B-PER", "L-PER", "O"], ["PER", "LOC", "O"]):
        found = [Prediction((1, 0, 2), None)]
        assert evaluate_metrics(task, labels, [Example("0", ("x",) * 3, (0, 1, 2))], found) == {"span_f1": 0.0}


def read(folder: Path, text: str, **source: object) -> list[tuple[tuple[str, ...], tuple[str, ...] | None]]:
    """Words and tags of a file's sentences."""
    (folder / "train.txt").write_bytes(text.encode())
    task = Task(
        name="t", head="token", metrics=["span_f1"],
        sources=[Source(files={"test": "train.txt"}, format="conll", **source)],
    )  # fmt: skip
    return [(example.texts, example.label) for example in read_split(task, folder, "test")]


TWO = [(("EU", "left"), ("B-ORG", "O")), (("Peter",), ("B-PER",))]
LAYOUTS = {
    "tabs": "EU\tB-ORG\nleft\tO\n\nPeter\tB-PER\n",
    "spaces": "EU   B-ORG\nleft O  \n\nPeter B-PER",
    "mixed": "EU\tB-ORG\nleft O\n\nPeter B-PER\n",
    "no-break spaces": "EU\u00a0B-ORG\nleft\u00a0O\n\nPeter\u00a0B-PER\n",
    "commas": "EU,B-ORG\nleft,O\n\nPeter,B-PER\n",
    "carriage returns": "EU B-ORG\r\nleft O\r\n\r\nPeter B-PER\r\n",
    "carriage returns alone": "EU B-ORG\rleft O\r\rPeter B-PER\r",
    "blank lines of blanks": "\ufeffEU B-ORG\nleft O\n \t \n\u00a0\n\nPeter B-PER\n\n\n",
    "documents": "-DOCSTART- -X- O\n\n-DOCSTART-\tO\nEU NNP B-ORG\nleft VB O\n\n-DOCSTART- O\nPeter NNP B-PER\n",
    "comments": "# sent_id = 1\n# text = EU left\nEU _ B-ORG\nleft _ O\n\n# id 4\tdomain=x\n\nPeter _ B-PER\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_and_tags_are_read_in_every_layout(tmp_path, layout):
    assert read(tmp_path, LAYOUTS[layout]) == TWO


def test_words_may_hold_what_does_not_separate_the_columns(tmp_path):
    assert read(tmp_path, "New York\tB-LOC\n\u3000\tO\n1,000\tO\n") == [
        (("New York", "\u3000", "1,000"), ("B-LOC", "O", "O"))
    ]
    assert read(tmp_path, "# B-X\n1,000 O\n#id O\n") == [(("#", "1,000", "#id"), ("B-X", "O", "O"))]
    assert read(tmp_path, "#love\tO\n@you\tB-X\n") == [(("#love", "@you"), ("O", "B-X"))]
    assert read(tmp_path, '","\tO\n"\tB-X\n') == [(('","', '"'), ("O", "B-X"))]
    assert read(tmp_path, "Peter\n1,000\n\nleft\n") == [(("Peter", "1,000"), None), (("left",), None)]


def test_another_column_is_read_by_its_name_and_ranges_of_words_are_passed_over(tmp_path):
    text = "# text = Au\n1-2\tAu\t_\t_\n1\tA\tADP\t_\n2\tle\tDET\t_\n"
    header = ["id", "form", "upos", "misc"]
    assert read(tmp_path, text, header=header, first="form", label="upos") == [(("A", "le"), ("ADP", "DET"))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("New York B-LOC\nleft O\nit O\n", "train.txt:1: 3 columns, where most lines have 2"),
        ("EU\tB-ORG\nleft\nnow\tO\n", "train.txt:2: 1 columns, where most lines have 2"),
        ("EU\tB-ORG\n\tO\nnow\tO\n", "train.txt:2: 1 columns"),
        ("1\tEU\tB-ORG\n2\tleft\tO\n", "the first one counts the words"),
        ("B-ORG EU\nO left\n", "entity tags are in column 1, not in the last one"),
        ("EU B-ORG NNP\nleft O VB\n", "entity tags are in column 2, not in the last one"),
        ("word,tag\nEU,B-ORG\n", r"the first line, \['word', 'tag'\], names them: delete it"),
    ],
)
def test_columns_that_would_be_read_wrong_are_refused_with_what_to_write(tmp_path, text, message):
    with pytest.raises(TaskDataError, match=message):
        read(tmp_path, text)


def test_a_file_in_utf16_is_read_and_one_in_another_encoding_is_no_latin(tmp_path):
    task = load_task("conll")
    (tmp_path / "test.txt").write_bytes("東京 B-LOC\n".encode("utf-16"))
    assert read_split(task, tmp_path, "test")[0].texts == ("東京",)
    for encoding in ("utf-16-le", "shift-jis", "euc-jp"):
        (tmp_path / "test.txt").write_bytes("東京 B-LOC\n大阪 O\n".encode(encoding))
        with pytest.raises(TaskDataError, match="iconv -f"):
            read_split(task, tmp_path, "test")
    (tmp_path / "test.txt").write_bytes("Málaga is in the south B-LOC".replace(" ", "\n").encode("latin-1"))
    assert read_split(task, tmp_path, "test")[0].texts[0] == "Málaga"


def test_a_tag_that_only_held_out_files_have_counts_and_is_never_right():
    task = load_task("conll")
    train = [Example("0", ("a", "b"), ("B-PER", "O"))]
    valid = [Example("0", ("a", "b"), ("B-ORG", "O"))]
    labels = labels_of(task, train, {"valid": valid})
    assert labels == ["B-PER", "O", "B-ORG"]
    encoded = encode_labels(task, labels, valid, where="here")
    assert evaluate_metrics(task, labels, encoded, [Prediction((0, 1), None)])["span_f1"] == 0.0
    assert class_weights(task, 3, encode_labels(task, labels, train, where="here")).tolist() == [1.0, 1.0, 1.0]
    assert labels_to_score(task, ["B-PER", "O"], valid, "test") == ["B-PER", "O", "B-ORG"]


def test_held_out_tags_of_another_scheme_or_written_in_another_way_are_no_further_classes():
    task = load_task("conll")
    train = [Example("0", ("a", "b", "c"), ("B-PER", "I-PER", "O"))]
    singles = [Example("0", ("a", "b"), ("S-PER", "O"))]
    with pytest.raises(TaskDataError, match=r"trained on tags of IOB .*'S-PER' \(1 words of valid\): one scheme"):
        labels_of(task, train, {"valid": singles})
    with pytest.raises(TaskDataError, match="one scheme for all"):
        labels_to_score(task, ["B-PER", "L-PER", "O"], singles, "test")
    assert labels_to_score(load_task("stsb"), [], [Example("0", ("a",), 1.5)], "test") == []
    small = [Example("0", ("a", "b"), ("b-per", "O"))]
    assert labels_to_score(task, ["B-PER", "O"], small, "test") == ["B-PER", "O"]
    with pytest.raises(TaskDataError, match=r"unknown labels 'b-per' .*differ only in capital letters"):
        encode_labels(task, ["B-PER", "O"], small, where="here")
