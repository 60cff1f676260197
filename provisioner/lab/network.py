"""The lab's network: one bridge, one port for each host, and a router that only says it is there.

Runs inside the lab's own network namespace; touches nothing outside it.
"""

import contextlib
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from provisioner.errors import ConfigError
from provisioner.lab.model import BRIDGE, BRIDGE_ADDRESS

PREFIX_LENGTH: Final = 24
# A bridge takes the lowest MAC of its ports, and so would change its own; this one stays.
BRIDGE_MAC: Final = "52:54:00:77:ff:01"
IP_LIMIT_S: Final = 10

# RFC 4861 §4.1 and §4.2.
ROUTER_SOLICITATION: Final = 133
ROUTER_ADVERTISEMENT: Final = 134
ALL_NODES: Final = "ff02::1"
ALL_ROUTERS: Final = "ff02::2"
HOP_LIMIT: Final = 255
ICMP6_FILTER: Final = 1  # linux/icmpv6.h


def set_up(taps: Sequence[str]) -> None:
    """Make the bridge with its address and one port for each tap. Raises ConfigError."""
    # A bridge that listens and learns for 15 s before it forwards costs each boot that time.
    lines = [
        "link set lo up",
        f"link add {BRIDGE} address {BRIDGE_MAC} type bridge forward_delay 0 stp_state 0",
        f"address add {BRIDGE_ADDRESS}/{PREFIX_LENGTH} dev {BRIDGE}",
    ]
    _ip(lines)
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6 has no such file
        Path(f"/proc/sys/net/ipv6/conf/{BRIDGE}/accept_dad").write_text("0")
    lines = [f"link set {BRIDGE} up"]
    for tap in taps:
        lines += [f"tuntap add dev {tap} mode tap", f"link set {tap} master {BRIDGE} up"]
    _ip(lines)


def set_port(tap: str, *, up: bool) -> None:
    """Let a host's frames through, or drop them all, as a pulled cable or a silent DHCP does."""
    _ip([f"link set {tap} {'up' if up else 'down'}"])


def _ip(lines: Sequence[str]) -> None:
    done = subprocess.run(
        ["ip", "-batch", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=IP_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError("the lab's network cannot be made", found=done.stderr.strip())


def open_router() -> socket.socket | None:
    """Return a socket that hears router solicitations on the bridge; None without IPv6."""
    try:
        router = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    except OSError:
        return None
    passed = bytearray(b"\xff" * 32)
    passed[ROUTER_SOLICITATION // 8] &= ~(1 << (ROUTER_SOLICITATION % 8)) & 0xFF
    router.setsockopt(socket.IPPROTO_ICMPV6, ICMP6_FILTER, bytes(passed))
    index = socket.if_nametoindex(BRIDGE)
    group = socket.inet_pton(socket.AF_INET6, ALL_ROUTERS) + struct.pack("@I", index)
    router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
    router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, HOP_LIMIT)
    router.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
    router.setblocking(False)
    return router


def answer_solicitation(router: socket.socket) -> None:
    """Answer one solicitation: a router is here, offers no prefix and no route, ask nobody else.

    iPXE waits for this word before it goes on with IPv4, and for 15 s when nobody says it.
    """
    with contextlib.suppress(OSError):
        router.recv(1500)
        advertisement = struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, 64, 0, 0, 0, 0)
        router.sendto(advertisement, (ALL_NODES, 0))
