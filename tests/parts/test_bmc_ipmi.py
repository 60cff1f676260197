"""The BMC room against OpenIPMI's simulator: what is sent, and what each failure becomes."""

import ast
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.bmc.ipmi import IpmiPool, translate
from provisioner.bmc.locks import bmc_lock, lock_name
from provisioner.bmc.quirks import QUIRKS
from provisioner.core.model import BootDevice, PowerState
from provisioner.errors import (
    BmcAuthFailed,
    BmcBusy,
    BmcRejected,
    BmcUnreachable,
    DeviceError,
    RequestError,
)

from .busy_machine import in_one_of
from .ipmi import IpmiSim, running_ipmi_sim, running_relay
from .processes import until

OPEN_SESSION, LOGIN_ATTEMPT, PASSWORD_PROOF = 0x10, 0x12, 0x14


@pytest.fixture(scope="module")
def shared_sim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IpmiSim]:
    with running_ipmi_sim(tmp_path_factory.mktemp("bmc") / "bmc") as sim:
        yield sim


@pytest.fixture
def sim(tmp_path: Path) -> Iterator[IpmiSim]:
    with running_ipmi_sim(tmp_path / "bmc") as sim:
        yield sim


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[IpmiPool]:
    pool = IpmiPool(tmp_path / "locks")
    yield pool
    pool.close()


def test_power_commands_reach_the_bmc_as_the_standard_has_them(
    sim: IpmiSim, pool: IpmiPool
) -> None:
    bmc = pool.bmc(sim.where())

    def attempt() -> None:
        before = len(sim.chassis())
        bmc.power_on()
        assert bmc.power() is PowerState.ON
        bmc.reset()
        bmc.power_off(soft=True)
        bmc.power_on()
        bmc.power_off(soft=False)
        assert bmc.power() is PowerState.OFF
        sent = [m.hex() for m in sim.chassis()[before:]]
        assert sent == ["0201", "0203", "0205", "0201", "0200"]

    in_one_of(attempt)


@pytest.mark.parametrize(
    ("device", "persistent", "uefi", "hold_timer", "sent", "read_back"),
    [
        ("network", False, False, False, ["08058004000000"], "PXE"),
        ("network", False, True, False, ["0805a004000000"], "PXE"),
        ("network", False, True, True, ["080308", "0805a004000000"], "PXE"),
        ("network", True, True, False, ["0805e004000000"], "PXE"),
        ("network", True, False, True, ["080308", "0805c004000000"], "PXE"),
        ("disk", False, False, False, ["08058008000000"], "Hard-Drive"),
        ("disk", True, True, False, ["0805e008000000"], "Hard-Drive"),
    ],
)
def test_next_boot_reaches_the_bmc_and_is_read_back(
    sim: IpmiSim,
    pool: IpmiPool,
    device: str,
    persistent: bool,
    uefi: bool,
    hold_timer: bool,
    sent: list[str],
    read_back: str,
) -> None:
    """The simulator remembers only the device, and never marks the flags valid."""

    def attempt() -> None:
        before = len(sim.chassis())
        pool.bmc(sim.where()).set_next_boot(
            BootDevice(device), persistent=persistent, uefi=uefi, hold_timer=hold_timer
        )
        assert [m.hex() for m in sim.chassis()[before:]] == sent

    in_one_of(attempt)  # what is not answered within half a second is sent again
    shown = sim.ipmitool("chassis", "bootparam", "get", "5")
    assert read_back in shown
    assert "Boot Flag Invalid" in shown


def test_field_13_the_flag_timer_is_held_before_the_flags_are_set(
    sim: IpmiSim, pool: IpmiPool
) -> None:
    def attempt() -> None:
        before = len(sim.chassis())
        pool.bmc(sim.where()).set_next_boot(
            BootDevice.NETWORK, persistent=False, uefi=True, hold_timer=True
        )
        assert [m[:2].hex() for m in sim.chassis()[before:]] == ["0803", "0805"]

    in_one_of(attempt)


def test_a_wrong_password_is_one_login_attempt_and_not_a_dead_bmc(
    shared_sim: IpmiSim, pool: IpmiPool
) -> None:
    """Had the answer to it been lost, or very late, it would be begun anew."""

    def attempt() -> None:
        with running_relay(shared_sim.port) as relay:
            with pytest.raises(BmcAuthFailed):
                pool.bmc(shared_sim.where(password="wrong", port=relay.port)).power()
            assert relay.counts[LOGIN_ATTEMPT] == 1
            assert relay.counts[PASSWORD_PROOF] == 0
            pool.bmc(shared_sim.where(port=relay.port)).power()
            assert relay.counts[LOGIN_ATTEMPT] == 2

    in_one_of(attempt)


def test_an_unknown_user_is_one_login_attempt_too(shared_sim: IpmiSim, pool: IpmiPool) -> None:
    def attempt() -> None:
        with running_relay(shared_sim.port) as relay:
            with pytest.raises(BmcAuthFailed):
                pool.bmc(shared_sim.where(user="nobody", port=relay.port)).power()
            assert relay.counts[LOGIN_ATTEMPT] == 1

    in_one_of(attempt)


def test_field_16_a_silent_bmc_is_given_up_at_the_deadline(sim: IpmiSim, tmp_path: Path) -> None:
    pool = IpmiPool(tmp_path / "locks", exchange_limit=timedelta(seconds=1))

    def answers() -> None:
        assert pool.bmc(sim.where()).power() is PowerState.OFF

    def gives_up() -> None:
        started = time.monotonic()
        with pytest.raises(BmcUnreachable):
            pool.bmc(sim.where()).power()
        # By itself it would after more than 4 s.
        assert 0.7 < time.monotonic() - started < 4
        assert len(pool.workers.pids()) == 1  # it logs out by itself, and is not killed for it

    try:
        in_one_of(answers)
        sim.pause()
        in_one_of(gives_up)
        sim.resume()
        in_one_of(answers)
    finally:
        pool.close()


def test_a_bmc_that_nobody_answers_for_is_unreachable_and_the_worker_lives(
    shared_sim: IpmiSim, pool: IpmiPool
) -> None:
    pool.bmc(shared_sim.where()).power()
    before = pool.workers.pids()
    with pytest.raises(BmcUnreachable):
        pool.bmc(shared_sim.where(port=9)).power()
    assert pool.workers.pids() == before


@pytest.mark.parametrize("lost", [1, 6, 8, 10, 12, 14])
def test_a_lost_packet_is_sent_again(shared_sim: IpmiSim, pool: IpmiPool, lost: int) -> None:
    """An exchange is 16 packets: 12 to log in, 2 for the command, 2 to log out."""
    with running_relay(shared_sim.port, lost={lost}) as relay:
        assert pool.bmc(shared_sim.where(port=relay.port)).power() is PowerState.OFF


def test_field_14_no_session_is_left_open(sim: IpmiSim, pool: IpmiPool) -> None:
    def counted(text: str) -> int:
        return sim.log().count(text)

    def attempt() -> None:
        started, closed = counted("Session started"), counted("Session closed")
        for _ in range(25):  # the user may have ten
            pool.bmc(sim.where()).power()
        # The last logout is not answered for.
        until(lambda: counted("Session closed") >= closed + 25)
        assert counted("Session started") == started + 25
        assert counted("Session closed: Closed due to request") >= 25

    in_one_of(attempt)  # what is answered late is asked again, and may start a second session


def test_a_slow_power_command_is_sent_once(sim: IpmiSim, pool: IpmiPool) -> None:
    sim.delay(1.6)
    pool.bmc(sim.where()).reset()
    assert len(sim.calls()) == 1


def test_a_busy_bmc_is_waited_for_no_longer_than_allowed(
    shared_sim: IpmiSim, tmp_path: Path
) -> None:
    locks = tmp_path / "locks"
    pool = IpmiPool(locks, wait_limit=timedelta(seconds=0.3))
    where = shared_sim.where()
    try:
        with (
            bmc_lock(locks, where.address, where.port, timedelta(0)),
            pytest.raises(BmcBusy, match="busy"),
        ):
            pool.bmc(where).power()
        pool.bmc(where).power()
    finally:
        pool.close()


def test_a_bmc_is_locked_under_one_name_however_its_address_is_written() -> None:
    assert lock_name("fe80:0:0:0::1", 623) == lock_name("fe80::1", 623) == "fe80::1-623.lock"
    with pytest.raises(RequestError):
        lock_name("../../etc/passwd", 623)


@pytest.mark.parametrize(
    ("outcome", "text", "expected"),
    [
        ("failed", "Incorrect password provided", BmcAuthFailed),
        ("failed", "Unauthorized name in RAKP2", BmcAuthFailed),
        ("failed", "Invalid integrity check value reported in RAKP4", BmcAuthFailed),
        ("failed", "Invalid RAKP4 integrity code (wrong Kg?)", BmcAuthFailed),
        ("failed", "None", BmcUnreachable),
        ("failed", "timeout", BmcUnreachable),
        ("refused", "timeout", BmcUnreachable),
        ("failed", "Session no longer connected", BmcUnreachable),
        ("failed", "Unable to transmit to specified address", BmcUnreachable),
        (
            "failed",
            "Insufficient resources to create new session (wait for existing sessions to timeout)",
            BmcBusy,
        ),
        ("crashed", "KeyError", BmcUnreachable),
        ("refused", "Insufficient privilege level", BmcRejected),
        ("refused", "Invalid data field in request", BmcRejected),
        ("failed", "No Cipher suite match with proposed security algorithms", BmcRejected),
    ],
)
def test_what_pyghmi_says_becomes_the_error_of_whoever_must_act(
    outcome: str, text: str, expected: type[DeviceError]
) -> None:
    error = translate(outcome, text, "10.0.0.1")
    assert type(error) is expected
    assert "10.0.0.1" in error.message


def test_a_command_that_the_bmc_refuses_is_rejected_and_the_worker_lives(
    sim: IpmiSim, pool: IpmiPool
) -> None:
    """A chassis program that fails makes the simulator answer with a completion code."""
    bmc = pool.bmc(sim.where())
    (sim.directory / "chassis").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BmcRejected):
        bmc.power()
    with pytest.raises(BmcRejected):
        bmc.set_next_boot(BootDevice.NETWORK, persistent=False, uefi=True, hold_timer=True)
    assert len(pool.workers.pids()) == 1


def test_every_quirk_names_a_test_that_exists() -> None:
    tree = ast.parse(Path(__file__).read_text())
    tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {quirk.test for quirk in QUIRKS} <= tests
