"""The release archive on a real file system: whole releases, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.core.manifest import Manifest
from provisioner.errors import Conflict, NotFound, RequestError, TrustError, Unavailable
from provisioner.imaging.archive import Archive, ReleaseFacts
from provisioner.imaging.chunks import data_bytes
from provisioner.imaging.gpt import LINUX_FILESYSTEM
from provisioner.imaging.publish import Publisher

KIB = 1024
MIB = 1024 * KIB
CHUNK = 64 * KIB
SIGNER = Ed25519PrivateKey.generate()

FACTS = ReleaseFacts(
    image="tiny",
    version="1",
    architecture="amd64",
    firmware=("bios",),
    release_id="ab" * 16,
    packages={"bash": "5.2"},
    recipe_digest="c" * 64,
    builder="test",
    built_at="2026-11-23T12:00:00Z",
    root_partition=1,
)


def make_disk(path: Path, content: bytes, size_bytes: int = 8 * MIB) -> Path:
    """Write a sparse disk image whose one partition, at 1 MiB, starts with content."""
    with path.open("wb") as disk:
        disk.truncate(size_bytes)
    script = f"label: gpt\nstart=2048, size=8192, type={LINUX_FILESYSTEM}, name=root\n"
    subprocess.run(
        ["sfdisk", "--quiet", "--no-tell-kernel", "--no-reread", str(path)],
        input=script.encode(),
        check=True,
    )
    with path.open("r+b") as disk:
        disk.seek(MIB)
        disk.write(content)
    return path


def files_of(archive: Archive) -> set[str]:
    """Return every file in the archive but the lock."""
    paths = (path for path in archive.root.rglob("*") if path.is_file())
    return {str(path.relative_to(archive.root)) for path in paths} - {"publish.lock"}


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(
        tmp_path / "archive", SIGNER.public_key(), chunk_bytes=CHUNK, space_reserve_bytes=0
    )


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", os.urandom(3 * CHUNK + 5) + bytes(CHUNK))


def test_published_release_is_put_together_again_byte_for_byte(
    archive: Archive, disk: Path, tmp_path: Path
) -> None:
    manifest = archive.publish(disk, FACTS, SIGNER)
    archive.write_image(archive.load(manifest.digest), tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes()
    assert data_bytes(tmp_path / "again.raw") <= manifest.used_bytes
    assert [part.name for part in manifest.partitions] == ["root"]
    assert archive.releases() == [manifest]


def test_zeros_are_null_whether_holes_or_written(archive: Archive, disk: Path) -> None:
    manifest = archive.publish(disk, FACTS, SIGNER)
    assert len(manifest.chunks) == 8 * MIB // CHUNK
    # The two partition tables, and four chunks of data; the chunk of written zeros is none.
    assert sum(digest is not None for digest in manifest.chunks) == 6
    stored = sum(path.stat().st_size for path in (archive.root / "chunks").rglob("*/*"))
    assert stored == manifest.stored_bytes


def test_last_chunk_may_be_short(archive: Archive, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "odd.raw", b"x", size_bytes=8 * MIB + 512)
    manifest = archive.publish(disk, FACTS, SIGNER)
    assert manifest.chunk_length(len(manifest.chunks) - 1) == 512
    archive.write_image(manifest, tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes()


def test_two_releases_share_their_chunks(archive: Archive, disk: Path) -> None:
    first = archive.publish(disk, FACTS, SIGNER)
    before = files_of(archive)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")
    second = archive.publish(disk, replace(FACTS, version="2"), SIGNER)
    new = {name for name in files_of(archive) - before if name.startswith("chunks/")}
    assert len(new) == 1
    assert second.distinct_chunks - first.distinct_chunks == {name[-64:] for name in new}


def test_same_version_with_other_content_is_refused(archive: Archive, disk: Path) -> None:
    archive.publish(disk, FACTS, SIGNER)
    before = files_of(archive)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")
    with pytest.raises(Conflict) as caught:
        archive.publish(disk, FACTS, SIGNER)
    assert "tiny@1" in str(caught.value)
    assert files_of(archive) == before


def test_same_content_again_is_the_same_release_and_registered_again(
    archive: Archive, disk: Path
) -> None:
    """A publisher that died between the archive and the database just runs again."""
    registered: list[Manifest] = []
    publisher = Publisher(archive, registered.append, SIGNER)
    first = publisher.publish(disk, FACTS)
    again = publisher.publish(disk, replace(FACTS, built_at="2027-01-01T00:00:00Z"))
    assert again == first
    assert registered == [first, first]


def test_failed_registration_leaves_nothing_behind(archive: Archive, disk: Path) -> None:
    def refuse(manifest: Manifest) -> None:
        assert archive.load(manifest.digest) == manifest  # durable before it is made known
        raise Conflict("no")

    with pytest.raises(Conflict, match="no"):
        archive.publish(disk, FACTS, SIGNER, register=refuse)
    assert files_of(archive) == set()


def test_failed_registration_leaves_the_chunks_of_others_alone(
    archive: Archive, disk: Path
) -> None:
    archive.publish(disk, FACTS, SIGNER)
    before = files_of(archive)

    def refuse(_: Manifest) -> None:
        raise Conflict("no")

    with pytest.raises(Conflict):
        archive.publish(disk, replace(FACTS, version="2"), SIGNER, register=refuse)
    assert files_of(archive) == before


def test_space_is_looked_at_before_anything_is_written(tmp_path: Path, disk: Path) -> None:
    greedy = Archive(tmp_path / "a", SIGNER.public_key(), space_reserve_bytes=1 << 60)
    with pytest.raises(Unavailable, match="not enough space") as caught:
        greedy.publish(disk, FACTS, SIGNER)
    assert caught.value.hint
    assert files_of(greedy) == set()


FILL_A_SMALL_DISK = """
import pathlib, subprocess, sys
sys.path.insert(0, {here!r})
from test_imaging_archive import *
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", {mount!r}], check=True)
archive = Archive(pathlib.Path({mount!r}), SIGNER.public_key(), chunk_bytes=CHUNK,
    space_reserve_bytes=-(1 << 40))
try:
    archive.publish(pathlib.Path({disk!r}), FACTS, SIGNER)
except Unavailable as error:
    print("refused:", error, files_of(archive))
"""


def test_disk_that_fills_up_meanwhile_leaves_nothing_behind(tmp_path: Path) -> None:
    """The space check is only a forecast: somebody else may fill the disk while we write."""
    disk = make_disk(tmp_path / "disk.raw", os.urandom(4 * MIB - KIB))
    (tmp_path / "small").mkdir()
    script = FILL_A_SMALL_DISK.format(
        here=str(Path(__file__).parent), mount=str(tmp_path / "small"), disk=str(disk)
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", script]
    found = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, env=path_env()
    )
    assert "refused: the disk filled up" in found.stdout, found.stderr
    assert found.stdout.strip().endswith("set()")


def test_leftovers_of_a_killed_publisher_are_cleared_away(archive: Archive, disk: Path) -> None:
    left = archive.root / "incoming" / "dead"
    left.mkdir(parents=True)
    (left / ("e" * 64)).write_bytes(b"half a chu")
    archive.publish(disk, FACTS, SIGNER)
    assert not list((archive.root / "incoming").iterdir())


def test_one_publisher_at_a_time(archive: Archive, disk: Path) -> None:
    def publish_inside(_: Manifest) -> None:
        archive.publish(disk, replace(FACTS, version="2"), SIGNER)

    with pytest.raises(Conflict, match="another publisher"):
        archive.publish(disk, FACTS, SIGNER, register=publish_inside)


def test_damaged_chunk_is_noticed_and_the_next_publisher_repairs_it(
    archive: Archive, disk: Path, tmp_path: Path
) -> None:
    manifest = archive.publish(disk, FACTS, SIGNER)
    _, digest = next(manifest.stored_chunks())
    path = archive.chunk_path(digest)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(TrustError, match="damaged"):
        archive.write_image(manifest, tmp_path / "again.raw")
    assert not (tmp_path / "again.raw").exists()
    archive.publish(disk, replace(FACTS, version="2"), SIGNER)
    archive.write_image(manifest, tmp_path / "again.raw")


def test_missing_chunk_is_noticed(archive: Archive, disk: Path, tmp_path: Path) -> None:
    manifest = archive.publish(disk, FACTS, SIGNER)
    _, digest = next(manifest.stored_chunks())
    archive.chunk_path(digest).unlink()
    with pytest.raises(NotFound, match=digest):
        archive.write_image(manifest, tmp_path / "again.raw")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_one_flipped_bit_in_a_release_is_noticed(archive: Archive, disk: Path, name: str) -> None:
    manifest = archive.publish(disk, FACTS, SIGNER)
    path = archive.release_dir(manifest.digest) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(TrustError, match="signature"):
        archive.load(manifest.digest)


def test_release_signed_by_another_key_is_refused(archive: Archive, disk: Path) -> None:
    manifest = archive.publish(disk, FACTS, SIGNER)
    stranger = Archive(archive.root, Ed25519PrivateKey.generate().public_key())
    with pytest.raises(TrustError):
        stranger.load(manifest.digest)
    with pytest.raises(TrustError):
        archive.publish(disk, FACTS, Ed25519PrivateKey.generate())


def test_release_under_another_releases_name_is_refused(archive: Archive, disk: Path) -> None:
    """An old, well-signed release must not come back under a new one's digest."""
    manifest = archive.publish(disk, FACTS, SIGNER)
    archive.release_dir(manifest.digest).rename(archive.release_dir("f" * 64))
    with pytest.raises(TrustError, match="another's name"):
        archive.load("f" * 64)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "F" * 64, "f" * 63 + "\n"])
def test_only_digests_name_files(archive: Archive, name: str) -> None:
    with pytest.raises(RequestError):
        archive.chunk_path(name)
    with pytest.raises(RequestError):
        archive.load(name)


def test_unknown_release_is_not_found(archive: Archive) -> None:
    with pytest.raises(NotFound):
        archive.load("f" * 64)


MEASURE_PUBLISHING = """
import pathlib, re, sys
sys.path.insert(0, {here!r})
from test_imaging_archive import *
archive = Archive(pathlib.Path({root!r}), SIGNER.public_key(), space_reserve_bytes=0)
archive.publish(pathlib.Path({disk!r}), FACTS, SIGNER)
# Not ru_maxrss: that of a child begins with its parent's at the fork.
status = pathlib.Path('/proc/self/status').read_text()
print(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])
"""


def test_memory_stays_below_256_mib_whatever_the_size(tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "disk.raw", b"", size_bytes=64 * 1024 * MIB)
    block = os.urandom(MIB)
    with disk.open("r+b") as file:
        for index in range(300):
            file.seek((index * 200 + 8) * MIB)
            file.write(block[index:] + block[:index])
    script = MEASURE_PUBLISHING.format(
        here=str(Path(__file__).parent), root=str(tmp_path / "archive"), disk=str(disk)
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=path_env(), check=True
    )
    assert int(found.stdout) * KIB < 256 * MIB


def path_env() -> dict[str, str]:
    """Return an environment in which a child finds what this process found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
