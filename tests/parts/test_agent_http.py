"""The agent's HTTP client against a server that says exactly what a test wants."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from provisioner.agent.boot_args import parse_boot_args
from provisioner.agent.http import BodyCut, Connection, HttpBroken, Origin
from provisioner.agent.problems import BootArguments
from tests.parts.busy_machine import in_one_of


@contextmanager
def saying(*answers: bytes) -> Iterator[tuple[Connection, list[bytes]]]:
    """A server that gives one answer to each connection, then closes it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for answer in answers:
                connection, _ = server.accept()
                with connection:
                    heard.append(connection.recv(65536))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        origin = Origin.parse(f"http://127.0.0.1:{server.getsockname()[1]}/prefix/")
        yield Connection(origin, timeout_s=60), heard
        thread.join(60)


def test_an_answer_is_read_into_the_buffer() -> None:
    """Status, body, and a request that names host and path."""
    into = bytearray(10)
    with saying(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody") as (connection, heard):
        assert connection.request("GET", "/a", into=into) == (200, 4)
    assert bytes(into[:4]) == b"body"
    assert heard[0].startswith(b"GET /prefix/a HTTP/1.1\r\nHost: 127.0.0.1:")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbod",
        b"HTTP/1.1 200 OK\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + b"x" * 99,
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxy",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx",
        b"HTTP/1.1 999 No\r\nContent-Length: 1\r\n\r\nx",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 40000 + b"\r\n\r\n",
    ],
)
def test_field_28_what_is_not_a_whole_answer_is_an_error(answer: bytes) -> None:
    """Short, long, unbounded and foreign answers are never taken for content."""
    with saying(answer) as (connection, _), pytest.raises(OSError):  # noqa: PT011 - or a subclass
        connection.request("GET", "/", into=bytearray(10))


def test_a_connection_that_the_server_closed_is_opened_again() -> None:
    """Servers close idle connections; the next request does not fail for it."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
    with saying(answer, answer) as (connection, heard):
        for _ in range(2):
            assert connection.request("GET", "/", into=bytearray(10)) == (200, 1)
            # Wait for the server's end of the connection, as time would bring it.
            assert connection.wait_until_readable(60)
    assert len(heard) == 2


DRIBBLE_S = 120.0
HEAD_OF_1000 = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"


@contextmanager
def dribbling(at_once: bytes) -> Iterator[Origin]:
    """A server whose answer goes on, after its begin, with a byte now and then."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            ends_at = time.monotonic() + DRIBBLE_S
            with connection, suppress(OSError):
                connection.sendall(at_once)
                while time.monotonic() < ends_at and not over.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Origin.parse(f"http://127.0.0.1:{server.getsockname()[1]}")
        finally:
            over.set()
            thread.join(60)


@pytest.mark.parametrize("at_once", [b"HTTP/1.1 200 OK\r\nX: ", HEAD_OF_1000])
def test_a_byte_now_and_then_does_not_hold_a_worker(at_once: bytes) -> None:
    """Each byte comes well within the timeout; the whole answer does not."""
    began = time.monotonic()
    with dribbling(at_once) as origin:
        too_slow(origin, bytearray(1000))
    assert time.monotonic() - began < DRIBBLE_S / 2


def test_what_came_before_it_was_too_slow_is_kept() -> None:
    def attempt() -> None:
        into = bytearray(1000)
        with dribbling(HEAD_OF_1000 + b"whole") as origin:
            cut = too_slow(origin, into)
        assert isinstance(cut, BodyCut)  # and not before the answer began, on a busy machine
        assert cut.received >= 5
        assert bytes(into[: cut.received]).startswith(b"whole")

    in_one_of(attempt)


def too_slow(origin: Origin, into: bytearray) -> OSError:
    with pytest.raises(OSError, match=r"too slowly|timed out") as caught:
        Connection(origin, timeout_s=0.4).request("GET", "/", into=into)
    return caught.value


def test_reading_ends_when_the_agent_has_to_stop() -> None:
    stop = threading.Event()
    began = time.monotonic()
    threading.Timer(0.3, stop.set).start()
    with dribbling(HEAD_OF_1000) as origin, pytest.raises(OSError, match="stop"):
        Connection(origin, timeout_s=DRIBBLE_S, stop=stop).request("GET", "/", into=bytearray(1000))
    assert time.monotonic() - began < DRIBBLE_S / 2


@pytest.mark.parametrize(
    "url",
    [
        "ftp://1.2.3.4/",
        "http://name/",
        "http://1.2.3.4:1 /x",
        "http://1.2.3.4:65536",
        "1.2.3.4",
        "http://[::1]/",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    """The ramdisk resolves no names."""
    with pytest.raises(ValueError, match="not a URL"):
        Origin.parse(url)


def test_an_answer_that_is_too_large_says_so() -> None:
    """The limit is the caller's buffer."""
    with (
        saying(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n") as (connection, _),
        pytest.raises(HttpBroken, match="where 10 are the limit"),
    ):
        connection.request("GET", "/", into=bytearray(10))


GOOD = "provisioner.boot=http://10.77.0.1:8081 provisioner.agent=https://10.77.0.1:8443"


def test_the_command_line_is_understood_and_keeps_its_secret() -> None:
    """Addresses and ticket are found among other words; repr leaves the ticket out."""
    args = parse_boot_args(f"quiet {GOOD} provisioner.ticket=abc panic=30")
    assert (args.ticket, args.boot.port, args.agent.port) == ("abc", 8081, 8443)
    assert "abc" not in repr(args)


@pytest.mark.parametrize(
    "line",
    [
        "",
        GOOD,
        f"{GOOD} provisioner.ticket=",
        f"{GOOD} provisioner.ticket=a".replace("https", "http"),
        f"{GOOD} provisioner.ticket=a".replace("10.77.0.1", "name"),
    ],
)
def test_a_command_line_that_lacks_something_is_refused(line: str) -> None:
    """TLS for the agent is not optional."""
    with pytest.raises(BootArguments):
        parse_boot_args(line)
