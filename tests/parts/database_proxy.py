"""A TCP proxy before a PostgreSQL on a Unix socket, that takes the database away, or cuts the
connection around a COMMIT: before the server saw it, or before the client heard of it. Or at
its client's end only, of which the server hears nothing."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PIECE_BYTES = 65536
POLL_S = 0.05

# Called with the number of each COMMIT, from 1: None lets it pass.
Cut = Callable[[int], str | None]
LOST, UNHEARD = "lost", "unheard"


class DatabaseProxy:
    """Carries every connection until told otherwise. `cut` is asked about each commit."""

    def __init__(self, socket_dir: Path, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self.commits = 0
        self.cuts: list[str] = []
        self.cut: Cut = lambda _number: None
        self._target = str(socket_dir / ".s.PGSQL.5432")
        self._listener = listener
        self._is_down = False
        self._open: set[socket.socket] = set()
        self._clients: set[socket.socket] = set()
        self._unheard: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def url(self, database: str) -> str:
        """Return the URL of a database, by this proxy."""
        name = database.split("@/")[1].split("?")[0]
        return f"postgresql://provisioner@127.0.0.1:{self.port}/{name}"

    def down(self) -> None:
        """Take the database away: every connection ends, and no new one is carried."""
        with self._lock:
            self._is_down = True
            for end in self._open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def cut_clients(self) -> None:
        """End every connection as a link does that is down for a while: its client gives up,
        and the server keeps the session until it ends that itself."""
        with self._lock:
            self._unheard |= self._clients
            for client in self._clients:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def up(self) -> None:
        self._is_down = False

    def run(self) -> None:
        carriers = []
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            carriers.append(threading.Thread(target=self._carry, args=(client,)))
            carriers[-1].start()
        self.down()
        for carrier in carriers:
            carrier.join(60)

    def stop(self) -> None:
        self._over.set()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            with self._lock:  # or it would be open still when all that are have been ended
                if self._is_down:
                    return
                server.connect(self._target)
                self._open |= {client, server}
                self._clients.add(client)
            back = threading.Thread(target=self._answers, args=(server, client))
            back.start()
            with suppress(OSError):
                self._requests(client, server)
            if client not in self._unheard:
                with suppress(OSError):
                    server.shutdown(socket.SHUT_WR)
            back.join()
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open -= {client, server}
                self._clients.discard(client)
                self._unheard.discard(client)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        while piece := client.recv(PIECE_BYTES):
            how = self._judge(piece)
            if how == LOST:
                return
            if how == UNHEARD:
                # The way back ends first, so that the answer is certainly not heard; the
                # server carries out what it got although its client is gone.
                client.shutdown(socket.SHUT_WR)
                server.sendall(piece)
                server.shutdown(socket.SHUT_WR)
                return
            server.sendall(piece)

    def _judge(self, piece: bytes) -> str | None:
        if b"COMMIT" not in piece:
            return None
        with self._lock:
            self.commits += 1
            how = self.cut(self.commits)
            if how is not None:
                self.cuts.append(how)
        return how

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while piece := server.recv(PIECE_BYTES):
                if client not in self._unheard:
                    client.sendall(piece)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def running_proxy(socket_dir: Path) -> Iterator[DatabaseProxy]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.settimeout(POLL_S)
        proxy = DatabaseProxy(socket_dir, listener)
        thread = threading.Thread(target=proxy.run)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.stop()
            thread.join(90)
