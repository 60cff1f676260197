"""Our own DHCP gives a host one address, from its firmware to its ramdisk, whatever each of
them calls itself; and our service reads which."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from provisioner.netboot.dhcp import DhcpMode, dnsmasq_config
from provisioner.netboot.leases import leases_in

from .netboot_network import CLIENT_MAC, Network, discover, network, our_dhcp

# As a UEFI, iPXE, busybox and systemd-networkd call themselves in option 61; some say nothing.
CLIENT_IDS = (
    "007b3d2a520c654d5b9d3c2c6a2f3f0001",
    "",
    "01525400770099",
    "ff56504d980002000000ab11f0ae1d3c9d3c2c",
)

_PROGRAM = """
import itertools, json, select, socket, sys
from tests.parts.netboot_network import packet_of
numbers = itertools.count(1)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for option in (socket.SO_BROADCAST, socket.SO_REUSEADDR):
    sock.setsockopt(socket.SOL_SOCKET, option, 1)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
sock.bind(("", 68))

def ask(kind, client, *more):
    options = [(61, bytes.fromhex(client))] if client else []
    options += more
    extra = b"".join(bytes([n, len(v)]) + v for n, v in options)
    for _ in range(60):
        # A number of its own: what comes late is an answer to another question.
        number = next(numbers)
        question = packet_of(0, kind=kind, number=number)[:-1] + extra + b"\\xff"
        sock.sendto(question, ("255.255.255.255", 67))
        while select.select([sock], [], [], 1.0)[0]:
            packet = sock.recv(2048)
            if packet[4:8] == number.to_bytes(4, "big"):
                return packet[16:20], packet[packet.index(b"\\x36\\x04") + 2:][:4]
    raise SystemExit("nobody answers")

for client in json.loads(sys.argv[1]):
    address, server = ask(1, client)
    address, _ = ask(3, client, (50, address), (54, server))
    print(socket.inet_ntoa(address), flush=True)
"""


def addresses_given(net: Network) -> list[str]:
    """Return what a host gets that calls itself by one client id after the other."""
    command = net.site.python(_PROGRAM, json.dumps(CLIENT_IDS))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "secure boot"])
def test_a_host_keeps_one_address_whatever_it_calls_itself(is_secure: bool) -> None:
    with network() as net:
        net.secure_macs.write_text(CLIENT_MAC if is_secure else "")
        with our_dhcp(net, DhcpMode.FULL):
            discover(net.site, 0)  # it is up
            given = addresses_given(net)
            assert len(given) == len(CLIENT_IDS)
            assert len(set(given)) == 1
            leases = leases_in(net.config.lease_file)
            assert leases == {CLIENT_MAC: frozenset(given)}


def test_without_our_line_it_would_get_several() -> None:
    """The line is needed: the test above can fail."""
    with network() as net:
        config = dnsmasq_config(net.config, DhcpMode.FULL)
        path = net.folder / "plain.conf"
        path.write_text("".join(line for line in config.splitlines(True) if "id:*" not in line))
        net.config.hosts_file.touch()
        command = ["dnsmasq", "--keep-in-foreground", f"--conf-file={path}"]
        dnsmasq = subprocess.Popen(net.service.command(*command), stderr=subprocess.DEVNULL)
        try:
            discover(net.site, 0)
            assert len(set(addresses_given(net))) > 1
        finally:
            dnsmasq.terminate()
            dnsmasq.wait(60)


def test_a_lease_file_is_read_line_by_line_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "dnsmasq.leases"
    assert leases_in(file) is None
    file.touch()
    assert leases_in(file) == {}
    file.write_text(
        "1764075600 52:54:00:77:00:01 10.77.0.101 r1n1 01:52:54:00:77:00:01\n"
        "1764075600 52:54:00:77:00:01 10.77.0.102 * *\n"
        "1764075600 06-52:54:00:77:00:02 10.77.0.103 * *\n"
        "duid 00:01:00:01:2f:00\n"
        "1764075600 1996488705 fd00::1 * 00:01\n"
        "nonsense\n"
        "1764075600 52:54:00:77:00:03 10.77.0.104 "  # it is being written
    )
    assert leases_in(file) == {
        "52:54:00:77:00:01": frozenset({"10.77.0.101", "10.77.0.102"}),
        "52:54:00:77:00:03": frozenset({"10.77.0.104"}),
    }
    assert leases_in(tmp_path) is None


def test_reading_ten_thousand_leases_holds_nobody_up(tmp_path: Path) -> None:
    file = tmp_path / "dnsmasq.leases"
    lines = [
        f"1764075600 52:54:00:77:{n >> 8:02x}:{n & 255:02x} 10.77.{n >> 8}.{n & 255} * *\n"
        for n in range(10_000)
    ]
    file.write_text("".join(lines))
    began = time.thread_time()  # on a busy machine others have their turn meanwhile
    found = leases_in(file)
    assert found is not None
    assert len(found) == 10_000
    assert time.thread_time() - began < 1
