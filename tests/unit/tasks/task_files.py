"""Small files in the benchmarks' own formats."""

from __future__ import annotations

import json
from pathlib import Path

SQUAD = {
    "version": "1.1",
    "data": [{
        "title": "t",
        "paragraphs": [{
            "context": "The function returns a list of names. The list is empty when there are no names.",
            "qas": [
                {"id": "a", "question": "What does it return?",
                 "answers": [{"answer_start": 21, "text": "a list of names"}]},
                {"id": "b", "question": "Who wrote it?", "answers": [], "is_impossible": True},
            ],
        }],
    }],
}  # fmt: skip
MULTIRC = {
    "idx": 7,
    "passage": {
        "text": "A name is bound.",
        "questions": [
            {"idx": 1, "question": "What?",
             "answers": [{"idx": 0, "text": "name", "label": 1}, {"idx": 1, "text": "cat", "label": 0}]},
            {"idx": 2, "question": "Who?", "answers": [{"idx": 2, "text": "dog", "label": 1}]},
        ],
    },
}  # fmt: skip
RECORD = {
    "idx": 1,
    "passage": {"text": "Ann met Bob.\n@highlight\nAnn left", "entities": [
        {"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}]},
    "qas": [{"idx": 5, "query": "@placeholder met him", "answers": [{"text": "Ann", "start": 0, "end": 2}]}],
}  # fmt: skip
RACE = {
    "id": "high1.txt",
    "article": "It rained.",
    "questions": ["What fell?"],
    "options": [list("wxyz")],
    "answers": ["C"],
}
COPA_XML = """<copa-corpus><item id="1" asks-for="cause" most-plausible-alternative="2">
<p>It fell.</p><a1>It was red.</a1><a2>It was dropped.</a2></item></copa-corpus>"""
FILES = {
    "sst2": {"train.tsv": 'sentence\tlabel\na "good one\t1\nbad\t0\n', "dev.tsv": "sentence\tlabel\nfine\t1\n",
             "test.tsv": "index\tsentence\n0\tso so\n"},
    "cola": {"train.tsv": "gj04\t1\t\tIt works.\ngj04\t0\t*\tWorks it.\n", "test.tsv": "index\tsentence\n0\tIs it?\n"},
    "stsb": {"train.tsv": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n"},
    "boolq": {"train.jsonl": json.dumps({"question": "q", "passage": "p", "idx": 3, "label": True}) + "\n"},
    "copa": {"train.jsonl": json.dumps({
        "premise": "It fell.", "choice1": "x", "choice2": "y", "question": "effect", "label": 1, "idx": 2}) + "\n"},
    "wic": {"train.jsonl": json.dumps(
        {"word": "run", "sentence1": "I run.", "sentence2": "A run.", "idx": 0, "label": False}) + "\n"},
    "wsc": {"train.jsonl": json.dumps({"text": "Ann called but she left", "idx": 0, "label": True, "target": {
        "span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 3}}) + "\n"},
    "multirc": {"train.jsonl": json.dumps(MULTIRC) + "\n"},
    "record": {"train.jsonl": json.dumps(RECORD) + "\n"},
    "squad2": {"train-v2.0.json": json.dumps(SQUAD)},
    "conll": {"train.txt": "-DOCSTART- -X- O O\n\nEU NNP B-ORG\nrejects VBZ O\n\nPeter NNP B-PER\nBlackburn N I-PER\n"},
    "race": {"train/high/1.txt": json.dumps(RACE)},
    "swag": {"train.csv": 'sent1,sent2,ending0,ending1,ending2,ending3,label\n"A, b.",He,a,b,c,d,2\n'},
    "trec": {"train.txt": "NUM:dist How far is it ?\nHUM:desc Who was Galileo ?\n"},
}  # fmt: skip


def write_task(name: str, folder: Path) -> Path:
    """The folder, filled with the task's files."""
    for path, text in FILES[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder
