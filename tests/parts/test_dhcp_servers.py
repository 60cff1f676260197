"""DHCP with real servers and a client of our own, in network namespaces."""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.errors import ConfigError, Unavailable
from provisioner.netboot.advertise import RouterAdvertiser
from provisioner.netboot.dhcp import DhcpMode, DhcpServer, boot_script_url, dhcp_snippet
from provisioner.netboot.dnsmasq import DhcpEvent, Dnsmasq, LogReader

from .netboot_network import (
    BIOS,
    UEFI,
    UEFI_OLD,
    Namespace,
    Network,
    Offer,
    discover,
    network,
    our_dhcp,
    running,
    site_dhcp,
)

NO_PXEDHCP = bytes([176, 1, 1])


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


def check_boot_files(net: Network) -> None:
    """Whoever gives out addresses names the right file for each firmware, and at once."""
    files = {BIOS: "undionly.kpxe", UEFI: "snponly.efi", UEFI_OLD: "snponly.efi"}
    for architecture, expected in files.items():
        (offer,) = discover(net.site, architecture)
        assert (offer.boot_file, offer.next_server) == (expected, "10.77.0.1")
        assert offer.address.startswith("10.77.0.1")
        assert offer.after_s < 0.9, "a first offer waits for nobody"
    for architecture in (BIOS, UEFI):
        (offer,) = discover(net.site, architecture, is_ipxe=True)
        assert offer.boot_file == boot_script_url(net.config.boot_url)
        assert NO_PXEDHCP in offer.options[175], "iPXE would wait for a proxy's offer"


def test_full_mode_names_a_boot_file_for_each_firmware(net: Network) -> None:
    with our_dhcp(net, DhcpMode.FULL) as dhcp:
        check_boot_files(net)
        kinds = {event["kind"] for event in dhcp.events()}
        assert {"DISCOVER", "OFFER", "BOOTFILE"} <= kinds
        assert {event["mac"] for event in dhcp.events()} == {"52:54:00:77:00:99"}
        assert dhcp.stop() == 0
    assert not leftovers(net)


def test_proxy_mode_adds_how_to_boot_to_another_servers_addresses(net: Network) -> None:
    with site_dhcp(net), our_dhcp(net, DhcpMode.PROXY) as dhcp:
        ours = wait_for_proxy(net)
        assert ours.address == "0.0.0.0"
        assert ours.boot_file == boot_script_url(net.config.boot_url)
        assert ours.options[60] == b"PXEClient"
        for architecture in (BIOS, UEFI, UEFI_OLD):
            offers = {offer.server: offer for offer in discover(net.site, architecture)}
            assert offers["10.77.0.2"].address.startswith("10.77.0.5")
            assert offers["10.77.0.1"].address == "0.0.0.0"
            assert offers["10.77.0.1"].options[60] == b"PXEClient"
        assert {event["kind"] for event in dhcp.events()} >= {"PXE"}


def wait_for_proxy(net: Network) -> Offer:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        offers = {o.server: o for o in discover(net.site, BIOS, is_ipxe=True)}
        if {"10.77.0.1", "10.77.0.2"} <= offers.keys():
            return offers["10.77.0.1"]
    raise AssertionError("the two servers never both answered")


def leftovers(net: Network) -> list[int]:
    """Return the dnsmasqs that run with our configuration file."""
    wanted = f"--conf-file={net.folder / 'dnsmasq.conf'}".encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if arguments[0].endswith(b"dnsmasq") and wanted in arguments:
            found.append(int(file.parent.name))
    return found


def wait_for_leftovers(net: Network, *, other_than: int = 0) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := [pid for pid in leftovers(net) if pid != other_than]:
            return found[0]
        time.sleep(0.02)
    raise AssertionError("no dnsmasq runs")


def test_a_dnsmasq_that_died_is_started_again(net: Network) -> None:
    with our_dhcp(net, DhcpMode.FULL):
        first = wait_for_leftovers(net)
        os.kill(first, signal.SIGKILL)
        wait_for_leftovers(net, other_than=first)
        assert discover(net.site, BIOS)[0].boot_file == "undionly.kpxe"


def test_what_a_killed_service_left_behind_is_ended_and_others_are_not(net: Network) -> None:
    with site_dhcp(net) as site, our_dhcp(net, DhcpMode.PROXY) as killed:
        left = wait_for_leftovers(net)
        killed.process.kill()
        killed.process.wait()
        assert leftovers(net) == [left]
        with our_dhcp(net, DhcpMode.PROXY):
            wait_for_leftovers(net, other_than=left)
            assert left not in leftovers(net)
            assert site.process.poll() is None
            wait_for_proxy(net)


def test_a_configuration_that_dnsmasq_refuses_is_our_installers_error(tmp_path: Path) -> None:
    config = tmp_path / "dnsmasq.conf"
    config.write_text("no-such-option\n")
    with pytest.raises(ConfigError) as refused:
        Dnsmasq(config, on_event=print).run()
    assert "no-such-option" in str(refused.value.found) or "bad option" in str(refused.value.found)


def test_a_dnsmasq_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    config = tmp_path / "dnsmasq.conf"
    config.write_text(f"port=0\nlog-facility=-\npid-file={tmp_path}/missing/pid\n")
    dnsmasq = Dnsmasq(config, on_event=print, restart_pause=timedelta(milliseconds=1))
    with pytest.raises(Unavailable) as given_up:
        dnsmasq.run()
    assert "missing/pid" in str(given_up.value.found)


def test_a_router_solicitation_is_answered_with_nothing_to_use(net: Network) -> None:
    program = """
import socket, struct, time
sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
index = socket.if_nametoindex("eth0")
group = socket.inet_pton(socket.AF_INET6, "ff02::1") + struct.pack("@I", index)
sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
sock.settimeout(0.5)
for _ in range(40):  # the link's own address takes a second or two to become usable
    try:
        sock.sendto(struct.pack("!BBHI", 133, 0, 0, 0), ("ff02::2", 0, 0, index))
        while True:
            packet = sock.recvfrom(1500)[0]
            if packet[0] == 134:
                print(packet.hex())
                raise SystemExit
    except OSError:
        time.sleep(0.1)
"""
    with our_dhcp(net, DhcpMode.FULL):
        command = net.site.python(program)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    packet = bytes.fromhex(done.stdout.strip())
    _, _, _, _, flags, lifetime_s = struct.unpack_from("!BBHBBH", packet)
    assert (flags, lifetime_s, len(packet)) == (0, 0, 16)


@pytest.mark.skipif(not shutil.which("kea-dhcp4"), reason="kea-dhcp4-server is not installed")
def test_the_snippet_for_kea_works(net: Network) -> None:
    text = dhcp_snippet(net.config, DhcpServer.KEA).replace('"br0"', '"eth0"')
    file = net.folder / "kea.conf"
    file.write_text(text)
    environment = ["env", f"KEA_PIDFILE_DIR={net.folder}", f"KEA_LOCKFILE_DIR={net.folder}"]
    checked = net.site.command(*environment, "kea-dhcp4", "-t", str(file))
    subprocess.run(checked, check=True, capture_output=True)
    # Without leases on disk, and read without the comments that only Kea understands.
    config = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.M))
    config["Dhcp4"]["lease-database"] = {"type": "memfile", "persist": False}
    file.write_text(json.dumps(config))
    command = net.site.command(*environment, "kea-dhcp4", "-c", str(file))
    # Kea hears only what comes over the wire, so the client sits on the other side.
    with running(command, net.folder / "kea.log"), swapped(net) as seen:
        check_boot_files(seen)


@pytest.mark.skipif(not shutil.which("dhcpd"), reason="isc-dhcp-server is not installed")
def test_the_snippet_for_isc_works(net: Network) -> None:
    file = net.folder / "dhcpd.conf"
    file.write_text(dhcp_snippet(net.config, DhcpServer.ISC))
    (net.folder / "leases").touch()
    files = ["-cf", str(file), "-lf", str(net.folder / "leases"), "-pf", str(net.folder / "pid")]
    tested = net.site.command("dhcpd", "-t", *files)
    subprocess.run(tested, check=True, capture_output=True)
    with (
        running(net.site.command("dhcpd", "-f", "-4", *files, "eth0"), net.folder / "isc.log"),
        swapped(net) as seen,
    ):
        check_boot_files(seen)


def test_the_snippet_for_dnsmasq_works(net: Network) -> None:
    file = net.folder / "snippet.conf"
    file.write_text(
        dhcp_snippet(net.config, DhcpServer.DNSMASQ)
        + "port=0\ninterface=eth0\nbind-interfaces\ndhcp-range=10.77.0.100,10.77.0.199,1h\n"
        + f"dhcp-leasefile={net.folder}/leases\npid-file={net.folder}/pid\nlog-facility=-\n"
    )
    command = net.site.command("dnsmasq", "--keep-in-foreground", f"--conf-file={file}")
    with running(command, net.folder / "snippet.log"), swapped(net) as seen:
        check_boot_files(seen)


@contextmanager
def swapped(net: Network) -> Iterator[Network]:
    """The same network with a third namespace as the place where clients live."""
    client = Namespace()
    try:
        peer = ["peer", "name", "eth0", "netns", str(client.pid)]
        net.service.ip("link", "add", "client0", "type", "veth", *peer)
        net.service.ip("link", "set", "client0", "master", "br0", "up")
        client.ip("link", "set", "eth0", "up")
        yield Network(net.service, client, net.folder)
    finally:
        client.close()


def test_the_log_of_dnsmasq_becomes_events() -> None:
    mac = "52:54:00:77:00:01"
    reader = LogReader()
    log = f"""\
dnsmasq-dhcp[7]: 99 DHCPDISCOVER(br0) {mac}
dnsmasq-dhcp[7]: 99 vendor class: PXEClient:Arch:00000:UNDI:002001
dnsmasq-dhcp[7]: 99 bootfile name: undionly.kpxe
dnsmasq-dhcp[7]: 98 bootfile name: of another packet
dnsmasq-dhcp[7]: 99 DHCPOFFER(br0) 10.77.0.101 {mac}
dnsmasq-dhcp[7]: DHCPACK(br0) 10.77.0.101 {mac} some-name
dnsmasq-dhcp[7]: 99 PXE(br0) {mac} proxy
dnsmasq-dhcp[7]: DHCPDISCOVER(br0) {mac} no address available
dnsmasq[7]: started, version 2.90 DNS disabled"""
    events = [event for line in log.splitlines() if (event := reader.read(line))]
    assert events == [
        DhcpEvent("DISCOVER", mac, None, ""),
        DhcpEvent("BOOTFILE", mac, None, "undionly.kpxe"),
        DhcpEvent("OFFER", mac, "10.77.0.101", ""),
        DhcpEvent("ACK", mac, "10.77.0.101", "some-name"),
        DhcpEvent("PXE", mac, None, "proxy"),
        DhcpEvent("DISCOVER", mac, None, "no address available"),
    ]


def test_an_interface_that_is_not_there_is_our_installers_error() -> None:
    assert "nb-missing" not in [name for _, name in socket.if_nameindex()]
    with pytest.raises(ConfigError, match="nb-missing"):
        RouterAdvertiser("nb-missing")
