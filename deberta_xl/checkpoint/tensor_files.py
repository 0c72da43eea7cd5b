"""Files of named tensors, opened to be read one tensor at a time: safetensors, whole or in shards, and pickles.

Of a pickle only tensors are read, and nothing in it is executed (`weights_only`). A shard index can name only files
beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deberta_xl.base.small_file import read_json
from deberta_xl.checkpoint.lazy import LazyTensor, LazyTensors
from deberta_xl.checkpoint.manifest import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WEIGHTS_NAME = "model.safetensors"
INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = (
    WEIGHTS_NAME,
    WEIGHTS_NAME + INDEX_SUFFIX,
    "weights.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX_SUFFIX,
)
"""What can hold a model's weights; the first that is there is read."""
REOPEN_AFTER_BYTES = 2**30
"""A mapped pickle is mapped anew after so much has been read of it, which gives its pages back."""


def find_weight_file(folder: Path) -> Path:
    """The file, or the index of the files, with the weights of a folder."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    shards = sorted(path.name for path in folder.glob("*-of-*"))
    hint = f"; it has {shards[0]}, but not the index of the shards" if shards else ""
    raise CheckpointError(f"{folder} has none of {', '.join(WEIGHT_FILES)}{hint}")


def open_tensors(path: Path) -> LazyTensors:
    """The tensors of a file, or of all files that an index names. Raises CheckpointError naming what is wrong."""
    if path.name.endswith(INDEX_SUFFIX):
        return open_shards(path)
    return open_pickle(path) if path.suffix in (".bin", ".pt") else open_safetensors(path)


def open_shards(index: Path) -> LazyTensors:
    """The tensors of all shards; index and shards must agree in every name."""
    stated = read_index(index)
    found: LazyTensors = {}
    for file_name in sorted(set(stated.values())):
        shard = open_tensors(index.parent / file_name)
        for name, tensor in shard.items():
            if stated.get(name) != file_name:
                raise CheckpointError(
                    f"{index.parent / file_name} holds {name}, which {index.name} "
                    + (f"places in {stated[name]}" if name in stated else "does not name")
                )
            found[name] = tensor
    if lacking := [name for name in stated if name not in found]:
        raise CheckpointError(
            f"{index.parent / stated[lacking[0]]} lacks {lacking[0]}, which {index.name} places there"
        )
    return {name: found[name] for name in stated}


def read_index(index: Path) -> dict[str, str]:
    """Tensor → name of the file beside the index that holds it."""
    try:
        stated = read_json(index)["weight_map"]
        is_table = isinstance(stated, dict) and stated and all(isinstance(value, str) for value in stated.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of shards: {error!r}") from None
    if not is_table:
        raise CheckpointError(f"{index} is no index of shards: weight_map must map tensors to file names")
    suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
    for file_name in stated.values():
        is_plain = Path(file_name).name == file_name and "\\" not in file_name and "\0" not in file_name
        if not is_plain or not file_name.endswith(suffix):
            raise CheckpointError(f"{index} names {file_name!r}, which is no {suffix} file beside it: not read")
        if not (index.parent / file_name).is_file():
            raise CheckpointError(f"{index.parent / file_name} is missing, though {index.name} names it")
    return stated


# safetensors


def open_safetensors(path: Path) -> LazyTensors:
    """The tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            facts = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it from a copy") from None
    for name, (_, dtype) in facts.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has type {dtype}, which is not read; known: {', '.join(DTYPES)}")
    return {
        name: LazyTensor(shape, DTYPES[dtype], lambda name=name: _read_safetensor(path, name), f"{path}: {name}")
        for name, (shape, dtype) in facts.items()
    }


def _read_safetensor(path: Path, name: str) -> Tensor:
    """One tensor. The file is opened for it alone: pages once mapped would count as ours until it is closed."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None


# Pickles


def open_pickle(path: Path) -> LazyTensors:
    """The tensors of a file written by `torch.save`; mapped where its format allows (torch 1.6 and newer)."""
    opened = _Pickle(path)
    return {
        name: LazyTensor(tuple(t.shape), t.dtype, lambda name=name: opened.read(name), f"{path}: {name}")
        for name, t in opened.tensors.items()
    }


class _Pickle:
    """An opened pickle, mapped anew from time to time."""

    def __init__(self, path: Path):
        self.path = path
        self.is_mapped = True
        self.bytes_read = 0
        self.tensors = self.load()

    def load(self) -> dict[str, Tensor]:
        """The table of tensors."""
        try:
            content = self.load_any()
        except Exception:  # a damaged file makes torch.load raise almost anything
            # torch's own message is left out: it advises to load the file without this protection.
            raise CheckpointError(
                f"{self.path} is damaged, or holds other things than tensors, which are not loaded: a pickle can run "
                "any program; restore the file from a copy, or get the weights as safetensors"
            ) from None
        is_table = isinstance(content, dict)
        if not is_table or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()):
            raise CheckpointError(f"{self.path} is no table of named tensors, as a model's weights are")
        return {name: tensor.detach() for name, tensor in content.items()}

    def load_any(self) -> object:
        """Whatever is in the file, as far as it is tensors and plain containers."""
        if self.is_mapped:
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                self.is_mapped = False  # the format of torch before 1.6, which is held in memory
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        if self.is_mapped and self.bytes_read > REOPEN_AFTER_BYTES:
            self.tensors = {}
            self.tensors = self.load()
            self.bytes_read = 0
        tensor = self.tensors[name]
        self.bytes_read += tensor.nbytes
        return tensor


def complain_about_names(path: Path, names: Iterable[str], what: str) -> CheckpointError:
    """An error that names the first few of many tensors."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return CheckpointError(f"{path} {what}: {', '.join(names[:5])}{more}")
