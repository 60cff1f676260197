"""TFTP clients and a lossy wire for tests: the tools are real, the loss is a proxy of ours."""

import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from provisioner.netboot.relay import Source
from provisioner.netboot.tftp import TftpEvent, TftpLimits, TftpServer

# All of these only guard against hanging: tens of thousands of blocks take their time on a
# busy machine.
CLIENT_LIMIT_S = 600
# curl has at most 50 tries in this, so it asks again each 5 s.
CURL_LIMIT_S = 240
ANSWER_LIMIT_S = 60.0
OPCODE_DATA = 3
OPCODE_ACK = 4


class Served:
    """A running server with the events it reported."""

    def __init__(self, server: TftpServer, events: list[TftpEvent]) -> None:
        self.server = server
        self.events = events
        self.address = server.address

    def wait_for_events(self, count: int, limit_s: float = 60.0) -> list[TftpEvent]:
        """Return the events once there are `count`; whoever waits longer has found a bug."""
        deadline = time.monotonic() + limit_s
        while len(self.events) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(self.events) >= count, self.events
        return self.events


@contextmanager
def serving(
    files: Mapping[str, bytes | Path],
    limits: TftpLimits | None = None,
    source: Source | None = None,
) -> Iterator[Served]:
    """Serve files on a free loopback port, with room for many clients at one address."""
    events: list[TftpEvent] = []
    limits = limits or TftpLimits(sessions_per_source=128)
    server = TftpServer(
        ("127.0.0.1", 0), files, on_event=events.append, limits=limits, source=source
    )
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield Served(server, events)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def curl(
    address: tuple[str, int], name: str, to: Path, block_bytes: int
) -> subprocess.Popen[bytes]:
    url = f"tftp://{address[0]}:{address[1]}/{name}"
    limit = str(CURL_LIMIT_S)
    command = ["curl", "-s", "-m", limit, "--tftp-blksize", str(block_bytes), "-o", str(to), url]
    return subprocess.Popen(command)


def tftp_hpa(
    address: tuple[str, int], *command: str, mode: str = "octet", cwd: Path | None = None
) -> str:
    """Run tftp-hpa's client; return what it printed."""
    done = subprocess.run(
        ["tftp", "-m", mode, address[0], str(address[1]), "-c", *command],
        capture_output=True,
        timeout=CLIENT_LIMIT_S,
        cwd=cwd,
        check=False,
    )
    return (done.stdout + done.stderr).decode()


def request_packet(name: bytes, *options: bytes, mode: bytes = b"octet", opcode: int = 1) -> bytes:
    """Return a request as on the wire; `options` are names and values in turn."""
    return struct.pack("!H", opcode) + b"\0".join([name, mode, *options]) + b"\0"


class Client:
    """A TFTP client that does one thing at a time, so that a test can misbehave with it.

    The server sends again what is not acknowledged soon, within 50 ms at the least, and a test
    may be slower than that: so blocks are asked for by their numbers.
    """

    def __init__(self, address: tuple[str, int], source: str = "127.0.0.1") -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((source, 0))
        self.socket.settimeout(ANSWER_LIMIT_S)
        self.address = address
        self.peer = address

    def ask(self, packet: bytes) -> None:
        self.socket.sendto(packet, self.address)

    def receive(self) -> bytes:
        packet, self.peer = self.socket.recvfrom(2048)
        return packet

    def blocks_up_to(self, last: int) -> list[int]:
        """Receive until block `last` has come, and return the numbers of all that came."""
        numbers: list[int] = []
        while not numbers or numbers[-1] != last:
            opcode, number = struct.unpack_from("!HH", self.receive())
            if opcode == OPCODE_DATA:
                numbers.append(number)
        return numbers

    def block(self, number: int, *, not_from: tuple[str, int] | None = None) -> bytes:
        """Return what is in a block; whatever else comes before it, or from `not_from`, was
        sent again and is passed over."""
        head = struct.pack("!HH", OPCODE_DATA, number)
        while True:
            packet, peer = self.socket.recvfrom(2048)
            if packet.startswith(head) and peer != not_from:
                self.peer = peer
                return packet[len(head) :]

    def acknowledge(self, number: int) -> None:
        self.socket.sendto(struct.pack("!HH", OPCODE_ACK, number), self.peer)

    def hears_nothing(self, seconds: float) -> bool:
        return not select.select([self.socket], [], [], seconds)[0]

    def hears_nobody_but_its_peer(self, seconds: float) -> bool:
        """Say whether no second transfer speaks; the first may send again what it sent."""
        ends_at = time.monotonic() + seconds
        while not self.hears_nothing(max(ends_at - time.monotonic(), 0)):
            if self.socket.recvfrom(2048)[1] != self.peer:
                return False
        return True

    def waiting(self) -> list[bytes]:
        """Return what has come and was not received yet."""
        packets = []
        while not self.hears_nothing(0):
            packets.append(self.receive())
        return packets

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class LossyWire:
    """A UDP proxy before a TFTP server that drops a share of the packets both ways.

    Every client gets an upstream socket of its own, and every transfer port of the server a
    socket towards that client, so port numbers keep the meaning that TFTP gives them.
    """

    def __init__(self, server: tuple[str, int], *, loss: float, seed: int = 1) -> None:
        self._server = server
        self._loss = loss
        self._chance = random.Random(seed)
        self._front = self._socket()
        self.address: tuple[str, int] = self._front.getsockname()
        self._upstream: dict[tuple[str, int], socket.socket] = {}
        # Where a packet that arrives on a socket goes: (through, to).
        self._routes: dict[tuple[int, int], tuple[socket.socket, tuple[str, int]]] = {}
        self._client_of: dict[int, tuple[str, int]] = {}
        self._sockets: dict[int, socket.socket] = {self._front.fileno(): self._front}
        self._poll = select.epoll()
        self._poll.register(self._front, select.EPOLLIN)
        self._stopping = threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run)

    def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("127.0.0.1", 0))
        return sock

    def _new(self) -> socket.socket:
        sock = self._socket()
        self._sockets[sock.fileno()] = sock
        self._poll.register(sock, select.EPOLLIN)
        return sock

    def _run(self) -> None:
        while not self._stopping.is_set():
            for fd, _ in self._poll.poll(0.1):
                try:
                    packet, sender = self._sockets[fd].recvfrom(2048)
                    through, to = self._route(fd, sender)
                    if self._chance.random() < self._loss:
                        self.dropped += 1
                    else:
                        through.sendto(packet, to)
                except OSError:
                    continue  # an ICMP error, as a real wire would lose it

    def _route(self, fd: int, sender: tuple[str, int]) -> tuple[socket.socket, tuple[str, int]]:
        if fd == self._front.fileno():
            if sender not in self._upstream:
                upstream = self._upstream[sender] = self._new()
                self._client_of[upstream.fileno()] = sender
            return self._upstream[sender], self._server
        if (fd, sender[1]) not in self._routes:
            client = self._client_of[fd]  # a first packet from a new port of the server
            downstream = self._new()
            self._routes[fd, sender[1]] = (downstream, client)
            self._routes[downstream.fileno(), client[1]] = (self._sockets[fd], sender)
        return self._routes[fd, sender[1]]

    def __enter__(self) -> "LossyWire":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(60)
        for sock in self._sockets.values():
            sock.close()
        self._poll.close()
