"""A worker that is frozen at any moment, for any time, does nothing of the past when it wakes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.errors import BmcUnreachable
from provisioner.service.fence import LOOK_HOLDS, NO_LIMIT, CarefulBmc, Fence, Overtaken
from tests.parts.fake_bmc import FakeBmc
from tests.parts.rack import INTO_NETWORK, Rack, patiently, request, running_rack
from tests.parts.served_lives import HOST, until

# Longer than any look holds.
FROZEN_S = LOOK_HOLDS.total_seconds() + 1
HOLD_LIMIT_S = 300.0
END_LIMIT_S = 180.0


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    with running_rack(tmp_path_factory.mktemp("paused")) as rack:
        yield rack


def cancelled_while_frozen(rack: Rack, armed: str, *, comes: bool = False) -> list[str]:
    """Freeze the worker at a point of a deployment, cancel that, let the worker go on much
    later; return what the BMC did from the freezing on. With `comes` the host is on its way into
    the network, where it asks after the cancelling."""
    rack.lives.begin()
    rack.host.forget()
    is_cancelled = threading.Event()

    def is_slow(_name: str) -> None:
        is_cancelled.wait(HOLD_LIMIT_S)

    rack.host.on_call = is_slow
    try:
        rack.lives.arm(f"stop {armed}")
        with rack.lives.client() as client:
            operation = request(rack, client)
            until(rack.lives.has_fired, "the worker frozen", END_LIMIT_S)
            worker = rack.lives.pid_of("prov-worker")
            before = len(rack.host.happened())
            assert patiently(lambda: client.cancel(operation))["phase"] == "cancelled"
            is_cancelled.set()
            if comes:
                until(lambda: "boots its disk" in rack.host.said, "the host at home", END_LIMIT_S)
            time.sleep(FROZEN_S)
            os.kill(worker, signal.SIGCONT)
            until(lambda: rack.in_queue() == 0, "the end of all effects", END_LIMIT_S)
            ended = patiently(lambda: client.operation(operation))
            assert (ended["phase"], ended["error"]) == ("cancelled", None)
            assert patiently(lambda: client.host(HOST))["operation"] is None
            assert patiently(client.verify_audit) > 0
            assert rack.lives.pid_of("prov-worker") == worker, "it was not even restarted"
        return rack.host.happened()[before:]
    finally:
        is_cancelled.set()
        rack.host.on_call = lambda _name: None
        rack.lives.kill()


def test_a_command_of_the_past_is_not_given(rack: Rack) -> None:
    """It was about to switch the host off for a deployment that was cancelled meanwhile."""
    assert cancelled_while_frozen(rack, "worker bmc.power_off.before 1") == []


def test_a_late_result_is_dropped(rack: Rack) -> None:
    """The host was switched on into the network; by then nobody wants it there."""
    assert cancelled_while_frozen(rack, "worker bmc.power_on.after 1", comes=True) == []
    assert rack.host.happened() == INTO_NETWORK
    assert "FAILPOINT" in rack.lives.log.read_text()
    assert "late BMC result dropped" in rack.lives.log.read_text()


def test_the_last_look_is_taken_right_before_the_command_begins() -> None:
    now, looks = 100.0, 0
    took = [LOOK_HOLDS.total_seconds(), 1.0, 0.0]  # the first answer is of a world of the past

    def look() -> None:
        nonlocal now, looks
        now += took[looks]
        looks += 1

    fence = Fence(lambda: now)
    assert fence.begin() == (NO_LIMIT, NO_LIMIT), "a person's command needs no look"
    with fence.acting(look):
        assert fence.begin() == (LOOK_HOLDS - timedelta(seconds=1), NO_LIMIT)
        assert looks == 2
        fence.hold(lambda: timedelta(seconds=-1))
        assert fence.begin() == (timedelta(seconds=-1), timedelta(seconds=-1))
    assert fence.begin() == (NO_LIMIT, NO_LIMIT)


def test_each_command_looks_first_and_reading_does_not() -> None:
    bmc = FakeBmc(is_on=True)

    def look() -> None:
        raise Overtaken

    careful = CarefulBmc(bmc, Fence(), look)
    careful.power()
    for command in (careful.power_on, careful.reset, lambda: careful.power_off(soft=True)):
        with pytest.raises(Overtaken):
            command()
    assert bmc.exchanges == ["power"]


def test_an_exchange_whose_time_is_over_is_not_begun_and_one_that_hangs_is_ended(
    tmp_path: Path,
) -> None:
    """By its own process, so that it ends even while the service is frozen."""
    from provisioner.bmc.ipmi import IpmiPool
    from tests.parts.ipmi import running_ipmi_sim

    within = (timedelta(seconds=-1), NO_LIMIT)
    pool = IpmiPool(tmp_path / "locks", may_begin=lambda: within)
    with running_ipmi_sim(tmp_path / "bmc") as sim:
        try:
            with pytest.raises(BmcUnreachable, match="not begun"):
                pool.bmc(sim.where()).power_on()
            assert sim.chassis() == []
            pool.bmc(sim.where()).power()
            within = (NO_LIMIT, timedelta(seconds=1))
            sim.pause()
            # Else the library gives up by itself, after some seconds, and that is told as such.
            with pytest.raises(BmcUnreachable, match="broke off"):
                pool.bmc(sim.where()).power_on()
        finally:
            sim.resume()
            pool.close()
