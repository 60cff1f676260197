"""Looks for TFTP's files in threads, so that its one loop waits for nobody.

A client sends its request again while it waits; each is looked for once.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from provisioner.netboot.relay import Content, Source
from provisioner.netboot.tftp_request import ReadRequest

THREADS_MAX: Final = 8
WAITING_MAX: Final = 64
WAITING_PER_SOURCE_MAX: Final = 4

ClientAddress = tuple[str, int]
Found = tuple[ReadRequest, ClientAddress, Content | None]

log = structlog.get_logger(__name__)


class Lookup:
    """What is being looked for. `handle` becomes readable when there is something to `take`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="tftp-lookup")
        self._lock = threading.Lock()
        self._found: list[Found] = []
        self._waiting: dict[ClientAddress, str] = {}
        self.handle = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def has(self, name: str) -> bool:
        """Say whether a name is of a form that can be looked for."""
        return self._source.has(name)

    def ask(self, request: ReadRequest, client: ClientAddress) -> bool:
        """Begin to look, unless this client's request is looked for already.

        Return False when too many wait, and the request is dropped.
        """
        if self._waiting.get(client) == request.name:
            return True
        of_source = sum(client[0] == waiting for waiting, _ in self._waiting)
        if len(self._waiting) >= WAITING_MAX or of_source >= WAITING_PER_SOURCE_MAX:
            return False
        self._waiting[client] = request.name
        self._threads.submit(self._find, request, client)
        return True

    def take(self) -> list[Found]:
        """Return what was found, or not (None), since the last call."""
        with self._lock:
            found, self._found = self._found, []
            if found:
                os.eventfd_read(self.handle)
        for _, client, _ in found:
            self._waiting.pop(client, None)
        return found

    def close(self) -> None:
        """Forget what is still looked for. Threads end within their source's limits."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            handle, self.handle = self.handle, -1
            os.close(handle)

    def _find(self, request: ReadRequest, client: ClientAddress) -> None:
        content = None
        try:
            content = self._source.find(request.name, client[0])
        except Exception:
            # The top of a thread: our own bug may cost this client its file, and no more.
            log.exception("tftp lookup failed", client=client[0], file=request.name)
        with self._lock:
            if self.handle >= 0:
                self._found.append((request, client, content))
                os.eventfd_write(self.handle, 1)
