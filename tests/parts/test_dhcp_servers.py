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
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.errors import ConfigError, Unavailable
from provisioner.netboot.advertise import RouterAdvertiser
from provisioner.netboot.dhcp import (
    DhcpMode,
    DhcpServer,
    UefiLoader,
    boot_script_url,
    dhcp_snippet,
)
from provisioner.netboot.dnsmasq import DhcpClient, DhcpEvent, Dnsmasq, LogReader

from .netboot_network import (
    BIOS,
    CLIENT_MAC,
    UEFI,
    UEFI_OLD,
    Namespace,
    Network,
    Offer,
    Running,
    ask_proxy,
    discover,
    network,
    our_dhcp,
    running,
    site_dhcp,
)
from .processes import LIMIT_S, children, until

NO_PXEDHCP = bytes([176, 1, 1])
# A server that pings an address before it offers it takes a second at least.
AT_ONCE_S = 0.9
OTHER_MACS = [f"52:54:00:77:02:{number:02x}" for number in range(9)]


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


def check_boot_files(net: Network, uefi_file: str = "snponly.efi") -> None:
    """Whoever gives out addresses names the right file for each firmware, and at once."""
    files = {BIOS: "undionly.kpxe", UEFI: uefi_file, UEFI_OLD: uefi_file}
    for architecture, expected in files.items():
        (offer,) = discover(net.site, architecture)
        assert (offer.boot_file, offer.next_server) == (expected, "10.77.0.1")
        assert offer.address.startswith("10.77.0.1")
        assert came_at_once(net, offer), "a first offer waits for nobody"
    for architecture in (BIOS, UEFI):
        (offer,) = discover(net.site, architecture, is_ipxe=True)
        assert offer.boot_file == boot_script_url(net.config.boot_url)
        assert NO_PXEDHCP in offer.options[175], "iPXE would wait for a proxy's offer"


def came_at_once(net: Network, offer: Offer) -> bool:
    """Say whether it did, or another host's first one does: this machine may stand still for a
    second now and then, a server that waits does so each time."""
    macs = iter(OTHER_MACS)
    while offer.after_s >= AT_ONCE_S:
        if (mac := next(macs, None)) is None:
            return False
        (offer,) = discover(net.site, BIOS, mac=mac)
    return True


def test_full_mode_names_a_boot_file_for_each_firmware(net: Network) -> None:
    with our_dhcp(net, DhcpMode.FULL) as dhcp:
        check_boot_files(net)
        # What it tells is read from its log, and that comes after its answers.
        until(lambda: {"DISCOVER", "OFFER", "BOOTFILE"} <= {one["kind"] for one in dhcp.events()})
        until(lambda: asked(dhcp) == {"firmware", "iPXE"})
        assert {event["mac"] for event in dhcp.events()} - {*OTHER_MACS} == {CLIENT_MAC}
        assert dhcp.stop() == 0
    assert not leftovers(net)


def asked(dhcp: Running) -> set[str | None]:
    return {event["client"] for event in dhcp.events() if event["kind"] == "DISCOVER"}


def test_proxy_mode_adds_how_to_boot_to_another_servers_addresses(net: Network) -> None:
    with site_dhcp(net), our_dhcp(net, DhcpMode.PROXY) as dhcp:
        ours = wait_for_proxy(net)
        assert ours.address == "0.0.0.0"
        assert ours.boot_file == boot_script_url(net.config.boot_url)
        assert ours.options[60] == b"PXEClient"
        for architecture in (BIOS, UEFI, UEFI_OLD):
            offers = both_offers(net, architecture)
            assert offers["10.77.0.2"].address.startswith("10.77.0.5")
            assert offers["10.77.0.1"].address == "0.0.0.0"
            assert offers["10.77.0.1"].options[60] == b"PXEClient"
        until(lambda: {event["kind"] for event in dhcp.events()} >= {"PXE"})


def wait_for_file(net: Network, expected: str) -> None:
    """Return when our DHCP names the file to a UEFI."""
    deadline = time.monotonic() + LIMIT_S
    while discover(net.site, UEFI)[0].boot_file != expected:
        assert time.monotonic() < deadline, f"{expected} is never named"


def test_a_host_with_secure_boot_is_given_shim_as_soon_as_it_is_known(net: Network) -> None:
    """And no other host is, nor a BIOS that has its NIC now; nor is dnsmasq given up."""
    with our_dhcp(net, DhcpMode.FULL):
        check_boot_files(net)
        net.secure_macs.write_text(f"52:54:00:77:00:01 {CLIENT_MAC}")
        wait_for_file(net, "shimx64.efi")
        check_boot_files(net, "shimx64.efi")
        net.secure_macs.write_text("52:54:00:77:00:01")
        wait_for_file(net, "snponly.efi")


@pytest.mark.parametrize(
    ("macs", "file"), [("", "snponly.efi"), (CLIENT_MAC, "shimx64.efi")], ids=["plain", "secure"]
)
def test_a_proxy_gives_shim_to_a_host_with_secure_boot_only(
    net: Network, macs: str, file: str
) -> None:
    net.secure_macs.write_text(macs)
    with site_dhcp(net), our_dhcp(net, DhcpMode.PROXY):
        wait_for_proxy(net)
        assert [ask_proxy(net.site, one) for one in (UEFI, UEFI_OLD)] == [file, file]


def wait_for_proxy(net: Network) -> Offer:
    return both_offers(net, BIOS, is_ipxe=True)["10.77.0.1"]


def both_offers(net: Network, architecture: int, *, is_ipxe: bool = False) -> dict[str, Offer]:
    """Return the offers of the site's server and of ours, once both answer in time."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        offers = {o.server: o for o in discover(net.site, architecture, is_ipxe=is_ipxe)}
        if {"10.77.0.1", "10.77.0.2"} <= offers.keys():
            return offers
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
    deadline = time.monotonic() + LIMIT_S
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


def test_it_is_told_when_there_is_a_dnsmasq(tmp_path: Path) -> None:
    """The service is ready then, and not when it has begun to look for one left behind."""
    config = tmp_path / "dnsmasq.conf"
    config.write_text("port=0\nlog-facility=-\npid-file=\n")
    dnsmasq, found = Dnsmasq(config, on_event=print), []

    def arguments() -> str:
        found = ""
        for pid in children(os.getpid()):
            with suppress(OSError):  # another one, that has just ended
                found += Path(f"/proc/{pid}/cmdline").read_text()
        return found

    def started() -> None:
        # A fresh process has no arguments yet, for a moment after its exec.
        until(lambda: f"--conf-file={config}" in arguments())
        found.append(True)
        dnsmasq.stop()

    dnsmasq.run(on_start=started)
    assert found == [True]


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
for _ in range(100):  # the link's own address takes a second or two to become usable
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    packet = bytes.fromhex(done.stdout.strip())
    _, _, _, _, flags, lifetime_s = struct.unpack_from("!BBHBBH", packet)
    assert (flags, lifetime_s, len(packet)) == (0, 0, 16)


UEFI_FILES = {UefiLoader.IPXE: "snponly.efi", UefiLoader.SHIM: "shimx64.efi"}


@pytest.mark.skipif(not shutil.which("kea-dhcp4"), reason="kea-dhcp4-server is not installed")
@pytest.mark.parametrize("loader", UefiLoader)
def test_the_snippet_for_kea_works(net: Network, loader: UefiLoader) -> None:
    config = replace(net.config, uefi_loader=loader)
    text = dhcp_snippet(config, DhcpServer.KEA).replace('"br0"', '"eth0"')
    file = net.folder / "kea.conf"
    file.write_text(text)
    environment = ["env", f"KEA_PIDFILE_DIR={net.folder}", f"KEA_LOCKFILE_DIR={net.folder}"]
    checked = net.site.command(*environment, "kea-dhcp4", "-t", str(file))
    subprocess.run(checked, check=True, capture_output=True)
    # Without leases on disk, and read without the comments that only Kea understands.
    document = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.M))
    document["Dhcp4"]["lease-database"] = {"type": "memfile", "persist": False}
    file.write_text(json.dumps(document))
    command = net.site.command(*environment, "kea-dhcp4", "-c", str(file))
    # Kea hears only what comes over the wire, so the client sits on the other side.
    with running(command, net.folder / "kea.log"), swapped(net) as seen:
        check_boot_files(seen, UEFI_FILES[loader])


@pytest.mark.skipif(not shutil.which("dhcpd"), reason="isc-dhcp-server is not installed")
@pytest.mark.parametrize("loader", UefiLoader)
def test_the_snippet_for_isc_works(net: Network, loader: UefiLoader) -> None:
    file = net.folder / "dhcpd.conf"
    file.write_text(dhcp_snippet(replace(net.config, uefi_loader=loader), DhcpServer.ISC))
    (net.folder / "leases").touch()
    files = ["-cf", str(file), "-lf", str(net.folder / "leases"), "-pf", str(net.folder / "pid")]
    tested = net.site.command("dhcpd", "-t", *files)
    subprocess.run(tested, check=True, capture_output=True)
    with (
        running(net.site.command("dhcpd", "-f", "-4", *files, "eth0"), net.folder / "isc.log"),
        swapped(net) as seen,
    ):
        check_boot_files(seen, UEFI_FILES[loader])


@pytest.mark.parametrize(
    ("loader", "lines", "uefi_file"),
    [
        (UefiLoader.IPXE, "", "snponly.efi"),
        (UefiLoader.IPXE, f"dhcp-host={CLIENT_MAC},set:secure-boot\n", "shimx64.efi"),
        (UefiLoader.SHIM, "", "shimx64.efi"),
    ],
)
def test_the_snippet_for_dnsmasq_works(
    net: Network, loader: UefiLoader, lines: str, uefi_file: str
) -> None:
    file = net.folder / "snippet.conf"
    file.write_text(
        dhcp_snippet(replace(net.config, uefi_loader=loader), DhcpServer.DNSMASQ)
        + lines
        + "port=0\ninterface=eth0\nbind-interfaces\ndhcp-range=10.77.0.100,10.77.0.199,1h\n"
        + f"dhcp-leasefile={net.folder}/leases\npid-file={net.folder}/pid\nlog-facility=-\n"
    )
    command = net.site.command("dnsmasq", "--keep-in-foreground", f"--conf-file={file}")
    with running(command, net.folder / "snippet.log"), swapped(net) as seen:
        check_boot_files(seen, uefi_file)


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
dnsmasq-dhcp[7]: 99 vendor class: PXEClient:Arch:00000:UNDI:002001
dnsmasq-dhcp[7]: 99 DHCPDISCOVER(br0) {mac}
dnsmasq-dhcp[7]: 99 bootfile name: undionly.kpxe
dnsmasq-dhcp[7]: 98 bootfile name: of another packet
dnsmasq-dhcp[7]: 99 DHCPOFFER(br0) 10.77.0.101 {mac}
dnsmasq-dhcp[7]: DHCPACK(br0) 10.77.0.101 {mac} some-name
dnsmasq-dhcp[7]: 97 vendor class: PXEClient:Arch:00007:UNDI:003016
dnsmasq-dhcp[7]: 97 user class: iPXE
dnsmasq-dhcp[7]: 97 PXE(br0) {mac} proxy
dnsmasq-dhcp[7]: 96 vendor class: udhcp 1.35.0
dnsmasq-dhcp[7]: 96 DHCPDISCOVER(br0) {mac}
dnsmasq-dhcp[7]: DHCPDISCOVER(br0) {mac} no address available
dnsmasq[7]: started, version 2.90 DNS disabled"""
    events = [event for line in log.splitlines() if (event := reader.read(line))]
    assert events == [
        DhcpEvent("DISCOVER", mac, None, "", DhcpClient.FIRMWARE),
        DhcpEvent("BOOTFILE", mac, None, "undionly.kpxe", DhcpClient.FIRMWARE),
        DhcpEvent("OFFER", mac, "10.77.0.101", "", DhcpClient.FIRMWARE),
        DhcpEvent("ACK", mac, "10.77.0.101", "some-name"),
        DhcpEvent("PXE", mac, None, "proxy", DhcpClient.IPXE),
        DhcpEvent("DISCOVER", mac, None, "", DhcpClient.SYSTEM),
        DhcpEvent("DISCOVER", mac, None, "no address available"),
    ]


def test_an_interface_that_is_not_there_is_our_installers_error() -> None:
    assert "nb-missing" not in [name for _, name in socket.if_nameindex()]
    with pytest.raises(ConfigError, match="nb-missing"):
        RouterAdvertiser("nb-missing")
