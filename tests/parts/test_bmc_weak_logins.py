"""BMCs that let people in without a password are found out, without logging in to them."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.bmc.ipmi import IpmiPool
from provisioner.core.model import BmcAddress, PowerState, Secret, WeakLogin
from provisioner.errors import BmcUnreachable, Conflict
from provisioner.service.hosts import Hosts, HostSpec
from tests.faulty_bmc.faults import Faults
from tests.faulty_bmc.server import Rack, running_rack
from tests.parts.busy_machine import in_one_of
from tests.parts.ipmi import PASSWORD, USER, running_ipmi_sim
from tests.parts.processes import until
from tests.parts.service_site import ACTOR, Site, mac

ZERO, NOBODY = WeakLogin.CIPHER_ZERO, WeakLogin.ANONYMOUS


@pytest.fixture
def rack() -> Iterator[Rack]:
    with running_rack() as rack:
        yield rack


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[IpmiPool]:
    pool = IpmiPool(tmp_path / "locks", exchange_limit=timedelta(seconds=60))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("faults", "ways"),
    [
        (Faults(), ()),
        (Faults(takes_suite_0=True), (ZERO,)),
        (Faults(nobodys_password=""), (NOBODY,)),
        (Faults(takes_suite_0=True, nobodys_password=""), (ZERO, NOBODY)),
    ],
    ids=["sound", "cipher zero", "anonymous", "both"],
)
def test_public_cipher_zero_and_anonymous_login_are_found(
    rack: Rack, pool: IpmiPool, faults: Faults, ways: tuple[WeakLogin, ...]
) -> None:
    """With cipher suite 0 any password opens a BMC; many have a user without a name."""

    def attempt() -> None:
        bmc = rack.add(faults)
        assert pool.weak_logins(bmc.where()) == ways
        assert bmc.sessions.counts.active == 0, "nobody logged in"
        until(lambda: not bmc.sessions.rows)  # no session stays open
        assert bmc.commands == []
        assert pool.bmc(bmc.where()).power() is PowerState.ON

    in_one_of(attempt)  # an answer is waited for for a second


def test_openipmis_bmc_takes_suite_0_as_it_is_configured_here(
    pool: IpmiPool, tmp_path: Path
) -> None:
    """It allows `none` as an authentication. Its user without a name is disabled."""
    with running_ipmi_sim(tmp_path / "bmc") as sim:
        where = BmcAddress("127.0.0.1", sim.port, USER, Secret(PASSWORD))
        assert pool.weak_logins(where) == (ZERO,)


def test_a_nameless_user_with_a_password_is_no_weak_login(rack: Rack, pool: IpmiPool) -> None:
    bmc = rack.add(Faults(nobodys_password="a-password"))
    assert pool.weak_logins(bmc.where()) == ()


def test_a_silent_bmc_says_nothing_about_itself(rack: Rack, pool: IpmiPool) -> None:
    bmc = rack.add(Faults(answers=lambda _exchange, _age: False))
    with pytest.raises(BmcUnreachable):
        pool.weak_logins(bmc.where())


def test_what_is_found_is_in_the_timeline_with_a_hint(
    site: Site, rack: Rack, pool: IpmiPool
) -> None:
    hosts = Hosts(site.store, pool, site.clock, pool.weak_logins)
    bmc = rack.add(Faults(takes_suite_0=True))
    hosts.add(HostSpec("r9n1", (mac(91),), bmc=bmc.where()), actor=ACTOR)
    hosts.add(HostSpec("r9n2", (mac(92),)), actor=ACTOR)
    (found,) = hosts.check_bmc("r9n1")
    assert (found["code"], "cipher suite 0" in found["message"]) == ("cipher_zero", True)
    (line,) = [event for _, event in hosts.timeline("r9n1") if event.text.startswith("warning")]
    assert line.source == "bmc"
    assert line.detail["hint"] == found["hint"]
    with pytest.raises(Conflict, match="no BMC"):
        hosts.check_bmc("r9n2")
