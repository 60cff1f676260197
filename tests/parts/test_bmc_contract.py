"""What every `Bmc` must do, real or fake: `check_bmc` is for whoever writes another one.

The scenarios pass against OpenIPMI's simulator, which nobody here wrote, and against the
faulty BMC without a fault; so what the faults show is shown by a BMC that is one.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.bmc.ipmi import IpmiPool
from provisioner.core.contracts import Bmc, BmcPool
from provisioner.core.model import BmcAddress, BootDevice, PowerState, Secret
from provisioner.errors import BmcAuthFailed
from tests.faulty_bmc.faults import Faults, Traits
from tests.faulty_bmc.server import running_rack

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


@pytest.fixture(params=["ipmi_sim", "faulty_bmc"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BmcAddress]:
    """A BMC without a fault, with ten sessions at most, whose host is off and obeys at once."""
    if request.param == "ipmi_sim":
        with running_ipmi_sim(tmp_path / "bmc") as sim:
            yield sim.where()
        return
    with running_rack() as rack:
        traits = Traits(post_seconds=0, shutdown_seconds=0, is_on=False)
        yield rack.add(Faults(slots=10), traits).where()


def ipmitool(where: BmcAddress, folder: Path, *arguments: str) -> str:
    """Return what another IPMI client prints, with cipher suite 3."""
    password_file = folder / "password"
    password_file.write_text(where.password.reveal())
    command = ["ipmitool", "-I", "lanplus", "-C", "3", "-H", where.address, "-p", str(where.port)]
    command += ["-U", where.user, "-f", str(password_file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


def test_ipmi_over_a_real_server_keeps_the_contract(pool: BmcPool, where: BmcAddress) -> None:
    check_bmc(pool.bmc(where))


def test_another_client_sees_what_was_done_and_is_seen(
    pool: BmcPool, where: BmcAddress, tmp_path: Path
) -> None:
    pool.bmc(where).power_on()
    assert "Power is on" in ipmitool(where, tmp_path, "power", "status")
    ipmitool(where, tmp_path, "power", "off")
    assert pool.bmc(where).power() is PowerState.OFF


def test_wrong_credentials_are_told_apart_from_a_dead_bmc(pool: BmcPool, where: BmcAddress) -> None:
    for user, password in (("admin", "wrong"), ("nobody", where.password.reveal())):
        wrong = BmcAddress(where.address, where.port, user, Secret(password))
        with pytest.raises(BmcAuthFailed):
            pool.bmc(wrong).power()
    assert pool.bmc(where).power() is PowerState.OFF


def test_more_exchanges_than_it_has_sessions_all_succeed(pool: BmcPool, where: BmcAddress) -> None:
    for _ in range(25):
        assert pool.bmc(where).power() is PowerState.OFF
