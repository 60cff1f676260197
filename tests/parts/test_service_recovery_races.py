"""Whoever takes what follows a failure dies at any line, or does it beside another: one operation
follows, and only one. Over both databases."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest

from tests.parts.processes import until
from tests.parts.recovery_site import (
    Died,
    DyingStore,
    chain,
    fail,
    follow,
    newest_of,
    recovery_with,
    request,
    running,
    what,
)
from tests.parts.service_site import Site
from tests.parts.stores import opened_at


@pytest.fixture
def site(either_site: Site) -> Site:
    return either_site


def test_field_04_whoever_takes_a_follow_up_may_die_at_any_line(site: Site) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    site.clock.pass_(60)
    for last in range(100):
        store = DyingStore(site.store, last)
        with pytest.raises(Died):
            recovery_with(site, store=store).take_due()
        assert site.at(failed) == failed
        assert len(site.operations.list("r1n1")) == 2
        if store.ran_out:
            break
    assert store.ran_out
    assert last > 10
    assert chain(follow(site, failed)) == ("retry", 2, 3, failed.id)


def test_of_two_that_take_a_follow_up_at_once_one_does(site: Site, migrated_url: str) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    site.clock.pass_(60)
    start = threading.Barrier(2)
    problems: list[BaseException] = []

    def take() -> None:
        with opened_at(migrated_url) as store:
            recovery = recovery_with(site, store=store)
            start.wait(60)
            try:
                recovery.take_due()
            except BaseException as error:  # noqa: BLE001 # told to the test
                problems.append(error)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert chain(newest_of(site)) == ("retry", 2, 3, failed.id)
    assert len(site.operations.list("r1n1")) == 3
    assert site.audit.verify() > 0
    requested = [row for row in site.audit.rows() if row.action == "deployment.requested"]
    assert len(requested) == 3
    assert what(site.at(failed)) == ("retry", "taken")


def test_field_04_another_process_goes_on_where_one_has_died(
    site: Site, open_site: Callable[..., Site]
) -> None:
    running(site)
    failed = fail(site, request(site, "tiny@2"))
    after_restart = open_site()
    after_restart.clock.at = site.clock() + timedelta(hours=6)
    after_restart.worker.tick()
    until(lambda: what(site.at(failed))[1] == "taken", 60)
    assert chain(newest_of(site)) == ("retry", 2, 3, failed.id)
