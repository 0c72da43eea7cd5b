"""Reading a dataset of tokenised documents: memory-mapped, checked when opened, verified in full on request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deberta_xl.base.errors import TokenizerError, TokenStoreError
from deberta_xl.base.log import logger
from deberta_xl.data.token_store_format import (
    BLOCK_SIZE,
    HEADER,
    REBUILD,
    IndexHeader,
    content_fingerprint,
    dataset_paths,
    edges_of,
    read_index_header,
    read_manifest,
)
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.data.tokenizer_files import MODEL_FILE


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, uint8, read when they are looked at; the mapping lives as long as any view of it."""
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


class TokenStore:
    """The documents of the dataset PREFIX: `store[i]` are the token ids of document i, without special tokens.

    Opening checks sizes, header, and the hashes of both ends of each file, in milliseconds for any size; `verify` reads
    everything. A Megatron dataset without our manifest opens too, with a warning; its documents may hold several
    sequences. Arrays that are handed out are copies. Raises TokenStoreError for whatever is wrong with the files.
    """

    def __init__(self, prefix: str | Path):
        self.paths = dataset_paths(prefix)
        self.prefix = str(self.paths.bin).removesuffix(".bin")
        for path in (self.paths.idx, self.paths.bin):
            if not path.is_file():
                raise TokenStoreError(f"dataset {self.prefix}: there is no {path}; make it with tools/preprocess.py")
        self.header = read_index_header(self.paths.idx)
        if not self.header.sequences or not self.paths.bin.stat().st_size:
            raise TokenStoreError(f"dataset {self.prefix} holds no tokens; {REBUILD}")
        self.manifest = read_manifest(self.paths.manifest) if self.paths.manifest.is_file() else None
        if self.manifest:
            self.check_against_manifest()
        self.map_files(self.header)
        self.check_size()
        if not self.manifest:
            logger.warning("%s: no manifest, so the dataset's integrity cannot be checked", self.prefix)
            self.check_index()

    def map_files(self, header: IndexHeader) -> None:
        """Map both files and find the byte offset at which each document starts."""
        index = mapped(self.paths.idx)
        lengths_end = HEADER.size + 4 * header.sequences
        offsets_end = lengths_end + 8 * header.sequences
        self.sequence_lengths = index[HEADER.size : lengths_end].view("<i4")
        self.sequence_offsets = index[lengths_end:offsets_end].view("<i8")
        self.first_sequences = index[offsets_end:].view("<i8")
        self.stream = mapped(self.paths.bin)
        self.num_tokens = self.stream.size // header.dtype.itemsize
        #: Byte offset of each document, int64 [documents]: the index itself where documents are sequences.
        self.document_offsets = self.sequence_offsets if self.manifest else self.grouped_offsets()

    def grouped_offsets(self) -> np.ndarray:
        """Byte offset of each document of a dataset whose documents may hold several sequences, or none."""
        offsets = np.append(self.sequence_offsets, self.stream.size)
        first = self.first_sequences
        if first[0] != 0 or first[-1] != self.header.sequences or np.any(np.diff(first) < 0):
            raise TokenStoreError(f"{self.paths.idx} is damaged: its document list is not in order; {REBUILD}")
        return offsets[first[:-1]]

    def check_size(self) -> None:
        """Refuse a .bin that does not end where the index says."""
        expected = int(self.sequence_offsets[-1]) + int(self.sequence_lengths[-1]) * self.header.dtype.itemsize
        if self.stream.size != expected:
            state = "truncated" if self.stream.size < expected else "longer than its index says"
            raise TokenStoreError(
                f"{self.paths.bin} is {state}: {self.stream.size:,} bytes, {self.paths.idx.name} describes "
                f"{expected:,}; it is damaged or belongs to another dataset; {REBUILD}"
            )

    def check_against_manifest(self) -> None:
        """Compare sizes, ends and counts with what the writer noted."""
        for part, path in (("bin", self.paths.bin), ("idx", self.paths.idx)):
            noted = self.manifest["files"][part]
            if (size := path.stat().st_size) != noted["size"]:
                state = "truncated" if size < noted["size"] else "too long"
                raise TokenStoreError(
                    f"{path} is {state}: {size:,} bytes, the manifest says {noted['size']:,}; "
                    f"it is damaged or belongs to another dataset; {REBUILD}"
                )
            if edges_of(path) != noted["edges"]:
                raise TokenStoreError(
                    f"{path} is not the file that {self.paths.manifest.name} describes; "
                    f"it is damaged or belongs to another dataset; {REBUILD}"
                )
        if self.manifest["documents"] != self.header.sequences or self.header.documents != self.header.sequences:
            raise TokenStoreError(f"{self.paths.idx} and {self.paths.manifest} disagree about the documents; {REBUILD}")

    def check_index(self) -> None:
        """Refuse an index whose offsets are not the running sum of its lengths."""
        lengths = self.sequence_lengths.astype(np.int64)
        expected = (np.cumsum(lengths) - lengths) * self.header.dtype.itemsize
        if np.any(lengths < 0) or not np.array_equal(expected, self.sequence_offsets):
            raise TokenStoreError(f"{self.paths.idx} is damaged: its offsets do not follow from its lengths; {REBUILD}")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.document_offsets)

    @property
    def vocab_size(self) -> int | None:
        """Size of the table the ids come from; None when there is no manifest."""
        return self.manifest["vocab_size"] if self.manifest else None

    @property
    def token_counts(self) -> np.ndarray | None:
        """How often each id stands in the dataset, int64 `[vocab_size]`, as its writer counted; None where it did not.

        None, too, where the counts are not those of as many tokens.
        """
        try:
            counts = np.array(self.manifest["token_counts"].split(), np.int64)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
            return None
        return counts if len(counts) == self.vocab_size and counts.sum() == self.num_tokens else None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 `[documents]`."""
        return np.diff(self.document_offsets, append=self.stream.size) // self.header.dtype.itemsize

    @property
    def fingerprint(self) -> str:
        """A hash of the content: of all blocks' hashes, or, without a manifest, of the ends of both files."""
        if self.manifest:
            return content_fingerprint(self.manifest["files"])
        ends = [edges_of(path) + str(path.stat().st_size) for path in (self.paths.bin, self.paths.idx)]
        return hashlib.sha256("".join(ends).encode()).hexdigest()

    def nonempty_offsets(self) -> np.ndarray:
        """Byte offset of each document that holds tokens, int64; our own datasets hold no others (no copy then)."""
        if self.manifest:
            return self.document_offsets
        offsets = np.unique(self.document_offsets)
        return offsets[offsets < self.stream.size]

    def bounds(self, document: int) -> tuple[int, int]:
        """First token of a document in the token stream, and the one behind its last."""
        if not -len(self) <= document < len(self):
            raise IndexError(f"document {document} of {self.prefix}, which holds {len(self)}")
        document %= len(self)
        is_last = document == len(self) - 1
        end = self.stream.size if is_last else int(self.document_offsets[document + 1])
        itemsize = self.header.dtype.itemsize
        return int(self.document_offsets[document]) // itemsize, end // itemsize

    def __getitem__(self, document: int) -> np.ndarray:
        """Token ids of a document, `[tokens]` in the dtype of the file."""
        return self.read_stream(*self.bounds(document))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of a document; both must lie within it."""
        first, end = self.bounds(document)
        if not 0 <= start <= stop <= end - first:
            raise IndexError(f"tokens {start} … {stop} of {self.prefix}'s document {document}, which has {end - first}")
        return self.read_stream(first + start, first + stop)

    def read_stream(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop − 1 of the whole stream, documents back to back."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} … {stop} of {self.prefix}, which holds {self.num_tokens}")
        itemsize = self.header.dtype.itemsize
        return np.array(self.stream[start * itemsize : stop * itemsize]).view(self.header.dtype)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that travels with the data. Raises TokenizerError when there is none."""
        folder = self.paths.tokenizer
        if not (folder / MODEL_FILE).is_file():
            raise TokenizerError(
                f"dataset {self.prefix} is without its tokenizer: copy the tokenizer that made this dataset (a folder "
                f"with {MODEL_FILE}) to {folder}. The ids stand for that one's pieces; with any other, a newly trained "
                "one too, they would stand for other text, and nothing could notice"
            )
        return Tokenizer.load(folder)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer other than the one the dataset was made with."""
        if not self.manifest or not self.manifest["tokenizer"]:
            logger.warning("%s does not say which tokenizer made it; it is not checked", self.prefix)
        elif tokenizer.fingerprint != self.manifest["tokenizer"]:
            raise TokenStoreError(
                f"dataset {self.prefix} was made with another tokenizer (fingerprint "
                f"{self.manifest['tokenizer'][:12]}, vocabulary {self.vocab_size}) than the one given "
                f"({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size}); "
                f"use {self.paths.tokenizer}, or run tools/preprocess.py with the tokenizer you want"
            )

    def verify(self, progress: Callable[[int], Any] = lambda num_bytes: None) -> None:
        """Read everything: the hash of every block, and that every id lies in the vocabulary.

        `progress` is called with the number of bytes just checked. Raises TokenStoreError naming file and place.
        """
        itemsize = self.header.dtype.itemsize
        for start, block in self.verified_blocks("bin", self.stream):
            self.verify_ids(start // itemsize, block.view(self.header.dtype))
            progress(block.size)
        for _, block in self.verified_blocks("idx", mapped(self.paths.idx)):
            progress(block.size)
        self.check_index()

    def verified_blocks(self, part: str, content: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The blocks of a file with their places, each compared with its hash in the manifest, if there is one."""
        noted = self.manifest["files"][part] if self.manifest else {"block_size": BLOCK_SIZE, "sha256": []}
        for start in range(0, content.size, noted["block_size"]):
            block = content[start : start + noted["block_size"]]
            if self.manifest and hashlib.sha256(block).hexdigest() != noted["sha256"][start // noted["block_size"]]:
                raise TokenStoreError(
                    f"{getattr(self.paths, part)} is damaged between byte {start:,} and {start + block.size:,} "
                    f"(its hash is wrong); {REBUILD}"
                )
            yield start, block

    def verify_ids(self, first: int, ids: np.ndarray) -> None:
        """Refuse ids outside the vocabulary; `first` is the place of `ids[0]` in the token stream."""
        limit = self.vocab_size if self.vocab_size is not None else np.iinfo(np.int64).max
        bad = np.flatnonzero((ids < 0) | (ids.astype(np.int64) >= limit))
        if bad.size:
            document = int(np.searchsorted(self.document_offsets, (first + bad[0]) * ids.itemsize, side="right")) - 1
            raise TokenStoreError(
                f"{self.paths.bin}: token id {ids[bad[0]]} in document {document} is beyond the vocabulary "
                f"(0 … {limit - 1}); {REBUILD}"
            )
