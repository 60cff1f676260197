"""What a killed build or import leaves is cleared by the next, and one that goes on is let be."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest

from provisioner.imaging.build import space_bytes
from provisioner.imaging.importer import imported_image
from provisioner.imaging.recipe import find_recipe, load_recipe
from provisioner.imaging.scratch import clear_leftovers, scratch_folder
from provisioner.setup import Plan, initialise
from tests.parts.test_cli_image import Image, make_raw
from tests.parts.test_imaging_importer import make_image, release, request

WAIT_LIMIT_S: Final = 180
RECIPE: Final = """\
format: 1
image: tiny
architecture: amd64
size: 1GiB
firmware: [bios]
kernel: linux-image-amd64
kernel_arguments: []
mirrors: [{{suite: bookworm, components: [main], uri: "http://127.0.0.1:{port}/debian"}}]
packages: []
"""
# Works in a folder, makes files that no user but root may enter, and does not come to an end.
WORKS_ON: Final = """\
import sys, time
from pathlib import Path
from provisioner.imaging.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "closed").mkdir(mode=0o700)
    (folder / "closed" / "disk.raw").write_bytes(bytes(1024))
    print(folder, flush=True)
    time.sleep(600)
"""
FILLS: Final = """\
import sys
from pathlib import Path
from provisioner.errors import Unavailable
from provisioner.imaging.scratch import scratch_folder, told_when_full
from provisioner.imaging.tools import run
place = Path(sys.argv[1])
def write(folder):
    (folder / "disk.raw").write_bytes(bytes(2 * 1024 * 1024))
def let_a_program_write(folder):
    run(["dd", "if=/dev/zero", f"of={folder / 'disk.raw'}", "bs=1M", "count=2"])
for fill in (write, let_a_program_write):
    try:
        with scratch_folder(place, "build") as folder, told_when_full(place):
            fill(folder)
    except Unavailable as error:
        print(error.message, "--cache" in error.hint, len(list(place.iterdir())))
"""


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a program that runs meanwhile."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def working(place: Path, purpose: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Yield a process that works in a folder of its own in place, and the folder."""
    with started("-c", WORKS_ON, str(place), purpose) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + WAIT_LIMIT_S
    while not is_so():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_folder_is_there_meanwhile_and_goes_with_all_in_it(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "images"
    with scratch_folder(place, "tree", mode=0o755) as folder:
        assert folder.stat().st_mode & 0o777 == 0o755
        (folder / "disk.raw").write_bytes(b"x")
        clear_leftovers(place)
        assert (folder / "disk.raw").exists()
    assert not list(place.iterdir())


def test_what_a_killed_process_left_goes_and_what_goes_on_stays(tmp_path: Path) -> None:
    with working(tmp_path, "build") as (first, killed), working(tmp_path, "parent") as (_, live):
        (tmp_path / "provisioner-work-of-mine.txt").write_text("a file, and no folder of ours")
        first.kill()
        first.wait()
        assert (killed / "closed" / "disk.raw").exists()
        with scratch_folder(tmp_path, "import") as own:
            assert not killed.exists()
            assert (live / "closed" / "disk.raw").exists()
            assert own.is_dir()
    assert (tmp_path / "provisioner-work-of-mine.txt").exists()


def test_what_a_killed_import_left_goes_with_the_next_of_any_format(tmp_path: Path) -> None:
    place = tmp_path / "images"
    with working(place, "import") as (process, killed):
        process.kill()
        process.wait()
        assert (killed / "closed" / "disk.raw").exists()
    disk = make_image(tmp_path / "disk.raw", release())
    with imported_image(request(disk), work=place, now=datetime.now(UTC)):
        assert not list(place.iterdir())


def test_an_export_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    image = Image(tmp_path / "site")
    image.publish(make_raw(tmp_path / "disk.raw", b"one"), "1")
    # A chunk that never comes, so that the export does not come to its end.
    chunk = next(path for path in (tmp_path / "site" / "chunks").rglob("*") if path.is_file())
    chunk.unlink()
    os.mkfifo(chunk)
    out = tmp_path / "out"
    out.mkdir()
    command = ["-m", "provisioner", "image", "export", "tiny@1", str(out / "file")]
    with started(*command, "--config", str(image.config)) as process:
        wait_until(lambda: any(out.iterdir()), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_LIMIT_S) == 143
    assert not list(out.iterdir())


@pytest.fixture
def silent_mirror() -> Iterator[int]:
    """Yield the port of a mirror that takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


def test_a_build_that_is_killed_is_cleared_by_the_next_and_one_that_is_ended_clears_up(
    tmp_path: Path, silent_mirror: int
) -> None:
    initialise(tmp_path / "site", Plan())
    recipe = tmp_path / "tiny"
    recipe.mkdir()
    (recipe / "recipe.yaml").write_text(RECIPE.format(port=silent_mirror))
    cache = tmp_path / "cache"
    command = ["-m", "provisioner", "image", "build", str(recipe), "--version", "1"]
    command += ["--config", str(tmp_path / "site" / "provisioner.toml"), "--cache", str(cache)]

    def folders() -> set[Path]:
        return set((cache / "images").glob("provisioner-work-build-*"))

    with started(*command) as first:
        wait_until(lambda: len(folders()) == 1, first)
        left = folders()
        first.kill()
        first.wait()
    assert folders() == left
    with started(*command) as second:
        wait_until(lambda: bool(folders() - left), second)
        live = folders()
        assert not live & left
        with started(*command) as third:
            wait_until(lambda: len(folders()) == 2, third)
            assert live < folders()
            for process in (second, third):
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_LIMIT_S) == 143
    assert not list((cache / "images").iterdir())


def test_a_full_disk_is_told_with_what_to_do_and_left_empty(tmp_path: Path) -> None:
    shell = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*apart, "sh", "-c", shell, "-", str(tmp_path), sys.executable, FILLS],
        capture_output=True,
        text=True,
        timeout=WAIT_LIMIT_S,
        check=False,
    )
    line = f"the disk filled up while an image was made in {tmp_path} True 0\n"
    assert done.stdout == 2 * line, done.stderr


@pytest.mark.parametrize(("size_gib", "needed_gib"), [(1, 4), (8, 4), (64, 32)])
def test_a_large_disk_needs_more_space_to_begin(size_gib: int, needed_gib: int) -> None:
    recipe = replace(load_recipe(find_recipe("debian-12")), size_bytes=size_gib * 1024**3)
    assert space_bytes(recipe) == needed_gib * 1024**3
