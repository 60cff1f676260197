"""The database is away, cut off around a commit, locked or on a full disk, in the middle of a
deployment: nothing is lost or doubled, everybody is told to come back, and it goes on by itself.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from provisioner.core.effects import SetNextBoot
from provisioner.core.model import BootDevice
from provisioner.errors import Unavailable
from provisioner.store.engine import open_engine
from tests.parts.database_proxy import LOST, UNHEARD, DatabaseProxy, running_proxy
from tests.parts.postgres import Postgres, running_postgres
from tests.parts.rack import INTO_NETWORK, Rack, patiently, request, running_rack
from tests.parts.served_lives import HOST, until
from tests.parts.service_site import Site
from tests.parts.stores import NOW, opened

# Less than the store waits for a lock, and far more than a decision may take.
FIRMWARE_PATIENCE_S = 12.0
HOLD_LIMIT_S = 300.0
END_LIMIT_S = 180.0


def told_to_come_back(rack: Rack, method: str, path: str, body: Any = None) -> httpx.Response:
    """Ask the API for something that it cannot do now, and see that it says so."""
    settings = rack.lives.settings
    answer = httpx.request(
        method,
        f"http://{settings.api.listen}{path}",
        json=body,
        headers={"Authorization": f"Bearer {settings.keys.admin_token.reveal()}"},
        timeout=120,
    )
    assert answer.status_code == 503, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] == "unavailable"
    assert int(answer.headers["Retry-After"]) > 0
    return answer


def boots_locally(rack: Rack) -> None:
    """Any host that asks how to boot is told its own disk, before its firmware gives up."""
    begun = time.monotonic()
    url = f"{rack.lives.settings.boot.url}/boot/ipxe?mac=52:54:00:99:99:99"
    script = httpx.get(url, timeout=60)
    assert script.status_code == 200
    assert "exit" in script.text
    assert "kernel" not in script.text
    assert time.monotonic() - begun < FIRMWARE_PATIENCE_S


@contextmanager
def deployed_until(rack: Rack, call: str) -> Iterator[str]:
    """Deploy the host, and let its agent stand before a call of its own while something happens
    to the database; yields the operation."""
    there, go_on = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        if name == call and not go_on.is_set():
            there.set()
            go_on.wait(HOLD_LIMIT_S)

    # First of all: the agent is quick, and this process may be slow.
    rack.host.on_call = wait
    try:
        with rack.lives.client() as client:
            operation = request(rack, client)
        assert there.wait(END_LIMIT_S), f"the agent never came to {call}"
        yield operation
    finally:
        go_on.set()
        rack.host.on_call = lambda _name: None


def worker_waits(rack: Rack) -> None:
    """Return when a worker has begun anew, since its sessions ended, and finds it still so."""
    said = "worker waits for the database"
    until(lambda: said in rack.lives.log.read_text(), "the worker", END_LIMIT_S)


def goes_on(rack: Rack, operation: str) -> None:
    """Wait for the end: everything was done once."""
    with rack.lives.client() as client:
        until(
            lambda: patiently(lambda: client.operation(operation))["is_final"],
            "the end",
            END_LIMIT_S,
        )
        ended = client.operation(operation)
        if "stops at seed" in rack.host.said:
            # Its commit was one whose outcome nobody heard; the seed leaves once.
            assert (ended["phase"], ended["error"]["code"]) == ("failed", "seed_gone")
        else:
            assert ended["phase"] == "succeeded", ended["error"]
        assert ended["rung"] == 0
        until(lambda: rack.in_queue() == 0, "the end of all effects", END_LIMIT_S)
        assert rack.host.happened() == INTO_NETWORK
        actions = [row["action"] for row in client.audit(after=0, limit=1000)]
        assert actions.count("deployment.requested") == 1
        assert actions.count("deployment.writing") == 1
        assert actions.count("seed.taken") == 1
        assert client.verify_audit() > 0


def test_a_result_that_is_saved_twice_wishes_once_for_what_follows(site: Site) -> None:
    """Whoever did not hear of a commit saves again, or performs again after a crash."""
    site.add_host()
    site.deploy("r1n1")
    first = site.outbox.waiting.pop()
    for _ in range(2):
        site.performer.perform(first)
    assert [asked.effect for asked in site.outbox.waiting] == [SetNextBoot(BootDevice.NETWORK)]
    assert site.bmc().changes() == ["soft_off"]


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[DatabaseProxy]:
    with running_proxy(postgres.socket_dir) as proxy:
        yield proxy


def test_the_database_is_away_in_the_middle(
    tmp_path: Path, postgres: Postgres, proxy: DatabaseProxy
) -> None:
    url = proxy.url(postgres.new_database())
    with running_rack(tmp_path, database=url) as rack:
        rack.lives.begin()
        with deployed_until(rack, "seed") as operation:
            proxy.down()
            told_to_come_back(rack, "GET", "/api/v1/hosts")
            told_to_come_back(rack, "GET", "/healthz")
            told_to_come_back(rack, "POST", f"/api/v1/operations/{operation}/cancel")
            boots_locally(rack)
            worker_waits(rack)
            boots_locally(rack)
            proxy.up()
        goes_on(rack, operation)


def test_the_link_to_the_database_is_down_and_only_we_notice(
    tmp_path: Path, postgres: Postgres, proxy: DatabaseProxy
) -> None:
    """The server keeps the session that holds the worker's name until its lease is over."""
    url = proxy.url(postgres.new_database())
    with running_rack(tmp_path, database=url) as rack:
        rack.lives.begin()
        with deployed_until(rack, "seed") as operation:
            worker = rack.lives.pid_of("prov-worker")
            proxy.cut_clients()

            def is_replaced() -> bool:
                return rack.lives.pid_of("prov-worker") != worker

            until(is_replaced, "another worker in its place", END_LIMIT_S)
        goes_on(rack, operation)


def test_the_database_is_a_standby_for_a_while(tmp_path: Path) -> None:
    """A failover: it takes no writes until it is made the first one."""
    with (
        running_postgres() as postgres,
        running_rack(tmp_path, database=postgres.new_database()) as rack,
    ):
        rack.lives.begin()
        with rack.lives.client() as client, deployed_until(rack, "seed") as operation:
            postgres.stand_by()
            change = ("PATCH", f"/api/v1/hosts/{HOST}", {"labels": {"a": "b"}})
            for _ in range(3):
                told_to_come_back(rack, *change)
                assert patiently(lambda: client.host(HOST))["name"] == HOST, "reading goes on"
            boots_locally(rack)
            worker_waits(rack)
            postgres.promote()
        goes_on(rack, operation)
        assert "bug" not in rack.lives.log.read_text()


def test_a_database_that_takes_no_writes_is_unavailable(
    postgres: Postgres, postgres_template: str
) -> None:
    url = postgres.new_database(postgres_template)
    engine = open_engine(url)
    with engine.connect() as connection, connection.begin():
        how = f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = on"
        connection.execute(text(how))
    engine.dispose()
    with opened(engine) as store:
        with pytest.raises(Unavailable), store.begin() as tx:
            tx.audit(NOW, "a", "b", "c", {})
        with store.read() as tx:
            assert tx.audit_rows() == []


def test_commits_whose_outcome_nobody_hears(
    tmp_path: Path, postgres: Postgres, proxy: DatabaseProxy
) -> None:
    """Every 23rd COMMIT, of ours and of the queue's, is lost or unheard in turn."""
    url = proxy.url(postgres.new_database())
    with running_rack(tmp_path, database=url) as rack:
        rack.lives.begin()
        proxy.cut = lambda number: (LOST if number % 2 else UNHEARD) if number % 23 == 0 else None
        with rack.lives.client() as client:
            operation = request(rack, client)
        goes_on(rack, operation)
        assert {LOST, UNHEARD} <= set(proxy.cuts)


@pytest.mark.parametrize("how", [LOST, UNHEARD])
def test_a_cut_around_a_commit_is_told_as_unavailable_whatever_came_of_it(
    postgres: Postgres, postgres_template: str, proxy: DatabaseProxy, how: str
) -> None:
    url = postgres.new_database(postgres_template)
    with opened(open_engine(proxy.url(url))) as store:
        with store.begin() as tx:
            tx.audit(NOW, "a", "first", "b", {})
        proxy.cut = lambda _number: how
        with pytest.raises(Unavailable), store.begin() as tx:
            tx.audit(NOW, "a", "second", "b", {})
        proxy.cut = lambda _number: None

        def actions() -> list[str]:
            with store.read() as tx:
                return [row.action for row in tx.audit_rows()]

        expected = ["first", "second"] if how == UNHEARD else ["first"]
        until(lambda: actions() == expected, f"{expected}")


def test_sqlite_is_locked_by_somebody_else_for_longer_than_anybody_waits(tmp_path: Path) -> None:
    with running_rack(tmp_path) as rack:
        rack.lives.begin()
        with rack.lives.client() as client, deployed_until(rack, "seed") as operation:
            other = sqlite3.connect(
                rack.lives.settings.data_dir / "state.db", isolation_level=None, timeout=60
            )
            other.execute("BEGIN IMMEDIATE")
            with ThreadPoolExecutor(1) as pool:
                cancel = f"/api/v1/operations/{operation}/cancel"
                waiting = pool.submit(told_to_come_back, rack, "POST", cancel)
                assert client.host(HOST)["name"] == HOST, "reading goes on"
                boots_locally(rack)
                waiting.result(END_LIMIT_S)
            other.execute("ROLLBACK")
            other.close()
        goes_on(rack, operation)


def test_the_disk_is_full(tmp_path: Path) -> None:
    """A file system of its own, in a mount namespace of its own, filled to the last byte."""
    with running_rack(tmp_path, small_disk=True) as rack:
        rack.lives.begin()
        with rack.lives.client() as client, deployed_until(rack, "seed") as operation:
            filler = rack.lives.data_dir / "filler"
            fill(filler)
            told_to_come_back(rack, "PATCH", f"/api/v1/hosts/{HOST}", {"labels": {"a": "b"}})
            assert client.host(HOST)["labels"] == {}, "reading goes on"
            boots_locally(rack)
            filler.unlink()
        goes_on(rack, operation)


def fill(filler: Path) -> None:
    """Write until there is no byte left, also after somebody gave a few back."""
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(os.urandom(size))
            except OSError:
                continue
