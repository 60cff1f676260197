"""A small HTTP/1.1 client over one kept connection, with or without TLS.

It knows what the agent needs, and refuses the rest: IPv4 addresses, Content-Length, no
redirects, no chunked transfer. Python's own client costs half a second of imports and
milliseconds per answer on a slow host; this one reads a chunk straight into its buffer.

Source: RFC 9112.
"""

import mmap
import re
import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Final, Self

HEADER_BYTES_MAX: Final = 16 * 1024
RECEIVE_BYTES: Final = 256 * 1024
# An answer that comes more slowly is cut: who gives a byte now and then would hold a worker
# for years. A hundred hosts with sixteen threads each that share one gigabit get more.
LEAST_BYTES_PER_S: Final = 16 * 1024
# More than any buffer has. Python refuses to read numbers of many thousands of digits.
_LENGTH_DIGITS_MAX: Final = 15
_PORT_MAX: Final = 65535
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL's x509_vfy.h, which the ssl module does not name.
_NO_CHECK_TIME: Final = 0x200000
_URL: Final = re.compile(r"(https?)://([0-9.]{7,15})(?::([0-9]{1,5}))?(/[!-~]*)?")
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?")


Buffer = bytearray | mmap.mmap


def lazy_buffer(size_bytes: int) -> mmap.mmap:
    """Return a buffer that takes memory only where it is written to; a bytearray is all zeroed."""
    return mmap.mmap(-1, size_bytes)


class HttpBroken(OSError):
    """The connection ended early, or what came was not an answer we understand."""


class AnswerTooLarge(HttpBroken):
    """The answer does not fit into the buffer that was given for it. Asking again is no use."""


class BodyCut(HttpBroken):
    """The answer ended within its body; its first `received` bytes are in the buffer."""

    def __init__(self, status: int, received: int, length: int, why: object) -> None:
        super().__init__(f"the connection ended after {received} of {length} bytes: {why}")
        self.status = status
        self.received = received


@dataclass(frozen=True)
class Origin:
    """Where to connect: the part of a URL before its path, and the path in front of others."""

    is_tls: bool
    address: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Return the origin of `http(s)://1.2.3.4:80/prefix`; ValueError for anything else."""
        match = _URL.fullmatch(url)
        if match is None:
            raise ValueError(f"not a URL with an IPv4 address: {url!r}")
        scheme, address, port, prefix = match.groups()
        is_tls = scheme == "https"
        number = int(port) if port else (443 if is_tls else 80)
        if number > _PORT_MAX:
            raise ValueError(f"not a URL with a port that exists: {url!r}")
        return cls(is_tls, address, number, (prefix or "").rstrip("/"))

    def __str__(self) -> str:
        """Return the URL."""
        scheme = "https" if self.is_tls else "http"
        return f"{scheme}://{self.address}:{self.port}{self.prefix}"


def pinned_context(ca_file: str) -> ssl.SSLContext:
    """Return a TLS client context that trusts this one certificate file and nothing else.

    The name in the certificate does not matter, since the certificate itself is pinned. Nor
    does its validity: a server's clock may say 1970 before its first boot.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cafile=ca_file)
    context.verify_flags |= _NO_CHECK_TIME
    return context


class Connection:
    """One connection, opened when first needed and kept. For one thread at a time.

    timeout_s is how long nothing may come, and the whole head of an answer may take; its body
    has as long once more, and the time that LEAST_BYTES_PER_S gives it. Once `stop` is set
    nothing more is read.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        context: ssl.SSLContext | None = None,
        timeout_s: float,
        stop: threading.Event | None = None,
    ) -> None:
        if origin.is_tls and context is None:
            raise ValueError("an https origin needs a TLS context")
        self._origin = origin
        self._context = context
        self._timeout_s = timeout_s
        self._stop = stop or threading.Event()
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def wait_until_readable(self, limit_s: float) -> bool:
        """Say whether the kept connection, if there is one, has something to read."""
        return self._socket is not None and bool(select.select([self._socket], [], [], limit_s)[0])

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        into: Buffer,
    ) -> tuple[int, int]:
        """Send one request; return its status and how many bytes of body are now in `into`.

        Raises OSError when no whole answer came: BodyCut when it ended within its body,
        AnswerTooLarge when that does not fit into `into`, HttpBroken when it is no answer.
        The connection is closed then, and may be used again.
        """
        try:
            connection = self._open()
            connection.sendall(self._head(method, path, headers or {}, body) + (body or b""))
            return self._receive(connection, into)
        except BaseException:
            self.close()
            raise

    def _open(self) -> socket.socket:
        # Something to read before we asked is the server's goodbye: it closes idle connections.
        if self.wait_until_readable(0):
            self.close()
        if self._socket is None:
            plain = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._socket = plain
            plain.settimeout(self._timeout_s)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.connect((self._origin.address, self._origin.port))
            if self._origin.is_tls and self._context is not None:
                self._socket = self._context.wrap_socket(plain)
        self._socket.settimeout(self._timeout_s)
        return self._socket

    def _head(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> bytes:
        lines = [f"{method} {self._origin.prefix}{path} HTTP/1.1"]
        lines += [f"Host: {self._origin.address}:{self._origin.port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def _receive(self, connection: socket.socket, into: Buffer) -> tuple[int, int]:
        head, rest = self._read_head(connection)
        status, length, keeps = _understand(head)
        if length > len(into):
            raise AnswerTooLarge(f"an answer of {length} bytes, where {len(into)} are the limit")
        if len(rest) > length:
            raise HttpBroken(f"more than the {length} bytes that were announced")
        ends_at = time.monotonic() + self._timeout_s + length / LEAST_BYTES_PER_S
        with memoryview(into) as view:
            view[: len(rest)] = rest
            have = len(rest)
            while have < length:
                try:
                    self._limit_next_read(connection, ends_at)
                    with view[have:length] as free:
                        count = connection.recv_into(free, min(length - have, RECEIVE_BYTES))
                except OSError as error:
                    raise BodyCut(status, have, length, error) from error
                if count == 0:
                    raise BodyCut(status, have, length, "closed")
                have += count
        if not keeps:
            self.close()
        return status, length

    def _read_head(self, connection: socket.socket) -> tuple[bytes, bytes]:
        """Return the header lines of the answer, and what of the body came with them."""
        ends_at = time.monotonic() + self._timeout_s
        data = b""
        while True:
            head, end, rest = data.partition(b"\r\n\r\n")
            if end:
                return head, rest
            if len(data) > HEADER_BYTES_MAX:
                raise HttpBroken("an answer without an end of its headers")
            self._limit_next_read(connection, ends_at)
            more = connection.recv(HEADER_BYTES_MAX)
            if not more:
                raise HttpBroken("the connection ended before an answer")
            data += more

    def _limit_next_read(self, connection: socket.socket, ends_at: float) -> None:
        """Let the next read end when the answer has to be here; raise when that is over."""
        if self._stop.is_set():
            raise HttpBroken("the agent has to stop")
        remaining_s = ends_at - time.monotonic()
        if remaining_s <= 0:
            raise HttpBroken("the answer comes too slowly")
        connection.settimeout(min(self._timeout_s, remaining_s))


def _understand(head: bytes) -> tuple[int, int, bool]:
    """Return status, length of the body, and whether the connection stays open."""
    first, *lines = head.split(b"\r\n")
    match = _STATUS.fullmatch(first)
    if match is None:
        raise HttpBroken(f"not an HTTP answer: {first[:80]!r}")
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    length = headers.get(b"content-length", b"")
    if b"transfer-encoding" in headers or not length.isdigit():
        raise HttpBroken("an answer without a Content-Length")
    if len(length) > _LENGTH_DIGITS_MAX:
        raise HttpBroken(f"a Content-Length of {len(length)} digits")
    keeps = headers.get(b"connection", b"").lower() != b"close" and not first.startswith(
        b"HTTP/1.0"
    )
    return int(match[1]), int(length), keeps
