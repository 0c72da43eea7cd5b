"""Writing named tensors one at a time, so that no more than one of them is ever held in memory.

safetensors (its format: the header's length in 8 bytes, a JSON header, the tensors' bytes), whole or in shards with
Hugging Face's index, and `pytorch_model.bin` as torch.save writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deberta_xl.base.durable import sync, write_file
from deberta_xl.checkpoint.lazy import LazyTensor, LazyTensors, read_finite
from deberta_xl.checkpoint.manifest import FileFacts
from deberta_xl.checkpoint.tensor_files import DTYPES, INDEX_SUFFIX, WEIGHTS_NAME

TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DEFAULT_SHARD_BYTES = 5 * 10**9
WRITTEN_AT_ONCE = 128 * 2**20
"""Bytes between two signs that writing gets on; each has forced those before it to the disk."""

Advance = Callable[..., None]
"""Told how many bytes have just been written, and of what."""


def no_progress(_amount: int, _note: str = "") -> None:
    """For those who do not wait."""


def write_shards(
    folder: Path, tensors: LazyTensors, *, shard_bytes: int = DEFAULT_SHARD_BYTES, advance: Advance = no_progress
) -> list[str]:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (or one tensor) and their index; the files' names.

    Raises CheckpointError naming a tensor that holds NaN or infinity, or values beyond its new type.
    """
    shards = cut_into_shards(tensors, shard_bytes)
    if len(shards) == 1:
        names = [WEIGHTS_NAME]
    else:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, advance)
    if len(shards) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    write_file(folder / f"{WEIGHTS_NAME}{INDEX_SUFFIX}", (json.dumps(index, indent=2) + "\n").encode())
    return [*names, WEIGHTS_NAME + INDEX_SUFFIX]


def cut_into_shards(tensors: LazyTensors, shard_bytes: int) -> list[LazyTensors]:
    """Consecutive tensors of at most `shard_bytes` together; a larger tensor has a shard of its own."""
    shards: list[LazyTensors] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def write_safetensors(path: Path, tensors: LazyTensors, advance: Advance = no_progress) -> None:
    """Write one safetensors file and force it to the disk."""
    # Wider types first, as the format's own library does: every tensor then begins at a multiple of its width.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    with path.open("wb") as file:
        file.write(safetensors_header(header))
        for name, tensor in ordered:
            _write_bytes(file, read_finite(name, tensor))
            advance(tensor.nbytes, name)
    sync(path)


def safetensors_header(header: Mapping[str, object]) -> bytes:
    """The beginning of a safetensors file, before the tensors' bytes."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_flat(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], advance: Advance) -> FileFacts:
    """Write a safetensors file of long tensors of one type, piece by piece: `advance` is told of each when it is there.

    What is hashed, while it is written, are the bytes in memory: whatever the disk makes of them, the hash tells.
    Raises OSError that names the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    beginning = safetensors_header(header)
    digest = hashlib.sha256(beginning)
    try:
        with path.open("wb") as file, ThreadPoolExecutor(1, "hash") as beside:
            file.write(beginning)
            for tensor in tensors.values():
                content = tensor.reshape(-1).view(torch.uint8).numpy().data
                for start in range(0, len(content), WRITTEN_AT_ONCE):
                    part = content[start : start + WRITTEN_AT_ONCE]
                    hashed = beside.submit(digest.update, part)
                    file.write(part)
                    file.flush()
                    os.fdatasync(file.fileno())
                    hashed.result()
                    advance(len(part))
        sync(path)
        return FileFacts(len(beginning) + end, digest.hexdigest())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}", str(path)) from error


def write_pickle(path: Path, tensors: LazyTensors, advance: Advance = no_progress) -> None:
    """Write a file as `torch.save` does and force it to the disk.

    torch lays the file out with holes for the tensors' bytes (`skip_data`; the tensors it is given are never touched,
    so the system gives them no memory), and the holes are filled one by one.
    """
    skeleton = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    with torch.serialization.skip_data():
        torch.save(skeleton, path)
    del skeleton
    # Tensors without a device have no bytes either; they know where in the file their bytes would be.
    placed = torch.load(path, map_location="meta", weights_only=True)
    checksums = {}
    with path.open("rb+") as file:
        for name, tensor in tensors.items():
            offset = placed[name].untyped_storage()._checkpoint_offset
            if tensor.nbytes:
                file.seek(offset)
                checksums[offset] = _write_bytes(file, read_finite(name, tensor))
            advance(tensor.nbytes, name)
        _write_checksums(file, path, checksums)
    sync(path)


def _write_bytes(file: BinaryIO, tensor: Tensor) -> int:
    """Write a tensor's elements; their CRC-32, which zip archives keep."""
    content = tensor.reshape(-1).view(torch.uint8).numpy().data
    file.write(content)
    return zlib.crc32(content)


def _write_checksums(file: BinaryIO, path: Path, checksums: dict[int, int]) -> None:
    """Note the CRC-32 of each record in the archive's directory; `checksums` maps a record's first byte to it.

    torch reads such a file without them, but other programs that test archives do not.
    """
    file.flush()
    with zipfile.ZipFile(path) as archive:
        position = archive.start_dir
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            first = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if first in checksums:
                file.seek(position + 16)
                file.write(struct.pack("<I", checksums[first]))
            file.seek(position + 28)
            position += 46 + sum(struct.unpack("<HHH", file.read(6)))


def total_bytes(tensors: LazyTensors) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def most_common_type(tensors: LazyTensors) -> torch.dtype:
    """The floating-point type that holds most of the elements."""
    sizes: dict[torch.dtype, int] = {}
    floating: list[LazyTensor] = [t for t in tensors.values() if t.dtype.is_floating_point]
    for tensor in floating:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes // tensor.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype])
