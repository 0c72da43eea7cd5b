"""Reading plain, gzip and Zstandard files as one kind of stream; a damaged file is an error, never a short read."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

#: Compressed bytes that are read at a time.
CHUNK = 64 * 2**10
#: The first bytes of a Zstandard frame, and the last three of those of a skippable one (which begins with 0x5?).
FRAME_MAGIC, SKIPPABLE_MAGIC = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
#: The longest window that `zstd --long` can ask for: what unpacking such a file takes in memory.
MAX_WINDOW = 2**31
#: What reading a damaged file raises.
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)


class CountingFile(io.RawIOBase):
    """A file on disk whose bytes are counted and hashed as they are read."""

    def __init__(self, path: Path):
        self.raw = open(path, "rb", buffering=0)  # noqa: SIM115 (`close` closes it)
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer from the file."""
        count = self.raw.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        self.num_bytes += count
        return count

    def close(self) -> None:
        """Close the file."""
        self.raw.close()
        super().close()


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes. Raises EOFError where the file ends before."""
    data = file.read(count)
    if len(data) < count:
        raise EOFError("the last Zstandard frame is cut off")
    return data


def zstandard_blocks(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a Zstandard file of any number of frames (RFC 8878, section 3.1), cut so that each part unpacks to
    one block at most, which is 128 KiB: four bytes of a regular text can stand for as many.

    Skippable frames are left out. Raises EOFError when the last frame is cut off.
    """
    while magic := file.read(4):
        magic += read_exactly(file, 4 - len(magic))
        if magic[1:] == SKIPPABLE_MAGIC and magic[0] >> 4 == 5:
            skip(file, int.from_bytes(read_exactly(file, 4), "little"))
            continue
        if magic != FRAME_MAGIC:
            raise zstandard.ZstdError("no Zstandard frame begins where one should")
        descriptor = read_exactly(file, 1)
        yield magic + descriptor + read_exactly(file, header_size(descriptor[0]))
        is_last = False
        while not is_last:
            header = read_exactly(file, 3)
            value = int.from_bytes(header, "little")
            is_last, is_repeated_byte, size = value & 1 == 1, value >> 1 & 3 == 1, value >> 3
            yield header + read_exactly(file, 1 if is_repeated_byte else size)
        if descriptor[0] >> 2 & 1:
            yield read_exactly(file, 4)  # the checksum


def header_size(descriptor: int) -> int:
    """Bytes of a frame's header behind its descriptor: window, dictionary's number, size of the content."""
    has_window = not descriptor >> 5 & 1
    return has_window + (0, 1, 2, 4)[descriptor & 3] + (0 if has_window else 1, 2, 4, 8)[descriptor >> 6]


def skip(file: BinaryIO, count: int) -> None:
    """Read over `count` bytes, which may be more than memory holds."""
    while count:
        count -= len(read_exactly(file, min(count, CHUNK)))


class ZstandardFile(io.RawIOBase):
    """The unpacked bytes of a Zstandard file of any number of frames, of which no more than a block is held.

    Unlike the library's own reader it notices when the last frame is cut off (EOFError).
    """

    def __init__(self, file: BinaryIO):
        self.blocks = zstandard_blocks(io.BufferedReader(file, buffer_size=CHUNK))
        self.frame = self.new_frame()
        self.unpacked = memoryview(b"")

    @staticmethod
    def new_frame() -> zstandard.ZstdDecompressionObj:
        """A decompressor for one frame."""
        return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer with unpacked bytes."""
        while not self.unpacked:
            packed = next(self.blocks, None)
            if packed is None:
                return 0
            self.unpacked = memoryview(self.frame.decompress(packed))
            if self.frame.eof:
                self.frame = self.new_frame()
        count = min(len(buffer), len(self.unpacked))
        buffer[:count] = self.unpacked[:count]
        self.unpacked = self.unpacked[count:]
        return count


def unpacked(file: CountingFile, suffix: str) -> BinaryIO:
    """A buffered stream of what the file holds; `suffix` says how it is packed (.gz, .zst; anything else is plain)."""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=io.BufferedReader(file))
    return io.BufferedReader(ZstandardFile(file) if suffix == ".zst" else file, buffer_size=2**20)
