"""Tasks: the benchmarks' formats, users' own, framing and cutting, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from task_files import COPA_XML, FILES, write_task

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.architecture import IGNORED, HeadConfig
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.labels import class_weights, encode_labels, labels_of
from deberta_xl.tasks.reading import read_split, splits_of
from deberta_xl.tasks.records import TaskDataError, read_records
from deberta_xl.tasks.task import METRICS_OF, Example, Source, Task, load_task, task_names

PASSAGE = "The function returns a list of names. The list is empty when there are no names."
EXPECTED = {
    "sst2": [Example("0", ('a "good one',), "1"), Example("1", ("bad",), "0")],
    "cola": [Example("0", ("It works.",), "1"), Example("1", ("Works it.",), "0")],
    "stsb": [Example("0", ("a", "b"), 2.5)],
    "boolq": [Example("3", ("p", "q"), "true")],
    "copa": [Example("2", ("It fell. What happened as a result?", "x", "y"), 1.0)],
    "wic": [Example("0", ("run: I run.", "A run."), "false")],
    "wsc": [Example("0", ("Ann called but * she * left", "Ann"), "true")],
    "multirc": [
        Example("7/1/0", ("A name is bound.", "What? name"), "1", "7/1", "0"),
        Example("7/1/1", ("A name is bound.", "What? cat"), "0", "7/1", "1"),
        Example("7/2/2", ("A name is bound.", "Who? dog"), "1", "7/2", "2"),
    ],
    "record": [
        Example("5/0", ("Ann met Bob.\n.\nAnn left", "Ann met him"), "1", "5", "Ann", ("Ann",)),
        Example("5/1", ("Ann met Bob.\n.\nAnn left", "Bob met him"), "0", "5", "Bob", ("Ann",)),
    ],
    "squad2": [
        Example("a", (PASSAGE, "What does it return?"), ((21, "a list of names"),)),
        Example("b", (PASSAGE, "Who wrote it?"), ()),
    ],
    "conll": [
        Example("0", ("EU", "rejects"), ("B-ORG", "O")),
        Example("1", ("Peter", "Blackburn"), ("B-PER", "I-PER")),
    ],
    "race": [Example("high1.txt-0", ("It rained. What fell?", "w", "x", "y", "z"), 2.0)],
    "swag": [Example("0", ("A, b. He", "a", "b", "c", "d"), 2.0)],
    "trec": [Example("0", ("How far is it ?",), "NUM"), Example("1", ("Who was Galileo ?",), "HUM")],
}


@pytest.mark.parametrize("name", FILES)
def test_a_benchmarks_own_format_becomes_examples(tmp_path, name):
    task = load_task(name)
    examples = read_split(task, write_task(name, tmp_path), "train")
    assert examples == EXPECTED[name]
    encode_labels(task, labels_of(task, examples), examples, where="here")
    assert "train" in splits_of(task, tmp_path)


def test_the_first_release_of_copa_reads_alike(tmp_path):
    (tmp_path / "copa-dev.xml").write_text(COPA_XML)
    (example,) = read_split(load_task("copa"), tmp_path, "train")
    assert example == Example("1", ("It fell. What was the cause of this?", "It was red.", "It was dropped."), 1.0)


@pytest.mark.parametrize("name", task_names())
def test_every_built_in_task_can_be_read_and_has_a_head(name):
    task = load_task(name)
    HeadConfig(kind=task.head, num_labels=len(task.labels or "ab") if task.has_classes else 1 + (task.head == "span"))


OWN = """
head = "multi_label"
metrics = ["micro_f1"]
[[sources]]
files = { train = "mine.*" }
first = "text"
label = "topics"
separator = ";"
"""


@pytest.fixture
def own(tmp_path) -> Task:
    """A user's own task."""
    (tmp_path / "own.toml").write_text(OWN)
    return load_task(str(tmp_path / "own.toml"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "tsv", "csv", "parquet"])
def test_an_own_task_reads_every_kind_of_file(tmp_path, own, suffix):
    rows = [{"text": "one", "topics": "b;a"}, {"text": "two", "topics": ""}, {"text": "three", "topics": "a"}]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix in ("tsv", "csv"):
        separator = "\t" if suffix == "tsv" else ","
        path.write_text("".join(f"{separator.join(r)}\n" for r in [["text", "topics"], *(r.values() for r in rows)]))
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
        path.write_text(text)
    examples = read_split(own, tmp_path, "train")
    assert [example.texts for example in examples] == [("one",), ("two",), ("three",)]
    labels = labels_of(own, examples)
    assert labels == ["a", "b"]
    assert encode_labels(own, labels, examples[:1], where="here")[0].label == (1.0, 1.0)


def task_of(head: str, **options: object) -> Task:
    """A task in memory."""
    return Task(name="t", head=head, metrics=[METRICS_OF[head][0]], sources=[Source(files={"train": "x"})], **options)


def data_of(task: Task, examples: list[Example], tokenizer: object, **options: object) -> TaskData:
    """Examples, framed."""
    settings = {"sequence_length": 16, "document_stride": 4, "is_training": True, "where": "here"} | options
    return TaskData(task, labels_of(task, examples), examples, tokenizer, **settings)


def test_texts_are_framed_and_the_longer_one_is_cut(small_dataset):
    tokenizer = small_dataset.tokenizer
    task = task_of("regression")
    long, short = "the list of names in the module " * 9, "a name"
    data = data_of(task, [Example("0", (long, short), 1.0), Example("1", (short,), 2.0)], tokenizer)
    second = tokenizer.encode(short).tolist()
    first = tokenizer.encode(long).tolist()[: 16 - 3 - len(second)]
    batch = data.batch([0, 1])
    assert batch.input_ids[0].tolist() == [1, *first, 2, *second, 2]
    assert batch.input_ids[1].tolist() == [1, *second, 2] + [0] * (14 - len(second))
    assert batch.segments.sum(1).tolist() == [16, len(second) + 2]
    assert batch.token_types[0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert batch.token_types[1].sum() == 0
    assert batch.labels.tolist() == [1.0, 2.0]
    assert data.cuts.truncated == 1


def test_the_first_piece_of_a_word_carries_its_tag_and_words_that_do_not_fit_are_counted(small_dataset):
    examples = [
        Example("0", ("implementation", "of", "names"), ("A", "O", "B")),
        Example("1", ("x",) * 40, ("O",) * 40),
    ]
    data = data_of(task_of("token"), examples, small_dataset.tokenizer)
    labels, ids = data.batch([0, 1]).labels, data.batch([0]).input_ids[0]
    starts = [1]
    for word in examples[0].texts:
        starts.append(starts[-1] + len(small_dataset.tokenizer.encode(word)))
    assert [(p, labels[0, p]) for p in starts[:3]] == list(zip(starts[:3], (0, 2, 1), strict=True))
    assert (labels[0] != IGNORED).sum() == 3
    assert ids[starts[3]] == small_dataset.tokenizer.sep_id
    assert data.cuts.truncated == 1


def test_windows_cover_a_long_context_and_hold_the_answer(small_dataset):
    tokenizer = small_dataset.tokenizer
    text, answer = f"{PASSAGE} " * 4, "list of names"
    example = Example("0", (text, "What is returned?"), ((text.rindex(answer), answer),))
    data = data_of(task_of("span"), [example], tokenizer, sequence_length=32, document_stride=8)
    covered = set()
    found = 0
    for feature in data.features:
        assert len(feature.rows[0].input_ids) <= 32
        inside = feature.places[feature.places[:, 0] >= 0]
        covered |= {c for start, end in inside for c in range(start, end)}
        if feature.label != (0, 0):
            found += 1
            first, last = feature.label
            assert text[feature.places[first, 0] : feature.places[last, 1]] == answer
    assert covered == {c for c, character in enumerate(text) if not character.isspace()}
    assert found >= 1


def test_answers_that_are_not_in_their_text_are_left_out_and_counted(small_dataset):
    good = Example("0", (PASSAGE, "What?"), ((21, "a list of names"),))
    wrong = Example("1", (PASSAGE, "What?"), ((20, "a list of names"),))
    data = data_of(task_of("span"), [good, wrong], small_dataset.tokenizer, sequence_length=64)
    assert {feature.example for feature in data.features} == {0}
    assert data.cuts.mismatched == 1
    with pytest.raises(TaskDataError, match="no answer is where its example says"):
        data_of(task_of("span"), [wrong], small_dataset.tokenizer)


def test_a_split_of_whose_labels_none_fits_is_refused(small_dataset):
    long = "implementation" * 9
    words = [Example("0", (long, "x"), ("A", "B")), Example("1", ("x", long), ("B", "A"))]
    assert data_of(task_of("token"), words, small_dataset.tokenizer).cuts.truncated == 2  # one word of four fits
    for is_training in (True, False):
        with pytest.raises(TaskDataError, match="not even the first word of any of 1 examples fits"):
            data_of(task_of("token"), words[:1], small_dataset.tokenizer, is_training=is_training)
    start = PASSAGE.index("a list")
    answers = [
        Example("0", (PASSAGE, "What?"), ((start, PASSAGE[start:]),)),
        Example("1", (PASSAGE, "?"), ((start, "a"),)),
    ]
    data = data_of(task_of("span"), answers, small_dataset.tokenizer)
    assert (data.cuts.unreached, data.cuts.mismatched) == (1, 0)
    with pytest.raises(TaskDataError, match="none of 1 answers fits into a window"):
        data_of(task_of("span"), answers[:1], small_dataset.tokenizer)


def test_text_that_the_tokenizer_knows_nothing_of_is_refused_for_training_and_counted(small_dataset):
    examples = [Example("0", ("ख",), 1.0), Example("1", ("ग",), 2.0)]
    with pytest.raises(TaskDataError, match=r"here: all of the text is empty, or \[UNK\] to the model"):
        data_of(task_of("regression"), examples, small_dataset.tokenizer)
    assert 0.3 < data_of(task_of("regression"), examples, small_dataset.tokenizer, is_training=False).unknown_share <= 1
    assert data_of(task_of("regression"), [Example("0", ("names",), 1.0)], small_dataset.tokenizer).unknown_share == 0


def test_places_of_pieces_are_those_of_their_characters(small_dataset):
    text = "Un café,  ½ ﬁne — naïve names"
    ids, places = small_dataset.tokenizer.encode_with_places(text)
    assert ids == small_dataset.tokenizer.encode(text).tolist()
    covered = sorted({place for a, b in places for place in range(a, b)})
    assert "".join(text[place] for place in covered) == "".join(text.split())
    assert np.all(np.diff(places, axis=0) >= 0)
    # What one character became shares it.
    assert [text[a:b] for a, b in places].count("½") == 3


def test_balanced_weights_have_mean_one(small_dataset):
    examples = [Example(str(n), ("x",), n % 4 == 0) for n in range(20)]
    weights = class_weights(task_of("classification"), 2, [e._replace(label=int(e.label)) for e in examples])
    assert weights.tolist() == pytest.approx([20 / (2 * 15), 2.0])
    with pytest.raises(TaskDataError, match="no training example has class 2"):
        class_weights(task_of("classification"), 3, [e._replace(label=int(e.label)) for e in examples])


def read_and_encode(task: Task, folder: Path) -> None:
    """Everything that checks a training split."""
    examples = read_split(task, folder, "train")
    encode_labels(task, labels_of(task, examples), examples, where="here")


BAD = [
    ("sst2", {"train.tsv": "text\tlabel\na\t1\n"}, "train.tsv:2: no column 'sentence' .* there are: text, label"),
    ("sst2", {"train.tsv": "sentence\tlabel\n"}, "the train split is empty"),
    ("sst2", {"train.tsv": "sentence\tlabel\nx\n"}, "train.tsv:2: 1 columns, expected 2"),
    ("sst2", {"train.tsv": "sentence\tlabel\nx\t2\ny\t2\n"}, r"unknown labels '2' \(2 times\); task sst2 has: 0, 1"),
    ("sst2", {}, "no train file of task sst2; looked for: train.tsv; or stsa.binary.train"),
    ("stsb", {"train.tsv": "sentence1\tsentence2\tscore\na\tb\tgood\n"}, "holds 'good', a number is expected"),
    ("stsb", {"train.tsv": "sentence1\tsentence2\tscore\na\tb\tnan\n"}, "a finite number is expected"),
    ("cb", {"train.jsonl": '{"premise": "p"\n'}, "train.jsonl:1: not valid JSON"),
    ("cb", {"train.jsonl": "[1]\n"}, "a JSON object is expected"),
    ("copa", {"train.jsonl": '{"premise": "p", "choice1": "x", "question": "cause"}\n'}, "no column choice2"),
    ("squad", {"train-v1.1.json": '{"data": [{"title": "t"}]}'}, "is not in the format 'squad': KeyError"),
    ("multirc", {"train.jsonl": '{"passage": {"text": "p"}}\n'}, "is not in the format 'multirc': KeyError"),
    ("wsc", {"train.jsonl": '{"text": "p", "target": {}}\n'}, "is not in the format 'wsc': KeyError"),
    ("sst2", {"train.tsv": "sentence\tlabel\nx\ty\t1\n"}, "train.tsv:2: 3 columns, expected 2"),
    ("sst2", {"train.tsv": "sentence\tlable\nx\t1\n"}, "no column 'label' .* there are: sentence, lable"),
    ("sst2", {"train.tsv": "sentence\tlabel\tlabel\nx\t1\t0\n"}, "several columns are called 'label'"),
    ("swag", {"train.csv": 'sent1,label\n"a,1\n'}, "not a table with commas and quotes"),
    ("swag", {"train.csv": "sent1,sent2,ending0,ending1,ending2,ending3,label\na,b,c,d,e,f,7\n"}, "option 7 of 0 … 3"),
]


@pytest.mark.parametrize(("name", "files", "message"), BAD, ids=[message[:24] for *_, message in BAD])
def test_what_does_not_fit_is_refused_with_its_place(tmp_path, name, files, message):
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    task = load_task(name)
    with pytest.raises(TaskDataError, match=message):
        read_and_encode(task, tmp_path)


def test_a_training_example_without_label_is_refused(small_dataset):
    with pytest.raises(TaskDataError, match="example 7 has no label"):
        data_of(task_of("regression"), [Example("7", ("x",))], small_dataset.tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("multi_label", "multilabel"), "head='multilabel'"),
        (('"micro_f1"', '"micro"'), "micro"),
        (("first =", "frist ="), "unknown key frist; did you mean 'first'"),
        (("head", "hed"), "unknown key hed; did you mean 'head'"),
        (('["micro_f1"]', "[]"), "at least one"),
    ],
)
def test_mistakes_in_a_tasks_description_name_file_and_key(tmp_path, change, message):
    (tmp_path / "own.toml").write_text(OWN.replace(*change))
    with pytest.raises(ConfigError, match=message) as error:
        load_task(str(tmp_path / "own.toml"))
    assert "own.toml" in str(error.value)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'sst2'"):
        load_task("sst-2")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json"])
def test_a_file_that_is_not_utf8_is_refused_and_a_byte_order_mark_is_none_of_its_text(tmp_path, suffix):
    separator = {"tsv": "\t", "csv": ","}.get(suffix)
    rows = [{"text": "café", "label": "1"}]
    text = {"jsonl": json.dumps(rows[0], ensure_ascii=False), "json": json.dumps(rows, ensure_ascii=False)}.get(suffix)
    text = text or f"text{separator}label\ncafé{separator}1\n"
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [record.fields for record in read_records(path)] == rows
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TaskDataError, match=f"a.{suffix} is not UTF-8 text"):
        list(read_records(path))


def test_half_a_character_becomes_a_whole_one(tmp_path, small_dataset):
    (tmp_path / "train.jsonl").write_text('{"passage": "a \\ud83d b", "question": "q", "label": 1}\n')
    task = task_of("regression")
    source = Source(files={"train": "train.jsonl"}, first="passage", second="question", label="label")
    (example,) = read_split(replace(task, sources=[source]), tmp_path, "train")
    assert example.texts == ("a \ufffd b", "q")
    data_of(task, [example], small_dataset.tokenizer)


def test_broken_rows_of_qqp_and_undecided_pairs_of_mnli_are_left_out_and_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("deberta_xl"), "propagate", True)
    caplog.set_level(logging.INFO, "deberta_xl")
    (tmp_path / "train.tsv").write_text(
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta?\tb?\t1\n\twhy?\t0\n4\t5\t6\tc?\td?\t0\n"
    )
    assert [example.texts for example in read_split(load_task("qqp"), tmp_path, "train")] == [
        ("a?", "b?"),
        ("c?", "d?"),
    ]
    assert "1 rows were left out: they have not 6 columns" in caplog.text
    rows = [{"sentence1": "a", "sentence2": "b", "gold_label": label} for label in ("neutral", "-", "entailment")]
    (tmp_path / "multinli_1.0_dev_matched.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_split(load_task("mnli"), tmp_path, "valid")
    assert [example.label for example in found] == ["neutral", "entailment"]
    assert "valid: left out 1 examples labelled '-'" in caplog.text


def test_conll_words_hold_whatever_is_not_a_blank(tmp_path):
    (tmp_path / "train.txt").write_bytes("\ufeff-DOCSTART- O\r\n\r\na\u00a0b B-X\r\nc\u2028d O\r\n".encode())
    (example,) = read_split(load_task("conll"), tmp_path, "train")
    assert (example.texts, example.label) == (("a\u00a0b", "c\u2028d"), ("B-X", "O"))


def test_a_folder_with_brackets_in_its_name_is_a_folder(tmp_path):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    (folder / "train.tsv").write_text("sentence\tlabel\nx\t1\n")
    assert splits_of(load_task("sst2"), folder) == ["train"]


def test_a_long_context_gives_windows_and_not_one_for_every_token(small_dataset):
    example = Example("0", (f"{PASSAGE} " * 20, "What is returned?"), ())
    ids = small_dataset.tokenizer.encode(example.texts[0])
    data = data_of(task_of("span"), [example], small_dataset.tokenizer, sequence_length=32, document_stride=128)
    assert len(data.features) <= 2 + 2 * len(ids) / (32 - 3 - 10)


def test_an_answer_may_have_blanks_at_its_ends(small_dataset):
    example = Example("0", (PASSAGE, "What?"), ((20, " a list "),))
    data = data_of(task_of("span"), [example], small_dataset.tokenizer, sequence_length=64)
    (feature,) = data.features
    first, last = feature.label
    assert PASSAGE[feature.places[first, 0] : feature.places[last, 1]] == "a list"
    assert data.cuts.mismatched == 0


def test_examples_with_another_number_of_options_are_refused(small_dataset):
    examples = [Example("0", ("c", "x", "y"), 0.0), Example("1", ("c", "x", "y", "z"), 1.0)]
    with pytest.raises(TaskDataError, match="example 1 has 3 options, the first one has 2"):
        data_of(task_of("choice"), examples, small_dataset.tokenizer)


@pytest.mark.parametrize(
    ("head", "metric"), [("regression", "accuracy"), ("span", "f1"), ("classification", "pearson")]
)
def test_a_metric_of_another_head_is_refused(head, metric):
    with pytest.raises(ConfigError, match=f"metric {metric} is not for head {head}; choose of"):
        Task(name="t", head=head, metrics=[metric], sources=[Source(files={})])


def test_an_empty_cell_is_no_label_of_several_and_a_missing_column_is_a_mistake(tmp_path, own):
    (tmp_path / "mine.csv").write_text("text,topics\na,\nb,x;y\n")
    assert [example.label for example in read_split(own, tmp_path, "train")] == [(), ("x", "y")]
    (tmp_path / "mine.csv").write_text("text,topic\na,x\n")
    with pytest.raises(TaskDataError, match="no column 'topics'"):
        read_split(own, tmp_path, "train")


def test_the_column_that_holds_labels_when_nothing_else_is_said_is_missed_where_it_is_not_there(tmp_path):
    (tmp_path / "mine.csv").write_text("text, label\nx,a\n")
    task = Task(name="t", head="classification", metrics=["accuracy"], sources=[Source(files={"train": "mine.csv"})])
    with pytest.raises(TaskDataError, match=r"no column 'label' .* there are: text,  label"):
        read_split(task, tmp_path, "train")


@pytest.mark.parametrize("answers", [["one"], "one", {"text": ["one"]}, [{"text": "one"}], [{"text": "a"}, 3], 7])
def test_answers_in_another_form_are_refused_with_their_place_and_the_form_that_is_read(tmp_path, answers):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one", "answers": answers}))
    task = Task(name="t", head="span", metrics=["squad_f1"], sources=[Source(files={"train": "a.jsonl"})])
    with pytest.raises(TaskDataError, match=r"a\.jsonl:1: the answers .* expected are .*answer_start"):
        read_split(task, tmp_path, "train")


def test_a_damaged_parquet_file_and_an_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(TaskDataError, match="not a Parquet file"):
        list(read_records(tmp_path / "a.parquet"))
    with pytest.raises(TaskDataError, match=r"known: \.jsonl"):
        list(read_records(tmp_path / "a.xlsx"))


ROWS = [{"text": "a\nb", "label": "x"}, {"text": "東京", "label": "y"}, {"text": "}{", "label": "x"}]
SHAPES = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "list": json.dumps(ROWS),
    "spread list": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "object of data": json.dumps({"version": 1, "data": ROWS}),
    "spread objects": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "begun objects": "\n".join(json.dumps(row).replace('", ', '",\n ') for row in ROWS),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_is_read_in_every_shape_under_either_ending(tmp_path, suffix, shape):
    path = tmp_path / f"a.{suffix}"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(SHAPES[shape].encode(encoding))
        assert [record.fields for record in read_records(path)] == ROWS
    path.write_text(SHAPES[shape] + '\n{"text"\n')
    with pytest.raises(TaskDataError, match=rf"a\.{suffix}:\d+: not valid JSON"):
        list(read_records(path))
