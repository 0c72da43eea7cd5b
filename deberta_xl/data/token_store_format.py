"""The files of a dataset: Megatron's indexed format (megatron-core 0.16) and the manifest that vouches for it.

    PREFIX.bin            the tokens of all documents, one after the other, without special tokens
    PREFIX.idx            magic, u64 version, u8 dtype code, u64 sequences, u64 documents + 1, then
                          i32 length and i64 byte offset of each sequence, i64 first sequence of each document, the end
    PREFIX.manifest.json  sizes, hashes, dtype, vocabulary, tokenizer, inputs; written last
    PREFIX.tokenizer/     the tokenizer that made the tokens

One document is one sequence.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deberta_xl.base.errors import TokenStoreError
from deberta_xl.base.small_file import read_json

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
#: Megatron's dtype codes that can hold token ids; 6 and 7 are floats.
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

MANIFEST_FORMAT = "deberta_xl dataset"
MANIFEST_VERSION = 1
#: Bytes per hashed block: a damaged file of any size is located to one of them.
BLOCK_SIZE = 64 * 2**20
#: Bytes at each end of a file that are checked whenever it is opened.
EDGE_SIZE = 64 * 2**10


class DatasetPaths(NamedTuple):
    """Where the parts of the dataset PREFIX lie."""

    bin: Path
    idx: Path
    manifest: Path
    tokenizer: Path
    lock: Path


def dataset_paths(prefix: str | Path) -> DatasetPaths:
    """The parts of a dataset; its prefix may be written with or without the suffix of one of its files."""
    text = os.path.expanduser(prefix)
    if text.endswith("/") or Path(text).name in ("", ".", ".."):
        raise TokenStoreError(f"{text!r} is a folder, not the prefix of a dataset; for example {Path(text) / 'train'}")
    for suffix in (".bin", ".idx", ".manifest.json"):
        text = text.removesuffix(suffix)
    return DatasetPaths(*(Path(text + s) for s in (".bin", ".idx", ".manifest.json", ".tokenizer", ".lock")))


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice: two bytes below 65,500 ids, else four."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexHeader(NamedTuple):
    """What the first 34 bytes of the .idx say."""

    dtype: np.dtype
    sequences: int
    documents: int

    def pack(self) -> bytes:
        """The bytes of the header."""
        code = next(code for code, name in DTYPE_CODES.items() if name == self.dtype.name)
        return HEADER.pack(MAGIC, INDEX_VERSION, code, self.sequences, self.documents + 1)

    @property
    def file_size(self) -> int:
        """Bytes of the whole .idx."""
        return HEADER.size + 12 * self.sequences + 8 * (self.documents + 1)


def read_index_header(path: Path) -> IndexHeader:
    """The header of an .idx file; TokenStoreError when it is not one, or not as long as it says."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise TokenStoreError(f"{path} is truncated: {len(head)} bytes; {REBUILD}")
    magic, version, code, sequences, documents_and_end = HEADER.unpack(head)
    if magic != MAGIC:
        raise TokenStoreError(f"{path} is not an index of a Megatron dataset: it begins with {magic!r}, not {MAGIC!r}")
    if version != INDEX_VERSION:
        raise TokenStoreError(f"{path} has index version {version}; this program reads version {INDEX_VERSION}")
    if code not in DTYPE_CODES:
        raise TokenStoreError(f"{path} has dtype code {code}, which holds no token ids; allowed: {DTYPE_CODES}")
    header = IndexHeader(np.dtype(DTYPE_CODES[code]), sequences, documents_and_end - 1)
    if (size := path.stat().st_size) != header.file_size:
        state = "truncated" if size < header.file_size else "too long (multimodal datasets are not supported)"
        raise TokenStoreError(f"{path} is {state}: {size:,} bytes, its header says {header.file_size:,}; {REBUILD}")
    return header


REBUILD = "restore it, or run tools/preprocess.py again"


class BlockHasher:
    """SHA-256 of each block of a stream of bytes, and of its two ends."""

    def __init__(self, block_size: int = BLOCK_SIZE):
        self.block_size = block_size
        self.size = 0
        self.finished: list[str] = []
        self.block = hashlib.sha256()
        self.head = b""
        self.tail = b""

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the stream."""
        view = memoryview(data).cast("B")
        self.head += bytes(view[: EDGE_SIZE - len(self.head)])
        self.tail = (self.tail + bytes(view[-EDGE_SIZE:]))[-EDGE_SIZE:]
        while len(view):
            part = view[: self.block_size - self.size % self.block_size]
            self.block.update(part)
            self.size += len(part)
            if self.size % self.block_size == 0:
                self.close_block()
            view = view[len(part) :]

    def close_block(self) -> None:
        """Note the hash of the block that ends here."""
        self.finished.append(self.block.hexdigest())
        self.block = hashlib.sha256()

    def summary(self) -> dict[str, Any]:
        """What the manifest keeps about the file."""
        unfinished = [self.block.hexdigest()] if self.size % self.block_size else []
        return {
            "size": self.size,
            "edges": hashlib.sha256(self.head + self.tail).hexdigest(),
            "block_size": self.block_size,
            "sha256": self.finished + unfinished,
        }


def edges_of(path: Path) -> str:
    """The hash of a file's two ends, as `BlockHasher.summary` has it."""
    with open(path, "rb") as file:
        head = file.read(EDGE_SIZE)
        file.seek(max(0, path.stat().st_size - EDGE_SIZE))
        return hashlib.sha256(head + file.read(EDGE_SIZE)).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked for its format."""
    try:
        manifest = read_json(path)
        kind, version, files = manifest["format"], manifest["version"], manifest["files"]
        complete = {"vocab_size", "tokenizer", "documents"} <= manifest.keys() and all(
            {"size", "edges", "block_size", "sha256"} <= files[part].keys() for part in ("bin", "idx")
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenStoreError(f"{path} is damaged: {error!r}; {REBUILD}") from error
    if kind != MANIFEST_FORMAT or version != MANIFEST_VERSION or not complete:
        raise TokenStoreError(
            f"{path} is not a manifest this program reads: format {kind!r} version {version}, "
            f"expected {MANIFEST_FORMAT!r} version {MANIFEST_VERSION}"
        )
    return manifest


def content_fingerprint(files: dict[str, Any]) -> str:
    """One hash over the content of .bin and .idx, from the hashes in their summaries."""
    content = {part: [files[part]["size"], files[part]["sha256"]] for part in ("bin", "idx")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
