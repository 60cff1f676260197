"""Run a program that reads what strangers made, where it can do nothing but read it.

The program has namespaces of its own (files, network, processes, shared memory), no
privilege and no way to one, and limits on memory, time and output. It sees the system's
programs, the one file it shall read and the one it may write. Needs only util-linux.

It is the second line of defence: what can be judged without such a program is judged first.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Final

from provisioner.errors import ConfigError, RequestError
from provisioner.imaging.tools import SHOWN_LINES_MAX, ToolFailed, find_tool

SOURCE: Final = "/in"
TARGET: Final = "/out"

FILES_OPEN_MAX: Final = 64
# qemu-img was seen with 15 threads. Threads count, and as root so do those of whatever
# else runs as the same user.
PROCESSES_MAX: Final = 64
MESSAGE_BYTES_MAX: Final = 64 * 1024
_READ_BYTES: Final = 64 * 1024

# Who reads strangers' files when we are root: "nobody" wherever Linux runs.
NOBODY: Final = 65534

_NAMESPACES: Final = ("--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child")
_NO_PRIVILEGE: Final = ("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")
_PROGRAM_FAILED: Final = 111
_FILE_REPLACED: Final = 112
_ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    # Each further arena takes 128 MiB of address space, which is what we limit.
    "MALLOC_ARENA_MAX": "2",
}

# Runs with the right to mount, in namespaces of its own. /sys is there on every system and
# nothing below it is needed, so it is where the new root is put together: nothing has to be
# made or removed outside. The files are mounted by name, since a descriptor opened outside
# cannot be, and compared with the descriptor. umount cannot work without /proc, so that is
# the last to go. The shell stays: as process 1 of its namespace the program would be spared
# signals, such as those of its limits.
_SETUP: Final = r"""
set -eu
root=/sys
source=$1 source_id=$2 target=$3 target_id=$4
shift 4
place() {
    : > "$root/$2"
    mount --bind "$1" "$root/$2"
    mount -o "remount,bind,nosuid,nodev,noexec,$4" "$root/$2"
    [ "$(stat -c %d:%i "$root/$2")" = "$3" ] || exit 112
}
mount -t tmpfs -o size=64k,mode=755,nosuid,nodev none $root
for name in usr bin sbin lib lib32 lib64; do
    if [ -L /$name ]; then
        ln -s "$(readlink /$name)" $root/$name
    elif [ -d /$name ]; then
        mkdir $root/$name
        mount --rbind /$name $root/$name
        mount -o remount,bind,ro,nosuid,nodev $root/$name
    fi
done
mkdir $root/dev $root/proc $root/old
: > $root/dev/null
mount --bind /dev/null $root/dev/null
place "$source" in "$source_id" ro
[ -z "$target" ] || place "$target" out "$target_id" rw
mount --rbind /proc $root/proc
mount -o remount,bind,ro,nosuid,nodev $root
cd $root
pivot_root . old
umount -l /old
umount -l /proc
"$@" || { echo "ended with code $?" >&2; exit 111; }
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use. memory_bytes is the address space of each of its processes."""

    time: timedelta
    cpu_time: timedelta
    memory_bytes: int
    written_bytes: int
    printed_bytes: int


def run_in_sandbox(
    command: Sequence[str],
    *,
    source: BinaryIO,
    target: BinaryIO | None = None,
    limits: Limits,
) -> bytes:
    """Run a program to its end and return its standard output.

    It finds source, a regular file, read-only as SOURCE, and target, whose content it
    may change, as TARGET. Both must still stand under the name they were opened by.

    Raises ToolFailed when the program fails or meets a limit; it is then dead, with
    everything it started. Raises RequestError for a file that was replaced meanwhile, or
    that not everybody may read when we are root; ConfigError where this machine gives no
    such sandbox.
    """
    program = _program(command[0])
    _require_readable(source)
    arguments = [
        *(find_tool("setpriv"), "--pdeathsig", "KILL", find_tool("unshare"), *_namespaces()),
        *("sh", "-c", _SETUP, "sandbox", *_place(source), *_place(target)),
        *("setpriv", *_credentials(), "prlimit", *_limits(limits), "--", program, *command[1:]),
    ]
    with _writable(target):
        code, out, said = _run(command[0], arguments, limits)
    lines = "\n".join(said.decode("utf-8", "replace").strip().splitlines()[-SHOWN_LINES_MAX:])
    if code == _PROGRAM_FAILED:
        raise ToolFailed(f"{command[0]} failed in its sandbox", found=lines)
    if code == _FILE_REPLACED:
        raise RequestError(f"{source.name} was replaced while it was read")
    if code:
        raise ConfigError(
            "this machine gives no sandbox to read strangers' files in",
            expected="namespaces of mounts, network and processes",
            found=lines or f"code {code}",
            hint="run it as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone"
            ", user.max_user_namespaces)",
        )
    return out


def _program(name: str) -> str:
    """Return the program's path; only what the system installed is there in the sandbox."""
    path = find_tool(name)
    if not Path(path).resolve().is_relative_to("/usr"):
        raise ConfigError(
            f"the program {name} cannot be run in a sandbox", expected="below /usr", found=path
        )
    return path


def _namespaces() -> tuple[str, ...]:
    if os.geteuid() == 0:
        return _NAMESPACES
    return ("--user", "--map-root-user", *_NAMESPACES)


def _credentials() -> tuple[str, ...]:
    """Return what takes every privilege; without root there is no other user to become."""
    if os.geteuid():
        return _NO_PRIVILEGE
    return (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *_NO_PRIVILEGE)


def _limits(limits: Limits) -> tuple[str, ...]:
    return (
        f"--as={limits.memory_bytes}",
        f"--cpu={max(1, round(limits.cpu_time.total_seconds()))}",
        f"--fsize={limits.written_bytes}",
        f"--nofile={FILES_OPEN_MAX}",
        f"--nproc={PROCESSES_MAX}",
        "--core=0",
    )


def _place(file: BinaryIO | None) -> tuple[str, str]:
    """Return a file's absolute name and what it is, as stat prints it."""
    if file is None:
        return "", ""
    status = os.fstat(file.fileno())
    return str(Path(file.name).absolute()), f"{status.st_dev}:{status.st_ino}"


def _require_readable(source: BinaryIO) -> None:
    mode = os.fstat(source.fileno()).st_mode
    if not stat.S_ISREG(mode):
        raise RequestError(f"{source.name} is not a regular file")
    # The sandbox's user is another one only where we are root.
    if os.geteuid() == 0 and not mode & stat.S_IROTH:
        raise RequestError(
            f"{source.name} can be read by root, but not by the user that reads strangers' files",
            expected="a file that everybody may read",
            found=stat.filemode(mode),
            hint=f"chmod o+r {source.name}, or import it as its owner",
        )


@contextlib.contextmanager
def _writable(target: BinaryIO | None) -> Iterator[None]:
    """Give the file to the sandbox's user for as long as the program runs."""
    if target is None or os.geteuid():
        yield
        return
    os.fchown(target.fileno(), NOBODY, NOBODY)
    try:
        yield
    finally:
        os.fchown(target.fileno(), 0, 0)


def _run(name: str, arguments: Sequence[str], limits: Limits) -> tuple[int, bytes, bytes]:
    """Return exit code, output and messages; ToolFailed for too much of either, or of time."""
    with subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            out, said = _read_both(name, process, limits)
            process.wait()
        finally:
            # With unshare, the first process of the namespace dies, and so all of them.
            process.kill()
    return process.returncode, out, said


def _read_both(name: str, process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    ends_at = time.monotonic() + limits.time.total_seconds()
    read = {process.stdout: bytearray(), process.stderr: bytearray()}
    most = {process.stdout: limits.printed_bytes, process.stderr: MESSAGE_BYTES_MAX}
    with selectors.DefaultSelector() as waiting:
        for pipe in read:
            waiting.register(pipe, selectors.EVENT_READ, pipe)
        while waiting.get_map():
            ready = waiting.select(max(0.0, ends_at - time.monotonic()))
            if not ready:
                raise ToolFailed(
                    f"{name} took too long and was stopped", expected=f"at most {limits.time}"
                )
            for key, _ in ready:
                pipe = key.data
                data = os.read(pipe.fileno(), _READ_BYTES)
                read[pipe] += data
                if not data:
                    waiting.unregister(pipe)
                if len(read[pipe]) > most[pipe]:
                    raise ToolFailed(
                        f"{name} printed too much", expected=f"at most {most[pipe]} bytes"
                    )
    return bytes(read[process.stdout]), bytes(read[process.stderr])
