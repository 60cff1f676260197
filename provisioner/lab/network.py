"""The lab's network: one bridge, one port for each host, and a router that only says it is there.

Runs inside the lab's own network namespace; touches nothing outside it.
"""

import contextlib
import ctypes
import fcntl
import os
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

# linux/if_tun.h and linux/if.h
TUN_DEVICE: Final = "/dev/net/tun"
TUNSETIFF: Final = 0x400454CA
TUNATTACHFILTER: Final = 0x401054D5
TUNDETACHFILTER: Final = 0x401054D6
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
# A classic BPF program (linux/filter.h): opcode, jump if true, jump if false, operand. It
# drops UDP to the ports of DHCP clients, 68 over IPv4 and 546 over IPv6, and passes the rest.
# A jump counts from the instruction behind it.
NO_DHCP: Final = (
    (0x28, 0, 0, 12),  # the Ethernet type
    (0x15, 0, 5, 0x0800),  # IPv4?
    (0x30, 0, 0, 23),  # its protocol
    (0x15, 0, 8, 17),  # UDP?
    (0xB1, 0, 0, 14),  # X = the length of its header
    (0x48, 0, 0, 16),  # the port it is for, behind X
    (0x15, 6, 5, 68),
    (0x15, 0, 4, 0x86DD),  # IPv6?
    (0x30, 0, 0, 20),  # its next header
    (0x15, 0, 2, 17),  # UDP?
    (0x28, 0, 0, 56),  # the port it is for
    (0x15, 1, 0, 546),
    (0x06, 0, 0, 0xFFFFFFFF),  # pass
    (0x06, 0, 0, 0),  # drop
)

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
    """Let a host's frames through, or drop them all, as a pulled cable does."""
    _ip([f"link set {tap} {'up' if up else 'down'}"])


def open_port(tap: str) -> int:
    """Return a handle of a host's port, for its QEMU. Raises ConfigError when it is in use."""
    handle = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH22x", tap.encode(), flags))
    except OSError as error:
        os.close(handle)
        raise ConfigError(f"the lab's port {tap} cannot be opened", found=str(error)) from error
    return handle


def silence_dhcp(handle: int, *, is_silent: bool) -> None:
    """Keep DHCP's answers from the host behind an open port, or let them through again."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in NO_DHCP))
    program = struct.pack("@HP", len(NO_DHCP), ctypes.addressof(code))
    fcntl.ioctl(handle, TUNATTACHFILTER if is_silent else TUNDETACHFILTER, program)


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
