"""The whole pipeline in minutes on two CPU cores: text, tokenizer, dataset, pretraining on two ranks, fill-mask.

The text is the English that comes with Python (its language reference and docstrings), or your own with --corpus.
Everything goes to one folder; what is there already is not made again, and an interrupted training resumes. A folder
belongs to one text and one vocabulary size, noted in its made-from.json.
--objective replaced_tokens makes a DeBERTaV3: a generator proposes words, and the model learns to find them.

Your own text may have any form and script: it is looked at first, and divided into documents, tokenised and asked about
accordingly. Ctrl-C stops; the same command continues.

examples:
  python tools/quickstart.py --folder quickstart
  python tools/quickstart.py --folder mine --corpus a.txt b.jsonl -- train.steps=300
  python tools/quickstart.py --folder v3 --corpus a.txt --objective replaced_tokens
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.child_process import run_to_end
from deberta_xl.base.durable import replace_file
from deberta_xl.base.durations import duration
from deberta_xl.base.errors import UserError
from deberta_xl.base.interruption import Interrupted
from deberta_xl.base.strict import own_path
from deberta_xl.corpus.documents import is_held_out
from deberta_xl.corpus.reading import expand_inputs, iterate_documents
from deberta_xl.corpus.text_form import TextForm, look_at
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.public.questions import Question, questions

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
DEEPSPEED_LAUNCHERS = 2
"""`deepspeed` starts its launch.py, and that the ranks."""
VOCAB_SIZE = 4000
VALID_SHARE = 0.05
"""That of tools/preprocess.py, too."""
PYTHON_TEXT = "the English that comes with Python"
STEPS = 700
WARMUP_STEPS = 50
TRAINING = [
    f"train.steps={STEPS}",
    "optimizer.learning_rate=2e-3",
    # A few passes over two megabytes: the model is far from learning them by heart.
    "model.dropout=0",
    "train.log_interval=20",
]
PYTHON_QUESTIONS = [
    Question("Return a list [MASK] the names in the current scope.", "of"),
    Question("If the argument is not a string, a TypeError [MASK] raised.", "is"),
    Question("The function returns the number [MASK] bytes.", "of"),
]
SHOWN_FILES = 5
QUESTIONS = 3


class Recipe(NamedTuple):
    """What is trained."""

    preset: str
    title: str
    ending: str  # what is told of the last evaluation


RECIPES = {
    "masked_lm": Recipe(
        "debug",
        "DeBERTa with enhanced mask decoder",
        """validation loss at the end  {valid_loss:.3f} nats per masked token
unigram of the training set {valid_unigram_entropy:.3f}: the best possible without reading context
masked words guessed right  {valid_accuracy:.1%}""",
    ),
    "replaced_tokens": Recipe(
        "v3_debug",
        "DeBERTaV3, generator and discriminator",
        """generator's loss at the end {valid_generator_loss:.3f} nats per masked token
masked words guessed right  {valid_generator_accuracy:.1%}
discriminator's AUC         {valid_auc:.3f}: 0.5 is guessing, 1 is finding every replaced token""",
    ),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="where to work (default: quickstart)")
    parser.add_argument("--corpus", type=own_path, nargs="+", help="your own .txt or .jsonl files (also .gz, .zst)")
    parser.add_argument("--json_key", default="text", help="key of the text in .jsonl (default: text)")
    parser.add_argument(
        "--vocab_size", type=int, help=f"default: {VOCAB_SIZE}, or more for a text of many different characters"
    )
    parser.add_argument("--objective", choices=RECIPES, default="masked_lm", help="default: masked_lm")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="passed on to training")
    return parser.parse_args(arguments)


def from_root(path: Path) -> Path:
    """A path as it is written from the repository's root, where all commands run."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def announce(title: str) -> None:
    """A heading for the next stage."""
    print(f"\n== {title}", flush=True)


def execute(*command: str | Path, launchers: int = 0) -> None:
    """Show a command as a user would type it, run it, and stop when it fails."""
    words = [str(word) for word in command]
    print(f"$ {shlex.join(words)}", flush=True)
    # Two CPU ranks wherever this runs, one core each.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    scripts = Path(sys.executable).parent
    environment["PATH"] = f"{scripts}{os.pathsep}{environment.get('PATH', '')}"
    program = words[0] if words[0] != "python" else sys.executable
    words = [program, *words[1:]]
    status = run_to_end(words, environment, launchers=launchers, when_stopping=say_stopping)
    if status:
        raise UserError(f"the command above failed with status {status}; mend it and start the quickstart again")


def say_stopping() -> None:
    """A line for whoever has pressed Ctrl-C and waits."""
    sys.stderr.write("\nstopping: waiting for what has been started (Ctrl-C again ends it at once)\n")


def claim(folder: Path, corpus: list[str] | None, vocab_size: int) -> None:
    """Note what the folder is made from; UserError when that was something else, which would be used in its place."""
    sizes = {str(path): path.stat().st_size for path in expand_inputs(corpus)} if corpus else {}
    asked, note = {"corpus": sizes, "vocab_size": vocab_size}, folder / "made-from.json"
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if found != asked and (folder / "tokenizer").exists():
        made = f"was made from {describe(found)}" if found else "does not say what it was made from"
        raise UserError(
            f"{folder} {made}; asked for is {describe(asked)}: choose another folder (python tools/quickstart.py "
            f"--folder OTHER …), or remove this one (rm -r {shlex.quote(str(folder))})"
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(note, json.dumps(asked, indent=2) + "\n")


def describe(origin: dict[str, Any]) -> str:
    """What a folder is made from, in words."""
    texts = [f"{name} ({size:,} bytes)" for name, size in origin["corpus"].items()] or [PYTHON_TEXT]
    more = f" and {len(texts) - SHOWN_FILES} more files" if len(texts) > SHOWN_FILES else ""
    return f"{', '.join(texts[:SHOWN_FILES])}{more} with a vocabulary of {origin['vocab_size']}"


def prepare_data(folder: Path, corpus: list[str] | None, vocab_size: int, json_key: str, form: TextForm | None) -> None:
    """Corpus, tokenizer, training and held-out dataset; `form` is that of a user's own text."""
    rules, division, key = [], [], []
    if corpus:
        announce(f"1. Text: {' '.join(corpus)}")
        print(form)
        key = [] if json_key == "text" else ["--json_key", json_key]
        rules = ["--allow_smaller", *(["--byte_fallback"] if form.needs_bytes else [])]
        division = [] if form.documents == "blank_lines" else ["--documents", form.documents]
        division += [] if form.valid_share == VALID_SHARE else ["--valid_share", str(form.valid_share)]
    else:
        corpus = [str(folder / "corpus.jsonl")]
        if not Path(corpus[0]).exists():
            announce(f"1. Text: {PYTHON_TEXT}")
            execute("python", "tools/extract_corpus.py", "--output", corpus[0])
    if not (folder / "tokenizer").exists():
        announce("2. Tokenizer: SentencePiece with DeBERTa's special ids")
        options = ["--vocab_size", str(vocab_size), *rules, *key, "--output", folder / "tokenizer"]
        execute("python", "tools/train_tokenizer.py", "--input", *corpus, *options)
    if not (folder / "data" / "valid.manifest.json").exists():
        share = form.valid_share if form else VALID_SHARE
        announce(f"3. Dataset: tokenised, indexed, memory-mapped; {share:.0%} of the documents held out")
        outputs = ["--output", folder / "data/train", "--valid_output", folder / "data/valid", "--overwrite"]
        options = ["--tokenizer", folder / "tokenizer", *division, *key, *outputs]
        execute("python", "tools/preprocess.py", "--input", *corpus, *options)


def train(folder: Path, recipe: Recipe, overrides: list[str]) -> None:
    """Pretraining by DeepSpeed on two ranks; continues where an earlier start left off."""
    announce(f"4. Pretraining: {recipe.title}, DeepSpeed ZeRO-1 on {RANKS} ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = [f"data.train={folder}/data/train", f"data.valid={folder}/data/valid", f"run.folder={folder}/run"]
    launcher = ["deepspeed", "--quiet", "--num_accelerators", str(RANKS), "--master_port", str(port)]
    settings = ["--config", recipe.preset, "--deepspeed_config", "deepspeed_configs/cpu_debug.json"]
    command = [*launcher, "deberta_xl/pretrain.py", *settings, *data, *TRAINING, warmup(overrides), *overrides]
    try:
        execute(*command, launchers=DEEPSPEED_LAUNCHERS)
    except Interrupted as interruption:
        raise Interrupted(interruption.number, stopped(folder / "run")) from None


def warmup(overrides: list[str]) -> str:
    """The warm-up as a setting: a tenth of the steps asked for where they are few."""
    asked = [override.partition("=")[2] for override in overrides if override.startswith("train.steps=")]
    steps = int(asked[-1]) if asked and asked[-1].isdigit() else STEPS
    return f"schedule.warmup_steps={min(WARMUP_STEPS, steps // 10)}"


def stopped(run_folder: Path) -> str:
    """Where an interrupted training stands."""
    steps = [int(path.name.removeprefix("step-")) for path in run_folder.glob("checkpoints/step-*[0-9]")]
    place = f"at step {max(steps)}" if steps else "before its first checkpoint"
    return f"stopped {place}; the same command continues"


def questions_about(corpus: list[str], json_key: str, form: TextForm, tokenizer: Tokenizer) -> list[Question]:
    """Sentences of documents that were held out, each with a word hidden."""
    texts = iterate_documents(expand_inputs(corpus), json_key, form.documents)
    held_out = (text for text in texts if is_held_out(text, form.valid_share))
    return questions(held_out, tokenizer, QUESTIONS)


def use(folder: Path, objective: str, asked: list[Question]) -> None:
    """Export to Hugging Face's layout, and ask the model something."""
    announce("5. Export to Hugging Face's layout")
    exported = folder / "huggingface"
    shutil.rmtree(exported, ignore_errors=True)  # of an earlier start, which may have ended sooner
    execute("python", "tools/convert.py", "--from", "native", "--to", "huggingface", folder / "run", exported)
    if not asked:
        print("\nno held-out sentence is fit for a question")
        return
    hidden = [question.hidden for question in asked]
    of_text = "" if asked is PYTHON_QUESTIONS else "in sentences that were held out; "
    if objective == "replaced_tokens":
        announce("6. Find the word that does not belong there")
        wrong = [*hidden[1:], hidden[0]]
        print(f"{of_text}a word of each is exchanged for: {', '.join(wrong)}")
        texts = (question.text.replace("[MASK]", word) for question, word in zip(asked, wrong, strict=True))
        return execute("python", "tools/detect.py", folder / "run", *texts)
    announce("6. Fill the mask, with the exported model")
    print(f"{of_text}hidden: {', '.join(hidden)}")
    execute("python", "tools/fill_mask.py", exported, *(question.text for question in asked), "--top_k", "5")


def report(folder: Path, recipe: Recipe, seconds: float) -> None:
    """What came out, in a few lines."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line["loss"] for line in lines if "loss" in line)
    last = [line for line in lines if "valid_loss" in line][-1]
    announce(f"Done in {duration(seconds)}, {last['step']} steps")
    print(f"training loss at the start  {first:.3f}")
    print(recipe.ending.format_map(last))
    print(f"loss curve                  {folder / 'run' / 'loss.png'}")
    print(f"TensorBoard                 tensorboard --logdir {folder / 'run'}")
    print(f"Hugging Face model          {folder / 'huggingface'}")
    if (activate := Path(sys.prefix) / "bin" / "activate").exists():
        print(f"to type commands yourself   . {shlex.quote(str(from_root(activate)))}")


def run(arguments: argparse.Namespace) -> None:
    """All stages, from the repository's root."""
    started = time.monotonic()
    folder = from_root(arguments.folder)
    corpus = [str(from_root(Path(path))) for path in arguments.corpus] if arguments.corpus else None
    os.chdir(ROOT)
    form = look_at(expand_inputs(corpus), arguments.json_key) if corpus else None
    vocab_size = arguments.vocab_size or (form.vocab_size(VOCAB_SIZE) if form else VOCAB_SIZE)
    claim(folder, corpus, vocab_size)
    prepare_data(folder, corpus, vocab_size, arguments.json_key, form)
    recipe = RECIPES[arguments.objective]
    train(folder, recipe, arguments.overrides)
    asked = PYTHON_QUESTIONS
    if corpus:
        asked = questions_about(corpus, arguments.json_key, form, Tokenizer.load(folder / "tokenizer"))
    use(folder, arguments.objective, asked)
    report(folder, recipe, time.monotonic() - started)


def main() -> int:
    """Run; what is there after an interruption is told in words, since several commands write it."""
    return run_tool(whole, parse_arguments(), waits=True)


def whole(arguments: argparse.Namespace) -> None:
    """`run`, with a sentence for an interruption outside of training."""
    try:
        run(arguments)
    except Interrupted as interruption:
        text = interruption.text or "stopped; what is finished stays, and the same command continues"
        raise Interrupted(interruption.number, text) from None


if __name__ == "__main__":
    sys.exit(main())
