"""What TFTP looks up while it serves: a host's grub.cfg from the boot listener, and ramdisks.

The listener is a real HTTP server; the clients are curl and one that misbehaves.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from provisioner.netboot.relay import ANSWER_BYTES_MAX, BootRelay, Content
from provisioner.netboot.tftp import Outcome, TftpLimits
from provisioner.netboot.tftp_lookup import WAITING_PER_SOURCE_MAX

from .processes import until
from .tftp_clients import CLIENT_LIMIT_S, Client, curl, request_packet, serving

MAC = "52:54:00:77:00:01"
UUID = "52540077-0001-4000-8000-000000000001"
ANSWER = f"/boot/grub/{MAC}/{UUID}"
DIGEST = "ab" * 32
BLOCK_BYTES = 1024  # GRUB's


class Listener(ThreadingHTTPServer):
    """Answers each request with `status` and `body`, and keeps its path."""

    def __init__(self) -> None:
        self.status, self.body = 200, b"exit\n"
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[Listener]:
    with running_listener() as server:
        yield server


@contextmanager
def running_listener() -> Iterator[Listener]:
    with Listener() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetched(address: tuple[str, int], name: str, folder: Path) -> bytes | None:
    """Return what curl gets for a name (with its leading slash), or None for no such file."""
    to = folder / "got"
    to.unlink(missing_ok=True)
    # curl cuts one slash off.
    code = curl(address, "/" + name.removeprefix("/"), to, BLOCK_BYTES).wait(CLIENT_LIMIT_S)
    return to.read_bytes() if code == 0 else None


def test_a_hosts_answer_comes_from_the_boot_listener(tmp_path: Path, listener: Listener) -> None:
    listener.body = b"x" * 3000
    with serving({}, source=BootRelay(listener.url, tmp_path)) as served:
        assert fetched(served.address, ANSWER, tmp_path) == listener.body
        event = served.wait_for_events(1)[0]
    assert (event.file, event.outcome) == (ANSWER, Outcome.SERVED)
    (path,) = listener.asked
    assert urlsplit(path).path == "/boot/grub"
    assert parse_qs(urlsplit(path).query) == {
        "mac": [MAC],
        "uuid": [UUID],
        "address": ["127.0.0.1"],
    }


def test_a_host_without_a_uuid_is_answered(tmp_path: Path, listener: Listener) -> None:
    with serving({}, source=BootRelay(listener.url, tmp_path)) as served:
        assert fetched(served.address, f"/boot/grub/{MAC}/", tmp_path) == b"exit\n"


@pytest.mark.parametrize("wrong", ["away", "status", "too large"])
def test_without_an_answer_there_is_no_file(tmp_path: Path, wrong: str) -> None:
    """GRUB's first configuration then goes on to the host's own disk."""
    with running_listener() as listener:
        url = listener.url
        if wrong == "status":
            listener.status = 500
        elif wrong == "too large":
            listener.body = b"x" * (ANSWER_BYTES_MAX + 1)
        elif wrong == "away":
            url = "http://127.0.0.1:9"
        with serving({}, source=BootRelay(url, tmp_path)) as served:
            assert fetched(served.address, ANSWER, tmp_path) is None
            assert served.wait_for_events(1)[0].outcome is Outcome.NOT_FOUND


@pytest.mark.parametrize(
    "name",
    [
        "/boot/grub",
        "/boot/grub/",
        f"/boot/grub/{MAC}",
        "/boot/grub/AA:54:00:77:00:01/",
        f"/boot/grub/{MAC}/{UUID}/x",
        f"/boot/grub/{MAC}/../..",
        f"/boot/grub/{MAC}?mac=52:54:00:77:00:02/",
        f"boot/grub/{MAC}/",
        f"/ramdisks/{DIGEST}/ramdisk.json",
        f"/ramdisks/{DIGEST}/../../keys/master.key",
        f"/ramdisks/../{DIGEST}/vmlinuz",
        f"/ramdisks/{DIGEST[:-1]}/vmlinuz",
        f"/ramdisks/{'cd' * 32}/vmlinuz",
    ],
)
def test_no_other_name_is_looked_for(tmp_path: Path, listener: Listener, name: str) -> None:
    folder = tmp_path / DIGEST
    folder.mkdir()
    for file in ("vmlinuz", "ramdisk.json"):
        (folder / file).write_bytes(b"1")
    with (
        serving({}, source=BootRelay(listener.url, tmp_path)) as served,
        Client(served.address) as client,
    ):
        client.ask(request_packet(name.encode()))
        assert client.receive()[:4] == b"\0\5\0\1"
    assert listener.asked == []


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 300_000])
def test_a_ramdisks_files_are_served_by_digest(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / DIGEST).mkdir()
    (tmp_path / DIGEST / "initrd").write_bytes(content)
    with serving({}, source=BootRelay("http://127.0.0.1:9", tmp_path)) as served:
        got = fetched(served.address, f"/ramdisks/{DIGEST}/initrd", tmp_path)
    # Nobody makes an empty one; it is no file.
    assert got == (content or None)


class Held:
    """A source that knows one name, and answers when it is let go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._goes_on = threading.Event()

    def has(self, name: str) -> bool:
        return name == ANSWER

    def find(self, name: str, client: str) -> Content | None:
        assert name == ANSWER
        self.asked.append(client)
        self._goes_on.wait(CLIENT_LIMIT_S)
        return b"exit\n"

    def go_on(self) -> None:
        self._goes_on.set()


@pytest.fixture
def held() -> Iterator[Held]:
    source = Held()
    yield source
    source.go_on()


def test_a_request_that_is_sent_again_is_looked_for_once(held: Held) -> None:
    """While it waits, others are served; and GRUB sends its request each 0.4 s."""
    with (
        serving({"file": b"1"}, source=held) as served,
        Client(served.address) as client,
        Client(served.address) as other,
    ):
        for _ in range(5):
            client.ask(request_packet(ANSWER.encode()))
        other.ask(request_packet(b"file"))
        assert other.receive() == b"\0\3\0\1" + b"1"
        held.go_on()
        assert client.receive() == b"\0\3\0\1" + b"exit\n"
        client.acknowledge(1)
        served.wait_for_events(1)
        assert client.hears_nobody_but_its_peer(0.2)
    assert len(held.asked) == 1


def test_a_client_that_asks_for_something_else_meanwhile_gets_that(held: Held) -> None:
    with (
        serving({"file": b"1"}, TftpLimits(answer_s=60.0), source=held) as served,
        Client(served.address) as client,
    ):
        client.ask(request_packet(ANSWER.encode()))
        client.ask(request_packet(b"file"))
        assert client.receive() == b"\0\3\0\1" + b"1"
        held.go_on()
        assert client.hears_nobody_but_its_peer(0.5)
        client.acknowledge(1)
        assert [event.file for event in served.wait_for_events(1)] == ["file"]


def test_one_address_cannot_keep_all_others_waiting(held: Held) -> None:
    refused = 3
    with serving({}, source=held) as served:
        many = [Client(served.address) for _ in range(WAITING_PER_SOURCE_MAX + refused)]
        for client in many:
            client.ask(request_packet(ANSWER.encode()))
        events = served.wait_for_events(refused)
        with Client(served.address, source="127.0.0.2") as other:
            other.ask(request_packet(ANSWER.encode()))
            # Nobody is let go before somebody of another address waits with them.
            until(lambda: "127.0.0.2" in held.asked, 60)
            assert [event.outcome for event in events] == [Outcome.TOO_MANY] * refused
            held.go_on()
            assert other.receive().startswith(b"\0\3\0\1")
        for client in many[:WAITING_PER_SOURCE_MAX]:
            assert client.receive().startswith(b"\0\3\0\1")
        for client in many:
            client.socket.close()


class Broken:
    """A source with a bug."""

    def has(self, name: str) -> bool:
        return name == "broken"

    def find(self, name: str, client: str) -> Content | None:
        raise RuntimeError(f"{name} {client}")


def test_a_bug_of_a_source_costs_one_client_its_file() -> None:
    with (
        serving({"file": b"1"}, source=Broken()) as served,
        Client(served.address) as client,
    ):
        client.ask(request_packet(b"broken"))
        assert client.receive()[:4] == b"\0\5\0\1"
        client.peer = served.address
        client.ask(request_packet(b"file"))
        assert client.receive() == b"\0\3\0\1" + b"1"
