"""A provisioning network of its own for tests: network namespaces, a bridge, a DHCP client.

Needs root. Nothing of it reaches the host's own network.
"""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from provisioner.netboot.dhcp import DhcpMode, NetbootConfig, dnsmasq_config

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 60
ASK_AGAIN_S = 1.0
# How long another server may take for its offer, after the first one's.
MORE_OFFERS_S = 0.5

# The service's side of the network: our DHCP, with the answers to router solicitations. The
# hosts with Secure Boot on are those whose MAC stands in a file.
_DHCP_PROGRAM = """
import json, signal, sys, threading
from dataclasses import asdict
from pathlib import Path
from provisioner.netboot.advertise import RouterAdvertiser
from provisioner.netboot.dnsmasq import Dnsmasq
from provisioner.netboot.shim_hosts import ShimHosts
config, hosts, macs = map(Path, sys.argv[1:])
dnsmasq = Dnsmasq(config, on_event=lambda event: print(json.dumps(asdict(event)), flush=True))
signal.signal(signal.SIGTERM, lambda *_: dnsmasq.stop())
shim_hosts = ShimHosts(
    hosts, lambda: macs.read_text().split(), on_change=dnsmasq.restart, look_s=0.1
)
shim_hosts.look()
for work, arguments in (RouterAdvertiser("br0").run, ()), (shim_hosts.run, (threading.Event(),)):
    threading.Thread(target=work, args=arguments, daemon=True).start()
dnsmasq.run()
"""


class Namespace:
    """A network namespace, held by a process that sleeps."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        mine = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + START_LIMIT_S
        while os.readlink(f"/proc/{self._holder.pid}/ns/net") == mine:
            assert time.monotonic() < deadline, "no network namespace; are you root?"
            time.sleep(0.01)
        self.pid = self._holder.pid
        self.ip("link", "set", "lo", "up")

    def command(self, *command: str) -> list[str]:
        return ["nsenter", "--net", "--target", str(self.pid), *command]

    def ip(self, *arguments: str) -> None:
        subprocess.run(self.command("ip", *arguments), check=True)

    def python(self, program: str, *arguments: str) -> list[str]:
        return self.command("env", f"PYTHONPATH={ROOT}", sys.executable, "-c", program, *arguments)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@dataclass(frozen=True)
class Network:
    """`service` has the bridge br0 with 10.77.0.1; `site` has eth0 with 10.77.0.2 on it,
    and is where another DHCP server or a client lives."""

    service: Namespace
    site: Namespace
    folder: Path

    @property
    def config(self) -> NetbootConfig:
        return NetbootConfig(
            boot_url="http://10.77.0.1:8081",
            tftp_address="10.77.0.1",
            interface="br0",
            subnet="10.77.0.0/24",
            range_start="10.77.0.100",
            range_end="10.77.0.200",
            gateway="10.77.0.1",
            dns=("10.77.0.1",),
            lease_file=self.folder / "dnsmasq.leases",
            hosts_file=self.folder / "dnsmasq.hosts",
        )

    @property
    def secure_macs(self) -> Path:
        """The file that stands for the database: MACs of hosts with Secure Boot on."""
        return self.folder / "secure-macs"


@contextmanager
def network() -> Iterator[Network]:
    service, site = Namespace(), Namespace()
    try:
        service.ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
        service.ip("address", "add", "10.77.0.1/24", "dev", "br0")
        service.ip("link", "set", "br0", "up")
        peer = ["peer", "name", "eth0", "netns", str(site.pid)]
        service.ip("link", "add", "site0", "type", "veth", *peer)
        service.ip("link", "set", "site0", "master", "br0", "up")
        site.ip("address", "add", "10.77.0.2/24", "dev", "eth0")
        site.ip("link", "set", "eth0", "up")
        # Not the test's own folder: dnsmasq gives up root, and must still reach its leases.
        with tempfile.TemporaryDirectory(prefix="netboot-") as name:
            Path(name).chmod(0o755)
            yield Network(service, site, Path(name))
    finally:
        service.close()
        site.close()


class Running:
    """A child process whose standard output holds one JSON event per line."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self.process = process
        self._output = output

    def events(self) -> list[dict[str, str | None]]:
        whole_lines = self._output.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in whole_lines if line.startswith("{")]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_LIMIT_S)


@contextmanager
def running(command: list[str], output: Path) -> Iterator[Running]:
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True)
    try:
        yield Running(process, output)
    finally:
        process.terminate()
        try:
            process.wait(START_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def our_dhcp(net: Network, mode: DhcpMode) -> Iterator[Running]:
    """Run our dnsmasq and advertiser in the service's namespace."""
    path = net.folder / "dnsmasq.conf"
    path.write_text(dnsmasq_config(net.config, mode))
    net.secure_macs.touch()
    files = (path, net.config.hosts_file, net.secure_macs)
    command = net.service.python(_DHCP_PROGRAM, *map(str, files))
    with running(command, net.folder / "dhcp.log") as child:
        yield child


@contextmanager
def site_dhcp(net: Network) -> Iterator[Running]:
    """Run the site's own DHCP server, which knows nothing of netbooting."""
    command = ["dnsmasq", "--keep-in-foreground", "--port=0", "--conf-file=/dev/null"]
    command += ["--interface=eth0", "--bind-interfaces", "--no-ping", "--log-facility=-"]
    command += ["--dhcp-range=10.77.0.50,10.77.0.60,255.255.255.0,1h"]
    command += [f"--dhcp-leasefile={net.folder / 'site.leases'}"]
    command += [f"--pid-file={net.folder / 'site.pid'}"]
    with running(net.site.command(*command), net.folder / "site.log") as child:
        yield child


@dataclass(frozen=True)
class Offer:
    """A DHCPOFFER as a boot ROM reads it; `options` by number."""

    server: str
    address: str
    boot_file: str
    next_server: str
    options: dict[int, bytes]
    after_s: float


BIOS, UEFI, UEFI_OLD = 0, 7, 9
CLIENT_MAC = "52:54:00:77:00:99"


def discover(
    namespace: Namespace, architecture: int, *, is_ipxe: bool = False, mac: str = CLIENT_MAC
) -> list[Offer]:
    """Send DHCPDISCOVERs as a boot ROM does until there is an answer; return every offer to
    the one that was answered.

    Asks again each second while nothing answers, and waits half a second for more offers.
    """
    kind = "ipxe" if is_ipxe else ""
    command = namespace.python(_CLIENT_PROGRAM, str(architecture), kind, mac)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=2 * START_LIMIT_S, check=True
    )
    return [_offer(json.loads(line)) for line in done.stdout.splitlines()]


def ask_proxy(namespace: Namespace, architecture: int) -> str:
    """Return the file that the proxy at 10.77.0.1 names when a UEFI asks it for one, on the
    port that is its own for that (PXE 2.1, 2.2.3)."""
    command = namespace.python(_PROXY_PROGRAM, str(architecture))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=2 * START_LIMIT_S, check=True
    )
    return done.stdout.strip()


_PROXY_PROGRAM = """
import socket, sys
from tests.parts.netboot_network import packet_of
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
sock.bind(("10.77.0.2", 68))
sock.settimeout(60)
sock.sendto(packet_of(int(sys.argv[1]), kind=3, own="10.77.0.2"), ("10.77.0.1", 4011))
print(sock.recv(2048)[108:236].split(b"\\0")[0].decode())
"""

_CLIENT_PROGRAM = """
import sys
from tests.parts.netboot_network import dhcp_client
dhcp_client(int(sys.argv[1]), sys.argv[2] == "ipxe", sys.argv[3])
"""


def dhcp_client(architecture: int, is_ipxe: bool, mac: str) -> None:
    """Runs inside a namespace: prints one line of JSON per offer.

    Each question has a number of its own. A server that stood still for a while answers them
    all, and what it says to the next one is no second offer.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    sock.bind(("", 68))
    sent_at: dict[int, float] = {}
    first, answered = os.getpid() << 8, None
    deadline = time.monotonic() + START_LIMIT_S
    while answered is None and time.monotonic() < deadline:
        number = first + len(sent_at)
        sent_at[number] = time.monotonic()
        packet = packet_of(architecture, is_ipxe=is_ipxe, mac=mac, number=number)
        sock.sendto(packet, ("255.255.255.255", 67))
        while select.select([sock], [], [], ASK_AGAIN_S if answered is None else MORE_OFFERS_S)[0]:
            packet, server = sock.recvfrom(2048)
            (number,) = struct.unpack_from("!I", packet, 4)
            if answered is None and number in sent_at:
                answered = number
            if number != answered:
                continue
            line = {
                "server": server[0],
                "packet": packet.hex(),
                "after": time.monotonic() - sent_at[number],
            }
            sys.stdout.write(json.dumps(line) + "\n")


def packet_of(
    architecture: int,
    *,
    kind: int = 1,
    own: str = "0.0.0.0",
    is_ipxe: bool = False,
    mac: str = CLIENT_MAC,
    number: int = 0x77777777,
) -> bytes:
    """Return a DHCPDISCOVER, or another kind, that asks for a broadcast answer (RFC 2131,
    RFC 4578). `own` is the address that the client has already, `number` its transaction."""
    head = struct.pack("!BBBBIHH", 1, 1, 6, 0, number, 0, 0x8000)
    fixed = (
        head
        + socket.inet_aton(own)
        + bytes(12)
        + bytes.fromhex(mac.replace(":", "")).ljust(16, b"\0")
        + bytes(192)
        + b"\x63\x82\x53\x63"
    )
    options = [(53, bytes([kind])), (55, bytes([1, 3, 6, 43, 60, 66, 67, 175]))]
    options += [(60, f"PXEClient:Arch:{architecture:05}:UNDI:002001".encode())]
    options += [(93, struct.pack("!H", architecture)), (94, b"\1\2\1"), (97, b"\0" + bytes(16))]
    if is_ipxe:
        options += [(77, b"iPXE"), (175, bytes([19, 1, 1]))]
    return fixed + b"".join(bytes([n, len(v)]) + v for n, v in options) + b"\xff"


def _offer(line: dict[str, str]) -> Offer:
    packet = bytes.fromhex(line["packet"])
    options: dict[int, bytes] = {}
    rest = packet[240:]
    while rest and rest[0] != 255:
        if rest[0] == 0:
            rest = rest[1:]
            continue
        options[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    name = packet[108:236].split(b"\0")[0] or options.get(67, b"").rstrip(b"\0")
    return Offer(
        server=line["server"],
        address=socket.inet_ntoa(packet[16:20]),
        boot_file=name.decode(),
        next_server=socket.inet_ntoa(packet[20:24]),
        options=options,
        after_s=float(line["after"]),
    )
