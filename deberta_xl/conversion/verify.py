"""Whether two pretrained models compute the same: one text through both, a layer of each in memory at a time.

Shape suffixes of this file:
    B batch (1)   S sequence   D hidden   L masked positions   V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor, nn

from deberta_xl.base.progress import progress
from deberta_xl.checkpoint.lazy import LazyTensors
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.tokenizer_files import TOKENIZER_FILE, unread_files
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.replaced_tokens import Detector
from deberta_xl.weights.names import DETECTOR, EXTRA, is_beside_the_model
from deberta_xl.weights.pretrained_folder import Pretrained

TEXT = (
    "The old harbour lies where the river meets the sea. In 1893 its first lighthouse was built of grey stone; the "
    "keeper, who had seven children, lit 24 lamps every evening. “How far can you see it?” asked a visitor. "
    "“Twelve miles,” he said, “and on clear nights a little farther.” Ships from many countries brought timber, "
    "cotton, wine and letters, and took away wool. Today the warehouses are flats and cafés, but the light still turns."
)
MAPPED = (
    "ﬁne Ｆｕｌｌ－ｗｉｄｔｈ ½ … ² Ⅷ “quotes”; don't (stop), Mr. X! a_b.c",
    "cafe\u0301 \u00a0 two  spaces\tand\nlines ",
    "…\u0301 Ａ\u0301 ﬁ\u0301 ²\ufe0f \u00a0\u200d ｶ\uff9e 각",
)
"""Text that normalisation changes."""
MOST_ADDED_TOKENS = 500
LENGTH = 128
"""Tokens, at most."""
MASK_EVERY = 7

TOLERANCES = {None: 1e-6, torch.float32: 1e-6, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference allowed, as a share of the largest value of a layer, by the type the weights are rounded to.

Unrounded weights give the same bits. float16 keeps 11 bits of each weight and bfloat16 8, so that a weight is off by up
to 2.4e-4 or 2e-3; over 48 layers of random weights that grows to 4e-3 and 3e-2."""


class Difference(NamedTuple):
    """How far two models are apart somewhere."""

    where: str
    largest: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute value of the source."""

    @property
    def share(self) -> float:
        """The difference in proportion to the values."""
        return self.largest / max(self.scale, torch.finfo(torch.float32).tiny)


def verify(source: Pretrained, written: Pretrained, tolerance: float, show: Callable[[str], None]) -> None:
    """Compare all states and the logits (a discriminator's of each token), and show the largest difference of each.

    Raises CheckpointError naming the place where they differ most when that is more than `tolerance` (a share of the
    largest value there).
    """
    compare_riders(source.tensors, written.tensors)
    compare_tokenizers(source, written, show)
    differences = []
    with torch.inference_mode(), progress("verifying", source.config.num_layers + 2) as advance:
        for where, states in zip(places(source), zip(stream(source), stream(written), strict=True), strict=True):
            ours, theirs = states
            found = Difference(where, (ours - theirs).abs().max().item(), ours.abs().max().item())
            differences.append(found)
            show(f"{where:<14} largest difference {found.largest:.2e}, {found.share:.1e} of the largest value")
            advance(1, where)
    # A comparison with NaN is false, so what is asked is whether it is in order.
    worst = max(differences, key=lambda found: found.share if found.share == found.share else float("inf"))
    if not worst.share <= tolerance:
        raise CheckpointError(
            f"the written model differs from its source: at {worst.where} by {worst.largest:.2e}, {worst.share:.1e} of "
            f"the largest value; allowed: {tolerance:.0e}. Nothing was kept; a --tolerance above that accepts it"
        )
    show(
        f"verified: most different at {worst.where}, by {worst.share:.1e} of the largest value; allowed {tolerance:.0e}"
    )


def places(model: Pretrained) -> Iterator[str]:
    """What `stream` yields."""
    yield "embeddings"
    for number in range(1, model.config.num_layers + 1):
        yield f"layer {number}"
    yield "logits"


def stream(source: Pretrained) -> Iterator[Tensor]:
    """The states of the text after the embeddings and each layer, [S, D], then the logits at its masks, [L, V], or a
    discriminator's of all tokens, [S].
    """
    with torch.device("meta"):
        model = MaskedLanguageModel(source.config).eval()
    input_ids_BS, labels_BS = batch(source)
    with filled(model.encoder.relative_position, "encoder.relative_position.", source.tensors):
        scene = model.scene(input_ids_BS)
    with filled(model.embeddings, "embeddings.", source.tensors):
        hidden_BSD = model.embed(input_ids_BS, scene)
    yield hidden_BSD[0]
    inputs = []
    for number in range(source.config.num_layers):
        inputs.append(hidden_BSD)
        del inputs[:-1]
        with contextlib.ExitStack() as stack:
            stack.enter_context(filled_layer(model, number, source.tensors))
            if number == 0 and model.encoder.convolution is not None:
                stack.enter_context(filled(model.encoder.convolution, "encoder.convolution.", source.tensors))
            (hidden_BSD,) = model.encoder(hidden_BSD, scene, numbers=range(number, number + 1))
        yield hidden_BSD[0]
    if DETECTOR in source.tensors:
        with torch.device("meta"):
            detector = Detector(source.config)
        with filled(detector, "detector.", source.tensors):
            yield detector(hidden_BSD, scene.segments_BS)[0]
        return
    # A decoder that takes the last layer's place starts from what that reads.
    last_BSD = inputs[0] if source.config.shares_last_layer else hidden_BSD
    with (
        filled_layer(model, source.config.num_layers - 1, source.tensors),
        filled(model.embeddings, "embeddings.", source.tensors),
        filled(model.decoder, "decoder.", source.tensors),
        filled(model.head, "head.", source.tensors),
    ):
        yield model.predict(last_BSD, scene, LabelledPositions.of(labels_BS), with_logits=True).logits


@contextlib.contextmanager
def filled(module: nn.Module, prefix: str, tensors: LazyTensors) -> Iterator[None]:
    """A part of the model with its weights, in float32, for a while."""
    weights = {name: tensors[prefix + name].read().float() for name, _ in module.named_parameters()}
    module.load_state_dict(weights, assign=True)
    try:
        yield
    finally:
        del weights
        module.to("meta")


def filled_layer(model: MaskedLanguageModel, number: int, tensors: LazyTensors) -> contextlib.AbstractContextManager:
    """One layer of the encoder with its weights."""
    return filled(model.encoder.layers[number], f"encoder.layers.{number}.", tensors)


def batch(model: Pretrained) -> tuple[Tensor, Tensor]:
    """The text as ids, some of them masked, and the labels there, [1, S] each; without a tokenizer, random ids."""
    config = model.config
    length = min(LENGTH, config.max_position_embeddings)
    tokenizer = model.read_tokenizer()
    if tokenizer is not None:
        ids, mask_id = tokenizer.encode(TEXT).tolist(), tokenizer.mask_id
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, config.vocab_size, (length,), generator=generator).tolist()
        mask_id = config.vocab_size - 1
    input_ids_S = torch.tensor([1, *ids[: length - 2], 2])
    labels_S = torch.zeros_like(input_ids_S)
    labels_S[1 : len(input_ids_S) - 1 : MASK_EVERY] = input_ids_S[1 : len(input_ids_S) - 1 : MASK_EVERY]
    input_ids_S = torch.where(labels_S > 0, mask_id, input_ids_S)
    return input_ids_S.unsqueeze(0), labels_S.unsqueeze(0)


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts in which a rule or a step of normalisation that has got lost shows."""
    shown = [token.content for token in tokenizer.rules.added[:MOST_ADDED_TOKENS]]
    return [
        TEXT,
        TEXT.upper(),
        *MAPPED,
        *(f"the {content} sea,{content}a {content.upper()}{content}" for content in shown),
    ]


def compare_tokenizers(source: Pretrained, written: Pretrained, show: Callable[[str], None]) -> None:
    """Raise CheckpointError when a text has other ids afterwards, for us or for transformers."""
    before, after = source.read_tokenizer(), written.read_tokenizer()
    if before is None:
        if source.tokenizer is not None and (written.tokenizer is None or differs(source.tokenizer, written.tokenizer)):
            raise CheckpointError(f"the written folder has other tokenizer files than {source.tokenizer}")
        return
    if after is None:
        raise CheckpointError(f"the written folder has not the tokenizer of {source.tokenizer}")
    texts = probes(before)
    expected = [ids.tolist() for ids in before.encode_batch(texts)]
    found = {"it": [ids.tolist() for ids in after.encode_batch(texts)]}
    if (path := written.tokenizer / TOKENIZER_FILE).is_file():
        exported = tokenizers.Tokenizer.from_file(str(path))
        found[TOKENIZER_FILE] = [exported.encode(text, add_special_tokens=False).ids for text in texts]
    for name, ids in found.items():
        for text, ours, theirs in zip(texts, expected, ids, strict=True):
            if ours != theirs:
                raise CheckpointError(
                    f"the written tokenizer is another: {name} gives other ids than {source.tokenizer} for {text!r}"
                )
    show(f"tokenizer      the same {sum(map(len, expected))} ids of {len(texts)} texts")


def differs(source: Path, written: Path) -> bool:
    """Whether tokenizer files of a kind that is not read have changed on the way."""
    return unread_files(source) != unread_files(written)


def compare_riders(before: LazyTensors, after: LazyTensors) -> None:
    """Raise CheckpointError when a tensor that is only carried along has got lost."""
    for name in [name for name in before if is_beside_the_model(name)]:
        if name not in after or after[name].shape != before[name].shape:
            raise CheckpointError(f"{name.removeprefix(EXTRA)} of the source is not in the written model")
