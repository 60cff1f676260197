"""Events that nobody may wait for: kept in a bounded queue and saved by one thread.

A boot script must go out while another process holds the database's write lock; its line
in the timeline may come a moment later, and is dropped rather than let the queue grow.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from provisioner.core.contracts import Store
from provisioner.core.model import Event
from provisioner.errors import Unavailable

WAITING_MAX: Final = 1000
BATCH_MAX: Final = 100
RETRY_PAUSE_S: Final = 0.5
RETRIES_MAX: Final = 120
CLOSE_LIMIT_S: Final = 5.0

log = structlog.get_logger(__name__)


class Timeline:
    """Saves events soon. Its thread starts with the first event, so after any fork.

    `admit` is shown them by that thread, and returns those to save; it may ask the database.
    """

    def __init__(
        self, store: Store, admit: Callable[[list[Event]], list[Event]] | None = None
    ) -> None:
        self._store = store
        self._admit = admit
        self._waiting: queue.Queue[Event] = queue.Queue(WAITING_MAX)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def add(self, event: Event) -> None:
        """Take an event to be saved; never waits and never raises."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            log.warning("timeline is full, event dropped", text=event.text)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="timeline", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Save what waits, within a limit."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_LIMIT_S)

    def _run(self) -> None:
        while not (self._closing.is_set() and self._waiting.empty()):
            try:
                batch = [self._waiting.get(timeout=0.1)]
            except queue.Empty:
                continue
            while len(batch) < BATCH_MAX and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            self._save(batch)

    def _save(self, batch: list[Event]) -> None:
        for _ in range(RETRIES_MAX):
            try:
                self._write(batch)
            except Unavailable as error:
                if self._closing.is_set():
                    break
                log.warning("events wait for the database", why=error.message)
                time.sleep(RETRY_PAUSE_S)
            else:
                return
        log.warning("events were not saved", count=len(batch))

    def _write(self, batch: list[Event]) -> None:
        kept = self._admit(batch) if self._admit is not None else batch
        if kept:
            with self._store.begin() as tx:
                for event in kept:
                    tx.add_event(event)
