"""Failpoints: named places at which a test kills or stops the service, at every commit and
every external effect.

They are wrappers around the ports, which `wiring` puts in only when they are switched on: a
service that runs for real does not have them. To switch them on takes an environment
variable that names a folder, and in that folder a file that nobody makes by mistake.
"""

import fcntl
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from .core.contracts import Bmc, BmcPool, EffectWorker, Outgoing, Store, Tx
from .core.model import BmcAddress, BootDevice, PowerState
from .errors import ConfigError
from .imaging.blobs import Blobs, FileBlobs
from .service.sightings import Mark, MarkFile

log = structlog.get_logger(__name__)


class Point(StrEnum):
    """Every failpoint. Before: nothing has happened yet. After: it has, and nobody knows."""

    COMMIT_BEFORE = "commit.before"
    COMMIT_AFTER = "commit.after"
    # A worker took an effect from the queue; it performed it, and the queue still has it.
    EFFECT_BEFORE = "effect.before"
    EFFECT_AFTER = "effect.after"
    # The commit that saves what came of an effect.
    FEEDBACK_BEFORE = "feedback.before"
    FEEDBACK_AFTER = "feedback.after"
    POWER_BEFORE = "bmc.power.before"
    POWER_AFTER = "bmc.power.after"
    POWER_ON_BEFORE = "bmc.power_on.before"
    POWER_ON_AFTER = "bmc.power_on.after"
    POWER_OFF_BEFORE = "bmc.power_off.before"
    POWER_OFF_AFTER = "bmc.power_off.after"
    RESET_BEFORE = "bmc.reset.before"
    RESET_AFTER = "bmc.reset.after"
    NEXT_BOOT_BEFORE = "bmc.set_next_boot.before"
    NEXT_BOOT_AFTER = "bmc.set_next_boot.after"
    # The note of how far the audit log has come, a file beside the database.
    MARK_BEFORE = "mark.before"
    MARK_AFTER = "mark.after"
    # A blob of the release archive: a chunk, a manifest, a name. `place` is the renaming of a
    # file that is written and synced already.
    WRITE_BEFORE = "blob.write.before"
    WRITE_AFTER = "blob.write.after"
    PLACE_BEFORE = "blob.place.before"
    PLACE_AFTER = "blob.place.after"
    DELETE_BEFORE = "blob.delete.before"
    DELETE_AFTER = "blob.delete.after"


Reach = Callable[[Point], None]

VARIABLE: Final = "PROVISIONER_FAILPOINTS"
CONSENT: Final = "this-service-may-be-killed"
ARMED, FIRED, TRACE = "armed", "fired", "trace"


class Action(StrEnum):
    KILL = "kill"
    STOP = "stop"  # until it is sent SIGCONT

    @property
    def signal(self) -> signal.Signals:
        return signal.SIGKILL if self is Action.KILL else signal.SIGSTOP


@dataclass(frozen=True)
class Armed:
    """What happens to whom, at which point, at the how manieth time that `part` is there."""

    action: Action
    part: str
    point: Point
    hit: int

    def __str__(self) -> str:
        return f"{self.action} {self.part} {self.point} {self.hit}"

    @classmethod
    def parse(cls, text: str) -> "Armed":
        action, part, point, hit = text.split()
        return cls(Action(action), part, Point(point), int(hit))


class Failpoints:
    """The failpoints of a service under test, driven by files in `folder`.

    A test arms one by writing `armed`; it fires once, and the file is then called `fired`.
    Every point that is reached is a line of `trace`, and hits are counted there, over all
    processes of a part and over their restarts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, part: str) -> Reach:
        """Return what the processes of that part call at each point."""
        log.critical("FAILPOINTS ARE ON: a test may kill this service", folder=str(self._folder))
        return partial(self._reach, part)

    def _reach(self, part: str, point: Point) -> None:
        hit = self._count(f"{part} {point}\n")
        try:
            armed = Armed.parse((self._folder / ARMED).read_text())
        except FileNotFoundError:
            return
        if (armed.part, armed.point, armed.hit) == (part, point, hit):
            self._fire(armed)

    def _count(self, line: str) -> int:
        with (self._folder / TRACE).open("a+") as trace:
            fcntl.flock(trace, fcntl.LOCK_EX)
            trace.seek(0)
            seen = sum(one == line for one in trace)
            trace.write(line)
            return seen + 1

    def _fire(self, armed: Armed) -> None:
        try:
            (self._folder / ARMED).rename(self._folder / FIRED)
        except FileNotFoundError:
            return  # another process was first
        log.critical("FAILPOINT", point=str(armed))
        # To this thread, which then does not take another step: a signal to the process is
        # delivered to any of its threads, and this one would go on until that has stopped it.
        signal.pthread_kill(threading.get_ident(), armed.action.signal)


def find_failpoints(value: str | None) -> Failpoints | None:
    """Return the failpoints that the environment switched on; None, as in real life.

    Raises ConfigError for a folder without the file that says this service is a test's.
    """
    if not value:
        return None
    folder = Path(value)
    if not folder.is_absolute() or not (folder / CONSENT).is_file():
        raise ConfigError(
            f"{VARIABLE} is set, and this service would kill itself",
            expected=f"it unset, or a test's folder with a file {CONSENT}",
            found=value,
            hint=f"unset {VARIABLE}",
        )
    return Failpoints(folder)


@contextmanager
def _around(reach: Reach, before: Point, after: Point) -> Iterator[None]:
    reach(before)
    yield
    reach(after)


class _Performing(threading.local):
    """Whether this thread performs an effect: what it commits then is the feeding back."""

    now = False


_performing: Final = _Performing()


class WatchedStore:
    """The `Store` port with a failpoint on either side of each commit."""

    def __init__(self, store: Store, reach: Reach) -> None:
        self._store = store
        self._reach = reach

    @contextmanager
    def begin(self) -> Iterator[Tx]:
        is_feedback = _performing.now
        with self._store.begin() as tx:
            yield tx
            self._reach(Point.FEEDBACK_BEFORE if is_feedback else Point.COMMIT_BEFORE)
        self._reach(Point.FEEDBACK_AFTER if is_feedback else Point.COMMIT_AFTER)

    def read(self) -> AbstractContextManager[Tx]:
        return self._store.read()

    def close(self) -> None:
        self._store.close()


class WatchedEffects:
    """The `EffectWorker` port with a failpoint on either side of each effect."""

    def __init__(self, effects: EffectWorker, reach: Reach) -> None:
        self._effects = effects
        self._reach = reach

    def start(self, perform: Callable[[Outgoing], None]) -> None:
        def watched(outgoing: Outgoing) -> None:
            with _around(self._reach, Point.EFFECT_BEFORE, Point.EFFECT_AFTER):
                _performing.now = True
                try:
                    perform(outgoing)
                finally:
                    _performing.now = False

        self._effects.start(watched)

    def stop(self) -> None:
        self._effects.stop()


class WatchedPool:
    """The `BmcPool` port with a failpoint on either side of each exchange."""

    def __init__(self, pool: BmcPool, reach: Reach) -> None:
        self._pool = pool
        self._reach = reach

    def bmc(self, where: BmcAddress) -> Bmc:
        return WatchedBmc(self._pool.bmc(where), self._reach)

    def close(self) -> None:
        self._pool.close()


class WatchedBmc:
    """The `Bmc` port, each verb with its own two failpoints."""

    def __init__(self, bmc: Bmc, reach: Reach) -> None:
        self._bmc = bmc
        self._reach = reach

    def power(self) -> PowerState:
        with _around(self._reach, Point.POWER_BEFORE, Point.POWER_AFTER):
            return self._bmc.power()

    def power_on(self) -> None:
        with _around(self._reach, Point.POWER_ON_BEFORE, Point.POWER_ON_AFTER):
            self._bmc.power_on()

    def power_off(self, *, soft: bool) -> None:
        with _around(self._reach, Point.POWER_OFF_BEFORE, Point.POWER_OFF_AFTER):
            self._bmc.power_off(soft=soft)

    def reset(self) -> None:
        with _around(self._reach, Point.RESET_BEFORE, Point.RESET_AFTER):
            self._bmc.reset()

    def set_next_boot(
        self, device: BootDevice, *, persistent: bool, uefi: bool, hold_timer: bool
    ) -> None:
        with _around(self._reach, Point.NEXT_BOOT_BEFORE, Point.NEXT_BOOT_AFTER):
            self._bmc.set_next_boot(device, persistent=persistent, uefi=uefi, hold_timer=hold_timer)


class WatchedMarkFile(MarkFile):
    """The high-water mark, with a failpoint on either side of its being written."""

    def __init__(self, path: Path, reach: Reach) -> None:
        super().__init__(path)
        self._reach = reach

    def write(self, mark: Mark) -> None:
        with _around(self._reach, Point.MARK_BEFORE, Point.MARK_AFTER):
            super().write(mark)


class WatchedBlobs:
    """The `Blobs` port with a failpoint on either side of each write and removal."""

    def __init__(self, blobs: Blobs, reach: Reach) -> None:
        self._blobs = blobs
        self._reach = reach

    @property
    def place(self) -> str:
        return self._blobs.place

    def read(self, name: str, limit_bytes: int) -> bytes:
        return self._blobs.read(name, limit_bytes)

    def write(self, name: str, data: bytes) -> None:
        with _around(self._reach, Point.WRITE_BEFORE, Point.WRITE_AFTER):
            self._blobs.write(name, data)

    def size(self, name: str) -> int | None:
        return self._blobs.size(name)

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        return self._blobs.sizes(prefix)

    def delete(self, name: str) -> None:
        with _around(self._reach, Point.DELETE_BEFORE, Point.DELETE_AFTER):
            self._blobs.delete(name)

    def free_bytes(self) -> int | None:
        return self._blobs.free_bytes()


class WatchedFileBlobs(FileBlobs):
    """The archive's files, with a failpoint on either side of each write, rename and removal."""

    def __init__(self, root: Path, reach: Reach) -> None:
        super().__init__(root)
        self._reach = reach

    def write(self, name: str, data: bytes) -> None:
        with _around(self._reach, Point.WRITE_BEFORE, Point.WRITE_AFTER):
            super().write(name, data)

    def place_whole(self, temporary: Path, target: Path) -> None:
        with _around(self._reach, Point.PLACE_BEFORE, Point.PLACE_AFTER):
            super().place_whole(temporary, target)

    def delete(self, name: str) -> None:
        with _around(self._reach, Point.DELETE_BEFORE, Point.DELETE_AFTER):
            super().delete(name)
