"""qcow2 files: what qemu-img makes is accepted; what leads elsewhere is never opened by it."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from provisioner.errors import RequestError
from provisioner.imaging.importer import ImportRequest, imported_image
from provisioner.imaging.qcow2 import Qcow2, judge
from provisioner.imaging.qcow2_tables import PackedPlaces
from tests.parts.hostile_qcow2 import CLUSTER, COMPRESSED, COPIED, HOSTILE, MIB, SIZE_MAX, Patched

NOW = datetime(2026, 11, 25, tzinfo=UTC)
# Whatever could open the file, or start something that does.
OPENERS = ("qemu-img", "qemu-nbd", "qemu-io", "debugfs", "unshare", "setpriv", "bwrap")


def qemu_img(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def judged(path: Path) -> Qcow2:
    with path.open("rb") as image:
        return judge(image, size_bytes_max=SIZE_MAX)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of 4 MiB with text, random bytes and nothing in it."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    with path.open("wb") as raw:
        raw.truncate(4 * MIB)
        raw.write(b"provisioner " * 4000)
        raw.seek(3 * MIB)
        raw.write(random.Random(3).randbytes(5 * CLUSTER))
    return path


@pytest.fixture(scope="module")
def plain(disk: Path) -> bytes:
    path = disk.with_suffix(".plain")
    qemu_img("convert", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}", disk, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def packed(disk: Path) -> bytes:
    path = disk.with_suffix(".packed")
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}", disk, path)
    return path.read_bytes()


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Put recorders before every program that could open an image; return what they saw."""
    seen = tmp_path / "seen"
    record_calls(tmp_path / "bin", seen, OPENERS, monkeypatch)
    return lambda: seen.read_text() if seen.exists() else ""


def record_calls(
    folder: Path, seen: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    for name in names:
        script = folder / name
        script.write_text(f'#!/bin/sh\necho {name} "$@" >> {seen}\nexec /usr/bin/{name} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def import_it(path: Path, work: Path) -> None:
    asked = ImportRequest(path, "qcow2", "theirs", "1", release_id="ab" * 16)
    with imported_image(asked, work=work, now=NOW):
        pass


# --- what is accepted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64",
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=2M",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
    ],
)
def test_what_qemu_img_makes_is_accepted(disk: Path, tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-O", "qcow2", "-o", options, disk, path)
    found = judged(path)
    assert found.size_bytes == 4 * MIB
    assert 68 * 1024 <= found.data_bytes <= 4 * MIB


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", ["512", "64k", "2M"])
def test_compressed_images_are_accepted(
    disk: Path, tmp_path: Path, kind: str, cluster_size: str
) -> None:
    path = tmp_path / "disk.qcow2"
    options = f"compression_type={kind},cluster_size={cluster_size}"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, disk, path)
    assert judged(path).size_bytes == 4 * MIB


def test_an_image_that_lived_is_accepted(disk: Path, tmp_path: Path) -> None:
    """Grown, written to, discarded, and freed of its snapshots, which qemu-img leaves traces of."""
    path = tmp_path / "disk.qcow2"
    qemu_img("convert", "-O", "qcow2", disk, path)
    qemu_img("snapshot", "-c", "before", path)
    qemu_img("resize", path, "700M")
    for command in ("write -P 7 600M 3M", "discard 600M 1M", "write -z 1M 1M", "write -c 2M 64k"):
        subprocess.run(["qemu-io", "-c", command, str(path)], check=True, capture_output=True)
    qemu_img("snapshot", "-d", "before", path)
    assert judged(path).size_bytes == 700 * MIB


def test_a_terabyte_that_is_all_mapped_is_judged_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=2M", path, "1T")
    assert judged(path) == Qcow2(SIZE_MAX, SIZE_MAX)


def test_an_extension_that_the_specification_lets_us_ignore_is_ignored(
    plain: bytes, tmp_path: Path
) -> None:
    image = Patched(plain)
    image.extend(0x12345678, b"of somebody's own")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image.data)
    assert judged(path).size_bytes == 4 * MIB


def test_places_of_compressed_clusters_come_in_order_from_many_runs() -> None:
    places = PackedPlaces(run_length=7)
    pairs = [(random.Random(n).randrange(1 << 46), n % 8192) for n in range(100)]
    for pair in pairs:
        places.add(*pair)
    assert list(places.in_order()) == sorted(pairs)


# --- what is refused, and never opened ----------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_image_is_refused_and_never_opened(
    plain: bytes, tmp_path: Path, opened: Callable[[], str], name: str
) -> None:
    expected, patch = HOSTILE[name]
    image = Patched(plain)
    patch(image)
    path = tmp_path / "hostile.qcow2"
    path.write_bytes(image.data)
    with pytest.raises(RequestError, match=r"hostile\.qcow2 is refused") as caught:
        import_it(path, tmp_path / "work")
    assert expected in str(caught.value.expected)
    assert caught.value.found
    assert not opened()
    assert not (tmp_path / "work").exists()


def test_recorders_would_have_seen_a_program_open_it(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "disk.qcow2", tmp_path / "seen"
    qemu_img("convert", "-O", "qcow2", disk, path)
    # Those that start it; qemu-img itself is taken from /usr only, to run in the sandbox.
    record_calls(tmp_path / "bin", seen, ("unshare", "setpriv"), monkeypatch)
    with pytest.raises(RequestError, match="partition table"):
        import_it(path, tmp_path / "work")
    assert "/usr/bin/qemu-img convert" in seen.read_text()
    assert not list((tmp_path / "work").iterdir())


# --- what qemu-img itself makes of such features ------------------------------------------


def snapshot(path: Path, disk: Path) -> None:
    qemu_img("convert", "-O", "qcow2", disk, path)
    qemu_img("snapshot", "-c", "first", path)


def bitmap(path: Path, disk: Path) -> None:
    qemu_img("convert", "-O", "qcow2", disk, path)
    qemu_img("bitmap", "--add", path, "changes")


def encrypted(path: Path, disk: Path) -> None:
    # Not by LUKS: to make that, qemu-img measures the machine, and fails on a busy one.
    options = "encrypt.format=aes,encrypt.key-secret=s"
    made = ("-f", "qcow2", "--object", "secret,id=s,data=x", "-o", options)
    qemu_img("create", *made, path, disk.stat().st_size)


def option(text: str, size: str = "4M") -> Callable[[Path, Path], None]:
    return lambda path, _: qemu_img("create", "-f", "qcow2", *text.split(), path, size)


@pytest.mark.parametrize(
    ("expected", "make"),
    [
        ("no backing file", option("-u -F raw -b /etc/passwd")),
        ("no backing file", option("-u -F qcow2 -b nbd://127.0.0.1:1/x")),
        ("no external data file", option("-o data_file=data.raw,data_file_raw=on")),
        ("plain L2 entries", option("-o extended_l2=on")),
        ("clusters", option("-o cluster_size=512", "32G")),
        ("no internal snapshots", snapshot),
        ("no bitmaps", bitmap),
        ("no encryption", encrypted),
    ],
)
def test_features_as_qemu_img_makes_them_are_refused(
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: str,
    make: Callable[[Path, Path], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "disk.qcow2", disk)
    with pytest.raises(RequestError, match="refused") as caught:
        judged(tmp_path / "disk.qcow2")
    assert expected in str(caught.value.expected)
    assert "qemu-img convert" in str(caught.value.hint)


# --- compressed clusters ------------------------------------------------------------------


def compressed_entries(image: Patched) -> list[int]:
    """Return the places of the entries of compressed clusters in the first L2 table."""
    places = range(image.l2[0], image.l2[0] + CLUSTER, 8)
    return [place for place in places if image.get(place) & COMPRESSED]


@pytest.mark.parametrize("moved", [0, 1, -1])
def test_compressed_clusters_that_overlap_are_refused(
    packed: bytes, tmp_path: Path, moved: int
) -> None:
    """One cluster's data at the place of another's, or around it: a small file, a large disk."""
    image = Patched(packed)
    first, second = compressed_entries(image)[1:3]
    two_sectors = 1 << (62 - (12 - 8)) + 1
    image.put(first, image.get(first) | two_sectors)
    image.put(second, image.get(first) + moved)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image.data)
    with pytest.raises(RequestError) as caught:
        judged(path)
    assert "used once" in str(caught.value.expected)


@pytest.mark.parametrize("added", [1 << 40, COPIED])
def test_compressed_cluster_beyond_the_file_is_refused(
    packed: bytes, tmp_path: Path, added: int
) -> None:
    image = Patched(packed)
    place = compressed_entries(image)[0]
    image.put(place, image.get(place) | added)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image.data)
    with pytest.raises(RequestError) as caught:
        judged(path)
    assert "within the file" in str(caught.value.expected)


# --- anything at all ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_judged_or_refused(
    plain: bytes, packed: bytes, tmp_path: Path, seed: int
) -> None:
    """Whatever the bytes say, the answer is a size within the limit, or a refusal."""
    chance = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    found: list[Qcow2] = []
    for _ in range(150):
        image = Patched(chance.choice((plain, packed)))
        tables = (0, image.l1, image.refcounts, *image.l2)
        for _ in range(chance.randrange(1, 4)):
            place = chance.choice(tables) + chance.randrange(128)
            image.data[place] = chance.randrange(256)
        path.write_bytes(image.data[: chance.choice((len(image.data), CLUSTER * 5, 2 * MIB))])
        with contextlib.suppress(RequestError):
            found.append(judged(path))
    assert all(0 < one.size_bytes <= SIZE_MAX for one in found)
    assert 0 < len(found) < 100
