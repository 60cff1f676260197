"""A BMC that refuses the login is not asked again by itself until its credentials were changed."""

from collections.abc import Callable

import pytest

from provisioner.core.lifecycle import LIMIT, RUNG_LAST
from provisioner.core.model import BmcAddress, BootDevice, Operation, Phase, Secret
from tests.parts.recovery_site import (
    fail,
    request,
    running,
    what,
    with_a_profile_that_proves,
)
from tests.parts.service_site import ACTOR, Site

OTHER = BmcAddress("127.0.1.1", 623, "admin", Secret("another-password"))


@pytest.fixture
def operation(site: Site) -> Operation:
    """A deployment that was started, and whose effects were not performed yet."""
    site.add_host()
    return site.deploy("r1n1")


def cancel(site: Site, operation: Operation) -> None:
    site.operations.cancel(operation.id, actor=ACTOR)


def time_out(site: Site, _operation: Operation) -> None:
    for _ in range(RUNG_LAST + 1):
        site.clock.pass_(LIMIT[Phase.NETBOOTING].total_seconds())
        site.worker.end_overdue()


def revoke(site: Site, _operation: Operation) -> None:
    site.releases.revoke("tiny@1", "found faulty", actor=ACTOR)


@pytest.mark.parametrize("end", [cancel, time_out, revoke])
def test_field_14_what_was_wished_for_while_the_login_was_being_refused_is_not_done(
    site: Site, operation: Operation, end: Callable[[Site, Operation], None]
) -> None:
    """The way back to the disk waited behind the exchange that was refused."""
    bmc = site.bmc()
    bmc.refuses_login = True

    def ends(_verb: str) -> None:
        if site.phase(operation) is Phase.NETBOOTING:
            end(site, operation)

    bmc.on_exchange = ends
    site.perform()
    assert site.at(operation).is_final
    assert bmc.exchanges == ["power"], "one login, and no second one"
    assert not site.outbox.waiting


def test_other_credentials_are_used_for_what_is_wished_for_after_them(
    site: Site, operation: Operation
) -> None:
    bmc = site.bmc()
    bmc.refuses_login = True
    bmc.on_exchange = lambda _verb: site.at(operation).is_final or cancel(site, operation)
    site.performer.perform(site.outbox.waiting.pop(0))
    bmc.refuses_login = False
    site.hosts.change("r1n1", bmc=OTHER, actor=ACTOR)
    site.perform()
    assert bmc.next_boot is BootDevice.DISK
    assert len(bmc.exchanges) > 1
    assert "another-password" in site.pool.passwords


@pytest.mark.parametrize(
    ("phase", "then"),
    [(Phase.NETBOOTING, ("retry", "dropped")), (Phase.WRITING, ("quarantine", "done"))],
)
def test_field_14_no_attempt_follows_when_an_inspection_was_refused_the_login(
    site: Site, phase: Phase, then: tuple[str, str]
) -> None:
    running(with_a_profile_that_proves(site))
    failed = fail(site, request(site, "tiny@2"), phase)
    assert what(failed) == ("retry", "waiting")
    look = site.operations.request_inspection("r1n1", actor=ACTOR)
    bmc = site.bmc()
    bmc.refuses_login = True
    bmc.exchanges.clear()
    site.worker.start_queued()
    site.perform()
    assert (site.at(look).error or {})["code"] == "bmc_auth_failed"
    assert what(site.at(failed)) == then
    for _ in range(5):
        site.clock.pass_(3600)
        site.worker.tick()
        site.perform()
    assert bmc.exchanges == ["power"], "one login, and no second one"
    assert (site.hosts.show("r1n1").quarantine_reason is not None) is (then[0] == "quarantine")
