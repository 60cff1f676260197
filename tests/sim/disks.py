"""Disks by their content: which release each chunk is of, and whether there is a table."""

from dataclasses import dataclass, field
from typing import Any, Final

CHUNKS: Final = 6
OLD_SYSTEM: Final = "old"
NOTHING: Final = "-"


@dataclass(frozen=True)
class Seed:
    """What a deployment leaves behind the image: whose it is, and the nonce to report."""

    operation_id: str
    nonce: str


@dataclass
class SimDisk:
    """One disk. `chunks` holds for each part of the image the release it is of; `table` the
    release whose partition table is there. `at_fault` is what goes wrong at the next write:
    nothing, an error of the device, or bytes that come back as others."""

    name: str
    serial: str
    size_bytes: int
    bus: str
    chunks: list[str] = field(default_factory=lambda: [NOTHING] * CHUNKS)
    table: str | None = None
    seed: Seed | None = None
    is_reported: bool = False
    at_fault: str = ""

    @classmethod
    def with_old_system(cls, name: str, serial: str, size_bytes: int, bus: str) -> "SimDisk":
        return cls(name, serial, size_bytes, bus, [OLD_SYSTEM] * CHUNKS, OLD_SYSTEM)

    @property
    def is_bootable(self) -> bool:
        """Whether a firmware starts what is there: it looks for a table, and no further."""
        return self.table is not None

    def is_whole(self, release: str) -> bool:
        """Whether all of one system is there, with a seed if it is one of our releases."""
        of_release = self.table == release and all(chunk == release for chunk in self.chunks)
        return of_release and (release == OLD_SYSTEM or self.seed is not None)

    def make_unbootable(self) -> None:
        self.table, self.seed, self.is_reported = None, None, False
        self.chunks[0] = NOTHING

    def as_inventory(self) -> dict[str, Any]:
        """Return the disk as the ramdisk's agent lists it."""
        return {
            "name": self.name,
            "serial": self.serial,
            "wwn": None,
            "size_bytes": self.size_bytes,
            "rotational": False,
            "bus": self.bus,
            "by_path": None,
            "model": None,
        }

    def __str__(self) -> str:
        return f"{self.serial}[{''.join(chunk[0] for chunk in self.chunks)}|{self.table}]"
