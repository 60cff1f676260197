"""Unpacks the zstd frames of chunks straight into their places in a buffer, and checks them."""

import hashlib
import mmap
from typing import Final

import zstandard

# The window of the largest chunk.
WINDOW_BYTES_MIN: Final = 1 << 23


class Unpacker:
    """Unpacks chunks into one buffer. For one thread."""

    def __init__(self, buffer: mmap.mmap, chunk_bytes: int) -> None:
        self._buffer = buffer
        self._unpacker = zstandard.ZstdDecompressor(
            max_window_size=max(chunk_bytes, WINDOW_BYTES_MIN)
        )

    def unpack(self, frame: memoryview, at: int, length: int) -> str:
        """Fill `length` bytes of the buffer from byte `at` on; return their sha256 in hex.

        Where the frame is none, or holds another number of bytes, a sentence is returned
        instead. Never writes more than `length` bytes, whatever the frame says.
        """
        try:
            with self._unpacker.stream_reader(frame) as reader:
                problem = self._read_exactly(reader, at, length)
        except zstandard.ZstdError as error:
            problem = f"not a zstd frame: {error}"
        return problem or self.digest(at, length)

    def digest(self, at: int, length: int) -> str:
        """Return the sha256 of a part of the buffer."""
        with memoryview(self._buffer) as view, view[at : at + length] as part:
            return hashlib.sha256(part).hexdigest()

    def _read_exactly(
        self, reader: "zstandard.ZstdDecompressionReader", at: int, length: int
    ) -> str:
        have = 0
        with memoryview(self._buffer) as view:
            while have < length:
                with view[at + have : at + length] as rest:
                    count = reader.readinto(rest)
                if count == 0:
                    return f"{have} of {length} bytes"
                have += count
        return f"more than {length} bytes" if reader.read(1) else ""
