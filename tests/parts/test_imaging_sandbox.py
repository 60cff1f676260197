"""The sandbox: a hostile program in it finds nothing, reaches nobody, and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.errors import ConfigError, RequestError
from provisioner.imaging.sandbox import NOBODY, SOURCE, TARGET, Limits, run_in_sandbox
from provisioner.imaging.tools import ToolFailed

MIB = 1024 * 1024
ROOT = Path(__file__).parent.parent.parent
# Whoever this is: no user of the machine's own needs to exist.
USER = 61234
LIMITS = Limits(
    time=timedelta(seconds=120),
    cpu_time=timedelta(seconds=20),
    memory_bytes=256 * MIB,
    written_bytes=MIB,
    printed_bytes=64 * 1024,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"from a stranger")
    path.chmod(0o644)
    return path


def run(source: Path, *command: str, target: Path | None = None, **limits: object) -> bytes:
    """Run the command in a sandbox; limits are those of LIMITS that shall differ."""
    changed = dataclasses.replace(LIMITS, **limits)  # type: ignore[arg-type] # mixed values
    with contextlib.ExitStack() as opened:
        reads = opened.enter_context(source.open("rb"))
        writes = opened.enter_context(target.open("r+b")) if target else None
        return run_in_sandbox(command, source=reads, target=writes, limits=changed)


def shell(source: Path, script: str, target: Path | None = None, **limits: object) -> str:
    return run(source, "bash", "-c", script, target=target, **limits).decode()


def test_it_reads_the_one_file_and_writes_the_other(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    assert shell(source, f"tee {TARGET} < {SOURCE}", target) == "from a stranger"
    assert target.read_bytes() == b"from a stranger"
    assert target.stat().st_uid == os.geteuid()


def test_it_finds_no_other_file(source: Path, tmp_path: Path) -> None:
    """Neither what only root may read, nor what everybody may."""
    secret = tmp_path / "secret"
    secret.write_text("not handed over")
    secret.chmod(0o666)
    for path in (secret, "/etc/shadow", "/etc/passwd", "/proc/1/environ", "/dev/mem", ROOT):
        with pytest.raises(ToolFailed) as caught:
            run(source, "ls", str(path))
        assert "No such file" in str(caught.value.found)
    found = shell(source, "ls -A /; ls -A /dev /proc /old").split()
    assert set(found) <= {
        *("in", "usr", "bin", "sbin", "lib", "lib32", "lib64", "dev", "proc", "old", "null"),
        *("/dev:", "/proc:", "/old:"),
    }


@pytest.mark.parametrize("path", [SOURCE, "/new", "/usr/new", "/dev/new"])
def test_it_changes_nothing_but_its_target(source: Path, path: str) -> None:
    with pytest.raises(ToolFailed) as caught:
        shell(source, f"echo changed > {path}")
    assert "Read-only file system" in str(caught.value.found)
    assert source.read_bytes() == b"from a stranger"


def test_it_has_no_privilege_and_gets_none(source: Path) -> None:
    assert int(shell(source, "umask 0; id -u")) == (NOBODY if os.geteuid() == 0 else 0)
    for command in ("mount -t tmpfs none /usr", "chroot /usr /bin/true", "hostname other"):
        with pytest.raises(ToolFailed):
            shell(source, command)


def test_it_reaches_no_listener_of_this_machine(source: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        connect = f"echo hello > /dev/tcp/127.0.0.1/{port}"
        subprocess.run(["bash", "-c", connect], check=True)
        with pytest.raises(ToolFailed) as caught:
            shell(source, connect)
    assert "unreachable" in str(caught.value.found)


def test_it_sees_and_signals_no_other_process(source: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            with pytest.raises(ToolFailed, match="failed"):
                shell(source, f"kill -9 {other.pid} || kill -9 {os.getpid()}")
            assert other.poll() is None
        finally:
            other.kill()


def test_its_memory_ends(source: Path) -> None:
    command = ["dd", f"if={SOURCE}", "bs=200M", "count=1", "status=none"]
    assert run(source, *command) == b"from a stranger"
    with pytest.raises(ToolFailed) as caught:
        run(source, *command, memory_bytes=128 * MIB)
    assert "memory" in str(caught.value.found)


def test_what_it_writes_ends(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    with pytest.raises(ToolFailed):
        shell(source, f"yes > {TARGET}", target)
    assert target.stat().st_size == MIB


@pytest.mark.parametrize("stream", [1, 2])
def test_what_it_prints_ends(source: Path, stream: int) -> None:
    with pytest.raises(ToolFailed, match="printed too much"):
        shell(source, f"yes >&{stream}")


def test_its_processes_end(source: Path) -> None:
    with pytest.raises(ToolFailed) as caught:
        run(source, "sh", "-c", "for n in $(seq 200); do sleep 100 & done")
    assert "fork" in str(caught.value.found)


def processes_with(word: str) -> list[str]:
    """Return the names of the running processes that have the word among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
    return found


def mounts() -> list[str]:
    """Return what is mounted where a sandbox is put together; elsewhere others mount, too."""
    found = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in found if line.split()[1].startswith("/sys")]


@pytest.mark.parametrize(
    "script", ["sleep 60", "setsid sleep 60 & exec sleep 60", "trap '' TERM; sleep 60"]
)
def test_its_time_ends_and_nothing_is_left_behind(source: Path, script: str) -> None:
    word = secrets.token_hex(8)
    before = mounts()
    with pytest.raises(ToolFailed, match="took too long"):
        shell(source, f": {word}; {script}", time=timedelta(seconds=1))
    waits_until = time.monotonic() + 60
    while processes_with(word) and time.monotonic() < waits_until:
        time.sleep(0.02)
    assert not processes_with(word)
    assert mounts() == before
    assert list(source.parent.iterdir()) == [source]


def test_its_computing_time_ends(source: Path) -> None:
    with pytest.raises(ToolFailed, match="failed") as caught:
        shell(source, "while :; do :; done", cpu_time=timedelta(seconds=1))
    assert "ended with code" in str(caught.value.found)


STARTER = """
import json, sys
from contextlib import ExitStack
from datetime import timedelta
from provisioner.imaging.sandbox import Limits, run_in_sandbox
limits = Limits(timedelta(seconds=120), timedelta(seconds=20), 1 << 29, 1 << 24, 1 << 16)
source, target, command = sys.argv[1:]
with ExitStack() as opened:
    reads = opened.enter_context(open(source, "rb"))
    writes = opened.enter_context(open(target, "r+b")) if target else None
    out = run_in_sandbox(json.loads(command), source=reads, target=writes, limits=limits)
print(out.decode(), end="")
"""


def starter(
    source: Path, target: Path | None, *command: str, prefix: Sequence[str] = (sys.executable,)
) -> subprocess.Popen[str]:
    """Run the command in a sandbox of another process, whose own command begins with prefix."""
    arguments = [*prefix, "-B", "-c", STARTER, str(source), str(target or ""), json.dumps(command)]
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_it_dies_with_the_process_that_started_it(source: Path, tmp_path: Path) -> None:
    word = secrets.token_hex(8)
    target = tmp_path / "target"
    target.touch()
    script = f": {word}; echo up > {TARGET}; sleep 600; :"
    with starter(source, target, "bash", "-c", script) as process:
        waits_until = time.monotonic() + 60
        while not target.stat().st_size and time.monotonic() < waits_until:
            time.sleep(0.02)
        found = processes_with(word)
        process.kill()
    assert len(found) >= 4, "the one that starts it, unshare, the shell that mounts, bash"
    waits_until = time.monotonic() + 60
    while processes_with(word) and time.monotonic() < waits_until:
        time.sleep(0.02)
    assert not processes_with(word)


@pytest.fixture
def place_of_an_ordinary_user() -> Iterator[Path]:
    """A folder that belongs to a user without privilege, with the code that he may read."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for part in ("__init__.py", "errors.py", "imaging/__init__.py"):
            (place / "provisioner" / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "provisioner" / part, place / "provisioner" / part)
        for part in ("sandbox.py", "tools.py"):
            shutil.copy(ROOT / "provisioner/imaging" / part, place / "provisioner/imaging" / part)
        if os.geteuid() == 0:
            for path in (place, *place.rglob("*")):
                os.chown(path, USER, USER)
        yield place


def test_an_ordinary_user_has_the_same_sandbox(place_of_an_ordinary_user: Path) -> None:
    """Here with qemu-img, as in an import."""
    place = place_of_an_ordinary_user
    source, target, qcow2 = place / "source.raw", place / "target.raw", place / "source.qcow2"
    source.write_bytes(secrets.token_bytes(MIB))
    subprocess.run(
        ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(source), str(qcow2)],
        check=True,
    )
    target.touch()
    qcow2.chmod(0o600)
    prefix = ["/usr/bin/python3"]
    if os.geteuid() == 0:
        prefix = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *prefix]
        for path in (target, qcow2):
            os.chown(path, USER, USER)
    target.write_bytes(bytes(MIB))
    script = f"""
        ! cat /etc/shadow {source}; ! echo changed > {SOURCE}; ! mount -t tmpfs none /usr
        ! echo > /dev/tcp/127.0.0.1/22; ! kill -9 {os.getpid()}
        exec qemu-img convert -n -f qcow2 -O raw {SOURCE} {TARGET}
    """
    with starter(qcow2, target, "bash", "-ec", script, prefix=prefix) as process:
        _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert target.read_bytes() == source.read_bytes()


def test_a_machine_without_namespaces_says_so(source: Path) -> None:
    without = 'echo 0 > /proc/sys/user/max_mnt_namespaces; exec "$@"'
    prefix = ("unshare", "--user", "--map-root-user", "sh", "-c", without, "sh", sys.executable)
    with starter(source, None, "true", prefix=prefix) as process:
        _, said = process.communicate(timeout=180)
    assert process.returncode
    assert "this machine gives no sandbox" in said


def test_a_program_that_the_system_did_not_install_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy("/usr/bin/cat", folder / "cat")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    with pytest.raises(ConfigError, match="cannot be run in a sandbox"):
        run(source, "cat", SOURCE)


def test_a_file_that_was_replaced_is_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"of somebody else")
    with source.open("rb") as opened:
        other.rename(source)
        with pytest.raises(RequestError, match="replaced"):
            run_in_sandbox(["cat", SOURCE], source=opened, limits=LIMITS)


def test_a_pipe_is_refused() -> None:
    reads, writes = os.pipe()
    os.close(writes)
    with open(reads, "rb") as source, pytest.raises(RequestError, match="regular file"):
        run_in_sandbox(["cat", SOURCE], source=source, limits=LIMITS)


@pytest.mark.skipif(os.geteuid() != 0, reason="others read their files as themselves")
def test_a_file_that_only_root_may_read_is_refused_for_root(source: Path) -> None:
    source.chmod(0o640)
    with pytest.raises(RequestError, match="can be read by root") as caught:
        run(source, "cat", SOURCE)
    assert "chmod o+r" in str(caught.value.hint)
