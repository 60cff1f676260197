"""gunicorn's threaded worker, with a short way for plain requests for chunks.

A chunk that memory holds is answered where the worker learns that somebody asks, without any
thread; other chunks and batches are answered by its threads, and all else by gunicorn. What
gunicorn has begun to read stays with it: only one of the two decides where a request ends.
"""

import mmap
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from flask import Flask
from gunicorn.http.parser import RequestParser
from gunicorn.workers.gthread import TConn, ThreadWorker

from provisioner.web.quick_chunks import (
    BODY_BYTES_MAX,
    EXTENSION,
    REQUEST_BYTES_MAX,
    Answer,
    QuickChunks,
)

# Who connects to fetch chunks asks at once; for everybody else gunicorn waits.
FIRST_REQUEST_S: Final = 0.2

log = structlog.get_logger(__name__)


class QuickWorker(ThreadWorker):
    """Serves an application, and its QuickChunks if it has them."""

    def load_wsgi(self) -> None:
        """Load the application."""
        super().load_wsgi()
        self._quick: QuickChunks | None = None
        if isinstance(self.wsgi, Flask):
            self._quick = self.wsgi.extensions.get(EXTENSION)
        self._own_buffer = _buffer()
        self._buffers: list[memoryview] = []
        # What a client was too slow to take at once; a thread sends it.
        self._unsent: dict[TConn, bytes] = {}

    def on_client_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        """Answer the next request of a kept connection, or have a thread do so."""
        answer = self._find(conn, self._own_buffer, may_wait=False)
        if answer is None:
            super().on_client_socket_readable(conn, client)
        elif rest := _send(conn.sock, answer, socket.MSG_DONTWAIT):
            self._unsent[conn] = rest
            super().on_client_socket_readable(conn, client)
        else:
            # They stand in the order of their last use.
            self.keepalived_conns.remove(conn)
            conn.set_timeout()
            self.keepalived_conns.append(conn)

    def handle(self, conn: TConn) -> bool:
        """Answer one request, in a thread; say whether the connection is to be kept."""
        if (rest := self._unsent.pop(conn, None)) is not None:
            conn.sock.setblocking(True)
            conn.sock.sendall(rest)
            return True
        has_come = conn.initialized or conn.data_ready
        if self._quick is not None and (has_come or conn.wait_for_data(FIRST_REQUEST_S)):
            with self._lent() as buffer:
                answer = self._find(conn, buffer, may_wait=True)
                if answer is not None:
                    conn.init()
                    conn.sock.setblocking(True)
                    conn.sock.sendall(_send(conn.sock, answer))
                    return True
        return super().handle(conn)

    def _find(self, conn: TConn, buffer: memoryview, *, may_wait: bool) -> Answer | None:
        """Return the answer to a request, which is then read; None leaves it to gunicorn."""
        if self._quick is None or not self.alive or not _is_unread(conn):
            return None
        if len(self.keepalived_conns) >= self.max_keepalived:
            return None
        try:
            request = conn.sock.recv(REQUEST_BYTES_MAX, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            answer = self._quick.answer(request, buffer, may_wait=may_wait)
            if answer is not None:
                conn.sock.recv(len(request))
        except OSError:
            return None
        except Exception:
            # The top of the server: a bug of ours must not end the loop of all connections.
            log.exception("bug in a quick answer")
            return None
        return answer

    @contextmanager
    def _lent(self) -> Iterator[memoryview]:
        """Lend a buffer; there are as many as were ever needed at a time."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = _buffer()
        try:
            yield buffer
        finally:
            self._buffers.append(buffer)


def _buffer() -> memoryview:
    # Takes memory only where it is written to.
    return memoryview(mmap.mmap(-1, BODY_BYTES_MAX))


def _is_unread(conn: TConn) -> bool:
    """Say whether gunicorn has read nothing of this connection."""
    parser = conn.parser
    return parser is None or (isinstance(parser, RequestParser) and parser.req_count == 0)


def _send(sock: socket.socket, answer: Answer, flags: int = 0) -> bytes:
    """Send an answer; return what was not taken. Whoever sends that meets the error again."""
    try:
        sent = sock.sendmsg(answer, (), flags)
    except OSError:
        sent = 0
    return b"" if sent == sum(map(len, answer)) else b"".join(answer)[sent:]
