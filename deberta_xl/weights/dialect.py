"""How releases spell the same model: the prefix of its tensors, v1's fused attention, the head of older transformers.

    release                      prefix     attention   masked-LM head
    v2, v3 (original, the Hub)   deberta.   split       lm_predictions.lm_head
    v1                           deberta.   fused       lm_predictions.lm_head     some v1 files: bert.
    transformers, legacy=True    deberta.   as above    cls.predictions
    transformers, AutoModel      (none)     as above    none

All functions map lazily read tensors to lazily read tensors; shapes are the model's, checked elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from deberta_xl.checkpoint.lazy import LazyTensor, LazyTensors, constant, derived
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.checkpoint.tensor_files import complain_about_names
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.names import DELTA, EXTRA, from_microsoft, is_rider, to_microsoft

PLAIN = "deberta."
LEGACY_HEAD = {
    "cls.predictions.transform.": "lm_predictions.lm_head.",
    "cls.predictions.bias": "lm_predictions.lm_head.bias",
}
TIED = {
    "cls.predictions.decoder.weight": "deberta.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "lm_predictions.lm_head.bias",
}
"""Second names of one tensor in pickles of older transformers."""
RELATIVE = "encoder.relative_position."
BUFFER = re.compile(r".*\.position_ids")
"""What torch once saved although it follows from the configuration."""
FUSED = re.compile(r"(deberta\.encoder\.layer\.\d+\.attention\.self\.)in_proj\.weight")


class Dialect(NamedTuple):
    """The spelling of a file."""

    prefix: Literal["deberta.", "bert.", ""] = "deberta."
    """Before the names of embeddings and encoder."""
    is_fused: bool = False
    """Query, key and value in one matrix, without a key bias (v1)."""
    is_legacy: bool = False
    """The head as transformers has it with `legacy=True`."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Dialect:
        """The spelling that these names follow."""
        names = list(names)
        prefixes = {"embeddings.": "", "encoder.": "", "bert.": "bert."}
        found = {prefix for name in names for start, prefix in prefixes.items() if name.startswith(start)}
        return cls(
            prefix=found.pop() if len(found) == 1 else PLAIN,
            is_fused=any(".in_proj." in name for name in names),
            is_legacy=any(name.startswith("cls.predictions.") for name in names),
        )


# In


def read_dialect(
    tensors: LazyTensors, config: DebertaConfig, path: Path, generator: LazyTensors | None = None
) -> tuple[LazyTensors, Dialect]:
    """A release's tensors under our names, riders behind "extra."; and how they were spelt.

    `generator` holds the tensors, as they stand in its file, of the model whose tables a v3 discriminator adds to.
    Raises CheckpointError for tensors that belong to no DeBERTa, and for tables that need a generator and have none.
    """
    dialect = Dialect.of(tensors)
    plain = plain_spelling(tensors, dialect)
    if generator is not None:
        generator = plain_spelling(generator, Dialect.of(generator))
    plain = add_deltas(plain, generator, path)
    plain = split_attention(plain, config)
    ours: LazyTensors = {}
    unknown = []
    for name, tensor in plain.items():
        if (our_name := from_microsoft(name)) is not None:
            if our_name.startswith(RELATIVE) and not config.relative_rows:
                continue  # others make a table although no term reads it
            ours[our_name] = tensor
        elif is_rider(name):
            ours[EXTRA + name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise complain_about_names(path, unknown, "holds tensors that belong to no DeBERTa; rename or delete them")
    return ours, dialect


def plain_spelling(tensors: LazyTensors, dialect: Dialect) -> LazyTensors:
    """The tensors under the names of the v2 release; second names of one tensor must be equal, and are left out."""
    named: LazyTensors = {}
    for name, tensor in tensors.items():
        if BUFFER.fullmatch(name):
            continue
        plain = _plain_name(name, dialect)
        if plain in named:
            raise CheckpointError(
                f"{named[plain].place} and {tensor.place} are two spellings of one tensor; delete one"
            )
        named[plain] = tensor
    return {name: t for name, t in named.items() if name not in TIED or not _is_second(name, t, named)}


def _plain_name(name: str, dialect: Dialect) -> str:
    """One name in the spelling of the v2 release."""
    if dialect.prefix == "bert." and name.startswith("bert."):
        return PLAIN + name.removeprefix("bert.")
    if dialect.prefix == "" and name.startswith(("embeddings.", "encoder.")):
        return PLAIN + name
    for theirs, plain in LEGACY_HEAD.items():
        if name.startswith(theirs):
            return plain + name.removeprefix(theirs)
    return name


def _is_second(name: str, tensor: LazyTensor, tensors: LazyTensors) -> bool:
    """Whether a tensor repeats the one it is tied to. Raises CheckpointError when it differs."""
    first = tensors.get(TIED[name])
    if first is None or first.shape != tensor.shape or not torch.equal(first.read(), tensor.read()):
        raise CheckpointError(
            f"{tensor.place} differs from {TIED[name]}: an output table of its own, which DeBERTa does not have"
        )
    return True


def add_deltas(tensors: LazyTensors, generator: LazyTensors | None, path: Path) -> LazyTensors:
    """v3's discriminator learns what it adds to the generator's tables (arXiv 2111.09543, section 3.3): the sum.

    A file that holds the sum already (`.weight` beside `._weight`, as the released ones) is taken at its word; what it
    added stays with it as a rider. A file with `._weight` alone has no table without its generator.
    """
    merged = dict(tensors)
    for name in deltas_alone(tensors):
        table = table_of(name)
        if generator is None or table not in generator:
            raise CheckpointError(
                f"{path} holds {name} without {table}: that is what a v3 discriminator adds to its generator's table, "
                "and no table itself; put the generator beside it as pytorch_model.generator.bin, or give it with "
                "--generator"
            )
        if generator[table].shape != tensors[name].shape:
            raise CheckpointError(
                f"{name} has shape {list(tensors[name].shape)} in {path}, but the generator's {table} has "
                f"{list(generator[table].shape)}: they do not belong together"
            )
        merged[table] = derived(torch.add, (generator[table], tensors[name]), tensors[name].shape)
    return merged


def deltas_alone(tensors: LazyTensors) -> list[str]:
    """The tensors that are added to a table which is not there."""
    return [name for name in tensors if name.endswith(DELTA) and table_of(name) not in tensors]


def table_of(delta: str) -> str:
    """The name of the table that a delta is added to."""
    return delta.removesuffix(DELTA) + ".weight"


def needs_generator(tensors: LazyTensors) -> bool:
    """Whether a file's tables are there only together with its generator's."""
    return bool(deltas_alone(tensors))


def split_attention(tensors: LazyTensors, config: DebertaConfig) -> LazyTensors:
    """v1's fused projections taken apart: rows 3dt … of `in_proj` are head t's query, key and value (d = head size).

    v1 has no key bias, which is a bias of zero (any other would change position-to-content), and none for the relative
    keys, where it would cancel in the softmax.
    """
    split: LazyTensors = {}
    for name, tensor in tensors.items():
        if match := FUSED.fullmatch(name):
            split |= _split_layer(match.group(1), tensor, tensors, config)
        elif name.partition(".attention.self.")[2] not in V1_NAMES.values():
            split[name] = tensor
    return split


def _split_layer(prefix: str, fused: LazyTensor, tensors: LazyTensors, config: DebertaConfig) -> LazyTensors:
    """The projections of one layer."""
    size, hidden = config.attention_size, config.hidden_size
    if fused.shape != (3 * size, hidden):
        raise CheckpointError(f"{fused.place} has shape {list(fused.shape)}, not {[3 * size, hidden]}")

    def part(number: int) -> LazyTensor:
        def rows(weight: Tensor) -> Tensor:
            return weight.view(config.num_heads, 3, config.head_size, hidden)[:, number].reshape(size, hidden)

        return derived(rows, [fused], (size, hidden))

    def zeros() -> LazyTensor:
        return constant(0.0, (size,), fused.dtype, f"{fused.place} (v1 has no such bias)")

    layer = {f"{kind}_proj.weight": part(number) for number, kind in enumerate(("query", "key", "value"))}
    layer["key_proj.bias"] = zeros()
    layer |= {ours: tensors[prefix + v1] for ours, v1 in V1_NAMES.items() if prefix + v1 in tensors}
    layer |= {"pos_key_proj.bias": zeros()} if "pos_key_proj.weight" in layer else {}
    return {prefix + name: tensor for name, tensor in layer.items()}


# Out


def write_dialect(tensors: LazyTensors, config: DebertaConfig, dialect: Dialect) -> LazyTensors:
    """Our tensors as a release spells them; the inverse of `read_dialect`."""
    plain = {
        name.removeprefix(EXTRA) if name.startswith(EXTRA) else to_microsoft(name): t for name, t in tensors.items()
    }
    if dialect.is_fused:
        plain = fuse_attention(plain, config)
    return {_spelt(name, dialect): tensor for name, tensor in plain.items()}


def _spelt(name: str, dialect: Dialect) -> str:
    """One name of the v2 release in another spelling."""
    if dialect.is_legacy:
        for theirs, plain in LEGACY_HEAD.items():
            # The bias first: it is the one name that the longer beginning would swallow.
            if name == plain or (plain.endswith(".") and name.startswith(plain) and not name.endswith("lm_head.bias")):
                return theirs + name.removeprefix(plain)
    return dialect.prefix + name.removeprefix(PLAIN) if name.startswith(PLAIN) else name


def fuse_attention(tensors: LazyTensors, config: DebertaConfig) -> LazyTensors:
    """v1's spelling of every layer's projections; the biases that v1 lacks are left out."""
    fused: LazyTensors = {}
    for name, tensor in tensors.items():
        prefix, found, rest = name.partition(".attention.self.")
        prefix += found
        if not found:
            fused[name] = tensor
        elif rest == "query_proj.weight":
            parts = [tensors[f"{prefix}{kind}_proj.weight"] for kind in ("query", "key", "value")]
            size, hidden = tensor.shape
            fused[prefix + "in_proj.weight"] = derived(
                lambda *parts: torch.stack([p.unflatten(0, (config.num_heads, -1)) for p in parts], 1).flatten(0, 2),
                parts,
                (3 * size, hidden),
            )
        elif rest in V1_NAMES:
            fused[prefix + V1_NAMES[rest]] = tensor
    return fused


V1_NAMES = {
    "query_proj.bias": "q_bias",
    "value_proj.bias": "v_bias",
    "pos_key_proj.weight": "pos_proj.weight",
    "pos_query_proj.weight": "pos_q_proj.weight",
    "pos_query_proj.bias": "pos_q_proj.bias",
}
"""v2's names of what v1 has as well, apart from the fused matrix."""


def can_be_fused(tensors: LazyTensors, config: DebertaConfig) -> bool:
    """Whether v1 can hold a model of ours: its own position projections, no buckets, and no bias that v1 lacks."""
    is_v1 = not (config.share_att_key or config.position_buckets or config.normalize_relative_table)
    if not is_v1 or config.conv_kernel_size or config.attention_size != config.hidden_size:
        return False
    lacking = [t for name, t in tensors.items() if name.endswith((".key_proj.bias", ".pos_key_proj.bias"))]
    return not any(bool(tensor.read().any()) for tensor in lacking)
