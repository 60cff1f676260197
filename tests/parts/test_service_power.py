"""Power of hosts whose BMC is slow to do or to say: what is repeated, and who is left off."""

from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from provisioner.core.effects import PowerOff, ReturnToDisk
from provisioner.core.lifecycle import LIMIT
from provisioner.core.model import BootDevice, Phase
from provisioner.errors import BmcBusy
from provisioner.service.performer import BUSY_PAUSE_S
from provisioner.service.wishes import POLL_MAX_S
from tests.faulty_bmc.faults import Command, Faults, Traits
from tests.faulty_bmc.simulated_host import Source
from tests.parts.bmc_trial import OLD, running_trial
from tests.parts.service_site import ACTOR, SOFT_SHUTDOWN, Agent, Site

# Longer than it is waited for, and shorter than it is watched after that.
LONG_SHUTDOWN = Traits(shutdown_seconds=45)
ALWAYS = 10**6


# --- looking ------------------------------------------------------------------------------


def test_field_14_a_bmc_is_polled_less_and_less(site: Site) -> None:
    """Each look is a login; every half second they would be 180 for one soft shutdown."""
    site.add_host()
    bmc = site.bmc()
    bmc.ignores_soft_off = True
    site.deploy("r1n1")
    looked_at = []

    def note(verb: str) -> None:
        if verb == "power":
            looked_at.append((site.clock() - began_at).total_seconds())

    began_at = site.clock()
    bmc.on_exchange = note
    site.perform(at_most=1)
    while_shutting_down = [at for at in looked_at if at < SOFT_SHUTDOWN.total_seconds()]
    assert len(while_shutting_down) < 60
    gaps = [round(b - a, 3) for a, b in pairwise(while_shutting_down[1:])]
    assert gaps[0] < 1
    assert gaps == sorted(gaps)
    assert gaps[-1] == POLL_MAX_S


def test_nothing_more_is_done_to_a_host_that_cannot_be_seen(site: Site) -> None:
    """Its BMC fell silent when it was told to shut the host down."""
    site.add_host()
    operation = site.deploy("r1n1")
    bmc = site.bmc()

    def fall_silent(verb: str) -> None:
        bmc.is_silent = verb == "soft_off" or bmc.is_silent

    bmc.on_exchange = fall_silent
    site.perform(at_most=1)
    assert bmc.changes() == ["soft_off"]
    error = site.at(operation).error or {}
    assert error["code"] == "bmc_unreachable"


# --- repeating ----------------------------------------------------------------------------


def test_field_15_a_power_off_is_not_tried_again_on_a_host_that_came_meanwhile(
    site: Site,
) -> None:
    """The BMC was silent at first, and the host's agent writes by the time of the retry."""
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform()
    bmc, agent = site.bmc(), Agent(site)
    site.clock.pass_(LIMIT[Phase.NETBOOTING].total_seconds())
    site.worker.end_overdue()
    assert [waiting.effect for waiting in site.outbox.waiting] == [PowerOff(soft=False)]
    agent.boots()

    def come_meanwhile(verb: str) -> None:
        if verb == "power":
            bmc.is_silent = False
            bmc.on_exchange = lambda _: None
            agent.hello()
            agent.authorise()

    before = len(bmc.changes())
    bmc.rejects = "power_off"  # so that there is a second attempt
    bmc.on_exchange = come_meanwhile
    site.perform()
    assert bmc.changes()[before:] == ["power_off"]
    assert site.phase(operation) is Phase.WRITING
    assert bmc.is_on


def test_field_15_the_host_is_restarted_once_per_rung(site: Site, tmp_path: Path) -> None:
    with running_trial(site, tmp_path, Faults(forgets_flags=True)) as trial:
        trial.deploy()
        starts = [line.at for line in trial.bmc.host.happened("starts")]
        assert len(starts) == 3
        rung = LIMIT[Phase.NETBOOTING].total_seconds()
        assert all(b - a >= rung for a, b in pairwise(starts))


def test_a_reset_that_nobody_acknowledged_is_not_repeated(site: Site, tmp_path: Path) -> None:
    """The second one would hit the host's own system, which is coming up."""
    with running_trial(site, tmp_path, Faults(not_answered={Command.RESET: ALWAYS})) as trial:
        operation = trial.request()

        def cancel_in_the_ramdisk() -> None:
            if trial.site.phase(operation) is Phase.PREPARING:
                trial.site.operations.cancel(operation.id, actor=ACTOR)

        trial.meanwhile = cancel_in_the_ramdisk
        trial.go_on(operation)
        assert trial.site.phase(operation) is Phase.CANCELLED
        assert len(trial.bmc.host.happened("reset")) == 1
        assert trial.bmc.host.boots() == [Source.NETWORK, Source.DISK]
        assert (trial.disk, trial.running) == (OLD, OLD)


# --- giving back --------------------------------------------------------------------------


def test_a_host_that_goes_off_after_it_was_given_back_is_switched_on_again(
    site: Site, tmp_path: Path
) -> None:
    """It was cancelled while it shut down, read on when it was told to be on, and went off."""
    with running_trial(site, tmp_path, Faults(), LONG_SHUTDOWN) as trial:
        operation = trial.request()

        def cancel() -> None:
            if trial.bmc.host.happened("soft off") and not trial.site.at(operation).is_final:
                trial.site.operations.cancel(operation.id, actor=ACTOR)

        trial.meanwhile = cancel
        trial.go_on(operation)
        assert trial.bmc.host.happened("goes off")
        assert trial.bmc.host.is_on
        assert trial.running == OLD


def test_nobody_watches_a_host_that_is_wanted_again(site: Site) -> None:
    site.add_host()
    first = site.deploy("r1n1")
    site.operations.cancel(first.id, actor=ACTOR)
    site.outbox.waiting.pop(0)  # the PowerOff, which a worker had no time for
    began_at = site.clock()
    seen: list[int] = []

    def deploy_again(verb: str) -> None:
        seen.append(1)
        if verb == "power" and len(seen) == 4:
            site.deploy("r1n1")

    site.bmc().on_exchange = deploy_again
    site.perform(at_most=1)
    assert site.clock() - began_at < timedelta(seconds=10)
    assert isinstance(site.outbox.waiting[0].effect, PowerOff)


def test_a_host_is_switched_on_although_its_bmc_takes_no_boot_flags(site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform(at_most=1)
    bmc = site.bmc()
    assert not bmc.is_on
    bmc.rejects = "next_boot"
    site.perform()
    assert site.phase(operation) is Phase.FAILED
    assert bmc.is_on
    assert bmc.booted[-1] is BootDevice.DISK


@pytest.mark.parametrize(("is_on", "ends"), [(True, Phase.NETBOOTING), (False, Phase.FAILED)])
def test_a_refusal_to_do_what_is_so_already_is_no_failure(
    site: Site, is_on: bool, ends: Phase
) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform(at_most=2)
    bmc = site.bmc()
    bmc.is_on, bmc.rejects = is_on, "power_on"
    site.perform(at_most=1)
    assert site.phase(operation) is ends


# --- waiting ------------------------------------------------------------------------------


def test_field_14_a_busy_bmc_is_waited_for_until_nobody_wants_it(site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    bmc, began_at = site.bmc(), site.clock()

    def be_busy(_: str) -> None:
        if site.clock() - began_at > timedelta(seconds=30):
            bmc.on_exchange = lambda _: None
            site.operations.cancel(operation.id, actor=ACTOR)
        raise BmcBusy("the BMC has no session free")

    bmc.on_exchange = be_busy
    site.perform(at_most=1)
    assert bmc.changes() == []
    assert len(bmc.exchanges) == 30 / BUSY_PAUSE_S + 2
    assert isinstance(site.outbox.waiting[0].effect, ReturnToDisk)


def test_a_refused_login_says_that_the_host_may_be_off(site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform(at_most=1)
    site.bmc().refuses_login = True
    site.perform()
    error = site.at(operation).error or {}
    assert error["code"] == "bmc_auth_failed"
    assert "host power r1n1 on" in error["hint"]
