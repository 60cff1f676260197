"""The BMC room against faulty BMCs: no exchange is wrong, endless, doubled, or leaves a session."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.bmc.ipmi import IpmiPool
from provisioner.core.model import BootDevice, PowerState
from provisioner.errors import BmcAuthFailed, BmcBusy, BmcUnreachable, DeviceError
from tests.faulty_bmc.faults import MANGLINGS, READINGS, Command, Faults, Traits
from tests.faulty_bmc.lies import LIES
from tests.faulty_bmc.packets import RAKP_1, RAKP_3
from tests.faulty_bmc.server import FaultyBmc, Rack, running_rack
from tests.parts.processes import children, is_gone, until

LIMIT = timedelta(seconds=1.5)
# What a busy machine may add to a deadline.
GRACE_S = 4.0
FOR_EVER = 10**6


@pytest.fixture
def rack() -> Iterator[Rack]:
    with running_rack() as rack:
        yield rack


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[IpmiPool]:
    pool = IpmiPool(tmp_path / "locks", exchange_limit=LIMIT)
    yield pool
    pool.close()


# --- sessions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        Faults(not_answered={Command.STATUS: FOR_EVER}),
        Faults(real_command_delay=60.0),
        Faults(short_answers=True),
        Faults(refused={Command.STATUS: 0xC0}),
    ],
    ids=["unanswered", "slow", "short", "refused"],
)
def test_field_14_an_exchange_that_fails_closes_its_session(
    rack: Rack, pool: IpmiPool, faults: Faults
) -> None:
    bmc = rack.add(faults)
    with pytest.raises(DeviceError):
        pool.bmc(bmc.where()).power()
    until(lambda: bmc.sessions.open_now() == 0)
    counts = bmc.sessions.counts
    assert (counts.opened, counts.active, counts.closed) == (1, 1, 1)
    assert len(pool.workers.pids()) == 1  # and its worker serves again


@pytest.mark.parametrize("unanswered", [RAKP_1, RAKP_3])
def test_field_14_half_a_login_is_begun_anew_once(
    rack: Rack, tmp_path: Path, unanswered: int
) -> None:
    """As released, pyghmi takes one session after the other, until it is killed."""
    pool = IpmiPool(tmp_path / "locks", exchange_limit=timedelta(seconds=8))
    bmc = rack.add(Faults(not_answered_login=frozenset({unanswered})))
    try:
        with pytest.raises(BmcUnreachable):
            pool.bmc(bmc.where()).power()
    finally:
        pool.close()
    assert bmc.sessions.counts.opened == 2


def test_a_refused_proof_of_the_password_is_not_repeated(rack: Rack, pool: IpmiPool) -> None:
    """As released, pyghmi takes the refusal for a lost packet, and BMCs count such logins."""
    bmc = rack.add(Faults(refuses_proof=True))
    with pytest.raises(BmcAuthFailed):
        pool.bmc(bmc.where()).power()
    assert bmc.sessions.counts.refused_logins == 1


def test_field_14_a_full_session_table_is_no_dead_bmc_and_heals(rack: Rack, pool: IpmiPool) -> None:
    bmc = rack.add(Faults(slots=3, taken_slots=3, session_seconds=1.0))
    with pytest.raises(BmcBusy, match="no session free"):
        pool.bmc(bmc.where()).power()
    time.sleep(1.0)
    assert pool.bmc(bmc.where()).power() is PowerState.ON
    assert bmc.sessions.counts.without_room > 0


def test_field_16_a_worker_that_hangs_is_killed_and_its_session_times_out(
    rack: Rack, pool: IpmiPool
) -> None:
    """Stopped, it can neither end the exchange by itself nor log out."""
    faults = Faults(slots=1, session_seconds=2.5, real_command_delay=0.6)
    bmc = rack.add(faults)
    failed: list[DeviceError] = []

    def ask() -> None:
        try:
            pool.bmc(bmc.where()).power()
        except DeviceError as error:
            failed.append(error)

    began_at = time.monotonic()
    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: bmc.sessions.open_now() == 1)
    [worker] = pool.workers.pids()
    [child] = children(worker)
    os.kill(child, signal.SIGSTOP)
    thread.join(LIMIT.total_seconds() + GRACE_S)
    assert time.monotonic() - began_at < LIMIT.total_seconds() + GRACE_S
    assert isinstance(failed[0], BmcUnreachable)
    assert pool.workers.pids() == []
    until(lambda: is_gone(child))
    with pytest.raises(BmcBusy):
        pool.bmc(bmc.where()).power()
    time.sleep(faults.session_seconds)
    assert pool.bmc(bmc.where()).power() is PowerState.ON
    assert bmc.sessions.counts.expired == 1


# --- commands -----------------------------------------------------------------------------


def test_a_reset_without_an_answer_is_sent_once(rack: Rack, pool: IpmiPool) -> None:
    """The second one would hit what the first one started."""
    bmc = rack.add(Faults(not_answered={Command.RESET: FOR_EVER}))
    with pytest.raises(BmcUnreachable):
        pool.bmc(bmc.where()).reset()
    assert bmc.commands == [Command.RESET]


def test_field_13_flags_are_set_on_a_bmc_that_refuses_to_hold_its_timer(
    rack: Rack, pool: IpmiPool
) -> None:
    bmc = rack.add(Faults(refused={Command.HOLD_TIMER: 0x80}))
    pool.bmc(bmc.where()).set_next_boot(
        BootDevice.NETWORK, persistent=False, uefi=True, hold_timer=True
    )
    assert bmc.commands == [Command.HOLD_TIMER, Command.SET_FLAGS]
    assert [line.detail for line in bmc.host.happened("flags")] == ["network"]


# --- hostile answers ----------------------------------------------------------------------


@pytest.mark.parametrize("mangling", MANGLINGS)
def test_a_hostile_answer_is_an_error_and_never_a_wrong_state(
    rack: Rack, pool: IpmiPool, mangling: str
) -> None:
    """The state is what a BMC says that knows the password, or there is none."""
    for is_on in (True, False):
        bmc = rack.add(Faults(mangling=mangling), Traits(is_on=is_on))
        began_at = time.monotonic()
        try:
            said = pool.bmc(bmc.where()).power()
        except DeviceError:
            pass
        else:
            assert (said is PowerState.ON) == is_on
        assert time.monotonic() - began_at < LIMIT.total_seconds() + GRACE_S
        assert bmc.sessions.open_now() <= 1  # one whose keys did not survive the mangling
        assert bmc.sessions.counts.opened <= 2
    assert pool.bmc(rack.add().where()).power() is PowerState.ON


# --- many at once -------------------------------------------------------------------------

BMCS = 200
ROUNDS = 2
KINDS: tuple[tuple[Faults, type[DeviceError] | None], ...] = (
    (Faults(), None),
    (Faults(real_delay=0.01), None),
    (Faults(mangling="twice"), None),
    (Faults(answers=lambda _, __: False), BmcUnreachable),
    (Faults(), None),
    (Faults(short_answers=True), BmcUnreachable),
    (Faults(slots=2, taken_slots=2, session_seconds=1e9), BmcBusy),
    (Faults(refuses_proof=True), BmcAuthFailed),
    (Faults(), None),
    (Faults(not_answered={Command.STATUS: FOR_EVER}), BmcUnreachable),
)


def test_two_hundred_faulty_bmcs_asked_at_once_each_end_by_their_deadline(
    rack: Rack, tmp_path: Path
) -> None:
    """Two askers each: one exchange at a time per BMC, and the sound ones do not suffer."""
    bmcs = [rack.add(KINDS[number % len(KINDS)][0]) for number in range(BMCS)]
    wait = timedelta(seconds=120)
    pool = IpmiPool(tmp_path / "locks", exchange_limit=LIMIT, wait_limit=wait)
    outcomes: dict[int, list[type[DeviceError] | None]] = {number: [] for number in range(BMCS)}

    def ask(number: int, bmc: FaultyBmc) -> None:
        try:
            pool.bmc(bmc.where()).power()
        except DeviceError as error:
            outcomes[number].append(type(error))
        else:
            outcomes[number].append(None)

    threads = [
        threading.Thread(target=ask, args=(number, bmc))
        for _ in range(ROUNDS)
        for number, bmc in enumerate(bmcs)
    ]
    began_at = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(wait.total_seconds())
        lasted = time.monotonic() - began_at
        workers = pool.workers.pids()
        assert all(children(worker) == [] for worker in workers)
    finally:
        pool.close()
    assert all(is_gone(worker) for worker in workers)
    wrong = Counter(
        (number % len(KINDS), outcome)
        for number, found in outcomes.items()
        for outcome in found
        if outcome is not KINDS[number % len(KINDS)][1]
    )
    assert not wrong
    assert sum(map(len, outcomes.values())) == ROUNDS * BMCS
    assert not any(bmc.is_overlapped for bmc in bmcs)
    # A fifth is silent or does not answer: eight workers wait for five at a time.
    assert lasted < ROUNDS * BMCS / 5 / 8 * LIMIT.total_seconds() + 60


def test_every_way_of_reading_power_is_used_by_a_lie() -> None:
    assert {lie.faults.reading for lie in LIES} == set(READINGS)
