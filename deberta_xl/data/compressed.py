"""Reading plain, gzip and Zstandard files as one kind of stream; a damaged file is an error, never a short read."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

#: Compressed bytes that are unpacked at a time.
CHUNK = 64 * 2**10
#: The longest window that `zstd --long` can ask for.
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


class ZstandardFile(io.RawIOBase):
    """The unpacked bytes of a Zstandard file of any number of frames.

    Unlike the library's own reader it notices when the last frame is cut off (EOFError).
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.frame = self.new_frame()
        self.is_inside_frame = False
        self.packed, self.unpacked = b"", b""

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
            self.packed = self.packed or self.file.read(CHUNK)
            if not self.packed:
                if self.is_inside_frame:
                    raise EOFError("the last Zstandard frame is cut off")
                return 0
            self.unpacked = self.frame.decompress(self.packed)
            self.packed, self.is_inside_frame = self.frame.unused_data, not self.frame.eof
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
