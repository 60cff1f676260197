"""What every `Bmc` must do, real or fake: `check_bmc` is for whoever writes another one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.bmc.ipmi import IpmiPool
from provisioner.core.contracts import Bmc, BmcPool
from provisioner.core.model import BootDevice, PowerState

from .ipmi import running_ipmi_sim


def check_bmc(bmc: Bmc) -> None:
    """Walk a BMC, whose host is off and obeys at once, through everything it can do."""
    assert bmc.power() is PowerState.OFF
    bmc.power_off(soft=False)  # a wish, not a toggle
    assert bmc.power() is PowerState.OFF
    for device in BootDevice:
        for persistent, uefi, hold_timer in ((False, False, False), (False, True, True)):
            bmc.set_next_boot(device, persistent=persistent, uefi=uefi, hold_timer=hold_timer)
        bmc.set_next_boot(device, persistent=True, uefi=False, hold_timer=False)
    bmc.power_on()
    bmc.power_on()
    assert bmc.power() is PowerState.ON
    bmc.reset()
    assert bmc.power() is PowerState.ON
    bmc.power_off(soft=True)
    assert bmc.power() is PowerState.OFF


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[BmcPool]:
    pool = IpmiPool(tmp_path / "locks")
    yield pool
    pool.close()


def test_ipmi_over_a_real_server_keeps_the_contract(pool: BmcPool, tmp_path: Path) -> None:
    with running_ipmi_sim(tmp_path / "bmc") as sim:
        check_bmc(pool.bmc(sim.where()))
