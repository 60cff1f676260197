"""Runs one kind of work over many items with a few threads, and stops at the first failure.

Not concurrent.futures: that queues every item at once, and imports the logging package.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Contra = TypeVar("Contra", contravariant=True)


class Worker(Protocol[Contra]):
    """One thread's worker, with its own buffers and connection."""

    def work(self, item: Contra) -> None:
        """Do one item."""

    def close(self) -> None:
        """Give back what the worker holds."""


class _Shared(Generic[Item]):
    """The items still to be done, and the first failure."""

    def __init__(self, items: Iterable[Item], stop: threading.Event) -> None:
        self._items: Iterator[Item] = iter(items)
        self._lock = threading.Lock()
        self._stop = stop
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[Item]:
        while not self._stop.is_set():
            with self._lock:
                try:
                    item = next(self._items)
                except StopIteration:
                    return
            yield item

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.failure = self.failure or error
        self._stop.set()


def run_parallel(
    items: Iterable[Item],
    make_worker: Callable[[], Worker[Item]],
    *,
    threads: int,
    stop: threading.Event,
) -> None:
    """Do every item, in order of start; return when all are done.

    The first exception of a worker sets `stop`, lets the others end their present item, and
    is raised here. When stop is set by somebody else, it returns early.
    """
    shared = _Shared(items, stop)

    def run() -> None:
        try:
            worker = make_worker()
            try:
                for item in shared:
                    worker.work(item)
            finally:
                worker.close()
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            shared.fail(error)

    crew = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    if shared.failure is not None:
        raise shared.failure
