"""Answers IPv6 router solicitations with an advertisement that offers nothing.

iPXE waits some 13 seconds for one on a network without IPv6. The answer holds no prefix
and a router lifetime of zero, so nobody gets an address or a route from it (RFC 4861 §4.2).
dnsmasq advertises only on an interface that has more than its link-local address.
"""

import os
import select
import socket
import struct
import time
from typing import Final

import structlog

from provisioner.errors import ConfigError

ANSWERS_PER_S_MAX: Final = 100

_SOLICITATION: Final = 133
_ALL_ROUTERS: Final = "ff02::2"
_ALL_HOSTS: Final = "ff02::1"
# Type, code, checksum (the kernel's), hop limit and flags unset, lifetime 0, timers unset.
_ADVERTISEMENT: Final = struct.pack("!BBHBBHII", 134, 0, 0, 0, 0, 0, 0, 0)
# Either side must drop packets that could have come through a router (RFC 4861 §6.1).
_HOPS: Final = 255

log = structlog.get_logger(__name__)


class RouterAdvertiser:
    """Answers on one interface until `stop`."""

    def __init__(self, interface: str) -> None:
        """Raises ConfigError when the interface is missing or raw sockets are forbidden."""
        try:
            index = socket.if_nametoindex(interface)
            self._socket = _icmp_socket(interface, index)
        except OSError as error:
            raise ConfigError(
                f"cannot answer router solicitations on {interface}: {error.strerror}",
                hint="is the interface there, and has the service CAP_NET_RAW?",
            ) from error
        self._to = (_ALL_HOSTS, 0, 0, index)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def stop(self) -> None:
        """Make `run` return. Fit for any thread and signal handler."""
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        second, answers = 0, 0
        try:
            while self._wake not in select.select([self._socket.fileno(), self._wake], [], [])[0]:
                packet, _ = self._socket.recvfrom(1500)
                now = int(time.monotonic())
                second, answers = (now, answers if now == second else 0)
                if packet[:1] == bytes([_SOLICITATION]) and answers < ANSWERS_PER_S_MAX:
                    answers += 1
                    self._answer()
        finally:
            self._socket.close()
            os.close(self._wake)

    def _answer(self) -> None:
        try:
            self._socket.sendto(_ADVERTISEMENT, self._to)
        except OSError as error:  # the interface went down; the client asks again
            log.warning("router advertisement not sent", error=str(error))


def _icmp_socket(interface: str, index: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
        group = socket.inet_pton(socket.AF_INET6, _ALL_ROUTERS) + struct.pack("@I", index)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, _HOPS)
    except OSError:
        sock.close()
        raise
    return sock
