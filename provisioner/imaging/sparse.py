"""Copy parts of sparse files, where holes and zeros stay holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

AnyFile = BinaryIO | FileIO
"""Only its descriptor is used, never what it buffers."""

_PIECE_BYTES: Final = 64 * 1024
_ZEROS: Final = bytes(_PIECE_BYTES)


def data_ranges(file: AnyFile, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (place, length) of what is not a hole between two places, at most to `end`.

    Where the file system keeps no holes, that is everything.
    """
    place = start
    while place < end:
        try:
            place = os.lseek(file.fileno(), place, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if place >= end:
            return
        hole = min(os.lseek(file.fileno(), place, os.SEEK_HOLE), end)
        yield place, hole - place
        place = hole


def copy_range(
    source: AnyFile, source_start: int, target: AnyFile, target_start: int, length: int
) -> None:
    """Copy length bytes from one file into another, which must hold zeros there."""
    for place, count in data_ranges(source, source_start, source_start + length):
        for piece in range(place, place + count, _PIECE_BYTES):
            data = os.pread(source.fileno(), min(_PIECE_BYTES, place + count - piece), piece)
            if data != _ZEROS[: len(data)]:
                write_all(target, target_start + piece - source_start, data)


def copy_part(source: Path, start: int, length: int, target: Path) -> None:
    """Copy a part of a file into a new sparse one."""
    with source.open("rb") as whole, target.open("xb") as part:
        part.truncate(length)
        copy_range(whole, start, part, 0, length)


def copy_into(source: Path, target: Path, start: int) -> None:
    """Copy a whole file to a place in another, which must hold zeros there."""
    with source.open("rb") as part, target.open("r+b") as whole:
        copy_range(part, 0, whole, start, source.stat().st_size)


def write_all(file: AnyFile, place: int, data: bytes) -> None:
    """Write all of the data at a place, past the file object's own buffer and position."""
    while data:
        written = os.pwrite(file.fileno(), data, place)
        data, place = data[written:], place + written
