"""Says what a bench ran on, and how much memory a tree of processes takes."""

import os
import platform
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

MIB: Final = 1024 * 1024
SAMPLE_EVERY_S: Final = 1.0
SAMPLER_STOP_LIMIT_S: Final = 10.0


@dataclass(frozen=True)
class MachineFacts:
    cpus: int
    cpu: str
    memory_gib: float
    kernel: str
    load_before: float

    @property
    def text(self) -> str:
        return (
            f"{self.cpus} × {self.cpu}, {self.memory_gib:.0f} GiB, Linux {self.kernel}, "
            f"load {self.load_before:.1f} before it began"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def about_machine() -> MachineFacts:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MachineFacts(
        cpus=os.cpu_count() or 1,
        cpu=models[0] if models else platform.machine(),
        memory_gib=round(memory / 1024**3, 1),
        kernel=platform.release(),
        load_before=round(os.getloadavg()[0], 2),
    )


class MemoryWatch:
    """Samples the memory of some processes and all their descendants while the block runs.

    It is the sum of their proportional set sizes (PSS): a page that they share counts once.
    """

    def __init__(self, roots: list[int]) -> None:
        self._roots = roots
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_mib = 0.0
        self.peak_by_name: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(SAMPLER_STOP_LIMIT_S)

    def _run(self) -> None:
        while True:
            sizes = pss_by_name(self._roots)
            total = sum(sizes.values())
            if total > self.peak_mib:
                self.peak_mib, self.peak_by_name = total, sizes
            if self._stop.wait(SAMPLE_EVERY_S):
                return


def pss_by_name(roots: list[int]) -> dict[str, float]:
    """Return the PSS in MiB of these processes and their descendants, summed by name."""
    sizes: dict[str, float] = {}
    for pid, name in _tree(roots).items():
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it ended meanwhile
        for line in text.splitlines():
            if line.startswith("Pss:"):
                sizes[name] = sizes.get(name, 0.0) + int(line.split()[1]) / 1024
    return {name: round(size, 1) for name, size in sizes.items()}


def _tree(roots: list[int]) -> dict[int, str]:
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        # The name stands in parentheses and may hold any character.
        head, _, rest = text.rpartition(")")
        pid = int(head.split(" ", 1)[0])
        parents[pid] = int(rest.split()[1])
        names[pid] = head.partition("(")[2]
    wanted = {pid for pid in roots if pid in parents}
    grown = True
    while grown:
        fresh = {pid for pid, parent in parents.items() if parent in wanted} - wanted
        wanted |= fresh
        grown = bool(fresh)
    return {pid: names[pid] for pid in wanted}
