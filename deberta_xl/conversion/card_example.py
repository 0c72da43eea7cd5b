"""Programs for a model card: what loads the folder and predicts, as it stands."""

from __future__ import annotations

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.data.tokenizer import MASK_PIECE, Tokenizer
from deberta_xl.settings.architecture import HeadKind

FILL_MASK = """\
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "."  # this folder, or the model's name on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
inputs = tokenizer({text}, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[inputs.input_ids == tokenizer.mask_token_id]
for probability, number in zip(*logits[0].softmax(-1).topk(5)):
    print(tokenizer.decode(number), probability.item())
"""

ENCODER = """\
import torch
from transformers import AutoModel, AutoTokenizer

folder = "."  # this folder, or the model's name on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
with torch.no_grad():
    states = model(**tokenizer({text}, return_tensors="pt")).last_hidden_state
print(states.shape)  # texts, tokens, width
"""

TASK = """\
import torch
from transformers import {auto_class}, AutoTokenizer

folder = "."  # this folder, or the model's name on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(folder), {auto_class}.from_pretrained(folder).eval()
inputs = tokenizer({text}, return_tensors="pt"{padding})
with torch.no_grad():
    {outputs}
{then}
"""

LABELS = "for number, probability in enumerate(logits[0].{function}.tolist()):\n    print({name}, probability)"
NAME = "model.config.id2label[number]"
OF_KINDS: dict[HeadKind, tuple[str, str, str]] = {
    "classification": (
        "AutoModelForSequenceClassification",
        "logits = model(**inputs).logits",
        LABELS.format(function="softmax(-1)", name=NAME),
    ),
    "multi_label": (
        "AutoModelForSequenceClassification",
        "logits = model(**inputs).logits",
        LABELS.format(function="sigmoid()", name=NAME),
    ),
    "regression": (
        "AutoModelForSequenceClassification",
        "logits = model(**inputs).logits",
        "print(logits[0].item())",
    ),
    "choice": (
        "AutoModelForMultipleChoice",
        "logits = model(**{name: ids.unsqueeze(0) for name, ids in inputs.items()}).logits",
        LABELS.format(function="softmax(-1)", name="number"),
    ),
    "token": (
        "AutoModelForTokenClassification",
        "logits = model(**inputs).logits",
        "for piece, number in zip(inputs.tokens(), logits[0].argmax(-1).tolist()):\n"
        "    print(piece, model.config.id2label[number])",
    ),
    "span": (
        "AutoModelForQuestionAnswering",
        "output = model(**inputs)",
        "first, last = output.start_logits.argmax(), output.end_logits.argmax()\n"
        "print(tokenizer.decode(inputs.input_ids[0, first : last + 1]))",
    ),
}


def fill_mask_example(tokenizer: Tokenizer | None, text: str | None) -> str:
    """A program that fills a mask. Without `text`, words of the model's own vocabulary.

    Raises CheckpointError for a text in which nothing is masked.
    """
    if text and MASK_PIECE not in text:
        raise CheckpointError(
            f"--card example={text!r}: the example fills a mask; write {MASK_PIECE} for one word of it"
        )
    return FILL_MASK.format(text=repr(text or f"{some_words(tokenizer)} [MASK]"))


def encoder_example(tokenizer: Tokenizer | None, text: str | None) -> str:
    """A program that computes the states of a text."""
    return ENCODER.format(text=repr(text or some_words(tokenizer)))


def task_example(kind: HeadKind, tokenizer: Tokenizer, text: str | None, *, is_pair: bool) -> str:
    """A program that applies a head to a text (a question and its context, a text and its continuations)."""
    auto_class, outputs, then = OF_KINDS[kind]
    words = some_words(tokenizer)
    arguments = repr(text or words)
    if kind == "choice":
        arguments = f"{[text or words] * 2!r}, {[words, words.split()[0]]!r}"
    elif kind == "span" or is_pair:
        arguments = f"{arguments}, {words!r}"
    padding = ", padding=True" if kind == "choice" else ""
    return TASK.format(auto_class=auto_class, text=arguments, padding=padding, outputs=outputs, then=then)


def some_words(tokenizer: Tokenizer | None, count: int = 5) -> str:
    """The first words of a vocabulary: those that stand most often in the text it was made from."""
    if tokenizer is None:
        return "…"
    pieces = map(tokenizer.processor.id_to_piece, range(4, tokenizer.processor.get_piece_size()))
    words = [piece.strip("▁") for piece in pieces if piece.strip("▁").isalpha()]
    longer = [word for word in words if len(word) > 1] or words
    return " ".join(longer[:count]) or "…"
