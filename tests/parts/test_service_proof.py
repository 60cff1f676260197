"""What ties a healthy host to the deployed system: its own reports, all through the soak."""

from datetime import timedelta

import pytest

from provisioner.core.lifecycle import LIMIT
from provisioner.core.model import HostState, Operation, Phase
from provisioner.errors import Gone
from provisioner.service.health import Finding, check_all
from provisioner.service.proof import REPORT_AGE_MAX, REPORT_EVERY, UNSEEN_MAX
from provisioner.service.worker import CHECK_EVERY
from tests.parts.service_site import ACTOR, Agent, Site, profile_document, state_of

SOAK = timedelta(seconds=60)
A_ROUND = CHECK_EVERY.total_seconds()


class Proving:
    """A deployment of r1n1 whose system has phoned home, and who looks at it."""

    def __init__(self, site: Site, soak: timedelta = SOAK, checks: tuple[str, ...] = ()) -> None:
        self.site = site
        # Seen from outside the host is well, whoever answers there.
        self.worker = site.another_worker(
            examine=lambda asked, _a, _e: [Finding(c, True, "well") for c in asked]
        )
        self.ask_for(soak, *checks)
        site.add_host()
        site.deploy("r1n1")
        site.perform()
        self.agent = Agent(site).until(Phase.PROVING)
        self.next_report = site.clock() + REPORT_EVERY

    def ask_for(self, soak: timedelta, *checks: str) -> None:
        health = {
            "soak_s": soak.total_seconds(),
            "checks": [
                {"type": kind, **({"port": 80} if kind == "tcp" else {})} for kind in checks
            ],
        }
        self.site.profiles.save("web", {**profile_document(), "health": health}, actor=ACTOR)

    @property
    def operation(self) -> Operation:
        return self.agent.operation()

    def goes_on(self, duration: timedelta, *, boot_id: str | None = "b") -> Phase:
        """Let rounds of checks go by, with the reports that the system makes; None: it is
        silent. Return the phase then."""
        ends_at = self.site.clock() + duration
        while self.site.clock() < ends_at and not self.operation.is_final:
            self.site.clock.pass_(A_ROUND)
            if boot_id is not None and self.site.clock() >= self.next_report:
                self.agent.phone_home(boot_id=boot_id)
                self.next_report = self.site.clock() + REPORT_EVERY
            self.look()
        return self.operation.phase

    def look(self) -> None:
        self.worker.check(self.operation.id)


# --- the system itself ----------------------------------------------------------------------


def test_a_system_that_reports_all_through_its_soak_is_proven_without_delay(site: Site) -> None:
    proving = Proving(site)
    began_at = site.clock()
    assert proving.goes_on(2 * SOAK) is Phase.SUCCEEDED
    assert site.clock() - began_at <= SOAK + 2 * CHECK_EVERY
    assert site.hosts.show("r1n1").state is HostState.ACTIVE


@pytest.mark.parametrize("checks", [(), ("systemd",), ("ssh", "tcp")], ids=str)
@pytest.mark.parametrize("soak_s", [1, 10, 90])
def test_field_26_an_old_system_at_its_address_does_not_pass_for_the_new_one(
    site: Site, soak_s: int, checks: tuple[str, ...]
) -> None:
    """The new system phoned home and panicked, and firmware went on to the other disk: its
    sshd answers at the same address for the whole soak."""
    soak = timedelta(seconds=soak_s)
    proving = Proving(site, soak, checks)
    heard_at = site.clock()
    assert proving.goes_on(soak + REPORT_AGE_MAX + CHECK_EVERY, boot_id=None) is Phase.PROVING
    site.pass_(LIMIT[Phase.PROVING])
    ended, host = proving.operation, site.hosts.show("r1n1")
    error = ended.error or {}
    assert (ended.phase, error["code"]) == (Phase.FAILED, "proving_timed_out")
    told = f"the new system was last heard at {heard_at.isoformat(timespec='seconds')}"
    assert told in error["found"]
    assert "console" in error["hint"]
    assert (host.state, host.release) == (HostState.DIRTY, None)


def test_a_stale_report_makes_a_healthy_round_unhealthy(site: Site) -> None:
    proving = Proving(site)
    proving.look()
    proving.goes_on(REPORT_AGE_MAX, boot_id=None)
    assert proving.operation.evidence["healthy_since"] is not None
    proving.goes_on(CHECK_EVERY, boot_id=None)
    evidence = proving.operation.evidence
    assert evidence["healthy_since"] is None
    assert evidence["checks"]["report"]["healthy"] is False
    assert "last heard" in evidence["checks"]["report"]["found"]
    # It was only cut off for a while: its soak begins anew.
    proving.agent.phone_home()
    proving.look()
    assert proving.operation.evidence["healthy_since"] == site.clock().isoformat()
    assert proving.goes_on(2 * SOAK) is Phase.SUCCEEDED


def test_a_system_that_restarts_begins_its_soak_anew(site: Site) -> None:
    proving = Proving(site)
    proving.look()
    proving.goes_on(SOAK - 2 * CHECK_EVERY)
    restarted_at = site.clock()
    assert proving.agent.phone_home(boot_id="another") == {"accepted": True, "ask_again": True}
    assert proving.operation.evidence["healthy_since"] is None
    assert proving.goes_on(SOAK, boot_id="another") is Phase.PROVING
    assert proving.goes_on(SOAK, boot_id="another") is Phase.SUCCEEDED
    assert site.clock() - restarted_at >= SOAK
    assert any("restart" in line.text for _, line in site.hosts.timeline("r1n1"))


def test_a_soak_of_nothing_asks_for_no_second_report(site: Site) -> None:
    proving = Proving(site, timedelta())
    proving.look()
    assert proving.operation.phase is Phase.SUCCEEDED


# --- nobody looked ---------------------------------------------------------------------------


@pytest.mark.parametrize("away", [timedelta(minutes=15), UNSEEN_MAX + CHECK_EVERY])
def test_what_nobody_saw_is_no_part_of_a_soak(site: Site, away: timedelta) -> None:
    """The service was down in between; the system reports as soon as it is back."""
    proving = Proving(site)
    proving.look()
    proving.goes_on(SOAK - UNSEEN_MAX)
    site.clock.pass_(away.total_seconds())
    proving.agent.phone_home()
    proving.look()
    assert proving.operation.phase is Phase.PROVING
    assert proving.operation.evidence["healthy_since"] == site.clock().isoformat()
    assert proving.goes_on(SOAK - CHECK_EVERY) is Phase.PROVING
    assert proving.goes_on(2 * CHECK_EVERY) is Phase.SUCCEEDED


def test_a_short_pause_of_the_worker_costs_no_soak(site: Site) -> None:
    proving = Proving(site)
    proving.look()
    since = proving.operation.evidence["healthy_since"]
    site.clock.pass_(UNSEEN_MAX.total_seconds())
    proving.look()
    assert proving.operation.evidence["healthy_since"] == since


# --- what it says of itself ------------------------------------------------------------------


def test_a_unit_that_fails_within_the_soak_is_seen(site: Site) -> None:
    proving = Proving(site, checks=("systemd",))
    proving.worker = site.another_worker(examine=check_all)
    proving.look()
    assert proving.operation.evidence["healthy_since"] is not None
    proving.agent.phone_home(failed_units=["nginx.service"])
    proving.look()
    evidence = proving.operation.evidence
    assert (evidence["healthy_since"], evidence["checks"]["systemd"]["found"]) == (
        None,
        "nginx.service",
    )


def test_a_unit_that_had_failed_at_first_may_become_good(site: Site) -> None:
    proving = Proving(site, checks=("systemd",))
    proving.worker = site.another_worker(examine=check_all)
    again = proving.agent.phone_home(failed_units=["nginx.service"])
    assert again == {"accepted": True, "ask_again": True}
    proving.look()
    assert proving.operation.evidence["healthy_since"] is None
    assert proving.goes_on(3 * SOAK) is Phase.SUCCEEDED


def test_a_report_that_comes_while_others_look_is_not_overlooked(site: Site) -> None:
    """The last round of a soak began before it: what it saw is not true any more."""
    proving = Proving(site, checks=("systemd",))
    proving.look()
    proving.goes_on(SOAK - CHECK_EVERY)
    site.clock.pass_(2 * A_ROUND)

    def examine(checks: object, address: str, evidence: object) -> list[Finding]:
        found = check_all(checks, address, evidence)  # type: ignore[arg-type] # handed on as it came
        proving.agent.phone_home(failed_units=["nginx.service"])
        return found

    site.another_worker(examine=examine).check(proving.operation.id)
    assert proving.operation.phase is Phase.PROVING


# --- what it is told -------------------------------------------------------------------------


def test_a_reporter_is_asked_again_until_its_system_is_proven(site: Site) -> None:
    proving = Proving(site, timedelta())
    assert proving.agent.phone_home() == {"accepted": True, "ask_again": True}
    proving.look()
    before = state_of(site)
    for _ in range(2):  # the first of these answers may be lost
        assert proving.agent.phone_home() == {"accepted": True, "ask_again": False}
    assert state_of(site) == before
    assert not any("refused" in line.text for _, line in site.hosts.timeline("r1n1"))


@pytest.mark.parametrize(
    "report", [{"release_id": "f" * 32}, {"root_disk": {"name": "sdb", "serial": "OLD"}}], ids=str
)
def test_another_system_with_the_nonce_of_a_success_is_told_that_it_is_spent(
    site: Site, report: dict[str, object]
) -> None:
    proving = Proving(site, timedelta())
    proving.look()
    with pytest.raises(Gone):
        proving.agent.phone_home(**report)


def test_a_nonce_is_spent_once_another_deployment_has_begun(site: Site) -> None:
    proving = Proving(site, timedelta())
    proving.look()
    old = proving.operation
    site.deploy("r1n1")
    nonce = site.derived.nonce(old.id, old.generation).reveal()
    with pytest.raises(Gone):
        proving.agent.phone_home(nonce=nonce)


def test_reports_that_say_nothing_new_leave_no_lines(site: Site) -> None:
    proving = Proving(site)
    proving.goes_on(2 * SOAK)
    lines = [line.text for _, line in site.hosts.timeline("r1n1") if "phones home" in line.text]
    assert lines == ["phones home"]
