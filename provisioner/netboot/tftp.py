"""Serves files by TFTP: reads only, one process, one loop.

Packets are parsed by tftpy (see `tftp_request.py`); the loop is ours, so that a bad packet
closes at most its own session. It knows neither directories nor paths, only exact names,
and those that a source has (see `relay.py`).
"""

import os
import select
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import structlog

from provisioner.errors import ConfigError
from provisioner.netboot.relay import Content, Source
from provisioner.netboot.tftp_lookup import Lookup
from provisioner.netboot.tftp_request import (
    NAME_CHARACTERS_MAX,
    REQUEST_BYTES_MAX,
    BadRequest,
    ErrorCode,
    ReadRequest,
    error_packet,
    read_request,
)
from provisioner.netboot.tftp_transfer import Transfer

FILES_BYTES_MAX: Final = 512 * 1024 * 1024  # all files are held in memory
TICK_S: Final = 0.02  # how often resending is looked at
REQUESTS_PER_TURN_MAX: Final = 64  # new requests read before running transfers get a turn
RECEIVE_BUFFER_BYTES: Final = 1024 * 1024

_ACK = struct.Struct("!HH")
_OPCODE_ACK: Final = 4
_OPCODE_ERROR: Final = 5

log = structlog.get_logger(__name__)


class Outcome(StrEnum):
    SERVED = "served"
    UNCONFIRMED = "unconfirmed"  # all was sent; only the last acknowledgement is missing
    ABORTED = "aborted"  # by the client; common, as boot ROMs first ask for the size only
    TIMED_OUT = "timed out"
    NOT_FOUND = "not found"
    REFUSED = "refused"
    TOO_MANY = "too many transfers"
    STOPPED = "stopped"


@dataclass(frozen=True)
class TftpEvent:
    """What became of one request. `file` is the name as asked for, made printable."""

    client: str
    file: str
    outcome: Outcome
    detail: str = ""
    sent_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class TftpLimits:
    """A request beyond a limit is dropped without an answer: its sender asks again."""

    sessions: int = 256
    sessions_per_source: int = 8
    answer_s: float = 5.0  # until the first acknowledgement, and for the last one
    idle_s: float = 15.0  # between two acknowledgements
    refusals_reported_per_s: int = 20


OnEvent = Callable[[TftpEvent], None]


class _Session:
    """A transfer with its socket. Connected, so that the kernel drops strangers' packets."""

    __slots__ = ("client", "file", "socket", "started_at", "transfer")

    def __init__(
        self, sock: socket.socket, client: tuple[str, int], file: str, transfer: Transfer
    ) -> None:
        self.socket = sock
        self.client = client
        self.file = file
        self.transfer = transfer
        self.started_at = transfer.moved_at


class TftpServer:
    """A TFTP server on one address.

    `listen` is (IPv4 address, port); port 0 takes a free one, see `address`. It must be
    the address that clients ask, not 0.0.0.0, on a host with several. `files` are read
    once, here; `source` is asked for other names, in threads. `on_event` runs in the loop:
    it must be quick and may not raise.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        files: Mapping[str, bytes | Path],
        *,
        on_event: OnEvent,
        limits: TftpLimits | None = None,
        source: Source | None = None,
    ) -> None:
        self._files = _frozen(files)
        self._lookup = Lookup(source) if source else None
        self._on_event = on_event
        self._limits = limits or TftpLimits()
        self._sessions: dict[int, _Session] = {}
        self._by_client: dict[tuple[str, int], _Session] = {}
        self._per_source: Counter[str] = Counter()
        self._refusals: tuple[int, int] = (0, 0)  # (second, reported in it)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._main = _bound(listen)
        self._main.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self.address: tuple[str, int] = self._main.getsockname()

    def stop(self) -> None:
        """Make `serve` return soon. May be called from any thread or signal handler."""
        os.eventfd_write(self._wake, 1)

    def serve(self) -> None:
        """Serve until `stop`. Call once."""
        with select.epoll() as poll:
            self._poll = poll
            poll.register(self._main, select.EPOLLIN)
            poll.register(self._wake, select.EPOLLIN)
            if self._lookup:
                poll.register(self._lookup.handle, select.EPOLLIN)
            try:
                self._loop(poll)
            finally:
                if self._lookup:
                    self._lookup.close()
                for session in list(self._sessions.values()):
                    self._close(session, Outcome.STOPPED)
                self._main.close()
                os.close(self._wake)

    def _loop(self, poll: select.epoll) -> None:
        main = self._main.fileno()
        sweep_at = 0.0
        while True:
            for fd, _ in poll.poll(TICK_S if self._sessions else None):
                if fd == self._wake:
                    return
                if fd == main:
                    self._take_requests()
                elif self._lookup and fd == self._lookup.handle:
                    self._take_found(self._lookup)
                elif (session := self._sessions.get(fd)) is not None:
                    self._guarded(session, self._take_packet)
            if self._sessions and time.monotonic() >= sweep_at:
                for session in list(self._sessions.values()):
                    self._guarded(session, self._look_at_clock)
                sweep_at = time.monotonic() + TICK_S

    def _guarded(self, session: _Session, act: Callable[[_Session], None]) -> None:
        """Let whatever goes wrong in one session end that session only."""
        try:
            act(session)
        except ConnectionRefusedError:
            # The client closed its port, as many do right after their last acknowledgement.
            self._close(session, self._ended(session, Outcome.ABORTED))
        except BlockingIOError:
            pass  # a full send buffer is a lost packet; the clock sends it again
        except OSError as error:  # no route, no neighbour
            self._close(session, Outcome.ABORTED, error.strerror or "")
        except Exception:
            # The top of the server: our own bug may cost this client, never the others.
            log.exception("tftp session failed", client=session.client[0], file=session.file)
            self._close(session, Outcome.ABORTED, "internal error")

    def _take_requests(self) -> None:
        for _ in range(REQUESTS_PER_TURN_MAX):
            try:
                # One byte more than allowed shows a request that is too long.
                packet, client = self._main.recvfrom(REQUEST_BYTES_MAX + 1)
            except OSError:
                return  # nothing left, or an ICMP error for an earlier refusal
            try:
                self._begin(packet, client)
            except BadRequest as bad:
                self._refuse(client, bad)
            except Exception:
                log.exception("tftp request failed", client=client[0])

    def _take_found(self, lookup: Lookup) -> None:
        for request, client, content in lookup.take():
            if client in self._by_client:
                continue  # it asked for something else meanwhile
            try:
                self._open(request, client, content)
            except BadRequest as bad:
                self._refuse(client, bad)
            except Exception:
                log.exception("tftp request failed", client=client[0])

    def _begin(self, packet: bytes, client: tuple[str, int]) -> None:
        request = read_request(packet)
        running = self._by_client.get(client)
        if running is not None:
            if running.file == request.name and not running.transfer.is_begun:
                return  # the request was sent twice; our answer is on its way or resent
            self._close(running, Outcome.ABORTED, "the client began again")
        content = self._files.get(request.name)
        if content is None and self._lookup and self._lookup.has(request.name):
            if not self._lookup.ask(request, client):
                self._report_refusal(TftpEvent(client[0], request.name, Outcome.TOO_MANY))
            return
        self._open(request, client, content)

    def _open(self, request: ReadRequest, client: tuple[str, int], content: Content | None) -> None:
        if content is None:
            raise BadRequest("no such file", ErrorCode.NOT_FOUND, request.name)
        if (
            len(self._sessions) >= self._limits.sessions
            or self._per_source[client[0]] >= self._limits.sessions_per_source
        ):
            self._report_refusal(TftpEvent(client[0], request.name, Outcome.TOO_MANY))
            return
        transfer = Transfer(content, request, time.monotonic())
        session = _Session(self._connected(client), client, request.name, transfer)
        sock = session.socket
        self._sessions[sock.fileno()] = self._by_client[client] = session
        self._per_source[client[0]] += 1
        self._poll.register(sock, select.EPOLLIN)
        self._guarded(session, _send)

    def _connected(self, client: tuple[str, int]) -> socket.socket:
        sock = _bound((self.address[0], 0))
        try:
            sock.connect(client)
        except OSError as error:  # port 0, a broadcast address
            sock.close()
            raise BadRequest("a sender that cannot be answered", None) from error
        return sock

    def _take_packet(self, session: _Session) -> None:
        packet = session.socket.recv(REQUEST_BYTES_MAX)
        opcode, number = _ACK.unpack_from(packet) if len(packet) >= _ACK.size else (0, 0)
        if opcode == _OPCODE_ACK:
            if session.transfer.acknowledge(number, time.monotonic()):
                if session.transfer.is_done:
                    self._close(session, Outcome.SERVED)
                else:
                    _send(session)
        elif opcode == _OPCODE_ERROR:
            self._close(session, self._ended(session, Outcome.ABORTED), "by the client")
        else:
            session.socket.send(error_packet(ErrorCode.ILLEGAL))
            self._close(session, Outcome.REFUSED, "not an acknowledgement")

    def _look_at_clock(self, session: _Session) -> None:
        transfer, now = session.transfer, time.monotonic()
        if now < transfer.resend_at:
            return
        begun = transfer.is_begun and not transfer.lacks_only_last_ack
        patience = self._limits.idle_s if begun else self._limits.answer_s
        if now - transfer.moved_at > patience:
            self._close(session, self._ended(session, Outcome.TIMED_OUT))
            return
        for packet in transfer.resend(now):
            session.socket.send(packet)

    @staticmethod
    def _ended(session: _Session, otherwise: Outcome) -> Outcome:
        transfer = session.transfer
        is_whole = transfer.is_begun and transfer.lacks_only_last_ack
        return Outcome.UNCONFIRMED if is_whole else otherwise

    def _close(self, session: _Session, outcome: Outcome, detail: str = "") -> None:
        if self._sessions.pop(session.socket.fileno(), None) is None:
            return
        del self._by_client[session.client]
        source = session.client[0]
        self._per_source[source] -= 1
        if not self._per_source[source]:
            del self._per_source[source]
        session.socket.close()  # which also takes it out of the epoll set
        seconds = time.monotonic() - session.started_at
        sent = session.transfer.sent_bytes
        self._on_event(TftpEvent(source, session.file, outcome, detail, sent, seconds))

    def _refuse(self, client: tuple[str, int], bad: BadRequest) -> None:
        if bad.answer is not None:
            try:
                self._main.sendto(error_packet(bad.answer), client)
            except OSError as error:  # port 0, a broadcast address, a full buffer
                log.debug("tftp refusal not sent", client=client[0], error=str(error))
        is_missing = bad.answer is ErrorCode.NOT_FOUND
        outcome = Outcome.NOT_FOUND if is_missing else Outcome.REFUSED
        self._report_refusal(TftpEvent(client[0], bad.name, outcome, str(bad)))

    def _report_refusal(self, event: TftpEvent) -> None:
        """Report, unless a flood of nonsense would become a flood of events."""
        second = int(time.monotonic())
        reported = self._refusals[1] if self._refusals[0] == second else 0
        if reported < self._limits.refusals_reported_per_s:
            self._refusals = (second, reported + 1)
            self._on_event(event)


def serve_tftp(
    listen: tuple[str, int],
    files: Mapping[str, bytes | Path],
    *,
    on_event: OnEvent,
    limits: TftpLimits | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. In a thread, use TftpServer and its `stop` instead.

    Raises ConfigError when the address cannot be bound or a file cannot be read.
    """
    server = TftpServer(listen, files, on_event=on_event, limits=limits)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
    log.info("tftp listening", address=server.address, files=sorted(files))
    server.serve()


def _send(session: _Session) -> None:
    for packet in session.transfer.packets():
        session.socket.send(packet)


def _bound(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"TFTP cannot listen on {address[0]} port {address[1]}: {error.strerror}",
            hint="is the address on this host, the port free, and the service allowed below 1024?",
        ) from error
    return sock


def _frozen(files: Mapping[str, bytes | Path]) -> dict[str, bytes]:
    frozen: dict[str, bytes] = {}
    for name, source in files.items():
        if not (0 < len(name) <= NAME_CHARACTERS_MAX and name.isascii() and name.isprintable()):
            raise ConfigError("a TFTP file has an impossible name", found=ascii(name))
        try:
            frozen[name] = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise ConfigError(f"TFTP cannot read {source!s}: {error.strerror}") from error
    total = sum(map(len, frozen.values()))
    if total > FILES_BYTES_MAX:
        raise ConfigError("the TFTP files are too large", expected=FILES_BYTES_MAX, found=total)
    return frozen
