"""The release archive on a real file system: whole releases, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.core.manifest import CHUNKS_MAX, Manifest
from provisioner.core.trust import TrustPolicy
from provisioner.errors import Conflict, NotFound, RequestError, TrustError, Unavailable
from provisioner.imaging import signing
from provisioner.imaging.archive import Archive, ReleaseFacts, folder_of
from provisioner.imaging.blobs import FileBlobs
from provisioner.imaging.chunks import chunk_name, data_bytes
from provisioner.imaging.gpt import LINUX_FILESYSTEM
from provisioner.imaging.publish import Publisher, Register, unregistered

KIB = 1024
MIB = 1024 * KIB
CHUNK = 64 * KIB
LOCK_WAIT_S = 2.0
WAIT_LIMIT_S = 60.0
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


def an_archive(root: Path, *keys: Ed25519PrivateKey, reserve_bytes: int = 0) -> Archive:
    """Return an archive of files that trusts these keys, or SIGNER."""
    trusted = tuple(signing.public_hex(key.public_key()) for key in keys or (SIGNER,))
    return Archive(
        FileBlobs(root),
        TrustPolicy(trusted),
        root / "lock",
        space_reserve_bytes=reserve_bytes,
        lock_wait=timedelta(seconds=LOCK_WAIT_S),
    )


def publish(
    archive: Archive,
    disk: Path,
    facts: ReleaseFacts = FACTS,
    register: Register = unregistered,
    *,
    signers: Sequence[Ed25519PrivateKey] = (SIGNER,),
) -> Manifest:
    return Publisher(archive, signers, register, chunk_bytes=CHUNK).publish(disk, facts)


def root_of(archive: Archive) -> Path:
    return Path(archive.blobs.place)


def files_of(archive: Archive) -> set[str]:
    """Return every file in the archive but the lock."""
    root = root_of(archive)
    paths = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in paths} - {"lock"}


def spoil(archive: Archive, name: str) -> None:
    """Flip one bit in the middle of a blob."""
    path = root_of(archive) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return an_archive(tmp_path / "archive")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", os.urandom(3 * CHUNK + 5) + bytes(CHUNK))


def test_published_release_is_put_together_again_byte_for_byte(
    archive: Archive, disk: Path, tmp_path: Path
) -> None:
    manifest = publish(archive, disk, FACTS)
    archive.write_image(archive.load(manifest.digest), tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes()
    assert data_bytes(tmp_path / "again.raw") <= manifest.used_bytes
    assert [part.name for part in manifest.partitions] == ["root"]
    assert archive.releases() == [manifest]


def test_zeros_are_null_whether_holes_or_written(archive: Archive, disk: Path) -> None:
    manifest = publish(archive, disk, FACTS)
    assert len(manifest.chunks) == 8 * MIB // CHUNK
    # The two partition tables, and four chunks of data; the chunk of written zeros is none.
    assert sum(digest is not None for digest in manifest.chunks) == 6
    assert len(list(archive.blobs.sizes("chunks/"))) == 6


def test_last_chunk_may_be_short(archive: Archive, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "odd.raw", b"x", size_bytes=8 * MIB + 512)
    manifest = publish(archive, disk, FACTS)
    assert manifest.chunk_length(len(manifest.chunks) - 1) == 512
    archive.write_image(manifest, tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes()


def test_a_huge_image_is_cut_into_chunks_that_an_agent_has_memory_for(
    archive: Archive, tmp_path: Path
) -> None:
    disk = make_disk(tmp_path / "huge.raw", b"x", size_bytes=20 * KIB * MIB)
    manifest = publish(archive, disk, FACTS)
    assert manifest.chunk_bytes == 2 * CHUNK
    assert len(manifest.chunks) == 20 * KIB * MIB // (2 * CHUNK) <= CHUNKS_MAX


def test_two_releases_share_their_chunks(archive: Archive, disk: Path) -> None:
    first = publish(archive, disk, FACTS)
    before = files_of(archive)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")
    second = publish(archive, disk, replace(FACTS, version="2"))
    new = {name for name in files_of(archive) - before if name.startswith("chunks/")}
    assert len(new) == 1
    assert second.distinct_chunks - first.distinct_chunks == {name[-64:] for name in new}


def test_same_version_with_other_content_is_refused(archive: Archive, disk: Path) -> None:
    publish(archive, disk, FACTS)
    before = files_of(archive)
    with disk.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")
    with pytest.raises(Conflict) as caught:
        publish(archive, disk, FACTS)
    assert "tiny@1" in str(caught.value)
    assert files_of(archive) == before


def test_same_content_again_is_the_same_release_and_registered_again(
    archive: Archive, disk: Path
) -> None:
    """A publisher that died between the archive and the database just runs again."""
    registered: list[tuple[Manifest, int]] = []

    def register(manifest: Manifest, stored_bytes: int) -> None:
        registered.append((manifest, stored_bytes))

    first = publish(archive, disk, FACTS, register)
    again = publish(archive, disk, replace(FACTS, built_at="2027-01-01T00:00:00Z"), register)
    assert again == first
    stored = sum(size for _, size in archive.blobs.sizes("chunks/"))
    assert registered == [(first, stored), (first, stored)]


def test_failed_registration_leaves_nothing_behind(archive: Archive, disk: Path) -> None:
    def refuse(manifest: Manifest, _: int) -> None:
        assert archive.load(manifest.digest) == manifest  # durable before it is made known
        raise Conflict("no")

    with pytest.raises(Conflict, match="no"):
        publish(archive, disk, FACTS, refuse)
    assert files_of(archive) == set()


def test_failed_registration_leaves_the_chunks_of_others_alone(
    archive: Archive, disk: Path
) -> None:
    publish(archive, disk, FACTS)
    before = files_of(archive)

    def refuse(_: Manifest, __: int) -> None:
        raise Conflict("no")

    with pytest.raises(Conflict):
        publish(archive, disk, replace(FACTS, version="2"), refuse)
    assert files_of(archive) == before


def test_space_is_looked_at_before_anything_is_written(tmp_path: Path, disk: Path) -> None:
    greedy = an_archive(tmp_path / "a", reserve_bytes=1 << 60)
    with pytest.raises(Unavailable, match="not enough space") as caught:
        publish(greedy, disk, FACTS)
    assert caught.value.hint
    assert files_of(greedy) == set()


FILL_A_SMALL_DISK = """
import pathlib, subprocess, sys
sys.path.insert(0, {here!r})
from test_imaging_archive import *
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", {mount!r}], check=True)
archive = an_archive(pathlib.Path({mount!r}), reserve_bytes=-(1 << 40))
try:
    publish(archive, pathlib.Path({disk!r}), FACTS)
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
        command, check=False, capture_output=True, text=True, timeout=180, env=path_env()
    )
    assert "refused: the disk filled up" in found.stdout, found.stderr
    assert found.stdout.strip().endswith("set()")


def test_leftovers_of_a_killed_publisher_are_cleared_away(archive: Archive, disk: Path) -> None:
    left = root_of(archive) / "incoming"
    left.mkdir(parents=True)
    (left / ("e" * 32)).write_bytes(b"half a chu")
    publish(archive, disk, FACTS)
    assert not list(left.iterdir())


def test_one_publisher_at_a_time(archive: Archive, disk: Path) -> None:
    def publish_inside(_: Manifest, __: int) -> None:
        publish(archive, disk, replace(FACTS, version="2"))

    with pytest.raises(Unavailable, match="another publisher") as caught:
        publish(archive, disk, FACTS, publish_inside)
    assert caught.value.exit_code == 3
    with archive.locked(), pytest.raises(Unavailable, match="another publisher"):
        archive.wait_for_others()


def test_who_comes_second_waits_for_the_first(archive: Archive, disk: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with archive.locked():
            second = pool.submit(publish, archive, disk)
            with pytest.raises(TimeoutError):
                second.result(LOCK_WAIT_S / 4)
        published = second.result(WAIT_LIMIT_S)
    assert archive.releases() == [published]


def test_damaged_chunk_is_noticed_and_the_next_publisher_repairs_it(
    archive: Archive, disk: Path, tmp_path: Path
) -> None:
    manifest = publish(archive, disk, FACTS)
    _, digest = next(manifest.stored_chunks())
    spoil(archive, chunk_name(digest))
    with pytest.raises(TrustError, match="damaged"):
        archive.write_image(manifest, tmp_path / "again.raw")
    assert not (tmp_path / "again.raw").exists()
    publish(archive, disk, replace(FACTS, version="2"))
    archive.write_image(manifest, tmp_path / "again.raw")


def test_missing_chunk_is_noticed(archive: Archive, disk: Path, tmp_path: Path) -> None:
    manifest = publish(archive, disk, FACTS)
    _, digest = next(manifest.stored_chunks())
    archive.blobs.delete(chunk_name(digest))
    with pytest.raises(NotFound, match=digest):
        archive.write_image(manifest, tmp_path / "again.raw")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_one_flipped_bit_in_a_release_is_noticed(archive: Archive, disk: Path, name: str) -> None:
    manifest = publish(archive, disk, FACTS)
    spoil(archive, f"{folder_of(manifest.digest)}/{name}")
    with pytest.raises(TrustError, match=r"signature|sign"):
        archive.load(manifest.digest)


def test_release_signed_by_another_key_is_refused(archive: Archive, disk: Path) -> None:
    manifest = publish(archive, disk, FACTS)
    stranger = an_archive(root_of(archive), Ed25519PrivateKey.generate())
    with pytest.raises(TrustError):
        stranger.load(manifest.digest)
    with pytest.raises(TrustError):
        publish(archive, disk, FACTS, signers=[Ed25519PrivateKey.generate()])


def test_release_under_another_releases_name_is_refused(archive: Archive, disk: Path) -> None:
    """An old, well-signed release must not come back under a new one's digest."""
    manifest = publish(archive, disk, FACTS)
    root = root_of(archive)
    (root / folder_of(manifest.digest)).rename(root / folder_of("f" * 64))
    with pytest.raises(TrustError, match="another's name"):
        archive.load("f" * 64)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "F" * 64, "f" * 63 + "\n"])
def test_only_digests_name_files(archive: Archive, name: str) -> None:
    with pytest.raises(RequestError):
        archive.load(name)


def test_unknown_release_is_not_found(archive: Archive) -> None:
    with pytest.raises(NotFound):
        archive.load("f" * 64)


MEASURE_PUBLISHING = """
import pathlib, re, sys
sys.path.insert(0, {here!r})
from test_imaging_archive import *
archive = an_archive(pathlib.Path({root!r}))
publish(archive, pathlib.Path({disk!r}), FACTS)
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
        command, capture_output=True, text=True, timeout=300, env=path_env(), check=True
    )
    assert int(found.stdout) * KIB < 256 * MIB


def path_env() -> dict[str, str]:
    """Return an environment in which a child finds what this process found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
