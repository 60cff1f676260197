"""Events are saved soon, in order and without anybody waiting for the database."""

import threading
import time

from provisioner.core.model import Event
from provisioner.service.timeline import WAITING_MAX, Timeline
from provisioner.store.sql_store import SqlStore
from tests.parts.stores import NOW, a_host

MAC = "52:54:00:00:00:01"


def event(number: int) -> Event:
    return Event(NOW, "http", f"line {number}", mac=MAC)


def saved(store: SqlStore) -> list[str]:
    with store.read() as tx:
        return [one.text for _, one in tx.events()]


def test_events_are_saved_in_order_by_close(store: SqlStore) -> None:
    timeline = Timeline(store)
    for number in range(250):
        timeline.add(event(number))
    timeline.close()
    with store.read() as tx:
        texts = [one.text for _, one in tx.events(limit=1000)]
    assert texts == [f"line {number}" for number in range(250)]


def test_adding_waits_for_no_writer(store: SqlStore) -> None:
    """The events come after the writer has ended, and `add` returned while it wrote."""
    timeline = Timeline(store)
    added = threading.Event()

    def add() -> None:
        timeline.add(event(1))
        added.set()

    with store.begin() as tx:
        tx.add_host(a_host())
        threading.Thread(target=add).start()
        assert added.wait(30)
    timeline.close()
    assert saved(store) == ["line 1"]


def test_a_full_queue_drops_and_never_blocks(store: SqlStore) -> None:
    timeline = Timeline(store)
    with store.begin() as tx:
        tx.add_host(a_host())
        for number in range(WAITING_MAX + 500):
            timeline.add(event(number))
            if number == 0:
                time.sleep(0)
    timeline.close()
    assert 0 < len(saved(store)) <= WAITING_MAX
