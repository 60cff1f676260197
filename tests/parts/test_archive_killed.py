"""Publishing and image gc are killed at every write, rename, removal and commit, on files and
in a bucket.

Whichever point it is: each release that the service knows is whole, the same thing done once
more succeeds, and nothing is left that belongs to no release.
"""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from provisioner import wiring
from provisioner.imaging.blobs import INCOMING
from provisioner.imaging.garbage import collect
from provisioner.imaging.verify import verify_release
from tests.parts.archive_lives import PART, ArchiveLives, archive_lives
from tests.parts.s3_server import make_bucket, s3_server
from tests.parts.served_lives import install
from tests.parts.test_imaging_archive import MIB, make_disk

BLOBS = ("chunks", "releases", "names", INCOMING)


@dataclass
class Shelf:
    """An installation, and new images for it: each shares a chunk with the others."""

    lives: ArchiveLives
    folder: Path
    _numbers: Iterator[int] = field(default_factory=lambda: count(2))

    def new_image(self) -> tuple[Path, str]:
        number = next(self._numbers)
        disk = make_disk(self.folder / "disk.raw", b"shared" * 99)
        with disk.open("r+b") as file:
            for place in (2, 3):
                file.seek(place * MIB)
                file.write(f"{number} {place}".encode())
        return disk, str(number)

    @property
    def is_bucket(self) -> bool:
        return self.lives.settings.keys.s3 is not None

    def files(self) -> set[str]:
        blobs = wiring.blobs_of(self.lives.settings)
        return {name for prefix in BLOBS for name, _ in blobs.sizes(f"{prefix}/")}

    def known(self) -> set[str]:
        """Return the digests of what the service knows, after a look at each: all are whole."""
        service = wiring.build(self.lives.settings)
        try:
            known = set(service.releases.kept())
            assert known
            assert [verify_release(service.archive, digest) for digest in known] == [
                [] for _ in known
            ]
            return known
        finally:
            service.close()

    def check_tidy(self) -> None:
        """See that there is nothing but what the known releases consist of."""
        known = self.known()
        archive = wiring.archive_of(self.lives.settings)
        assert set(archive.digests()) == known
        found = collect(archive, lambda: known, dry_run=True)
        assert (found.chunks, found.freed_bytes) == (0, 0)
        assert len([name for name in self.files() if name.startswith("names/")]) == len(known)
        assert not [name for name in self.files() if name.startswith(INCOMING)]


@pytest.fixture(scope="module", params=["files", "bucket"])
def shelf(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("shelf")
    more, credentials = "\n[releases]\ngrace_s = 0\n", ""
    with ExitStack() as stack:
        if request.param == "bucket":
            endpoint = stack.enter_context(s3_server(folder))
            make_bucket(endpoint, "releases")
            more += f'store = "s3://releases/site-1"\ns3_endpoint = "{endpoint}"\n'
            credentials = 'access_key = "AK"\nsecret_key = "not-shown"\n'
        settings = install(folder / "installation", more=more, s3_credentials=credentials)
        lives = stack.enter_context(archive_lives(settings))
        yield Shelf(lives, folder)


def points_of(lives: ArchiveLives, *, every: bool) -> list[str]:
    """Return the points that the last life has reached: each one, or the first, the middle and
    the last of each kind."""
    points = []
    for point, hits in sorted(Counter(lives.trace()).items()):
        chosen = range(1, hits + 1) if every else sorted({1, (hits + 1) // 2, hits})
        points += [f"{point} {hit}" for hit in chosen]
    return points


def publish_killed_at(shelf: Shelf, point: str) -> None:
    disk, version = shelf.new_image()
    known, files = shelf.known(), shelf.files()
    assert shelf.lives.publish(disk, version, armed=f"kill {point}") == -signal.SIGKILL
    if shelf.known() == known and int(version) % 2:
        # Nobody publishes it again: the next gc takes what was left.
        assert shelf.lives.gc() == 0
        assert shelf.files() <= files
        shelf.check_tidy()
    assert shelf.lives.publish(disk, version) == 0
    assert len(shelf.known() - known) == 1
    shelf.check_tidy()


def gc_killed_at(shelf: Shelf, point: str) -> None:
    assert shelf.lives.publish(*shelf.new_image()) == 0
    assert shelf.lives.gc(armed=f"kill {point}") == -signal.SIGKILL
    shelf.known()
    assert shelf.lives.gc() == 0
    assert len(shelf.known()) == 1
    shelf.check_tidy()


def sweep(shelf: Shelf, *, every: bool) -> None:
    for _ in range(2):  # the first one has the shared chunk to store as well
        assert shelf.lives.publish(*shelf.new_image()) == 0
    publishing = points_of(shelf.lives, every=every)
    assert shelf.lives.gc() == 0
    assert shelf.lives.publish(*shelf.new_image()) == 0
    assert shelf.lives.gc() == 0
    collecting = points_of(shelf.lives, every=every)
    for point in publishing:
        publish_killed_at(shelf, point)
        assert shelf.lives.gc() == 0
    for point in collecting:
        gc_killed_at(shelf, point)
    kinds = {point.split()[1] for point in [*publishing, *collecting]}
    # A bucket has no renaming: a put is whole or nothing.
    renames = [] if shelf.is_bucket else ["blob.place"]
    verbs = ("blob.write", *renames, "blob.delete", "commit")
    assert kinds == {f"{verb}.{when}" for verb in verbs for when in ("before", "after")}
    assert all(point.split()[0] == PART for point in [*publishing, *collecting])


def test_killed_at_a_few_points_of_each_kind_the_archive_is_whole(shelf: Shelf) -> None:
    sweep(shelf, every=False)


@pytest.mark.soak
def test_killed_at_every_point_the_archive_is_whole(shelf: Shelf) -> None:
    sweep(shelf, every=True)
