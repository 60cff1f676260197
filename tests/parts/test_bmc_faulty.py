"""The BMC room against faulty BMCs: no exchange is wrong, endless, doubled, or leaves a session."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.bmc.ipmi import IpmiPool
from provisioner.bmc.workers import WORKERS_MAX
from provisioner.core.model import BootDevice, PowerState
from provisioner.errors import BmcAuthFailed, BmcBusy, BmcUnreachable, DeviceError
from tests.faulty_bmc.faults import MANGLINGS, READINGS, Command, Faults, Traits
from tests.faulty_bmc.lies import LIES
from tests.faulty_bmc.packets import RAKP_1, RAKP_3
from tests.faulty_bmc.server import FaultyBmc, Rack, running_rack
from tests.parts.busy_machine import in_one_of
from tests.parts.processes import children, is_gone, until
from tests.parts.test_network_lines import Ticking

LIMIT = timedelta(seconds=1.5)
# What a busy machine may add to a deadline. Without one, an exchange would never end.
GRACE_S = 60.0
FOR_EVER = 10**6


@pytest.fixture
def rack() -> Iterator[Rack]:
    with running_rack() as rack:
        yield rack


@contextmanager
def pool_with(folder: Path, exchange_limit: timedelta) -> Iterator[IpmiPool]:
    pool = IpmiPool(folder / "locks", exchange_limit=exchange_limit)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[IpmiPool]:
    """For exchanges that last until their deadline."""
    with pool_with(tmp_path, LIMIT) as pool:
        yield pool


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[IpmiPool]:
    """For exchanges that end before, however busy this machine is."""
    with pool_with(tmp_path, timedelta(seconds=60)) as pool:
        yield pool


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
    def attempt() -> None:
        bmc = rack.add(faults)
        with pytest.raises(DeviceError):
            pool.bmc(bmc.where()).power()
        until(lambda: bmc.sessions.open_now() == 0)
        counts = bmc.sessions.counts
        assert (counts.opened, counts.active, counts.closed) == (1, 1, 1)
        assert len(pool.workers.pids()) == 1  # and its worker serves again

    in_one_of(attempt)


@pytest.mark.parametrize("unanswered", [RAKP_1, RAKP_3])
def test_field_14_half_a_login_is_begun_anew_once(
    rack: Rack, patient: IpmiPool, unanswered: int
) -> None:
    """As released, pyghmi takes one session after the other, until it is killed."""

    def attempt() -> None:
        bmc = rack.add(Faults(not_answered_login=frozenset({unanswered})))
        with pytest.raises(BmcUnreachable):
            patient.bmc(bmc.where()).power()
        assert bmc.sessions.counts.opened == 2

    in_one_of(attempt)


def test_a_refused_proof_of_the_password_is_not_repeated(rack: Rack, patient: IpmiPool) -> None:
    """As released, pyghmi takes the refusal for a lost packet, and BMCs count such logins."""

    def attempt() -> None:
        bmc = rack.add(Faults(refuses_proof=True))
        with pytest.raises(BmcAuthFailed):
            patient.bmc(bmc.where()).power()
        assert bmc.sessions.counts.refused_logins == 1

    in_one_of(attempt)


def test_field_14_a_full_session_table_is_no_dead_bmc_and_heals(patient: IpmiPool) -> None:
    clock = Ticking()
    faults = Faults(slots=3, taken_slots=3)
    with running_rack(clock) as rack:
        bmc = rack.add(faults)
        with pytest.raises(BmcBusy, match="no session free"):
            patient.bmc(bmc.where()).power()
        clock.at += faults.session_seconds
        assert patient.bmc(bmc.where()).power() is PowerState.ON
        assert bmc.sessions.counts.without_room > 0


def test_field_16_a_worker_that_hangs_is_killed_and_its_session_times_out(tmp_path: Path) -> None:
    """Stopped, it can neither end the exchange by itself nor log out."""
    clock = Ticking()
    with running_rack(clock) as rack, pool_with(tmp_path, timedelta(seconds=8)) as pool:
        bmc = rack.add(Faults(slots=1, real_command_delay=1000.0))
        hang_in_an_exchange(pool, bmc)
        with pytest.raises(BmcBusy):
            pool.bmc(bmc.where()).power()
        clock.at += bmc.faults.session_seconds
        bmc.faults = replace(bmc.faults, real_command_delay=0.0)
        assert pool.bmc(bmc.where()).power() is PowerState.ON
        assert bmc.sessions.counts.expired == 1


def hang_in_an_exchange(pool: IpmiPool, bmc: FaultyBmc) -> None:
    """Stop the process that waits for the BMC; return when it was given up, and killed."""
    failed: list[DeviceError] = []

    def ask() -> None:
        try:
            pool.bmc(bmc.where()).power()
        except DeviceError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: bmc.sessions.open_now() == 1)
    [worker] = pool.workers.pids()
    [child] = children(worker)
    os.kill(child, signal.SIGSTOP)
    thread.join(GRACE_S)
    assert isinstance(failed[0], BmcUnreachable)
    assert pool.workers.pids() == []
    until(lambda: is_gone(child))


# --- commands -----------------------------------------------------------------------------


def test_a_reset_without_an_answer_is_sent_once(rack: Rack, pool: IpmiPool) -> None:
    """The second one would hit what the first one started."""

    def attempt() -> None:
        bmc = rack.add(Faults(not_answered={Command.RESET: FOR_EVER}))
        with pytest.raises(BmcUnreachable):
            pool.bmc(bmc.where()).reset()
        assert bmc.commands == [Command.RESET]

    in_one_of(attempt)


def test_field_13_flags_are_set_on_a_bmc_that_refuses_to_hold_its_timer(
    rack: Rack, patient: IpmiPool
) -> None:
    def attempt() -> None:
        bmc = rack.add(Faults(refused={Command.HOLD_TIMER: 0x80}))
        patient.bmc(bmc.where()).set_next_boot(
            BootDevice.NETWORK, persistent=False, uefi=True, hold_timer=True
        )
        assert bmc.commands == [Command.HOLD_TIMER, Command.SET_FLAGS]
        assert [line.detail for line in bmc.host.happened("flags")] == ["network"]

    in_one_of(attempt)


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

    def serves_again() -> None:
        assert pool.bmc(rack.add().where()).power() is PowerState.ON

    in_one_of(serves_again)


# --- many at once -------------------------------------------------------------------------

BMCS = 200
ROUNDS = 2
# Long enough for all that answer, with so many at once on a busy machine.
MANY_LIMIT = timedelta(seconds=16)
Kind = tuple[Faults, type[DeviceError] | None]
KINDS: tuple[Kind, ...] = (
    (Faults(), None),
    (Faults(real_delay=0.01), None),
    (Faults(mangling="twice"), None),
    (Faults(short_answers=True), BmcUnreachable),
    (Faults(), None),
    (Faults(slots=2, taken_slots=2, session_seconds=1e9), BmcBusy),
    (Faults(refuses_proof=True), BmcAuthFailed),
    (Faults(), None),
)
# Few, since each of them is waited for until its deadline.
SILENT: tuple[Kind, ...] = (
    (Faults(answers=lambda _, __: False), BmcUnreachable),
    (Faults(not_answered={Command.STATUS: FOR_EVER}), BmcUnreachable),
)
SILENT_EACH = 25


def kind_of(number: int) -> Kind:
    if number % SILENT_EACH == 0:
        return SILENT[number // SILENT_EACH % len(SILENT)]
    return KINDS[number % len(KINDS)]


def test_two_hundred_faulty_bmcs_asked_at_once_each_end_by_their_deadline(
    rack: Rack, tmp_path: Path
) -> None:
    """Two askers each: one exchange at a time per BMC, and the sound ones do not suffer."""
    bmcs = [rack.add(kind_of(number)[0]) for number in range(BMCS)]
    wait = timedelta(minutes=5)
    pool = IpmiPool(tmp_path / "locks", exchange_limit=MANY_LIMIT, wait_limit=wait)
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
        until(lambda: all(children(worker) == [] for worker in workers))
    finally:
        pool.close()
    assert all(is_gone(worker) for worker in workers)
    wrong = Counter(
        (number, outcome)
        for number, found in outcomes.items()
        for outcome in found
        if outcome is not kind_of(number)[1]
    )
    assert not wrong
    assert sum(map(len, outcomes.values())) == ROUNDS * BMCS
    assert not any(bmc.is_overlapped for bmc in bmcs)
    # Eight workers wait for eight of the silent ones at a time.
    silent = ROUNDS * BMCS / SILENT_EACH
    assert lasted < silent / WORKERS_MAX * MANY_LIMIT.total_seconds() + 2 * GRACE_S


def test_every_way_of_reading_power_is_used_by_a_lie() -> None:
    assert {lie.faults.reading for lie in LIES} == set(READINGS)
