"""Whole builds of debian-12: the same bytes again, and the same files on a parent.

Takes packages from the mirrors. What would boot is tested where it boots.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from provisioner.core.manifest import FILES, SPDX
from provisioner.errors import RequestError
from provisioner.imaging.archive import ReleaseFacts
from provisioner.imaging.build import built_image
from provisioner.imaging.file_manifest import differences, parse
from provisioner.imaging.gpt import read_partitions
from provisioner.imaging.parent import Parent
from provisioner.imaging.tools import ToolFailed
from provisioner.lab.shelf import lab_recipe
from provisioner.lab.site import cache_directory

pytestmark = [pytest.mark.lab, pytest.mark.soak]

RECIPE = lab_recipe()
MIB = 1024 * 1024
CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Built:
    """A build that was kept: its disk, and what its builder knew and said."""

    raw: Path
    facts: ReleaseFacts
    said: list[str]

    @property
    def parent(self) -> Parent:
        return Parent("a" * 64, "debian-12@1", self.raw, read_partitions(self.raw))

    @property
    def digest(self) -> str:
        with self.raw.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def build(cache: Path, target: Path, version: str = "1", parent: Parent | None = None) -> Built:
    said: list[str] = []
    now = datetime.now(UTC)
    with built_image(
        RECIPE, version, cache=cache, now=now, say=said.append, parent=parent
    ) as built:
        shutil.move(built.raw, target)
        return Built(target, built.facts, said)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of our own, with what the shared one holds."""
    folder = tmp_path_factory.mktemp("cache")
    for name in ("packages", "bases"):
        if (kept := cache_directory() / "images" / name).is_dir():
            shutil.copytree(kept, folder / name)
    return folder


@pytest.fixture(scope="module")
def first(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(cache, tmp_path_factory.mktemp("first") / "disk.raw")


@pytest.fixture(scope="module")
def base(cache: Path, first: Built) -> Path:
    """The base tree that the first image was made of, alone in a folder with its log."""
    assert first.raw.exists()
    trees = (cache / "bases").glob("debian-12-*.tar.zst")
    used = max(trees, key=lambda path: path.stat().st_mtime)
    alone = cache / "used"
    alone.mkdir()
    for path in used.parent.glob(f"{used.name.removesuffix('.tar.zst')}*"):
        shutil.copy(path, alone)
    return alone / used.name


@pytest.fixture(scope="module")
def upgraded(
    base: Path, first: Built, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Built, Built]:
    """The image after a package changed: built from nothing, and built on the first."""
    folder = tmp_path_factory.mktemp("upgraded")
    shutil.copytree(base.parent, folder / "cache/bases")
    (folder / "cache/bases" / base.name).unlink()
    upgrade(base, folder / "cache/bases" / base.name)
    alone = build(folder / "cache", folder / "alone.raw", "2")
    return alone, build(folder / "cache", folder / "on-parent.raw", "2", first.parent)


def upgrade(base: Path, target: Path) -> None:
    """Write a base tree in which one small package is a newer one: less, by about 200 KB."""
    data = subprocess.run(["zstd", "-dcq", str(base)], check=True, capture_output=True).stdout
    changed = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as old,
        tarfile.open(
            fileobj=changed, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape"
        ) as new,
    ):
        for entry in old:
            content = old.extractfile(entry).read() if entry.isreg() else b""  # type: ignore[union-attr] # a regular file
            if entry.name == "./usr/bin/less":
                third = len(content) // 3
                content = content[:third] + b"more code" * 30 + content[third:]
            elif entry.name == "./var/lib/dpkg/status":
                content = content.replace(b"\nPackage: less\n", b"\nPackage: less\nX-New: yes\n")
            elif entry.name == "./usr/bin/lessecho":
                continue
            entry.size = len(content)
            new.addfile(entry, io.BytesIO(content))
    subprocess.run(
        ["zstd", "-q", "-o", str(target)], input=changed.getvalue(), check=True, timeout=120
    )


def test_building_twice_gives_the_same_release(first: Built, cache: Path, tmp_path: Path) -> None:
    """With nothing shared but what was downloaded: each installs all packages for itself."""
    shutil.copytree(cache / "packages", tmp_path / "cache" / "packages")
    second = build(tmp_path / "cache", tmp_path / "disk.raw")
    assert any("installing" in line for line in second.said)
    assert second.digest == first.digest
    # What is signed is the same. The log and the record are of their build.
    ours, theirs = (replace(one.facts, log="", record={}) for one in (second, first))
    assert ours == theirs
    assert {FILES, SPDX} <= set(first.facts.attachments)
    assert second.facts.record != first.facts.record


def test_a_parent_changes_where_files_are_and_not_what_they_are(
    upgraded: tuple[Built, Built],
) -> None:
    alone, on_parent = upgraded
    assert alone.facts.parent is None
    assert on_parent.facts.parent == "a" * 64
    assert not any("not built on" in line for line in on_parent.said)
    theirs, ours = (parse(one.facts.attachments[FILES]) for one in upgraded)
    assert differences(theirs, ours) == []
    assert on_parent.digest != alone.digest
    same = ("release_id", "packages", "kernel", "initrd", "recipe_digest", "built_at")
    assert all(getattr(alone.facts, one) == getattr(on_parent.facts, one) for one in same)


def test_a_small_upgrade_on_the_parent_moves_few_chunks(
    first: Built, upgraded: tuple[Built, Built]
) -> None:
    alone, on_parent = (differing_chunks(first.raw, one.raw) for one in upgraded)
    assert on_parent < 40
    assert on_parent * 10 < alone


def test_boot_partitions_do_not_move_with_the_version(
    first: Built, upgraded: tuple[Built, Built]
) -> None:
    *boots, _ = read_partitions(first.raw)
    assert [part.name for part in boots] == ["bios", "esp"]
    for part in boots:
        contents = []
        for built in (first, *upgraded):
            with built.raw.open("rb") as disk:
                disk.seek(part.start_bytes)
                contents.append(disk.read(part.size_bytes))
        assert contents[0] == contents[1] == contents[2]
        assert contents[0].strip(b"\0")


def test_what_would_start_the_system_is_named(first: Built) -> None:
    files = {entry.path: entry for entry in parse(first.facts.attachments[FILES])}
    for boot in (first.facts.kernel, first.facts.initrd):
        assert boot is not None
        assert files[boot.path].sha256 == boot.sha256
    assert first.facts.kernel_arguments == RECIPE.arguments
    assert files["/usr/bin/ping"].xattrs


@pytest.mark.parametrize("kind", ["damaged", "too small"])
def test_a_build_that_fails_leaves_nothing_behind(kind: str, base: Path, tmp_path: Path) -> None:
    cache, recipe = tmp_path / "cache", RECIPE
    shutil.copytree(base.parent, cache / "bases")
    if kind == "damaged":
        (cache / "bases" / base.name).write_bytes(base.read_bytes()[:20_000_000])
    else:
        recipe = replace(RECIPE, size_bytes=256 * MIB)
    before = {path: path.stat().st_size for path in cache.rglob("*")}
    expected = ToolFailed if kind == "damaged" else RequestError
    with (
        pytest.raises(expected) as caught,
        built_image(recipe, "3", cache=cache, now=datetime.now(UTC)),
    ):
        pass
    assert caught.value.found
    assert {path: path.stat().st_size for path in cache.rglob("*")} == before


def differing_chunks(one: Path, other: Path) -> int:
    with one.open("rb") as first, other.open("rb") as second:
        count = 0
        while chunk := first.read(CHUNK_BYTES):
            count += chunk != second.read(CHUNK_BYTES)
    return count
