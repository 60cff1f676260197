"""What many hosts, and many servers, make of DHCP: a rack that is switched on at once gets its
addresses soon, and a host that took another server's offer is noticed."""

import json
import select
import socket
import struct
import subprocess
import sys
import time
from typing import Final

from provisioner.netboot.dhcp import DhcpMode
from provisioner.netboot.dnsmasq import DhcpClient, DhcpEvent
from provisioner.netboot.network_lines import dhcp_line

from .netboot_network import BIOS, Running, discover, network, our_dhcp, packet_of
from .processes import until
from .stores import NOW

# The range of the test's network holds 101 addresses.
HOSTS: Final = 90
DISCOVER, REQUEST = 1, 3
OFFER, ACK = 2, 5
RESEND_S: Final = 1.0
# A boot ROM asks four times within a minute, and then gives up (PXE 2.1, 2.2.1.1).
PATIENCE_S: Final = 60.0

_PROGRAM: Final = """
import sys
from tests.parts.test_dhcp_many import a_rack_asks
a_rack_asks(int(sys.argv[1]))
"""


_TAKES_ANOTHERS: Final = """
from tests.parts.test_dhcp_many import takes_the_offer_of_another
takes_the_offer_of_another()
"""


def packet(host: int, kind: int, offered: bytes = b"", server: str = "10.77.0.1") -> bytes:
    """Return what the host of this number sends: with its own transaction and MAC."""
    plain = bytearray(packet_of(BIOS, kind=kind))
    plain[4:8] = struct.pack("!I", host)
    plain[28:34] = bytes.fromhex(f"5254007801{host:02x}")
    if offered:
        assert plain[-1] == 255
        chosen = bytes([50, 4]) + offered + bytes([54, 4]) + socket.inet_aton(server)
        plain[-1:] = chosen + b"\xff"
    return bytes(plain)


def client_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind(("", 68))
    return sock


def takes_the_offer_of_another() -> None:
    """Runs inside a namespace: asks, and takes what a server at 10.77.0.2 is said to offer."""
    sock = client_socket()
    sock.settimeout(PATIENCE_S)
    sock.sendto(packet(1, DISCOVER), ("255.255.255.255", 67))
    sock.recv(2048)
    taken = packet(1, REQUEST, socket.inet_aton("10.77.0.55"), "10.77.0.2")
    sock.sendto(taken, ("255.255.255.255", 67))
    sock.recv(2048)


def a_rack_asks(hosts: int) -> None:
    """Runs inside a namespace: prints the address of each host that got one, as JSON."""
    sock = client_socket()
    began_at, sent_at = time.monotonic(), 0.0
    waits: dict[int, bytes] = {host: packet(host, DISCOVER) for host in range(1, hosts + 1)}
    got: dict[int, str] = {}
    while waits and time.monotonic() - began_at < PATIENCE_S:
        if time.monotonic() - sent_at > RESEND_S:
            sent_at = time.monotonic()
            for data in waits.values():
                sock.sendto(data, ("255.255.255.255", 67))
        if not select.select([sock], [], [], 0.1)[0]:
            continue
        answer = sock.recv(2048)
        (host,) = struct.unpack("!I", answer[4:8])
        kind, offered = answer[answer.index(b"\x35\x01", 240) + 2], answer[16:20]
        if kind == OFFER and host in waits:
            waits[host] = packet(host, REQUEST, offered)
            sock.sendto(waits[host], ("255.255.255.255", 67))
        elif kind == ACK and waits.pop(host, None) is not None:
            got[host] = socket.inet_ntoa(offered)
    sys.stdout.write(json.dumps(list(got.values())))


def test_field_18_a_rack_that_is_switched_on_at_once_exhausts_no_dhcp() -> None:
    """Each host has its address before its firmware would give up."""
    with network() as net, our_dhcp(net, DhcpMode.FULL):
        discover(net.site, BIOS)  # it is up
        command = net.site.python(_PROGRAM, str(HOSTS))
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=3 * PATIENCE_S, check=True
        )
        assert len(set(json.loads(done.stdout))) == HOSTS


def refusals(dhcp: Running) -> list[dict[str, str | None]]:
    return [event for event in dhcp.events() if event["kind"] == "NAK"]


def test_a_host_that_takes_the_offer_of_another_server_is_noticed() -> None:
    with network() as net, our_dhcp(net, DhcpMode.FULL) as dhcp:
        discover(net.site, BIOS)  # it is up
        subprocess.run(net.site.python(_TAKES_ANOTHERS), timeout=3 * PATIENCE_S, check=True)
        # What dnsmasq logs is read a moment after its answer is heard.
        until(lambda: bool(refusals(dhcp)))
        (refused,) = refusals(dhcp)
    event = DhcpEvent("NAK", str(refused["mac"]), None, str(refused["text"]), DhcpClient.FIRMWARE)
    line = dhcp_line(event, NOW)
    assert line is not None
    assert line.detail["other_server"], line
    assert refused["client"] == "firmware"
