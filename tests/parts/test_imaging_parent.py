"""A release is built on the newest one that fits, whose disk is there only meanwhile."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from provisioner.errors import TrustError
from provisioner.imaging.chunks import chunk_name
from provisioner.imaging.parent import choose_parent, parent_of
from provisioner.imaging.recipe import find_recipe, load_recipe
from tests.parts.test_imaging_archive import FACTS, MIB, an_archive, make_disk, publish, spoil

RECIPE = replace(load_recipe(find_recipe("debian-12")), image="tiny", size_bytes=8 * MIB)


def test_the_newest_that_fits_is_chosen(tmp_path: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    small = make_disk(tmp_path / "small.raw", os.urandom(100))
    large = make_disk(tmp_path / "large.raw", os.urandom(100), 16 * MIB)
    assert choose_parent(RECIPE, archive.releases()) is None
    older = publish(archive, small, replace(FACTS, version="9"))
    newer = publish(archive, small, replace(FACTS, version="10"))
    later = replace(FACTS, built_at="2026-11-24T12:00:00Z")
    publish(archive, small, replace(later, image="other"))
    publish(archive, small, replace(later, version="11", architecture="arm64"))
    publish(archive, large, replace(later, version="12"))
    assert choose_parent(RECIPE, archive.releases()) == newer
    assert choose_parent(RECIPE, archive.releases(), [newer.digest]) == older
    dated = publish(archive, small, replace(later, version="1"))
    assert choose_parent(RECIPE, archive.releases()) == dated


def test_the_disk_is_whole_and_goes_again(tmp_path: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    disk = make_disk(tmp_path / "disk.raw", os.urandom(200_000))
    manifest = publish(archive, disk)
    with parent_of(archive, manifest, tmp_path / "work") as parent:
        assert parent.raw.read_bytes() == disk.read_bytes()
        assert (parent.digest, parent.name) == (manifest.digest, "tiny@1")
        assert parent.partitions == manifest.partitions
    assert not list((tmp_path / "work").iterdir())


def test_a_damaged_parent_is_refused(tmp_path: Path) -> None:
    archive = an_archive(tmp_path / "archive")
    manifest = publish(archive, make_disk(tmp_path / "disk.raw", os.urandom(200_000)))
    spoil(archive, chunk_name(next(iter(manifest.distinct_chunks))))
    with (
        pytest.raises(TrustError),
        parent_of(archive, manifest, tmp_path / "work"),
    ):
        pass
    assert not list((tmp_path / "work").iterdir())
