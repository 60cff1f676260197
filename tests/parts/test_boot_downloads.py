"""The real boot listener sees how its downloads of kernel and ramdisk go, at real sockets."""

import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from flask import Flask, send_file

from provisioner import wiring
from provisioner.core.diagnosis import Dhcp, Diagnosis
from provisioner.core.downloads import SEEN
from provisioner.core.model import Event
from provisioner.in_force import dhcp_leases
from provisioner.service.chance import utc_now
from provisioner.service.why import Why
from provisioner.settings import Settings
from provisioner.setup import Plan, initialise
from provisioner.web.downloads import TELL_S, TOLD_MAX, Downloads
from tests.parts.ports import free_ports
from tests.parts.service_site import RAMDISK, mac
from tests.parts.test_cli_serve import serving
from tests.parts.test_network_lines import Ticking

# Where the booting host, and somebody else, ask from.
AT_HOST, AT_STRANGER = "127.0.0.77", "127.0.0.99"
KERNEL_BYTES: Final = 1 << 20
# More than all buffers between two sockets hold.
RAMDISK_BYTES: Final = 64 << 20
BROKEN_OFF_AT: Final = 24 << 20
# More than a small receive buffer takes unread; the server's holds the rest of it.
NEAR_THE_END: Final = 1 << 20
AT_THE_END: Final = 200 << 10
SMALL_BUFFER: Final = 64 << 10
# What a host that reads no more may have in its buffers.
BUFFERED_BYTES_MAX: Final = 8 << 20
LINE_LIMIT_S: Final = 60.0
KERNEL, INITRD = f"/ramdisks/{RAMDISK}/vmlinuz", f"/ramdisks/{RAMDISK}/initrd"
NOBODYS_UUID: Final = "00000000-0000-0000-0000-000000000000"
HOST: Final = f"new-{mac(1).replace(':', '')}"


def later() -> datetime:
    return utc_now() + timedelta(minutes=2)


@dataclass
class Listener:
    """A boot listener in processes of its own, and the use cases over the same database."""

    settings: Settings
    service: wiring.Service

    def get(
        self, path: str, source: str = AT_HOST, status: int = 200, buffer: int = 0
    ) -> socket.socket:
        """Ask for a file and read no more than the answer's headers."""
        where = self.settings.boot.listen
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.settimeout(LINE_LIMIT_S)
        sock.bind((source, 0))
        sock.connect((where.host, where.port))
        self.again(sock, path, status)
        return sock

    def again(self, sock: socket.socket, path: str, status: int = 200) -> None:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: boot\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        assert int(head.split()[1]) == status

    def boot(self, source: str = AT_HOST) -> None:
        """Ask how to boot: a host that nobody knows yet gets the ramdisk, to be inspected."""
        with self.get(f"/boot/ipxe?mac={mac(1)}", source) as sock:
            assert b"provisioner.ticket=" in sock.recv(4096)

    def lines(self) -> list[Event]:
        lines = [one for _, one in self.service.hosts.timeline(HOST, limit=1000)]
        return sorted((one for one in lines if one.source == "http"), key=lambda one: one.at)

    def until(self, text: str) -> Event:
        """Wait for a line that begins so."""
        ends_at = time.monotonic() + LINE_LIMIT_S
        while not (found := [one for one in self.lines() if one.text.startswith(text)]):
            assert time.monotonic() < ends_at, [one.text for one in self.lines()]
            time.sleep(0.05)
        return found[-1]

    def why(self) -> Diagnosis:
        """Ask as one who has waited for some minutes."""
        guard = self.service.transitions.guard
        return Why(self.service.store, guard, later, Dhcp.FULL).ask(HOST).diagnosis


def read(sock: socket.socket, size: int) -> None:
    while size > 0:
        got = len(sock.recv(min(size, 1 << 20)))
        assert got, "it ended early"
        size -= got


def break_off(sock: socket.socket) -> None:
    """Close with a reset, as a boot loader does that gives up."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes were written that the other end has not acknowledged."""
    answer: bytes = fcntl.ioctl(sock, termios.TIOCOUTQ, struct.pack("=i", 0))
    (waiting,) = struct.unpack("=i", answer)
    return int(waiting)


class Looked(Ticking):
    """A clock that knows how often it was looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return super().__call__()


def wait_for(holds: Callable[[], bool], said: list[Event]) -> None:
    ends_at = time.monotonic() + LINE_LIMIT_S
    while not holds():
        assert time.monotonic() < ends_at, [one.text for one in said]
        time.sleep(0.02)


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as waiting,
        socket.create_connection(waiting.getsockname()) as host,
        waiting.accept()[0] as server,
    ):
        yield server, host


@contextmanager
def a_listener(folder: Path, more: str = "") -> Iterator[Listener]:
    """A listener whose DHCP gave the host its address."""
    boot, agent, tftp = free_ports(3)
    plan = Plan(
        interface="lo",
        dhcp="full",
        subnet="127.0.0.0/24",
        range_start="127.0.0.50",
        range_end="127.0.0.90",
        boot_port=boot,
        agent_port=agent,
        tftp_port=tftp,
        discovery=True,
    )
    settings = initialise(folder, plan)
    config = folder / "provisioner.toml"
    config.write_text(config.read_text().replace("[boot]\n", f"[boot]\n{more}"))
    ramdisk = folder / "ramdisks" / RAMDISK
    ramdisk.mkdir(parents=True)
    (ramdisk / "ramdisk.json").write_text("{}")
    (ramdisk / "vmlinuz").write_bytes(os.urandom(KERNEL_BYTES))
    (ramdisk / "initrd").write_bytes(bytes(RAMDISK_BYTES))
    leases = dhcp_leases(settings)
    leases.parent.mkdir()
    leases.write_text(f"{int(time.time()) + 3600} {mac(1)} {AT_HOST} * *\n")
    with serving(config, "--only", "boot"):
        service = wiring.build(settings)
        try:
            made = Listener(settings, service)
            # The first decision of a process takes longest, and whoever waits too long for his
            # boots his disk. This one is about nobody.
            made.get(f"/boot/ipxe?mac={mac(9)}&uuid={NOBODYS_UUID}").close()
            yield made
        finally:
            service.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with a_listener(tmp_path / "installation") as made:
        made.boot()
        made.until("boot script")
        yield made


def test_kernel_and_ramdisk_are_seen_to_be_taken_whole(listener: Listener) -> None:
    assert listener.why().cause == "download_not_begun"
    with listener.get(KERNEL) as sock:
        read(sock, KERNEL_BYTES)
        listener.again(sock, INITRD)  # on the same connection, as iPXE does
        read(sock, RAMDISK_BYTES)
        listener.until("ramdisk: taken whole")
        listener.until("kernel: taken whole")
    texts = {one.text.split(" in ")[0] for one in listener.lines()[1:]}
    assert texts == {
        f"kernel: asked for, {KERNEL_BYTES} bytes",
        f"kernel: taken whole, {KERNEL_BYTES} bytes",
        f"ramdisk: asked for, {RAMDISK_BYTES} bytes",
        f"ramdisk: taken whole, {RAMDISK_BYTES} bytes",
    }
    assert listener.why().cause == "ramdisk_silent"


def test_a_client_that_breaks_off_in_the_middle_of_the_ramdisk(listener: Listener) -> None:
    with listener.get(KERNEL) as sock:
        read(sock, KERNEL_BYTES)
    sock = listener.get(INITRD)
    read(sock, BROKEN_OFF_AT)
    listener.until("ramdisk: asked for")  # lines are saved a moment later
    assert listener.why().cause == "download_not_over"
    break_off(sock)
    line = listener.until("ramdisk: broke off")
    taken = line.detail["taken_bytes"]
    assert BROKEN_OFF_AT <= taken <= BROKEN_OFF_AT + BUFFERED_BYTES_MAX
    found = listener.why()
    assert found.cause == "download_cut"
    assert f"broke off once, at last after {taken} of {RAMDISK_BYTES} bytes" in found.why
    assert line.text in [one.text for one in found.evidence]


def test_the_end_of_a_file_is_not_taken_before_it_was_acknowledged(listener: Listener) -> None:
    """The server is done once its own kernel has the last bytes; the host may lack them still."""
    sock = listener.get(INITRD, buffer=SMALL_BUFFER)
    read(sock, RAMDISK_BYTES - NEAR_THE_END)
    listener.until("ramdisk: asked for")
    time.sleep(1)  # by now the server's buffer holds what is left
    assert [one.text.split(",")[0] for one in listener.lines()[1:]] == ["ramdisk: asked for"]
    break_off(sock)
    line = listener.until("ramdisk: broke off")
    assert line.detail["taken_bytes"] < RAMDISK_BYTES


def test_a_loader_that_starts_the_ramdisk_before_it_acknowledges_its_end(
    listener: Listener,
) -> None:
    """iPXE does. Whether the last bytes came nobody can tell, so it is not said to have failed."""
    sock = listener.get(INITRD, buffer=SMALL_BUFFER)
    read(sock, RAMDISK_BYTES - AT_THE_END)
    line = listener.until("ramdisk: sent whole")  # it is silent, and not gone
    break_off(sock)
    assert RAMDISK_BYTES - AT_THE_END <= line.detail["taken_bytes"] < RAMDISK_BYTES
    assert listener.why().cause == "ramdisk_silent"


def test_a_download_on_its_way_is_told_now_and_then_and_a_standstill_once(tmp_path: Path) -> None:
    said: list[Event] = []
    ticking = Looked()
    path = tmp_path / "initrd"
    path.write_bytes(bytes(RAMDISK_BYTES))
    app = Flask("test")
    with connected() as (server, host), app.app_context():
        watch = Downloads(said.append, utc_now, ticking, look_s=0.01)
        with app.test_request_context(environ_overrides={"gunicorn.socket": server}):
            response = watch.watch(send_file(path, mimetype="a/b"), path, "initrd")

        def be_looked_at() -> None:
            """Return when a whole look has begun and ended."""
            before = ticking.looks
            wait_for(lambda: ticking.looks >= before + 2, said)

        def then(sent: int, text: str) -> None:
            """Let the host take some, and time pass until a line is due."""
            ticking.at += TELL_S - 1
            server.sendall(bytes(sent))
            read(host, sent)
            wait_for(lambda: unacknowledged(server) == 0, said)
            be_looked_at()
            ticking.at += 1
            wait_for(lambda: said[-1].text.startswith(text), said)

        then(1000, "ramdisk: on its way, 1000 of")
        then(0, "ramdisk: nothing taken for 21 s, after 1000 of")
        ticking.at += 10 * TELL_S
        be_looked_at()
        assert len(said) == 3
        for number in range(1, TOLD_MAX - 1):
            then(1, f"ramdisk: on its way, {1000 + number} of")
        ticking.at += 10 * TELL_S
        be_looked_at()
        assert len(said) == 1 + TOLD_MAX
        response.close()
        wait_for(lambda: said[-1].text.startswith("ramdisk: broke off after 0 of"), said)


def test_a_ramdisk_that_is_not_there(listener: Listener) -> None:
    (listener.settings.data_dir / "ramdisks" / RAMDISK / "initrd").unlink()
    with listener.get(KERNEL) as sock:
        read(sock, KERNEL_BYTES)
    listener.get(INITRD, status=404).close()
    listener.until("ramdisk: there is no such file")
    assert listener.why().cause == "ramdisk_missing"


def test_strangers_and_a_look_at_the_headers_leave_no_line(listener: Listener) -> None:
    for _ in range(5):
        with listener.get(KERNEL, AT_STRANGER) as sock:
            read(sock, KERNEL_BYTES)
    with listener.get(KERNEL) as sock:
        read(sock, KERNEL_BYTES)
    listener.until("kernel: taken whole")
    assert [one.text.split(":")[0] for one in listener.lines()] == ["boot script", *["kernel"] * 2]


def test_behind_an_nginx_nothing_is_seen_and_nothing_claimed(tmp_path: Path) -> None:
    with a_listener(tmp_path / "installation", "accel = true\n") as listener:
        listener.boot()
        listener.get(KERNEL).close()
        script = listener.until("boot script")
        assert SEEN not in script.detail
        assert len(listener.lines()) == 1
        assert listener.why().cause == "ramdisk_not_heard"
