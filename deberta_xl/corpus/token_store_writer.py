"""Writing a dataset of tokenised documents so that no crash leaves one that opens and is not whole."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from deberta_xl.base.durable import partial, publish, remove
from deberta_xl.base.errors import TokenStoreError
from deberta_xl.base.lock import one_writer
from deberta_xl.data.token_store_format import (
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    BlockHasher,
    IndexHeader,
    content_fingerprint,
    dataset_paths,
    smallest_dtype,
)
from deberta_xl.data.tokenizer import Tokenizer

#: Documents whose index entries are computed at a time.
INDEX_CHUNK = 2**20


def program_version() -> str:
    """The installed version of this package."""
    try:
        return importlib.metadata.version("deberta_xl")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


class TokenStoreWriter:
    """Writes the dataset PREFIX. Use as a context; `finish` publishes, leaving without it discards everything.

        with TokenStoreWriter("data/wiki", tokenizer=tokenizer) as writer:
            writer.add(ids)
            writer.finish()

    Give the `tokenizer` (it is copied beside the data), or only a `vocab_size`. Files are written beside their final
    names and renamed when whole: tokenizer, .bin, .idx, then the manifest. Raises TokenStoreError for an output that
    exists (unless `overwrite`), for an id outside the vocabulary, and DataError for a second writer.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        overwrite: bool = False,
    ):
        if (tokenizer is None) == (vocab_size is None):
            raise ValueError("TokenStoreWriter needs a tokenizer or a vocab_size, and not both")
        self.paths = dataset_paths(prefix)
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size if tokenizer is None else tokenizer.vocab_size
        self.dtype = smallest_dtype(self.vocab_size)
        self.overwrite = overwrite
        self.lengths = array("i")
        self.token_counts = np.zeros(self.vocab_size, np.int64)
        self.hasher = BlockHasher()
        self.files = contextlib.ExitStack()
        self.bin_file: BinaryIO | None = None

    def __enter__(self) -> TokenStoreWriter:
        """Take the lock, check that nothing is overwritten by accident, open the temporary .bin."""
        with contextlib.ExitStack() as files:
            files.enter_context(one_writer(self.paths.lock))
            if not self.overwrite:
                self.refuse_existing()
            files.callback(self.discard)
            self.bin_file = files.enter_context(open(partial(self.paths.bin), "wb"))
            self.files = files.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete whatever is not published and release the lock."""
        self.files.close()

    def refuse_existing(self) -> None:
        """Refuse to replace any part of a dataset."""
        for path in (self.paths.bin, self.paths.idx, self.paths.manifest, self.paths.tokenizer):
            if path.exists():
                raise TokenStoreError(f"{path} exists; choose another output, or --overwrite to replace the dataset")

    def discard(self) -> None:
        """Delete the temporary files."""
        for path in (self.paths.bin, self.paths.idx, self.paths.manifest, self.paths.tokenizer):
            remove(partial(path))

    def add(self, ids: np.ndarray) -> None:
        """Append one document; one without tokens is left out."""
        self.add_many(ids, np.array([len(ids)]))

    def add_many(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose ids stand back to back; `lengths` are their sizes."""
        if lengths.sum() != len(ids):
            raise ValueError(f"the lengths sum to {lengths.sum()}, but there are {len(ids)} ids")
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if outside.size:
            raise TokenStoreError(
                f"{self.paths.bin}: token id {ids[outside[0]]} is outside the vocabulary (0 … {self.vocab_size - 1})"
            )
        data = np.ascontiguousarray(ids, self.dtype)
        self.bin_file.write(data)
        self.hasher.update(data)
        counts = np.bincount(data)
        self.token_counts[: len(counts)] += counts
        self.lengths.frombytes(lengths[lengths > 0].astype(np.int32).tobytes())

    def finish(self, inputs: list[dict[str, Any]] | None = None) -> None:
        """Publish the dataset; `inputs` (name, size, hash of each source) go into the manifest."""
        if not self.lengths:
            raise TokenStoreError(f"{self.paths.bin}: no document has a token, so there is nothing to write")
        self.bin_file.close()
        files = {"bin": self.hasher.summary(), "idx": self.write_index()}
        text = json.dumps(self.manifest(files, inputs or []), indent=1) + "\n"
        partial(self.paths.manifest).write_text(text, encoding="utf-8")
        # From here to the last line there is no manifest and, until the new pair is whole, no .idx: nothing opens.
        remove(self.paths.manifest)
        remove(self.paths.idx)
        remove(self.paths.tokenizer)
        if self.tokenizer:
            self.tokenizer.save(self.paths.tokenizer)
        for path in (self.paths.bin, self.paths.idx, self.paths.manifest):
            publish(path)

    def write_index(self) -> dict[str, Any]:
        """Write the temporary .idx; returns its summary for the manifest."""
        hasher = BlockHasher()
        lengths = np.frombuffer(self.lengths, np.int32)
        with open(partial(self.paths.idx), "wb") as file:

            def put(data: bytes) -> None:
                file.write(data)
                hasher.update(data)

            put(IndexHeader(self.dtype, len(lengths), len(lengths)).pack())
            put(lengths.tobytes())
            end = 0
            for start in range(0, len(lengths), INDEX_CHUNK):
                ends = end + np.cumsum(lengths[start : start + INDEX_CHUNK], dtype=np.int64)
                put(((ends - lengths[start : start + INDEX_CHUNK]) * self.dtype.itemsize).tobytes())
                end = int(ends[-1])
            for start in range(0, len(lengths) + 1, INDEX_CHUNK):
                put(np.arange(start, min(start + INDEX_CHUNK, len(lengths) + 1), dtype=np.int64).tobytes())
        return hasher.summary()

    def manifest(self, files: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """What PREFIX.manifest.json says; nothing in it depends on the clock or on the number of workers."""
        return {
            "format": MANIFEST_FORMAT,
            "version": MANIFEST_VERSION,
            "written_by": f"deberta_xl {program_version()}",
            "documents": len(self.lengths),
            "tokens": self.hasher.size // self.dtype.itemsize,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
            "special_ids": self.tokenizer.special_ids if self.tokenizer else None,
            "fingerprint": content_fingerprint(files),
            "files": files,
            "inputs": inputs,
            # In one string: a line for each id would bury the rest of the file.
            "token_counts": " ".join(map(str, self.token_counts.tolist())),
        }
