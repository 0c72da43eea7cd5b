"""A small encoder and small tasks over the text that comes with Python, for the tests of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from small_dataset import SmallDataset, documents

from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig

LENGTH = 32


def write_encoder(dataset: SmallDataset, folder: Path) -> Path:
    """A weights folder: two layers with everything, dropout on."""
    config = DebertaConfig(
        vocab_size=dataset.tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64,
        position_buckets=8, max_position_embeddings=48, conv_kernel_size=3,
    )  # fmt: skip
    dataset.tokenizer.save(folder.parent / "tokenizer")
    DebertaForMaskedLM(config, seed=4).save_pretrained(folder, tokenizer=folder.parent / "tokenizer")
    return folder


def write_sentences(folder: Path) -> Path:
    """SST-2's files: does the text speak of an object? 48 to train on, 24 held out, 8 without label."""
    folder.mkdir()
    texts = documents()
    yes = [text[:90] for text in texts if "object" in text[:90]][:40]
    no = [text[:90] for text in texts if "object" not in text][:40]
    pairs = [
        (text.replace("\t", " "), label)
        for two in zip(yes, no, strict=True)
        for text, label in zip(two, "10", strict=True)
    ]
    for name, part in (("train", pairs[:48]), ("dev", pairs[48:72])):
        rows = [("sentence", "label"), *part]
        (folder / f"{name}.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    test = [("index", "sentence"), *((str(n), text) for n, (text, _) in enumerate(pairs[72:]))]
    (folder / "test.tsv").write_text("".join("\t".join(row) + "\n" for row in test), encoding="utf-8")
    return folder


def write_questions(folder: Path) -> Path:
    """SQuAD 1.1's files: the answer is the text's third word."""
    folder.mkdir()
    for name, part in (("train", documents()[:16]), ("dev", documents()[16:24])):
        paragraphs = []
        for number, text in enumerate(part):
            context, words = text[:160], text[:160].split()
            start = len(words[0]) + len(words[1]) + 2
            question = {
                "id": f"{name}{number}", "question": "Which word is third?",
                "answers": [{"answer_start": start, "text": words[2]}],
            }  # fmt: skip
            paragraphs.append({"context": context, "qas": [question]})
        content = {"data": [{"title": name, "paragraphs": paragraphs}]}
        (folder / f"{name}-v1.1.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def finetune_arguments(
    encoder: Path, data: Path, run: Path, *overrides: str, task: str = "sst2", engine: str = "cpu_debug"
) -> list[str]:
    """Arguments of a tiny run of fine-tuning: 8 steps."""
    settings = Path(__file__).parent.parent / "deepspeed_configs" / f"{engine}.json"
    tiny: Sequence[str] = (
        f"model.sequence_length={LENGTH}", "model.document_stride=8", "train.global_batch_size=8",
        "train.micro_batch_size=2", "train.steps=8", "train.log_interval=1", "evaluation.interval=4",
        "checkpoint.interval=3", "checkpoint.keep=2", "optimizer.learning_rate=1e-3",
    )  # fmt: skip
    files = ["--task", task, "--data", str(data), "--init", str(encoder)]
    return [
        "--config", "finetune", "--deepspeed_config", str(settings), *files, f"run.folder={run}", *tiny, *overrides,
    ]  # fmt: skip
