"""A batch: several chunks of one release, asked for by number, in one answer.

The request names chunks as `100-163` or `100-103,110`. The answer holds, for each chunk in
that order, its stored length (32 bits, big-endian) and its zstd frame. Pure, and imports
only the standard library: service and ramdisk both use it.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from provisioner.errors import RequestError

# The raw bytes of one batch. A single chunk may be larger, and then comes alone.
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
# With the smallest chunks, 64 KiB, a batch holds this many.
BATCH_CHUNKS_MAX: Final = 64
# As long as 64 numbers of 9 digits need, with their commas, and a little more.
SPEC_CHARACTERS_MAX: Final = 1024
LENGTH: Final = struct.Struct(">I")

_PART: Final = re.compile(r"(0|[1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?")


def spec_of(indexes: Sequence[int]) -> str:
    """Return the request for these chunks; indexes are ascending, and at least one."""
    parts: list[str] = []
    first = last = indexes[0]
    for index in (*indexes[1:], -1):
        if index == last + 1:
            last = index
            continue
        parts.append(str(first) if first == last else f"{first}-{last}")
        first = last = index
    return ",".join(parts)


def indexes_in(spec: str) -> list[int]:
    """Return the chunks that a request names, ascending and each once.

    Raises RequestError for anything else, and for more than BATCH_CHUNKS_MAX.
    """
    if len(spec) > SPEC_CHARACTERS_MAX:
        raise _wrong(f"at most {SPEC_CHARACTERS_MAX} characters", f"{len(spec)} characters")
    indexes: list[int] = []
    for part in spec.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise _wrong("numbers and ranges, such as 100-103,110", part[:100])
        first, last = int(match[1]), int(match[2] or match[1])
        if first <= (indexes[-1] if indexes else -1) or (match[2] and last <= first):
            raise _wrong("ascending chunks, each once", part)
        if len(indexes) + last - first + 1 > BATCH_CHUNKS_MAX:
            raise _wrong(f"at most {BATCH_CHUNKS_MAX} chunks", "more")
        indexes += range(first, last + 1)
    return indexes


def frame_bytes_max(chunk_bytes: int) -> int:
    """Return how long the zstd frame of so many bytes may be.

    Source: ZSTD_COMPRESSBOUND of zstd.h, and a little more.
    """
    return chunk_bytes + (chunk_bytes >> 8) + 1024


def pack(frames: Iterable[bytes]) -> bytes:
    """Return the answer that holds these frames."""
    return b"".join(part for frame in frames for part in (LENGTH.pack(len(frame)), frame))


def frames_in(answer: memoryview) -> Iterator[memoryview]:
    """Yield the whole frames in an answer, in order; stops where it was cut."""
    at = 0
    while at + LENGTH.size <= len(answer):
        (length,) = LENGTH.unpack_from(answer, at)
        at += LENGTH.size
        if at + length > len(answer):
            return
        yield answer[at : at + length]
        at += length


def _wrong(expected: str, found: str) -> RequestError:
    return RequestError("these are not chunks to ask for", expected=expected, found=found)
