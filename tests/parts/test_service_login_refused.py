"""A BMC that refuses the login is not asked again by itself until its credentials were changed, nor
one whose stored password does not open."""

from collections.abc import Callable

import pytest

from provisioner.core.lifecycle import LIMIT, RUNG_LAST
from provisioner.core.model import (
    BmcAddress,
    BootDevice,
    Operation,
    Phase,
    PowerState,
    Secret,
)
from provisioner.errors import BmcAuthFailed
from tests.parts.recovery_site import (
    fail,
    request,
    running,
    what,
    with_a_profile_that_proves,
)
from tests.parts.service_site import ACTOR, Site, tamper

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

    def cancels(_verb: str) -> None:
        if not site.at(operation).is_final:
            cancel(site, operation)

    bmc.on_exchange = cancels
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


def damage(site: Site) -> None:
    tamper(site, "UPDATE hosts SET bmc_password = X'0102' WHERE name = 'r1n1'")


def test_a_password_that_does_not_open_fails_what_needs_it_and_nothing_else(
    site: Site, operation: Operation
) -> None:
    site.add_host(2)
    damage(site)
    site.perform()
    failed = site.at(operation)
    assert (failed.phase, (failed.error or {})["code"]) == (Phase.FAILED, "bmc_auth_failed")
    assert "stored password" in (failed.error or {})["message"]
    assert "host change r1n1" in (failed.error or {})["hint"]
    assert site.bmc().exchanges == [], "and no BMC is asked"

    assert [host.name for host in site.hosts.list()] == ["r1n1", "r1n2"]
    assert site.hosts.set_flags("r1n1", is_protected=True, actor=ACTOR).is_protected
    with pytest.raises(BmcAuthFailed, match="does not open") as refused:
        site.hosts.power("r1n1", "status", actor=ACTOR)
    assert "host change r1n1" in (refused.value.hint or "")
    assert site.deploy("r1n2").phase is Phase.QUEUED

    # The way out.
    site.hosts.set_flags("r1n1", is_protected=False, actor=ACTOR)
    site.hosts.change("r1n1", bmc=OTHER, actor=ACTOR)
    assert site.hosts.power("r1n1", "status", actor=ACTOR) is PowerState.ON
    assert "another-password" in site.pool.passwords


@pytest.mark.parametrize("end", [cancel, time_out])
def test_an_operation_ends_although_the_password_does_not_open_any_more(
    site: Site, operation: Operation, end: Callable[[Site, Operation], None]
) -> None:
    site.perform()
    damage(site)
    end(site, operation)
    assert site.at(operation).is_final
    site.perform()
    site.hosts.delete("r1n1", actor=ACTOR)
    assert site.hosts.list() == []
