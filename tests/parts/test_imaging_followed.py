"""Long programs are heard line by line, kept in bounds, and ended with all they started."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.imaging.followed import LINE_BYTES_MAX, BuildLog, follow
from provisioner.imaging.install_progress import InstallProgress
from provisioner.imaging.tools import SHOWN_LINES_MAX, ToolFailed
from tests.parts.busy_machine import in_one_of

LIMIT: Final = timedelta(seconds=60)
GONE_LIMIT_S: Final = 60


def said_by(code: str, limit: timedelta = LIMIT) -> list[str]:
    lines: list[str] = []
    follow([sys.executable, "-u", "-c", code], each_line=lines.append, limit=limit)
    return lines


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """Return whether a process is gone within a moment."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_output_and_errors_come_line_by_line_in_their_order() -> None:
    code = "import sys; print('one'); print('two', file=sys.stderr); print('three', end='')"
    assert said_by(code) == ["one", "two", "three"]


def test_lines_are_heard_while_the_program_works(tmp_path: Path) -> None:
    """It goes on when its first line was heard."""
    heard: list[str] = []
    code = (
        "import pathlib, sys, time\n"
        "print('now')\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\n"
        "print('later')\n"
    )

    def hear(line: str) -> None:
        heard.append(line)
        (tmp_path / "heard").touch()

    program = [sys.executable, "-u", "-c", code, str(tmp_path / "heard")]
    follow(program, each_line=hear, limit=LIMIT)
    assert heard == ["now", "later"]


def test_a_line_that_was_drawn_anew_counts_as_it_stood_last() -> None:
    assert said_by(r"print('5%\r50%\r100%\r'); print('\xff'.encode('latin-1'))")[0] == "100%"


def test_a_line_without_end_comes_in_pieces() -> None:
    lines = said_by(f"print('x' * {LINE_BYTES_MAX + 5})")
    assert [len(line) for line in lines] == [LINE_BYTES_MAX, 5]


def test_a_failure_carries_the_last_lines() -> None:
    with pytest.raises(ToolFailed, match="ended with code 3") as caught:
        said_by("import sys; [print(n) for n in range(100)]; sys.exit(3)")
    assert str(caught.value.found).splitlines() == [str(n) for n in range(100)][-SHOWN_LINES_MAX:]


def test_a_program_that_takes_too_long_may_tidy_up_and_leaves_no_child(tmp_path: Path) -> None:
    tidied, child = tmp_path / "tidied", tmp_path / "child"
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "def tidy(*_): pathlib.Path(sys.argv[1]).touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, tidy)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "pathlib.Path(sys.argv[2]).write_text(str(child.pid))\n"
        "print('waiting', flush=True)\n"
        "time.sleep(600)\n"
    )
    limits = iter((2, 8, 32))

    def attempt() -> None:
        with pytest.raises(ToolFailed, match="took too long") as caught:
            follow(
                [sys.executable, "-c", code, str(tidied), str(child)],
                each_line=lambda _: None,
                limit=timedelta(seconds=next(limits)),
            )
        assert caught.value.found == "waiting"
        assert tidied.exists()
        assert ends(int(child.read_text()))

    in_one_of(attempt, tries=3)  # on a busy machine it had not begun to wait by then


def test_who_stops_listening_ends_the_program() -> None:
    started: list[int] = []

    def refuse(line: str) -> None:
        started.append(int(line))
        raise KeyboardInterrupt

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        follow([sys.executable, "-c", code], each_line=refuse, limit=LIMIT)
    assert ends(started[0])
    assert started[0] != os.getpid()


def test_a_log_keeps_everything_up_to_its_limit() -> None:
    log = BuildLog(100)
    for number in range(10):
        log.add(f"line {number}")
    assert log.text() == "".join(f"line {number}\n" for number in range(10))


def test_a_long_log_keeps_its_two_ends_and_says_what_is_missing() -> None:
    log = BuildLog(1000)
    for number in range(10_000):
        log.add(f"line {number}")
    lines = log.text().splitlines()
    assert lines[0] == "line 0"
    assert lines[-1] == "line 9999"
    kept = [line for line in lines if line.startswith("line ")]
    assert f"... {10_000 - len(kept)} lines are left out here ..." in lines
    assert len(log.text()) < 1100


def test_a_line_longer_than_the_log_is_left_out() -> None:
    log = BuildLog(100)
    log.add("x" * 1000)
    log.add("y")
    assert log.text() == "... 1 lines are left out here ...\ny\n"


# What a build prints, with most of it left out.
PRINTED: Final = """\
I: automatically chosen mode: root
I: running apt-get update...
Get:1 http://mirror.test/debian bookworm InRelease [151 kB]
I: downloading packages with apt...
I: extracting archives...
I: installing essential packages...
0 upgraded, 69 newly installed, 0 to remove and 0 not upgraded.
Setting up gcc-12-base:amd64 (12.2.0-14) ...
I: installing remaining packages inside the chroot...
0 upgraded, 155 newly installed, 0 to remove and 0 not upgraded.
{set_up}
update-initramfs: Generating /boot/initrd.img-6.1.0-56-cloud-amd64
I: running --customize-hook in shell: sh -c 'echo "running the script tune"; ...'
running the script tune
I: creating tarball...
"""


def test_a_person_hears_of_each_stage_and_of_every_fiftieth_package() -> None:
    set_up = "\n".join(f"Setting up package-{n} (1.{n}) ..." for n in range(155))
    progress = InstallProgress()
    news = [progress.news(line) for line in PRINTED.format(set_up=set_up).splitlines()]
    assert [line for line in news if line] == [
        "fetching the lists of packages",
        "fetching the essential packages",
        "unpacking the essential packages",
        "setting up the essential packages",
        "fetching the other packages",
        "setting up packages: 50 of 155",
        "setting up packages: 100 of 155",
        "setting up packages: 150 of 155",
        "making the initramfs",
        "running the script tune",
        "packing the base tree",
    ]
