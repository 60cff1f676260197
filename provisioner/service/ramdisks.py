"""Which deploy ramdisk new operations boot: the newest one in the data directory."""

import json
import re
from pathlib import Path
from typing import Final

from .operations import missing_ramdisk

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Ramdisks:
    """Looks at `directory`, which holds one folder per ramdisk, named by its digest.

    `pinned` is the digest that the settings name, or empty for the newest.
    """

    def __init__(self, directory: Path, pinned: str = "") -> None:
        self._directory = directory
        self._pinned = pinned

    def newest_or_none(self) -> str | None:
        if self._pinned:
            return self._pinned if (self._directory / self._pinned / "initrd").is_file() else None
        found = [
            (entry.stat().st_mtime_ns, entry.name)
            for entry in self._directory.glob("*")
            if _DIGEST.fullmatch(entry.name) and (entry / "ramdisk.json").is_file()
        ]
        return max(found)[1] if found else None

    def newest(self) -> str:
        """Return the digest. Raises NotFound, saying how to build one."""
        digest = self.newest_or_none()
        if digest is None:
            raise missing_ramdisk()
        return digest

    def describe(self, digest: str) -> dict[str, object]:
        """Return what its builder wrote about it."""
        text = (self._directory / digest / "ramdisk.json").read_text()
        described: dict[str, object] = json.loads(text)
        return described
