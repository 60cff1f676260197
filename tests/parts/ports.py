"""Ports of the loopback for programs that have to be told theirs before they listen.

The operating system hands out none of them: a port that it had free a moment ago may be
another test's by the time that the program is there. Each process of tests has a share of its
own, whoever else runs tests beside it.
"""

import contextlib
import itertools
import socket
from collections.abc import Iterator
from functools import cache
from typing import Final

# Below those that Linux gives to whoever names none, /proc/sys/net/ipv4/ip_local_port_range.
FIRST: Final = 20_000
SHARES: Final = 60
SHARE: Final = 200


def free_ports(count: int) -> list[int]:
    """Return ports, for TCP and for UDP, that nobody has and no other test will get."""
    ports, _ = _share()
    return list(itertools.islice(filter(_is_free, ports), count))


@cache
def _share() -> tuple[Iterator[int], socket.socket]:
    """Return this process's ports, round and round, and what makes them its own: a name that
    the kernel gives to one process at a time, and takes back when that ends."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for number in range(SHARES):
        with contextlib.suppress(OSError):
            claim.bind(f"\0provisioner tests, ports {number}")
            first = FIRST + number * SHARE
            return itertools.cycle(range(first, first + SHARE)), claim
    raise RuntimeError(f"{SHARES} processes have ports for tests already")


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
