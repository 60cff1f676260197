"""Watches hosts fetch kernel and ramdisk by HTTP, and tells how each download goes.

Sending is the server's affair, by sendfile; nothing here waits in a request. A thread looks at
the sockets from the side: what a host has taken is what its TCP has acknowledged.
"""

import fcntl
import io
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

from flask import Response, request
from werkzeug.wsgi import wrap_file

from provisioner.core.contracts import Clock
from provisioner.core.downloads import CAME, KERNEL, RAMDISK, Download
from provisioner.core.model import Event

from .bodies import peer

FILES: Final = {"vmlinuz": KERNEL, "initrd": RAMDISK}

LOOK_S: Final = 0.5
# Until the last bytes of a file are acknowledged: a connection that its server is done with is
# kept open by our look at it.
LAST_LOOK_S: Final = 0.05
# One line about a download on its way in so long, and after so long a standstill.
TELL_S: Final = 20.0
TOLD_MAX: Final = 12
# What is sent and not acknowledged by then is lost, unless it is so little that the host may
# have had it: iPXE (its window is 256 KiB) often starts the kernel instead of acknowledging the
# end of the ramdisk. Then the end is told soon, as unconfirmed.
LAST_BYTES_LIMIT_S: Final = 60.0
UNCONFIRMED_BYTES_MAX: Final = 256 * 1024
UNCONFIRMED_AFTER_S: Final = 3.0
# Further ones are sent, and not watched. A boot listener has fewer threads.
WATCHED_MAX: Final = 64

# struct tcp_info in linux/tcp.h: tcpi_state, tcpi_bytes_acked (Linux 4.1).
_TCP_INFO_BYTES: Final = 128
_ACKNOWLEDGED: Final = struct.Struct("=Q")
_ACKNOWLEDGED_AT: Final = 120
_TCP_CLOSE: Final = 7
# Two figures that belong together, while acknowledgements come in: they do not come that often.
LOOKS_MAX: Final = 10
_NUMBER: Final = struct.Struct("=i")


class _Connection:
    """Another handle on a connection, so that it can be looked at whatever its server does."""

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError for one that is no TCP connection."""
        self._sock = sock.dup()
        try:
            self._before = self.written()
        except OSError:
            self._sock.close()
            raise

    def acknowledged(self) -> int:
        """Return how many bytes the other end has acknowledged, since the connection began."""
        found: int = _ACKNOWLEDGED.unpack_from(self._info(), _ACKNOWLEDGED_AT)[0]
        return found

    def written(self) -> int:
        """Return how many bytes were ever written to it."""
        acknowledged = self.acknowledged()
        for _ in range(LOOKS_MAX):
            answer = fcntl.ioctl(self._sock, termios.TIOCOUTQ, _NUMBER.pack(0))
            before, acknowledged = acknowledged, self.acknowledged()
            if acknowledged == before:
                break
        waiting: int = _NUMBER.unpack(answer)[0]
        return before + waiting

    def taken(self) -> int:
        """Return what was acknowledged since the request, its answer's headers among it."""
        return max(self.acknowledged() - self._before, 0)

    @property
    def is_gone(self) -> bool:
        return self._info()[0] == _TCP_CLOSE

    def close(self) -> None:
        self._sock.close()

    def _info(self) -> bytes:
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        return info.ljust(_TCP_INFO_BYTES, b"\0")


@dataclass
class _Transfer:
    """One download. `sent` is what the server got rid of, once it is done; then `goal` is what
    the connection has acknowledged when the host has taken all of that."""

    file: str
    address: str
    size: int
    connection: _Connection
    began: float
    moved: float
    told_at: float
    taken: int = 0
    told: int = 0
    is_still: bool = False
    sent: int | None = None
    goal: int = 0
    done: float = 0.0

    def look(self, now: float) -> Download | None:
        """Return what is to be told of it now, if anything."""
        if self.sent is not None:
            return self._end(self.sent, now)
        taken = min(self.connection.taken(), self.size)
        if taken > self.taken:
            self.taken, self.moved, self.is_still = taken, now, False
        if now - self.told_at < TELL_S or self.told >= TOLD_MAX or self.is_still:
            return None
        self.told_at, self.told = now, self.told + 1
        self.is_still = now - self.moved >= TELL_S
        return Download.STALLED if self.is_still else Download.GOES_ON

    def _end(self, sent: int, now: float) -> Download | None:
        missing = max(self.goal - self.connection.acknowledged(), 0)
        self.taken = max(sent - missing, 0)
        if sent < self.size:
            return Download.CUT
        if missing == 0:
            return Download.WHOLE
        is_little = missing <= UNCONFIRMED_BYTES_MAX
        limit = UNCONFIRMED_AFTER_S if is_little else LAST_BYTES_LIMIT_S
        if not self.connection.is_gone and now - self.done <= limit:
            return None
        return Download.UNCONFIRMED if is_little else Download.CUT


class _File(io.FileIO):
    """A file that says, as it is closed, how far it was sent."""

    def __init__(self, path: Path, closed: Callable[[int], None]) -> None:
        super().__init__(path)
        self._closed = closed
        self._furthest = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        # socket.sendfile leaves the place here that it came to, also when it was cut off.
        place = super().seek(offset, whence)
        self._furthest = max(self._furthest, place)
        return place

    def close(self) -> None:
        if self.closed:
            return
        sent = max(self._furthest, self.tell())
        super().close()
        self._closed(sent)


class Downloads:
    """The downloads of one process. `tell` takes lines, and may neither wait nor raise; whose
    they are, others find out. The thread starts with the first download, so after any fork."""

    def __init__(
        self,
        tell: Callable[[Event], None],
        clock: Clock,
        now: Callable[[], float] = time.monotonic,
        look_s: float = LOOK_S,
    ) -> None:
        self._tell = tell
        self._look_s = look_s
        self._clock = clock
        self._now = now
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._transfers: list[_Transfer] = []
        self._thread: threading.Thread | None = None

    def missing(self, name: str) -> None:
        """Note that the request is for a file that is not there."""
        self._line(Download.MISSING, FILES[name], peer(), "there is no such file")

    def watch(self, response: Response, path: Path, name: str) -> Response:
        """Note the request, and watch the file leave if it is answered with the whole of it."""
        size, address = path.stat().st_size, peer()
        self._line(Download.ASKED, FILES[name], address, f"asked for, {size} bytes", size)
        sock = request.environ.get("gunicorn.socket")
        is_whole = response.status_code == HTTPStatus.OK and response.direct_passthrough
        if not is_whole or sock is None or len(self._transfers) >= WATCHED_MAX:
            return response
        now = self._now()
        try:
            connection = _Connection(sock)
        except OSError:
            return response  # not a connection that we could look at
        transfer = _Transfer(FILES[name], address, size, connection, now, now, now)
        response.close()
        file = _File(path, lambda sent: self._done(transfer, sent))
        response.response = wrap_file(request.environ, file)
        self._begin(transfer)
        return response

    def _begin(self, transfer: _Transfer) -> None:
        with self._lock:
            self._transfers.append(transfer)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="downloads", daemon=True)
                self._thread.start()

    def _done(self, transfer: _Transfer, sent: int) -> None:
        transfer.goal = transfer.connection.written()
        transfer.done = self._now()
        transfer.sent = sent  # last: the thread goes by it
        self._changed.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                transfers = list(self._transfers)
                if not transfers:
                    self._thread = None
                    return
            for transfer in transfers:
                self._look(transfer)
            is_near = any(one.sent is not None for one in transfers)
            self._changed.wait(LAST_LOOK_S if is_near else self._look_s)
            self._changed.clear()

    def _look(self, transfer: _Transfer) -> None:
        now = self._now()
        told = transfer.look(now)
        if told is None:
            return
        words = _WORDS[told].format(
            taken=transfer.taken,
            size=transfer.size,
            seconds=now - transfer.began,
            still=now - transfer.moved,
        )
        self._line(told, transfer.file, transfer.address, words, transfer.size, transfer.taken)
        if told in (*CAME, Download.CUT):
            with self._lock:
                self._transfers.remove(transfer)
            transfer.connection.close()

    def _line(
        self, told: Download, file: str, address: str, words: str, size: int = 0, taken: int = 0
    ) -> None:
        detail = {"file": file, "download": str(told), "address": address}
        figures = {"taken_bytes": taken, "size_bytes": size}
        self._tell(Event(self._clock(), "http", f"{file}: {words}", detail={**detail, **figures}))


_WORDS: Final = {
    Download.WHOLE: "taken whole, {size} bytes in {seconds:.1f} s",
    Download.UNCONFIRMED: "sent whole, {size} bytes; {taken} were acknowledged",
    Download.CUT: "broke off after {taken} of {size} bytes, in {seconds:.1f} s",
    Download.GOES_ON: "on its way, {taken} of {size} bytes in {seconds:.0f} s",
    Download.STALLED: "nothing taken for {still:.0f} s, after {taken} of {size} bytes",
}
