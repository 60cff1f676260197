"""One exchange at a time per BMC, across all threads and processes of this machine.

A lock is a file that is locked while its BMC is spoken to; the kernel frees it when its
holder dies. The files are empty and are never removed: removing one would race with its users.
"""

import contextlib
import fcntl
import ipaddress
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.errors import BmcBusy, BmcUnreachable, RequestError

# An exchange takes about 10 ms on a quick BMC; asking every 5 ms wastes little of it.
POLL_SECONDS: Final = 0.005


def lock_name(address: str, port: int) -> str:
    """Return the file name for one BMC, the same for every way to write its address.

    Raises RequestError when `address` is not an IP address.
    """
    try:
        canonical = ipaddress.ip_address(address)
    except ValueError as error:
        raise RequestError(
            "a BMC is named by its IP address", expected="an IP address", found=address
        ) from error
    return f"{canonical}-{port}.lock"


@contextlib.contextmanager
def bmc_lock(lock_dir: Path, address: str, port: int, wait: timedelta) -> Iterator[None]:
    """Hold the lock of one BMC. Raises BmcBusy when others held it all of `wait`, and
    BmcUnreachable when its file does not open."""
    path = lock_dir / lock_name(address, port)
    deadline = time.monotonic() + wait.total_seconds()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise BmcUnreachable(
            f"the lock of BMC {address} cannot be taken",
            expected=f"the file {path} opened",
            found=error.strerror,
            hint="look at the disk, and at the rights of the service's data_dir",
        ) from error
    try:
        while not _took(descriptor):
            if time.monotonic() >= deadline:
                raise BmcBusy(
                    f"BMC {address} was busy with other exchanges all the time",
                    expected=f"free within {wait.total_seconds():g} s",
                    hint="another process may hold its lock; see the lock directory",
                )
            time.sleep(POLL_SECONDS)
        # Unlocked by name, not by closing: a process that is being started just now may hold
        # a copy of the descriptor for a moment.
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _took(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
