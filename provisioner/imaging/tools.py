"""Run the programs that make images, each with a time limit and an error one can act on."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Final

from provisioner.errors import ConfigError, DeviceError

TOOL_LIMIT: Final = timedelta(minutes=10)
# Enough for an error and what led to it; not for a whole package installation.
SHOWN_LINES_MAX: Final = 20

PACKAGE_OF: Final = {
    "mmdebstrap": "mmdebstrap",
    "sfdisk": "fdisk",
    "mkfs.fat": "dosfstools",
    "mcopy": "mtools",
    "mmd": "mtools",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "grub-mkimage": "grub-common",
    "qemu-img": "qemu-utils",
    "setpriv": "util-linux",
    "tar": "tar",
    "unshare": "util-linux",
    "newuidmap": "uidmap",
    "zstd": "zstd",
}
# Debian keeps some of them where an ordinary user's PATH does not look.
_SEARCH: Final = os.pathsep.join((os.defpath, "/usr/local/sbin", "/usr/sbin", "/sbin"))


class ToolFailed(DeviceError):
    """A program that makes images ended with an error; its last lines are in `found`."""

    code = "tool_failed"


def find_tool(name: str) -> str:
    """Return the program's path. Raises ConfigError that names the package to install."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + _SEARCH)
    if path is None:
        package = PACKAGE_OF.get(name, name)
        raise ConfigError(f"the program {name} is not installed", hint=f"apt-get install {package}")
    return path


def run(
    command: Sequence[str],
    *,
    stdin: bytes = b"",
    limit: timedelta = TOOL_LIMIT,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program to its end and return its standard output.

    environment is added to a small fixed one, so that a build does not depend on
    the caller's. Raises ToolFailed when it fails or takes longer than limit; it
    is then dead, with everything it started.
    """
    arguments = [find_tool(command[0]), *command[1:]]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=tool_environment(environment or {}),
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(stdin, timeout=limit.total_seconds())
        except subprocess.TimeoutExpired as error:
            raise ToolFailed(
                f"{command[0]} took too long and was stopped", expected=f"at most {limit}"
            ) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    if process.returncode:
        lines = err.decode("utf-8", "replace").strip().splitlines()[-SHOWN_LINES_MAX:]
        raise ToolFailed(
            f"{command[0]} ended with code {process.returncode}", found="\n".join(lines)
        )
    return out


def output_of(command: Sequence[str], *, bytes_max: int, limit: timedelta) -> bytes:
    """Return what a program prints, for programs that read what strangers made.

    Raises ToolFailed as soon as it prints more than bytes_max or takes longer than
    limit. Its exit code and messages do not count.
    """
    arguments = [find_tool(command[0]), *command[1:]]
    with subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=tool_environment({}),
    ) as process:
        assert process.stdout is not None
        stopping = threading.Timer(limit.total_seconds(), process.kill)
        stopping.start()
        try:
            data = process.stdout.read(bytes_max + 1)
        finally:
            stopping.cancel()
            process.kill()
    if len(data) > bytes_max:
        raise ToolFailed(f"{command[0]} printed too much", expected=f"at most {bytes_max} bytes")
    return data


def as_root_of_a_namespace(command: Sequence[str]) -> list[str]:
    """Return the command as it must be run to own files of many users.

    For root that is the command itself. Others get a user namespace in which they
    are root, with the subordinate ids of /etc/subuid as everybody else.
    """
    if os.geteuid() == 0:
        return list(command)
    find_tool("newuidmap")
    return ["unshare", "--user", "--map-root-user", "--map-auto", "--", *command]


def tool_environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return the small fixed environment that programs run in, and what is added to it."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    kept["PATH"] = kept.get("PATH", "") + os.pathsep + _SEARCH
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    return {**kept, **proxies, "LC_ALL": "C.UTF-8", "TZ": "UTC", **added}
