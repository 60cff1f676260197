"""A TCP proxy in front of an HTTP server that cuts connections at given bytes of the answers."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

PIECE_BYTES = 4096
POLL_S = 0.1


@dataclass
class CuttingProxy:
    """Cuts whichever connection carries one of the bytes in `cuts`.

    Bytes are counted over all connections, from the server to the client; cuts are
    ascending.
    """

    url: str
    target: tuple[str, int]
    cuts: list[int]
    passed_bytes: int = 0
    requests: int = 0
    cut: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def carry(self, client: socket.socket) -> None:
        """Carry one connection until it ends, or is cut."""
        with client, socket.create_connection(self.target) as server:
            back = threading.Thread(target=self._carry_requests, args=(client, server))
            back.start()
            while piece := _received(server):
                allowed, is_cut = self._allow(len(piece))
                with suppress(OSError):
                    client.sendall(piece[:allowed])
                if is_cut:
                    break
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            back.join()

    def _carry_requests(self, client: socket.socket, server: socket.socket) -> None:
        while piece := _received(client):
            self.requests += piece.count(b"GET ")
            with suppress(OSError):
                server.sendall(piece)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _allow(self, count: int) -> tuple[int, bool]:
        """Return how many of these bytes may pass, and whether it ends there."""
        with self._lock:
            is_cut = bool(self.cuts) and self.passed_bytes + count >= self.cuts[0]
            if is_cut:
                count = max(self.cuts.pop(0) - self.passed_bytes, 0)
                self.cut += 1
            self.passed_bytes += count
            return count, is_cut


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(PIECE_BYTES)
    except OSError:
        return b""


@contextmanager
def cutting(target: tuple[str, int], cuts: Sequence[int]) -> Iterator[CuttingProxy]:
    """Run a proxy in front of `target`; yields it."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.settimeout(POLL_S)
        port = listener.getsockname()[1]
        proxy = CuttingProxy(f"http://127.0.0.1:{port}", target, sorted(cuts))
        over = threading.Event()
        carriers: list[threading.Thread] = []

        def accept() -> None:
            while not over.is_set():
                with suppress(TimeoutError):
                    client, _ = listener.accept()
                    carriers.append(threading.Thread(target=proxy.carry, args=(client,)))
                    carriers[-1].start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield proxy
        finally:
            over.set()
            for one in (thread, *carriers):
                one.join(60)
