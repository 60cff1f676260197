"""`image test` boots a release on virtual hosts, keeps the result, and leaves nothing else."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest

from provisioner import wiring
from provisioner.core.model import ReleaseTest
from provisioner.imaging.blobs import FileBlobs
from provisioner.imaging.chunks import chunk_name
from provisioner.imaging.ramdisk import DEFAULT_KERNEL
from provisioner.imaging.recipe import find_recipe, load_recipe
from provisioner.lab import Lab
from provisioner.lab.site import Site, cache_directory
from provisioner.settings import load
from provisioner.setup import Plan, initialise
from tests.lab.conftest import OLDER
from tests.lab.sites import publish_tiny, until
from tests.lab.test_nothing_left import running_for

pytestmark = [pytest.mark.lab, pytest.mark.soak]
ROOT = Path(__file__).resolve().parents[2]
TRIAL_LIMIT_S = 1200.0


@pytest.fixture
def home(tmp_path: Path) -> Site:
    """A site that has an archive, and no rack."""
    folder = tmp_path / "home"
    initialise(folder, Plan())
    settings = load(folder / "provisioner.toml")
    wiring.prepare(settings)
    return Site(folder, cast(Lab, None), settings, cache_directory(), print, [])


def words_of(home: Site, *words: str) -> Sequence[str]:
    # Whatever runs the tests in the background lets its children ignore SIGINT.
    command = ("env", "--default-signal=INT", sys.executable, "-m", "provisioner", "image", "test")
    return (*command, *words, "--config", str(home.config))


@contextmanager
def trying(home: Site, *words: str) -> "Iterator[subprocess.Popen[str]]":
    """`image test` in a process group of its own, as a shell starts it."""
    with subprocess.Popen(
        words_of(home, *words),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def results(home: Site, release: str) -> Sequence[ReleaseTest]:
    service = wiring.build(home.settings)
    try:
        return service.releases.tests(release)
    finally:
        service.close()


def nothing_left(home: Site) -> bool:
    return not running_for(home.directory) and not list((home.directory / "trials").iterdir())


def test_a_healthy_release_passes_and_that_is_kept(home: Site) -> None:
    release = home.publish(OLDER)
    with trying(home, release.name, "--firmware", "bios") as process:
        said, told = process.communicate(timeout=TRIAL_LIMIT_S)
    assert process.returncode == 0, said + told
    assert "is healthy on bios" in told
    (kept,) = results(home, release.name)
    assert (kept.is_healthy, kept.firmware, kept.profile) == (True, ("bios",), "lab")
    assert kept.detail["hosts"]["bios"]["checks"]
    assert nothing_left(home)


def test_the_image_for_hardware_is_healthy_on_every_firmware(home: Site) -> None:
    """As it is shipped, with the kernel and the drivers for servers; other tests take the kernel
    for virtual hosts, which starts faster."""
    recipe = load_recipe(find_recipe("debian-12"))
    assert recipe.kernel == DEFAULT_KERNEL
    release = home.publish("1", recipe=recipe)
    with trying(home, release.name) as process:
        said, told = process.communicate(timeout=3 * TRIAL_LIMIT_S)
    assert process.returncode == 0, said + told
    kept = results(home, release.name)
    assert {one for result in kept for one in result.firmware} == {"bios", "uefi", "secure-boot"}
    assert all(result.is_healthy for result in kept)
    assert nothing_left(home)


def test_a_release_that_is_damaged_fails_and_that_is_kept(home: Site, tmp_path: Path) -> None:
    release = publish_tiny(home, tmp_path, "1")
    damaged = FileBlobs(home.directory).path(chunk_name(next(release.stored_chunks())[1]))
    damaged.write_bytes(b"not a chunk")
    with trying(home, release.name) as process:
        said, told = process.communicate(timeout=TRIAL_LIMIT_S)
    assert process.returncode == 4, said + told
    assert "the console of bios ends with" in told
    (kept,) = results(home, release.name)
    assert not kept.is_healthy
    assert kept.detail["hosts"]["bios"]["error"]["code"] == "chunk_corrupt"
    assert nothing_left(home)


def test_ctrl_c_takes_everything_down_and_keeps_no_result(home: Site, tmp_path: Path) -> None:
    release = publish_tiny(home, tmp_path, "1")
    with trying(home, release.name) as process:
        until(
            "the rack's host is switched on",
            lambda: any("qemu" in line for line in running_for(home.directory)),
            timedelta(minutes=5),
        )
        os.killpg(process.pid, signal.SIGINT)
        said, told = process.communicate(timeout=120)
    assert process.returncode == 130, said + told
    assert results(home, release.name) == []
    assert nothing_left(home)


def test_firmware_that_the_release_lacks_is_refused_before_anything_starts(
    home: Site, tmp_path: Path
) -> None:
    release = publish_tiny(home, tmp_path, "1")
    with trying(home, release.name, "--firmware", "uefi") as process:
        _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "does not boot on uefi" in told
    assert not (home.directory / "trials").exists()
