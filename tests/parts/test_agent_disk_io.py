"""Writing and reading a disk, and what happens when it lies or fails."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from provisioner.agent.deploy import make_unbootable
from provisioner.agent.disk_io import DiskFile, aligned_buffer
from provisioner.agent.http import Origin
from provisioner.agent.parallel import run_parallel
from provisioner.agent.permission import Permission
from provisioner.agent.problems import DiskFailed, PermissionRefused, ReadBackMismatch
from provisioner.agent.progress import Progress
from provisioner.agent.sources import Sources
from provisioner.agent.write import ImageWriter
from tests.parts.agent_service import MIB, Release, Service, make_image, make_release, running

FAR_BEHIND = 1000


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(make_image(tmp_path / "image", size_mib=16))


class Granted(Permission):
    """A permission that nobody has to keep alive."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def check(self) -> None:
        """Always."""

    def beat_now(self) -> None:
        """Nobody listens."""

    def raise_refusal(self) -> None:
        """Nobody refuses."""


def test_a_disk_that_changes_a_byte_is_caught(tmp_path: Path, release: Release) -> None:
    """What was written well and reads back otherwise is named, with both digests."""
    (tmp_path / "disk").write_bytes(b"\xff" * 32 * MIB)
    service = Service(files=release.files(), hello={})
    with running(service), DiskFile(str(tmp_path / "disk"), name="vda") as disk:
        sources = Sources(release.manifest.digest, Origin.parse(service.boot_url))
        job = ImageWriter(disk, release.manifest, sources, Granted(), Progress(), threads=2)
        job.write(compare_first=False)
        job.read_back()
        for at in (4 * MIB + 99, 6 * MIB + 1):
            before = (tmp_path / "disk").read_bytes()[at : at + 1]
            with (tmp_path / "disk").open("r+b") as file:
                file.seek(at)
                file.write(bytes([before[0] ^ 1]))
            with pytest.raises(ReadBackMismatch) as caught:
                job.read_back()
            assert caught.value.found != caught.value.expected
            job.permission.stop.clear()
            with (tmp_path / "disk").open("r+b") as file:
                file.seek(at)
                file.write(before)
        job.read_back()


def test_a_full_or_missing_disk_is_an_error_with_its_name(tmp_path: Path) -> None:
    """Reading past the end and opening nothing are told as what they are."""
    with pytest.raises(DiskFailed, match="could not open disk vdz"):
        DiskFile(str(tmp_path / "none"), name="vdz")
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with (
        DiskFile(str(tmp_path / "disk"), name="vda") as disk,
        aligned_buffer(MIB) as buffer,
        pytest.raises(DiskFailed, match="could not read disk vda at byte 1048576") as caught,
    ):
        disk.read_into(buffer, MIB, MIB)
    assert caught.value.expected == "1048576 bytes from there on"
    assert caught.value.found == "0 bytes came"


def test_small_pieces_and_zeros_reach_the_file(tmp_path: Path) -> None:
    """What is written is there, what is zeroed is zero, the rest stays."""
    path = tmp_path / "disk"
    path.write_bytes(b"\xff" * 4 * MIB)
    with DiskFile(str(path), name="vda") as disk:
        disk.write(b"a" * 512, 512)
        disk.zero(MIB, MIB + 512)
        disk.flush()
        assert disk.read(1024, 0) == b"\xff" * 512 + b"a" * 512
        assert disk.discard(0, MIB) is False
    found = path.read_bytes()
    assert found[MIB : 2 * MIB + 512] == bytes(MIB + 512)
    assert found.count(0xFF) == 4 * MIB - 512 - MIB - 512


@contextmanager
def with_unreadable_end(path: Path, release: Release, readable: int) -> Iterator[ImageWriter]:
    """A disk with the release that cannot be read from there on, until it is written.

    The file is cut short once it is open, so that a read fails and a write cures.
    """
    path.write_bytes(release.raw + bytes(16 * MIB))
    service = Service(files=release.files(), hello={})
    with running(service), DiskFile(str(path), name="vda") as disk:
        os.truncate(path, readable)
        sources = Sources(release.manifest.digest, Origin.parse(service.boot_url))
        yield ImageWriter(disk, release.manifest, sources, Granted(), Progress(), threads=2)


def test_what_cannot_be_read_is_written_anew(tmp_path: Path, release: Release) -> None:
    """A disk has a spare for a bad sector as soon as that is written to."""
    path = tmp_path / "disk"
    with with_unreadable_end(path, release, 9 * MIB) as job:
        assert job.looks_like_an_earlier_release()
        job.write(compare_first=True)
        job.read_back()
    assert path.read_bytes()[: 16 * MIB] == release.raw
    assert 0 < job.progress.written_bytes <= 8 * MIB, "what could be read, and was right, stayed"


def test_a_sample_that_cannot_be_read_is_not_equal(tmp_path: Path, release: Release) -> None:
    with with_unreadable_end(tmp_path / "disk", release, 0) as job:
        assert not job.looks_like_an_earlier_release()


def test_what_was_written_has_to_be_readable(tmp_path: Path, release: Release) -> None:
    """Reading back forgives nothing."""
    path = tmp_path / "disk"
    with with_unreadable_end(path, release, 9 * MIB) as job:
        job.write(compare_first=True)
        os.truncate(path, 12 * MIB)
        with pytest.raises(DiskFailed, match="could not read"):
            job.read_back()


class Counted(Granted):
    """A permission that is taken away after `lasts` looks at it."""

    def __init__(self, lasts: int = 1000) -> None:
        super().__init__()
        self.looks = 0
        self._lasts = lasts

    def check(self) -> None:
        """Count, and refuse what comes too late."""
        self.looks += 1
        if self.looks > self._lasts:
            raise PermissionRefused("no more")


@contextmanager
def large_disk(path: Path) -> Iterator[DiskFile]:
    """A disk of 40 GiB, most of which takes no place; its first and last MiB are old."""
    with path.open("wb") as file:
        file.write(b"\xff" * MIB)
        file.seek(40 * 1024 * MIB - MIB)
        file.write(b"\xff" * MIB)
    with DiskFile(str(path), name="vda") as disk:
        yield disk


def test_each_step_to_make_a_disk_unbootable_needs_the_permission(tmp_path: Path) -> None:
    """Forgetting a large disk takes a while, and is done in pieces."""
    permission = Counted()
    with large_disk(tmp_path / "disk") as disk:
        make_unbootable(disk, permission, first_bytes=65536, image_bytes=24 * MIB)
        assert disk.read(65536, 0) == bytes(65536)
        assert disk.read(MIB, disk.size_bytes - MIB) == bytes(MIB)
    assert permission.looks == 1 + 3 + 1, "the head, 16 + 16 + 8 GiB, the tail"


def test_a_permission_that_ends_meanwhile_saves_the_rest(tmp_path: Path) -> None:
    permission = Counted(lasts=3)
    with large_disk(tmp_path / "disk") as disk:
        with pytest.raises(PermissionRefused):
            make_unbootable(disk, permission, first_bytes=65536, image_bytes=24 * MIB)
        assert disk.read(65536, 0) == bytes(65536)
        assert disk.read(MIB, disk.size_bytes - MIB) == b"\xff" * MIB


class Counter:
    """A worker that fails at one item, and counts those it did. Far behind that one it waits
    for the end: whoever has the item may be the last to have a processor."""

    def __init__(self, done: list[int], fails_at: int, stop: threading.Event) -> None:
        self._done = done
        self._fails_at = fails_at
        self._stop = stop
        self.closed = False

    def work(self, item: int) -> None:
        if item == self._fails_at:
            raise DiskFailed(f"item {item}")
        if item > FAR_BEHIND:
            self._stop.wait(60)
        self._done.append(item)

    def close(self) -> None:
        self.closed = True


def test_the_first_failure_stops_the_others() -> None:
    """Every worker ends its item, closes, and the failure is raised once."""
    done: list[int] = []
    workers: list[Counter] = []

    stop = threading.Event()

    def make() -> Counter:
        workers.append(Counter(done, 50, stop))
        return workers[-1]

    with pytest.raises(DiskFailed, match="item 50"):
        run_parallel(range(100_000), make, threads=4, stop=stop)
    assert stop.is_set()
    assert len(done) < 100_000
    assert all(worker.closed for worker in workers)


def test_every_item_is_done_once() -> None:
    """Threads share the items."""
    done: list[int] = []
    stop = threading.Event()
    run_parallel(range(FAR_BEHIND), lambda: Counter(done, -1, stop), threads=4, stop=stop)
    assert sorted(done) == list(range(FAR_BEHIND))
