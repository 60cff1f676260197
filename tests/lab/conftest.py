"""A rack of real virtual hosts for the tests of this folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.lab import Lab, LabHost


@pytest.fixture
def lab_directory(tmp_path: Path) -> Iterator[Path]:
    """A place for a lab, which is taken down afterwards whatever became of it."""
    directory = tmp_path / "lab"
    yield directory
    if (directory / "lab.json").exists():
        Lab.open(directory).down()


@pytest.fixture(scope="module")
def lab_rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A BIOS host lab-1 and a UEFI host lab-2, both off, shared by the tests of a module."""
    directory = tmp_path_factory.mktemp("rack") / "lab"
    with Lab.up(directory, [LabHost("bios"), LabHost("uefi")]) as rack:
        yield rack
    shutil.rmtree(directory)
