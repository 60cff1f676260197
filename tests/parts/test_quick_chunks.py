"""Plain requests for chunks, which the boot listener's worker answers itself.

Its answers are known by what they lack: gunicorn puts a `Server` header into its own.
"""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

import pytest

from provisioner.agent.client import FileClient
from provisioner.agent.http import Origin
from provisioner.cli.serve.quick_worker import FIRST_REQUEST_S
from provisioner.core.batches import pack
from provisioner.web.file_source import LocalFiles, StoredElsewhere
from provisioner.web.quick_chunks import BODY_BYTES_MAX, EXTENSION, REQUEST_BYTES_MAX
from tests.parts.agent_service import CHUNK, MIB, Release, chunk_path, make_release
from tests.parts.processes import children, until
from tests.parts.quick_listener import quick_listener
from tests.parts.release_store import files_app, lay_out

LIMIT_S: Final = 60.0
HOST: Final = "Host: 127.0.0.1\r\n"


@dataclass(frozen=True)
class Got:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_quick(self) -> bool:
        return self.status == HTTPStatus.OK and "server" not in self.headers


class Line:
    """A kept connection on which a test says what it likes."""

    def __init__(self, address: tuple[str, int], *, window: int | None = None) -> None:
        self._socket = socket.socket()
        if window is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self._socket.settimeout(LIMIT_S)
        self._socket.connect(address)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def say(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def hear(self, *, has_body: bool = True) -> Got:
        status = re.fullmatch(rb"HTTP/1\.[01] (\d{3}) .*\r\n", self._file.readline())
        assert status
        headers = {}
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0)) if has_body else 0
        return Got(int(status[1]), headers, self._file.read(length))

    def hears_nothing(self, for_s: float) -> bool:
        self._socket.settimeout(for_s)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(LIMIT_S)

    def get(self, path: str, *more: str) -> Got:
        self.say(f"GET {path} HTTP/1.1\r\n{HOST}" + "".join(f"{one}\r\n" for one in more) + "\r\n")
        return self.hear()


@pytest.fixture(scope="module")
def release() -> Release:
    """A release of 70 chunks that do not compress."""
    return make_release(os.urandom(70 * CHUNK))


@pytest.fixture
def folder(tmp_path: Path, release: Release) -> Path:
    lay_out(tmp_path, release)
    return tmp_path


@pytest.fixture
def address(folder: Path) -> Iterator[tuple[str, int]]:
    with quick_listener(folder) as (address, _):
        yield address


@pytest.fixture
def line(address: tuple[str, int]) -> Iterator[Line]:
    with closing(Line(address)) as line:
        yield line


def path_of(release: Release, index: int) -> str:
    return chunk_path(str(release.manifest.chunks[index]))


def frames(release: Release, begin: int, end: int) -> bytes:
    return pack(release.chunks[path_of(release, index)] for index in range(begin, end))


def test_a_plain_answer_is_that_of_the_routes(line: Line, release: Release) -> None:
    """The routes are asked by a header that is not plain."""
    batch = f"{release.folder}/chunks"
    wanted = {
        path_of(release, 1): release.chunks[path_of(release, 1)],
        f"{batch}/0": frames(release, 0, 1),
        f"{batch}/3-66": frames(release, 3, 67),
    }
    plain = {path: line.get(path) for path in wanted for _ in range(2)}
    for path, body in wanted.items():
        routed = line.get(path, "X-Other: 1")
        assert plain[path].is_quick
        assert not routed.is_quick
        assert plain[path].body == routed.body == body
        assert plain[path].status == routed.status == 200
        # What the file system knows of a chunk is nobody's concern: its name says all.
        more = {"server", "last-modified", "content-disposition"}
        assert plain[path].headers.keys() == routed.headers.keys() - more
        assert {**plain[path].headers, "date": ""}.items() <= {**routed.headers, "date": ""}.items()


@pytest.mark.parametrize(
    "headers",
    [
        ["User-Agent: curl/8", "Accept: */*"],
        ["accept-encoding: gzip, zstd", "connection: keep-alive", "user-agent: python-httpx/1"],
    ],
)
def test_what_common_clients_say_is_plain(line: Line, release: Release, headers: list[str]) -> None:
    for path in (path_of(release, 0), f"{release.folder}/chunks/0-9"):
        assert line.get(path, *headers).is_quick


def test_what_an_agent_says_is_plain(line: Line, release: Release) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        client = FileClient(Origin.parse(f"http://127.0.0.1:{sock.getsockname()[1]}"))
        for path in (path_of(release, 0), f"{release.folder}/chunks/0-9,12"):
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(client.get, path, bytearray(CHUNK))
                with sock.accept()[0] as heard:
                    said = heard.recv(REQUEST_BYTES_MAX).decode()
                assert isinstance(asked.exception(LIMIT_S), OSError)
            line.say(said)
            assert line.hear().is_quick


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Range: bytes=2-5", 206),
        ('If-None-Match: "{digest}"', 304),
        ("Connection: close", 200),
        ("Content-Length: 0", 200),
        ("Host: another", 400),
        ("Accept: \x01", 400),
        (f"User-Agent: {'x' * REQUEST_BYTES_MAX}", 200),
    ],
)
def test_what_may_change_the_answer_is_not_plain(
    line: Line, release: Release, header: str, status: int
) -> None:
    path = path_of(release, 0)
    digest = path.rsplit("/", 1)[1]
    got = line.get(path, header.format(digest=digest))
    assert not got.is_quick
    assert got.status == status
    if status == 206:
        assert got.body == release.chunks[path][2:6]


def test_other_requests_are_answered_as_ever(address: tuple[str, int], release: Release) -> None:
    path = path_of(release, 0)
    digest = path.rsplit("/", 1)[1]
    other = "0" * 64 if not digest.startswith("00") else "1" * 64
    asked = {
        f"HEAD {path} HTTP/1.1\r\n{HOST}\r\n": 200,
        f"POST {path} HTTP/1.1\r\n{HOST}\r\n": 405,
        f"GET {path} HTTP/1.0\r\n\r\n": 200,
        f"GET {path}?a=b HTTP/1.1\r\n{HOST}\r\n": 200,
        f"GET /chunks/{digest[:2]}/{other} HTTP/1.1\r\n{HOST}\r\n": 404,
        f"GET /chunks/{digest[:2]}/{digest.upper()}A HTTP/1.1\r\n{HOST}\r\n": 404,
        f"GET /chunks/{digest[:2]}/../../state.db HTTP/1.1\r\n{HOST}\r\n": 404,
        f"GET {release.folder}/chunks/70 HTTP/1.1\r\n{HOST}\r\n": 400,
        f"GET {release.folder}/chunks/0-64 HTTP/1.1\r\n{HOST}\r\n": 400,
        f"GET /releases/{other}/chunks/0 HTTP/1.1\r\n{HOST}\r\n": 404,
    }
    for text, status in asked.items():
        with closing(Line(address)) as line:
            line.say(text)
            got = line.hear(has_body=not text.startswith("HEAD"))
        assert not got.is_quick, text
        assert got.status == status, text
        if status >= 400:
            assert got.headers["content-type"] == "application/problem+json"


def test_what_is_missing_is_a_problem(line: Line, folder: Path, release: Release) -> None:
    path = path_of(release, 1)
    assert line.get(path).is_quick
    (folder / path[1:]).unlink()
    assert line.get(path).status == 404
    got = line.get(f"{release.folder}/chunks/0-2")
    assert got.status == 404
    assert b"chunk 1 of release" in got.body


def test_a_chunk_too_large_for_the_buffer_comes_from_the_routes(
    line: Line, folder: Path, release: Release
) -> None:
    path = path_of(release, 0)
    for size, is_quick in ((BODY_BYTES_MAX, True), (BODY_BYTES_MAX + 1, False)):
        data = os.urandom(size)
        (folder / path[1:]).write_bytes(data)
        got = line.get(path)
        assert (got.status, got.body == data, got.is_quick) == (200, True, is_quick)


# --- where a request ends -----------------------------------------------------------------


def test_requests_that_come_together_are_answered_in_order(line: Line, release: Release) -> None:
    paths = [path_of(release, index) for index in range(3)]
    assert line.get(paths[0]).is_quick
    line.say("".join(f"GET {path} HTTP/1.1\r\n{HOST}\r\n" for path in paths))
    assert [line.hear().body for _ in paths] == [release.chunks[path] for path in paths]


def test_a_body_is_never_taken_for_a_request(line: Line, release: Release) -> None:
    """It comes when the answer to its own request is out already, and reads like a request."""
    hidden = f"GET {path_of(release, 0)} HTTP/1.1\r\n{HOST}\r\n"
    line.say(f"POST /chunks HTTP/1.1\r\n{HOST}Content-Length: {len(hidden)}\r\n\r\n")
    assert line.hear().status == 404
    line.say(hidden)
    assert line.hears_nothing(1.0)
    got = line.get(path_of(release, 1))
    assert got.body == release.chunks[path_of(release, 1)]
    assert not got.is_quick, "a connection that gunicorn has read stays with it"


def test_a_request_may_come_in_pieces(line: Line, release: Release) -> None:
    path = path_of(release, 0)
    assert line.get(path).is_quick
    line.say(f"GET {path[:20]}")
    time.sleep(0.1)
    line.say(f"{path[20:]} HTTP/1.1\r\n{HOST}\r\n")
    assert line.hear().body == release.chunks[path]


def test_who_connects_and_asks_later_is_answered(folder: Path, release: Release) -> None:
    with (
        quick_listener(folder, meets_the_silent=True) as (address, _),
        closing(Line(address)) as line,
    ):
        time.sleep(FIRST_REQUEST_S * 2)
        got = line.get(path_of(release, 0))
    assert got.body == release.chunks[path_of(release, 0)]


# --- slow clients, and the end ------------------------------------------------------------


def test_a_slow_client_gets_all_and_holds_up_nobody(
    address: tuple[str, int], folder: Path, release: Release
) -> None:
    path, other = path_of(release, 0), path_of(release, 1)
    data = os.urandom(BODY_BYTES_MAX)
    (folder / path[1:]).write_bytes(data)
    with closing(Line(address, window=4096)) as slow, closing(Line(address)) as quick:
        # The first is answered by a thread, the second where the worker learns of it.
        for _ in range(2):
            slow.say(f"GET {path} HTTP/1.1\r\n{HOST}\r\n")
            time.sleep(0.2)
            for _ in range(3):
                assert quick.get(other).body == release.chunks[other]
            got = slow.hear()
            assert (got.is_quick, got.body == data) == (True, True)


def test_a_client_that_leaves_in_the_middle_is_forgotten(
    address: tuple[str, int], folder: Path, release: Release
) -> None:
    path = path_of(release, 0)
    (folder / path[1:]).write_bytes(os.urandom(BODY_BYTES_MAX))
    for _ in range(8):
        with closing(Line(address, window=4096)) as line:
            for _ in range(2):
                line.say(f"GET {path} HTTP/1.1\r\n{HOST}\r\n")
                time.sleep(0.02)
    with closing(Line(address)) as line:
        assert line.get(path_of(release, 1)).is_quick


def test_a_server_that_ends_says_so(folder: Path, release: Release) -> None:
    """Its worker stands still meanwhile, and finds both when it goes on: that it is to end, and
    the next request."""
    path = path_of(release, 0)
    with quick_listener(folder) as (address, process), closing(Line(address)) as line:
        assert line.get(path).headers["connection"] == "keep-alive"
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        until(lambda: is_told_to_end(worker), LIMIT_S)
        line.say(f"GET {path} HTTP/1.1\r\n{HOST}\r\n")
        os.kill(worker, signal.SIGCONT)
        got = line.hear()
        assert got.body == release.chunks[path]
        assert got.headers["connection"] == "close"


def is_told_to_end(pid: int) -> bool:
    """Say whether a SIGTERM waits for this process."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = re.search(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)
    assert pending
    return bool(int(pending[1], 16) & 1 << signal.SIGTERM - 1)


# --- what is in memory --------------------------------------------------------------------


@pytest.mark.parametrize("begun_bytes", [0, 4096])
def test_nobody_waits_for_a_disk_who_may_not(tmp_path: Path, begun_bytes: int) -> None:
    """A file that is partly in memory is not served in part."""
    data = os.urandom(MIB)
    (tmp_path / "file").write_bytes(data)
    files, into = LocalFiles(tmp_path), memoryview(bytearray(2 * MIB))
    assert files.read_into("file", into, may_wait=False) == MIB
    file = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file, begun_bytes, 0)
        found = files.read_into("file", into, may_wait=False)
    finally:
        os.close(file)
    if found == MIB:
        pytest.skip("this file system keeps everything in memory")
    assert found is None
    assert files.read_into("file", into) == MIB
    assert into[:MIB] == data


def test_what_does_not_fit_or_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    files = LocalFiles(tmp_path)
    assert files.read_into("file", memoryview(bytearray(5))) == 5
    assert files.read_into("file", memoryview(bytearray(4))) is None
    assert files.read_into(".", memoryview(bytearray(4))) is None
    assert files.read_into("other", memoryview(bytearray(4))) is None


def test_files_that_another_sends_or_keeps_are_left_to_the_routes(tmp_path: Path) -> None:
    here = LocalFiles(tmp_path)
    assert EXTENSION in files_app(here).extensions
    assert EXTENSION not in files_app(here, accel=True).extensions
    elsewhere = StoredElsewhere(here, lambda *_: b"")
    assert EXTENSION not in files_app(elsewhere).extensions
