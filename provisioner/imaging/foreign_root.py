"""Read single files out of a stranger's ext2/3/4 root, without mounting it.

debugfs understands all of such file systems, and is made for file systems that are damaged,
not for hostile ones: it runs in the sandbox.
"""

from __future__ import annotations

import contextlib
import os
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from provisioner.core.manifest import Partition
from provisioner.imaging.sandbox import SOURCE, Limits, run_in_sandbox
from provisioner.imaging.tools import ToolFailed

INSPECT_LIMIT: Final = timedelta(minutes=1)
INSPECT_MEMORY_BYTES: Final = 512 * 1024 * 1024

# Linux, fs/ext4/ext4.h: s_wtime, two 16-bit numbers, and s_magic.
_SUPERBLOCK_PLACE: Final = 1024
_WRITTEN_AND_MAGIC: Final = struct.Struct("<48xIHHH")
_MAGIC: Final = 0xEF53


def read_text(raw: Path, root: Partition, path: str, *, bytes_max: int) -> str | None:
    """Return a text file of the root, or None where there is none of up to bytes_max bytes.

    path has no leading slash and is one of ours: debugfs reads it as part of a command.
    Raises ConfigError where this machine gives no sandbox.
    """
    command = ["debugfs", "-R", f"cat /{path}", f"{SOURCE}?offset={root.start_bytes}"]
    limits = Limits(
        time=INSPECT_LIMIT,
        cpu_time=INSPECT_LIMIT,
        memory_bytes=INSPECT_MEMORY_BYTES,
        written_bytes=0,
        printed_bytes=bytes_max,
    )
    with contextlib.suppress(ToolFailed, UnicodeDecodeError), raw.open("rb") as disk:
        return run_in_sandbox(command, source=disk, limits=limits).decode("utf-8") or None
    return None


def last_written_at(raw: Path, root: Partition) -> datetime:
    """Return when the root says that it was last written; 1970 when it does not say."""
    with raw.open("rb") as disk:
        place = root.start_bytes + _SUPERBLOCK_PLACE
        superblock = os.pread(disk.fileno(), _WRITTEN_AND_MAGIC.size, place)
    written_s = 0
    if len(superblock) == _WRITTEN_AND_MAGIC.size:
        seconds, _, _, magic = _WRITTEN_AND_MAGIC.unpack(superblock)
        written_s = seconds if magic == _MAGIC else 0
    return datetime.fromtimestamp(written_s, UTC)
