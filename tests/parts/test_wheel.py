"""An installed provisioner needs no checkout: the wheel carries all that is not Python, too."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
BUILD_LIMIT_S: Final = 600
NEEDED: Final = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS: Final = ("provisioner", "templates", "images", "systemd")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    out = copy / "wheel"
    build = "from setuptools import build_meta as b; import sys; b.build_wheel(sys.argv[1])"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", build, str(out)],
        cwd=copy,
        check=True,
        capture_output=True,
        timeout=BUILD_LIMIT_S,
    )
    (made,) = out.glob("*.whl")
    return made


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    def kept(folder: str, below: str) -> set[str]:
        paths = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        names = (str(path.relative_to(ROOT / folder)) for path in paths)
        return {f"{below}/{name}" for name in names if "__pycache__" not in name}

    expected = kept("provisioner", "provisioner")
    for folder in ("templates", "images", "systemd"):
        expected |= kept(folder, f"provisioner/{folder}")
    assert files_of(wheel) == expected


def test_what_was_installed_finds_its_templates_and_recipes(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import pathlib, sys, provisioner\n"
        "assert provisioner.__file__.startswith(sys.argv[1]), provisioner.__file__\n"
        "from provisioner.core.bootplan import LocalDisk\n"
        "from provisioner.core.model import LocalBoot\n"
        "from provisioner.imaging.recipe import find_recipe\n"
        "from provisioner.netboot.quoting import _template_root\n"
        "assert str(_template_root()).startswith(sys.argv[1])\n"
        "assert str(find_recipe('debian-12')).startswith(sys.argv[1])\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=BUILD_LIMIT_S,
    )
