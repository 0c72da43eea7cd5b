"""The cases of `unchanged.py`: short runs on tiny sizes, as a user would type them, and the files that they read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from languages import ENDINGS, WORDS


class Command(NamedTuple):
    """What a user types: a script of the repository, its arguments, and how many ranks the launcher starts."""

    script: str
    arguments: Sequence[str]
    ranks: int = 1


class Case(NamedTuple):
    """Commands that are given one after the other in a folder of the case's own; paths are relative to it."""

    name: str
    commands: Sequence[Command]
    equals: str | None = None
    """The case whose figures and weights this one must have, too, bit for bit."""


ENGINES = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}},
}
BFLOAT16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
ENGINES |= {f"{name}-bf16": {**stage, **BFLOAT16} for name, stage in ENGINES.items()}

COMMON = (
    "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=2", "train.log_interval=1",
    "checkpoint.interval=100", "checkpoint.keep=2", "evaluation.interval=4", "optimizer.learning_rate=2e-3",
)  # fmt: skip
PRETRAINING = (
    "model.hidden_size=32", "model.num_layers=3", "model.num_heads=4", "model.intermediate_size=48",
    "model.position_buckets=6", "model.sequence_length=40", "model.max_position_embeddings=44",
    "model.conv_kernel_size=3", "model.layer_norm_eps=1e-3", "model.initializer_range=0.1",
    "data.train=../data/train", "data.valid=../data/valid", "evaluation.max_samples=5", "schedule.warmup_steps=2",
)  # fmt: skip
"""Epsilon and the first weights are larger than anyone wants them, so that no rounding hides a change."""
NO_DROPOUT = ("model.hidden_dropout=0", "model.attention_dropout=0")
STEADY = ("schedule.decay=constant", "evaluation.interval=2")
"""Nothing that knows how long the run is: the first steps of a longer run are those of a shorter one."""

TENSOR = ("parallel.tensor_parallel_size=2",)
SLICED = (*TENSOR, "parallel.sequence_parallel=true")
STAGES = ("parallel.pipeline_parallel_size=2",)
RECOMPUTED = ("train.activation_checkpointing=true",)
VERSION_1 = (
    "model.conv_kernel_size=0", "model.position_buckets=0", "model.share_att_key=false", "model.type_vocab_size=2",
    "model.normalize_relative_table=false", "model.position_biased_input=true", "model.hidden_act=gelu_tanh",
    "data.masking=original", "data.attend_across_documents=true", "optimizer.bias_correction=false",
    "schedule.decay=cosine",
)  # fmt: skip
"""Every choice of the model and of its training that the others do not make."""

LAYOUTS = {
    "plain": (1, "zero1", ()),
    "zero1": (2, "zero1", STEADY),
    "zero2": (2, "zero2", ()),
    "zero3": (2, "zero3", ()),
    "tp2": (2, "zero1", TENSOR),
    "tp2-sliced": (2, "zero1", SLICED),
    "pp2": (2, "zero1", STAGES),
    "tp2-pp2": (4, "zero1", (*TENSOR, *STAGES)),
    "bf16": (2, "zero1-bf16", ()),
    "recomputed": (1, "zero1", RECOMPUTED),
}
"""Ranks, engine and settings; each is tried with dropout and without."""

FURTHER_LAYOUTS = {
    "zero3-bf16": (2, "zero3-bf16", ()),
    "pp2-bf16": (2, "zero1-bf16", STAGES),
    "tp2-sliced-recomputed": (2, "zero1", (*SLICED, *RECOMPUTED)),
    "version1": (1, "zero1", VERSION_1),
    "version1-tp2-pp2": (4, "zero1", (*VERSION_1, *TENSOR, *STAGES)),
}
"""These are tried with dropout only."""

TWO_MODELS = {
    "plain": (1, "zero1", ()),
    "zero3": (2, "zero3", STEADY),
    "zero3-bf16-recomputed": (2, "zero3-bf16", (*RECOMPUTED, "evaluation.interval=2")),
    "zero3-jointly": (2, "zero3", ("replaced_tokens.training=joint", "evaluation.interval=2")),
    "tp2": (2, "zero1", TENSOR),
}
"""Replaced token detection, with dropout."""

SIFT = ("sift.weight=2", "optimizer.layer_decay=0.9")
TASKS = {"classification": "sst2", "regression": "stsb", "token": "conll", "span": "squad", "choice": "copa"}
FINETUNING = {
    "classification-no-dropout": (1, "zero1", (*NO_DROPOUT, "model.head_dropout=0", "train.class_weights=balanced")),
    "classification-sift-original": (1, "zero1", ("sift.weight=2", "sift.variant=original", "sift.steps=2")),
    "classification-sift-zero3": (2, "zero3", SIFT),
    "classification-sift-tp2": (2, "zero1", (*SIFT, *TENSOR)),
    "token-sift-tp2-sliced-recomputed": (2, "zero1", (*SIFT, *SLICED, *RECOMPUTED)),
    "choice-sift-bf16": (2, "zero1-bf16", SIFT),
}
"""Ranks, engine and settings of the runs that are not one rank with dropout."""

PREPARATIONS = (
    Command("tools/train_tokenizer.py", ("--input", "text.txt", "--vocab_size", "240", "--output", "tokenizer")),
    Command(
        "tools/preprocess.py",
        (
            "--input", "text.txt", "--tokenizer", "tokenizer", "--output", "train", "--valid_output", "valid",
            "--valid_share", "0.1", "--workers", "1",
        ),
    ),
)  # fmt: skip
"""Make the dataset, in the folder that the cases know as ../data."""


def pretrain(engine: str, *settings: str, ranks: int = 1) -> Command:
    """A start of pretraining in the run folder `run`."""
    files = ("--config", "debug", "--deepspeed_config", f"../data/{engine}.json", "run.folder=run")
    return Command("deberta_xl/pretrain.py", (*files, *COMMON, *PRETRAINING, *settings), ranks)


def finetune(task: str, engine: str, *settings: str, ranks: int = 1) -> Command:
    """A start of fine-tuning in the run folder `run`."""
    files = ("--task", task, "--data", f"../data/{task}", "--init", "../encoder/run", "run.folder=run")
    engine_file = ("--deepspeed_config", f"../data/{engine}.json")
    tiny = ("model.sequence_length=32", "model.document_stride=8")
    return Command(
        "deberta_xl/finetune.py", ("--config", "finetune", *engine_file, *files, *COMMON, *tiny, *settings), ranks
    )


EXPORT = Command("tools/convert.py", ("--to", "native", "run", "weights"))
EXPORT_LAST_STEP = Command("tools/convert.py", ("--to", "huggingface", "run/checkpoints/step-00000004", "weights"))
"""For a fine-tuned model, whose best step may be another; where a case evaluates once, its `run/best` is the last."""

ENCODER = Case(
    "encoder", [pretrain("zero1", "train.steps=1", "schedule.warmup_steps=0", "optimizer.learning_rate=0"), EXPORT]
)
"""What fine-tuning starts from: weights as they are drawn, which no error of a training step can reach."""


def all_cases() -> list[Case]:
    """Every case, in the order in which they are run."""
    return [*pretraining_cases(), *task_cases()]


def pretraining_cases() -> Iterator[Case]:
    """Masked language models with their held-out losses, and what the tools say of one."""
    for name, (ranks, engine, settings) in LAYOUTS.items():
        yield Case(f"mlm-{name}-no-dropout", [pretrain(engine, *settings, *NO_DROPOUT, ranks=ranks), EXPORT])
    for name, (ranks, engine, settings) in (LAYOUTS | FURTHER_LAYOUTS).items():
        tools = MLM_TOOLS if name == "plain" else ()
        yield Case(f"mlm-{name}", [pretrain(engine, *settings, ranks=ranks), EXPORT, *tools])
    for name, (ranks, engine, settings) in TWO_MODELS.items():
        yield Case(f"rtd-{name}", [pretrain(engine, "train.objective=replaced_tokens", *settings, ranks=ranks), EXPORT])
    first, whole = (pretrain("zero1", *STEADY, f"train.steps={steps}", ranks=2) for steps in (2, 4))
    yield Case("mlm-resumed", [first, whole, EXPORT], equals="mlm-zero1")
    first = pretrain("zero3", *STEADY, "train.steps=2", ranks=2)
    yield Case("mlm-resumed-elsewhere", [first, pretrain("zero1", *STEADY, *TENSOR, ranks=2), EXPORT])


MLM_TOOLS = (
    Command("tools/evaluate.py", ("run", "../data/valid", "--max_samples", "6")),
    Command("tools/fill_mask.py", ("run", "many people [MASK] along its [MASK] streets")),
)
TASK_TOOLS = {
    name: (
        Command("tools/evaluate_task.py", ("run", "--data", f"../data/{task}", "--output", "output")),
        Command("tools/predict.py", ("run", "--input", f"../data/{name}.jsonl", "--output", "predicted.jsonl")),
    )
    for name, task in TASKS.items()
}


def task_cases() -> Iterator[Case]:
    """Fine-tuned models with their metrics and predictions, and what the tools say of those without SiFT."""
    for name, task in TASKS.items():
        yield Case(f"task-{name}", [finetune(task, "zero1"), *TASK_TOOLS[name]])
        yield Case(f"task-{name}-sift", [finetune(task, "zero1", *SIFT)])
    for name, (ranks, engine, settings) in FINETUNING.items():
        yield Case(f"task-{name}", [finetune(TASKS[name.partition("-")[0]], engine, *settings, ranks=ranks)])
    first, whole = (finetune("sst2", "zero1", *SIFT, *STEADY, f"train.steps={steps}", ranks=2) for steps in (2, 4))
    yield Case("task-whole", [whole, EXPORT_LAST_STEP])
    yield Case("task-resumed", [first, whole, EXPORT_LAST_STEP], equals="task-whole")


def write_files(folder: Path) -> None:
    """The text, the tasks' files and the engines' in a new folder. The same on any machine."""
    generator = random.Random(5)
    for name, engine in ENGINES.items():
        write_json(folder / f"{name}.json", engine)
    documents = [" ".join(sentence(generator) for _ in range(4)) for _ in range(160)]
    write_lines(folder / "text.txt", "\n\n".join(documents))
    write_tables(folder, generator)
    write_words(folder, generator)
    write_questions(folder, generator)
    write_choices(folder, generator)


def sentence(generator: random.Random) -> str:
    """Five to twelve words of English or German."""
    language = generator.choice(("English", "German"))
    words = [word + ending for word in WORDS[language].split() for ending in ENDINGS[language]]
    return " ".join(generator.choices(words, k=generator.randint(5, 12))) + "."


def write_json(path: Path, content: object) -> None:
    """A file of one JSON value."""
    write_lines(path, json.dumps(content))


def write_lines(path: Path, *lines: str) -> None:
    """A text file, and the folder that it stands in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def write_tables(folder: Path, generator: random.Random) -> None:
    """SST-2 and STS-B: does a sentence have more than eight words; how many words two of them have together."""
    for split, count in (("train", 24), ("dev", 9), ("test", 5)):
        pairs = [(sentence(generator), sentence(generator)) for _ in range(count)]
        sizes = [(len(first.split()), len(second.split())) for first, second in pairs]
        is_labelled = split != "test"
        head = ("sentence", "label") if is_labelled else ("index", "sentence")
        rows = [
            (first, str(int(size > 8))) if is_labelled else (str(number), first)
            for number, ((first, _), (size, _)) in enumerate(zip(pairs, sizes, strict=True))
        ]
        write_lines(folder / "sst2" / f"{split}.tsv", *("\t".join(row) for row in [head, *rows]))
        head = ("index", "sentence1", "sentence2", *(["score"] if is_labelled else []))
        rows = [
            (str(number), *pair, *([f"{sum(size) / 5:.1f}"] if is_labelled else []))
            for number, (pair, size) in enumerate(zip(pairs, sizes, strict=True))
        ]
        write_lines(folder / "stsb" / f"{split}.tsv", *("\t".join(row) for row in [head, *rows]))
    texts = [{"text": sentence(generator), "text_pair": sentence(generator)} for _ in range(5)]
    write_lines(folder / "regression.jsonl", *map(json.dumps, texts))
    write_lines(folder / "classification.jsonl", *(json.dumps({"text": text["text"]}) for text in texts))


def write_words(folder: Path, generator: random.Random) -> None:
    """CoNLL: words with a capital letter are names."""
    for split, count in (("train", 24), ("valid", 9), ("test", 5)):
        sentences = [sentence(generator).split() for _ in range(count)]
        lines = [[f"{word} {'B-NAME' if word[0].isupper() else 'O'}" for word in words] + [""] for words in sentences]
        write_lines(folder / "conll" / f"{split}.txt", *(line for of_sentence in lines for line in of_sentence))
    rows = [{"words": sentence(generator).split()} for _ in range(5)]
    write_lines(folder / "token.jsonl", *map(json.dumps, rows))


def write_questions(folder: Path, generator: random.Random) -> None:
    """SQuAD 1.1: the answer is the third word of a text that needs several windows."""
    for split, count in (("train", 12), ("dev", 6)):
        paragraphs = []
        for number in range(count):
            context = " ".join(sentence(generator) for _ in range(3))
            words = context.split()
            answer = {"answer_start": len(words[0]) + len(words[1]) + 2, "text": words[2]}
            question = {"id": f"{split}{number}", "question": "Which word is third?", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [question]})
        write_json(folder / "squad" / f"{split}-v1.1.json", {"data": [{"title": split, "paragraphs": paragraphs}]})
    rows = [{"context": " ".join(sentence(generator) for _ in range(3)), "question": "Who?"} for _ in range(3)]
    write_lines(folder / "span.jsonl", *map(json.dumps, rows))


def write_choices(folder: Path, generator: random.Random) -> None:
    """COPA: the choice with more words is right."""
    for split, count in (("train", 16), ("val", 8), ("test", 4)):
        rows = []
        for number in range(count):
            row = {name: sentence(generator) for name in ("premise", "choice1", "choice2")}
            row |= {"question": generator.choice(("cause", "effect")), "idx": number}
            if split != "test":
                row["label"] = int(len(row["choice2"]) > len(row["choice1"]))
            rows.append(row)
        write_lines(folder / "copa" / f"{split}.jsonl", *map(json.dumps, rows))
    rows = [{"context": sentence(generator), "options": [sentence(generator), sentence(generator)]} for _ in range(3)]
    write_lines(folder / "choice.jsonl", *map(json.dumps, rows))
