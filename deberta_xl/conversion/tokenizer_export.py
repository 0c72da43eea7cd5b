"""The tokenizer as Hugging Face's `tokenizer.json`, with SentencePiece's own ids.

transformers' `DebertaV2Tokenizer` drops SentencePiece's character map and its byte fallback, and replaces even a
shipped `tokenizer.json`'s normaliser; hence the class in `tokenizer_config.json` is `PreTrainedTokenizerFast`.

Where the ids still differ from those of pretraining:

* Literal special tokens in text: transformers reads the letters `[MASK]`, `[CLS]`, `[SEP]`, `[PAD]`, `[UNK]` as the
  special tokens; our `Tokenizer` cuts them into pieces like any other text. The same holds for literal byte pieces
  such as `<0x41>` where the model has byte fallback.
* The characters U+E0FFD … U+E0FFF, which Unicode has set aside: they are lost where a model has a character map
  (`character_map.py`).
* The literal character U+2581, which SentencePiece uses for the space; at a text's beginning, a user-defined piece that
  normalisation would change (`tools/train_tokenizer.py` makes none).
* Text behind [MASK], in a model trained with only one of `remove_extra_whitespaces` and `add_dummy_prefix` (both are
  SentencePiece's defaults): it gets one space too many or too few.
* Ties in long documents: SentencePiece adds up scores in float32 over the whole text, `tokenizers` in float64 within a
  word. Where two cuttings of a word weigh the same, the two may choose differently, the more often the longer the text.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from deberta_xl.base.errors import TokenizerError
from deberta_xl.base.log import logger
from deberta_xl.conversion.character_map import character_map
from deberta_xl.data.text_rules import TextRules
from deberta_xl.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, WORD_MARK, Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE, TOKENIZER_FILE

UNLIKE = "tokenizer.json normalises %d sequences of characters in another way than SentencePiece, e.g. %s"
#: How a piece takes part in SentencePiece's search: always where it occurs, unlike ordinary pieces.
USER_DEFINED = ModelProto.SentencePiece.USER_DEFINED
USER_DEFINED_SCORE = 64.0
"""For each character of such a piece: far above the negative scores of others, so that it is always taken."""


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """Name → content of the tokenizer's files in a Hugging Face folder; `max_length` is the longest sequence in tokens.

    SentencePiece's model and our settings go along, so that `Tokenizer.load` reads the folder as well.
    """
    return {
        "tokenizer.json": huggingface_tokenizer(tokenizer).to_str(pretty=True).encode(),
        "tokenizer_config.json": json_bytes(tokenizer_config(tokenizer, max_length)),
        **tokenizer.files(),
    }


def json_bytes(fields: dict[str, Any]) -> bytes:
    """A small JSON file for people to read."""
    return (json.dumps(fields, indent=2) + "\n").encode()


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """What `tokenizer_config.json` holds."""
    pad, cls, sep, unk = SPECIAL_PIECES
    names = {"bos": cls, "eos": sep, "cls": cls, "sep": sep, "pad": pad, "unk": unk, "mask": MASK_PIECE}
    special = [token.content for token in tokenizer.rules.added if token.special]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask", "token_type_ids"],
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": piece for role, piece in names.items()},
        **({"additional_special_tokens": special} if special else {}),
    }


def huggingface_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """A `tokenizers.Tokenizer` that gives the ids of `tokenizer`, between [CLS] and [SEP]; spare ids stay without name.

    [MASK] in a text stands for a word with the space before it: what follows begins a word only after a space.

    Raises TokenizerError when the SentencePiece model is of a kind that `tokenizer.json` cannot express.
    """
    model = ModelProto.FromString(tokenizer.spm_model)
    refuse_unknown_kinds(model)
    normalizer = build_normalizer(model.normalizer_spec, tokenizer.rules)
    user_defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    kept = {piece for piece in user_defined if normalizer.normalize_str(piece) == piece}
    scores = {piece: USER_DEFINED_SCORE * len(piece) for piece in kept}
    pieces = [(piece.piece, scores.get(piece.piece, piece.score)) for piece in model.pieces]
    unigram = models.Unigram(pieces, unk_id=tokenizer.unk_id, byte_fallback=model.trainer_spec.byte_fallback)
    converted = tokenizers.Tokenizer(unigram)
    converted.normalizer = normalizer
    converted.pre_tokenizer = build_pre_tokenizer(model, tokenizer.rules)
    converted.decoder = build_decoder(model.normalizer_spec)
    converted.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL_PIECES])
    converted.add_special_tokens([AddedToken(MASK_PIECE, special=True, normalized=False, lstrip=True)])
    converted.add_tokens([AddedToken(piece, normalized=True) for piece in user_defined if piece not in kept])
    converted.add_tokens(
        [AddedToken(**{k: v for k, v in t._asdict().items() if k != "id"}) for t in tokenizer.rules.added]
    )
    converted.post_processor = frame(tokenizer)
    assert converted.token_to_id(MASK_PIECE) == tokenizer.mask_id
    for token in tokenizer.rules.added:
        if converted.token_to_id(token.content) != token.id:
            raise TokenizerError(
                f"the added token {token.content!r} is {token.id}; {TOKENIZER_FILE} can only give ids without gaps "
                f"behind {MASK_PIECE}, which is {tokenizer.mask_id}"
            )
    return converted


def refuse_unknown_kinds(model: ModelProto) -> None:
    """Raise TokenizerError for a model that is not DeBERTa's: unigram, the space marked by U+2581 before a word."""
    if model.trainer_spec.model_type != TrainerSpec.UNIGRAM:
        kind = TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()
        raise TokenizerError(f"{MODEL_FILE} is a {kind} model; only unigram models can be exported")
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        raise TokenizerError(
            f"{MODEL_FILE} marks words in another way (treat_whitespace_as_suffix="
            f"{model.trainer_spec.treat_whitespace_as_suffix}, escape_whitespaces="
            f"{model.normalizer_spec.escape_whitespaces}); only models with U+2581 before a word can be exported"
        )


def build_normalizer(spec: NormalizerSpec, rules: TextRules) -> normalizers.Normalizer:
    """SentencePiece's character map, then its treatment of superfluous spaces (U+0020 only, as there)."""
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if rules.lower_case else []
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        steps.append(normalizers.Prepend(" "))  # before the map: a text that it empties keeps its word mark
    if spec.precompiled_charsmap:
        mapped = character_map(spec.precompiled_charsmap)
        if mapped.unlike:
            shown = ", ".join(repr(sequence) for sequence in mapped.unlike[:5])
            logger.warning(UNLIKE, len(mapped.unlike), shown)
        steps += mapped.steps
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r" \z"), "")]
        # A space at the very beginning becomes the first word's mark, so it may stay where words get one.
        steps += [] if spec.add_dummy_prefix else [normalizers.Replace(Regex(r"\A "), "")]
    return normalizers.Sequence(steps)


def build_pre_tokenizer(model: ModelProto, rules: TextRules) -> pre_tokenizers.PreTokenizer:
    """Spaces become word marks; the text's first word gets one, what follows a special token only for its own space.

    With rules of its own, every part of a text gets one, [MASK] or not, as in the tokenizer that they come from.
    """
    marks_first = model.normalizer_spec.add_dummy_prefix and model.normalizer_spec.remove_extra_whitespaces
    everywhere = not rules.is_plain and not rules.first_word_only
    scheme = "never" if not marks_first else "always" if everywhere else "first"
    marks = pre_tokenizers.Metaspace(WORD_MARK, scheme, split=model.trainer_spec.split_by_whitespace)
    return pre_tokenizers.Sequence([pre_tokenizers.Punctuation("isolated"), marks]) if rules.split_by_punct else marks


def build_decoder(spec: NormalizerSpec) -> decoders.Decoder:
    """Pieces back to text."""
    steps: list[decoders.Decoder] = [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else steps)


def frame(tokenizer: Tokenizer) -> processors.PostProcessor:
    """[CLS] text [SEP], or [CLS] text [SEP] second text [SEP] with token type 1 from the second text on."""
    _, cls, sep, _ = SPECIAL_PIECES
    return processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, tokenizer.cls_id), (sep, tokenizer.sep_id)],
    )
