"""The hosts that services run on: this one's, and those of others on its database, are never
targets."""

import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from provisioner import keys, wiring
from provisioner.cli.main import main
from provisioner.cli.serve.command import bring_up_to_date
from provisioner.cli.serve.registering import register
from provisioner.core.contracts import Store
from provisioner.core.guard import WriteRefused
from provisioner.core.model import Host, Operation, Phase
from provisioner.core.own_host import OwnHost, OwnHostRefused, ServiceHost
from provisioner.errors import ConfigError, NotFound
from provisioner.own_identity import own_host
from provisioner.settings import Settings, load
from tests.parts.command_line import Cli, commands_of
from tests.parts.postgres import Postgres
from tests.parts.served_lives import install, sibling_of
from tests.parts.service_site import ACTOR, Agent, Site, inventory, mac, tamper
from tests.parts.stores import NOW

KEY = "00112233"


@pytest.fixture
def cli(site: Site) -> Iterator[Cli]:
    with commands_of(site) as cli:
        yield cli


def request(site: Site, *names: str) -> list[Operation]:
    return site.operations.request_deployment(names, "tiny@1", options={}, actor=ACTOR)


def requests_for(site: Site, host: Host) -> list[Callable[[], object]]:
    """Return all that can be asked for r1n1, by name and by id, alone and beside another host."""
    return [
        lambda: request(site, "r1n2", "r1n1"),
        lambda: request(site, host.id),
        lambda: site.operations.request_verification(["r1n1"], "tiny@1", actor=ACTOR),
        lambda: site.operations.request_inspection("r1n1", actor=ACTOR),
    ]


# --- this service's ---------------------------------------------------------------------------


OWN = {
    "named": OwnHost(names=frozenset({"r1n1"})),
    "mac": OwnHost(macs=frozenset({mac(1), "02:00:00:00:00:99"})),
    "uuid": OwnHost(uuid=inventory(1)["uuid"].upper()),
    "serial": OwnHost(serial="sn-1"),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_public_the_services_own_host_is_never_a_target(site: Site, own: OwnHost) -> None:
    """A university reimaged its deployment server along with everything else."""
    host = site.add_host(uuid=inventory(1)["uuid"] if own.uuid else None, serial="SN-1")
    site.add_host(2)
    (queued,) = request(site, "r1n1")  # from before the service moved there
    guard = site.transitions.guard
    guard.own = own
    site.worker.start_queued()
    assert site.phase(queued) is Phase.FAILED
    assert "the service runs on it" in (site.at(queued).error or {})["message"]
    for ask in requests_for(site, host):
        with pytest.raises(OwnHostRefused) as caught:
            ask()
        assert caught.value.host == "r1n1"
    assert site.operations.list("r1n2") == []
    assert site.outbox.waiting == []


def test_the_services_own_host_is_found_before_the_write_at_the_latest(
    site: Site, agent: Agent
) -> None:
    agent.until(Phase.PREPARING)
    site.transitions.guard.own = OwnHost(macs=frozenset({mac(1)}))
    with pytest.raises(WriteRefused, match="the service runs on it"):
        agent.authorise()


@pytest.mark.parametrize("own", [*OWN.values()][:3], ids=[*OWN][:3])
def test_the_doctor_can_name_the_services_own_host(site: Site, own: OwnHost) -> None:
    site.add_host(1, uuid=inventory(1)["uuid"])
    site.add_host(2)
    assert list(site.hosts.own(own)) == ["r1n1"]
    assert site.hosts.own(OwnHost()) == {}


def test_a_serial_counts_only_where_no_uuid_contradicts_it(site: Site) -> None:
    """Boards are shipped with equal serials, and more often so than with equal UUIDs."""
    site.add_host(1, uuid=inventory(1)["uuid"], serial="123456789")
    site.transitions.guard.own = OwnHost(uuid=inventory(2)["uuid"], serial="123456789")
    request(site, "r1n1")


@pytest.mark.parametrize("serial", ["", "To be filled by O.E.M.", "Default string", None])
def test_a_machine_without_an_identity_is_not_taken_for_every_host(
    site: Site, serial: str | None
) -> None:
    zeros = "00000000-0000-0000-0000-000000000000"
    site.add_host(1, serial=serial or None)
    tamper(site, f"UPDATE hosts SET uuid = '{zeros}'")
    site.transitions.guard.own = OwnHost(uuid=zeros, serial=serial)
    request(site, "r1n1")


def test_this_machine_is_known_by_what_can_be_read_of_it(tmp_path: Path) -> None:
    assert own_host(("r1n9",), tmp_path) == OwnHost(names=frozenset({"r1n9"}))
    identity, net = tmp_path / "sys/class/dmi/id", tmp_path / "sys/class/net"
    identity.mkdir(parents=True)
    (identity / "product_uuid").write_text("4C4C4544-0042\n")
    (identity / "product_serial").write_text("  CZ1\n")
    for name, address, is_real in (
        ("eno1", "aa:bb:cc:00:00:01", True),
        ("eno2", "AA:BB:CC:00:00:01", True),  # as its bond's
        ("macvtap0", "52:54:00:77:00:01", False),  # a guest's MAC
        ("lo", "00:00:00:00:00:00", False),
    ):
        (net / name).mkdir(parents=True)
        (net / name / "address").write_text(f"{address}\n")
        if is_real:
            (net / name / "device").mkdir()
    (net / "eno2" / "bonding_slave").mkdir()
    (net / "eno2" / "bonding_slave" / "perm_hwaddr").write_text("aa:bb:cc:00:00:02\n")
    found = own_host((), tmp_path)
    assert (found.uuid, found.serial) == ("4C4C4544-0042", "CZ1")
    assert found.macs == {"aa:bb:cc:00:00:01", "aa:bb:cc:00:00:02"}


# --- those of other services ------------------------------------------------------------------


@pytest.mark.parametrize("found", OWN.values(), ids=OWN)
def test_public_another_services_host_is_never_a_target_either(site: Site, found: OwnHost) -> None:
    """Of two services on one database each would have rebuilt the other's host."""
    host = site.add_host(uuid=inventory(1)["uuid"] if found.uuid else None, serial="SN-1")
    site.add_host(2)
    (queued,) = request(site, "r1n1")
    site.services.register("two", found, "0.1.0", KEY)
    site.worker.start_queued()
    assert site.phase(queued) is Phase.FAILED
    assert "the service runs on it" in (site.at(queued).error or {})["message"]
    for ask in requests_for(site, host):
        with pytest.raises(OwnHostRefused, match="the service two was started there") as caught:
            ask()
        assert caught.value.host == "r1n1"
        assert "provisioner service forget two" in (caught.value.hint or "")
    assert site.operations.list("r1n2") == []
    assert site.hosts.own(OwnHost()).keys() == ({"r1n1"} if found.serial is None else set())


def test_a_service_that_starts_meanwhile_is_seen_before_the_write(site: Site, agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    site.services.register("two", OwnHost(macs=frozenset({mac(1)})), "0.1.0", KEY)
    with pytest.raises(WriteRefused, match="the service runs on it"):
        agent.authorise()


def test_one_that_has_moved_is_forgotten_by_a_person(site: Site, cli: Cli) -> None:
    site.add_host()
    site.services.register("two", OwnHost(macs=frozenset({mac(1)})), "0.1.0", KEY)
    refused = cli("reimage", "r1n1", "--release", "tiny@1", exit_code=2)
    assert "provisioner service forget two" in refused.stderr
    [listed] = cli.json("service", "list")
    assert (listed["name"], listed["macs"], listed["version"]) == ("two", [mac(1)], "0.1.0")
    assert "two" in cli("service", "list").stdout
    with pytest.raises(NotFound) as unknown:
        site.services.forget("tow", actor=ACTOR)
    assert unknown.value.expected == ["two"]

    site.services.forget("two", actor=ACTOR)
    assert cli.json("service", "list") == []
    assert request(site, "r1n1")
    deeds = [(row["action"], row["actor"], row["subject"]) for row in cli.json("audit", "list")]
    assert ("service.registered", "service", "two") in deeds
    assert ("service.forgotten", ACTOR, "two") in deeds


def test_one_that_starts_elsewhere_takes_its_name_along(site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    for number in (1, 2):
        site.services.register("two", OwnHost(macs=frozenset({mac(number)})), "0.1.0", KEY)
    assert request(site, "r1n1")
    with pytest.raises(OwnHostRefused):
        request(site, "r1n2")


def test_starting_again_is_audited_only_where_something_changed(site: Site) -> None:
    found = OwnHost(uuid=inventory(1)["uuid"], macs=frozenset({mac(1)}))
    for version in ("0.1.0", "0.1.0", "0.2.0"):
        site.services.register("two", found, version, KEY)
        site.clock.pass_(60)
    deeds = [row.action for row in site.audit.rows(0, 100)]
    assert deeds.count("service.registered") == 2
    [known] = site.services.list()
    assert known.version == "0.2.0"
    assert known.started_at == site.clock() - timedelta(seconds=60)


def test_nothing_is_kept_of_a_service_whose_host_cannot_be_known(site: Site) -> None:
    """In a container, say: any number of them come and go."""
    zeros = "00000000-0000-0000-0000-000000000000"
    for number, found in enumerate((OwnHost(), OwnHost(uuid=zeros, serial="none"))):
        site.services.register(f"pod-{number}", found, "0.1.0", KEY)
    assert site.services.list() == []


def test_what_is_known_of_a_service_comes_back(store: Store) -> None:
    """On SQLite and on PostgreSQL."""
    found = OwnHost("u-1", None, frozenset({mac(2), mac(1)}), frozenset({"r1n9"}))
    two = ServiceHost("two", found, "0.1.0", KEY, NOW)
    one = ServiceHost("one", OwnHost(), "0", KEY, NOW)
    with store.begin() as tx:
        tx.save_service(two)
        tx.save_service(one)
        tx.save_service(replace(two, version="0.2.0"))
    with store.begin() as tx:
        assert tx.services() == [one, replace(two, version="0.2.0")]
        assert tx.delete_service("two")
        assert not tx.delete_service("two")
    with store.read() as tx:
        assert tx.services() == [one]


def test_two_services_that_start_know_of_each_other(tmp_path: Path, postgres: Postgres) -> None:
    one = install(tmp_path / "one", database=postgres.new_database())
    two = sibling_of(one, tmp_path / "two", "two")
    words = two.path.read_text().replace("[service]", '[service]\nown_hosts = ["r9n9"]')
    two.path.write_text(words)
    for settings in (one, load(two.path)):
        bring_up_to_date(settings, None)
        bring_up_to_date(settings, None)
    first, second = known_services(one)
    assert {first.name, second.name} == {socket.gethostname(), f"two@{socket.gethostname()}"}
    assert {first.found.names, second.found.names} == {frozenset(), frozenset({"r9n9"})}
    assert first.found.macs == second.found.macs == own_host(()).macs
    assert first.key_id == second.key_id


def known_services(settings: Settings) -> Sequence[ServiceHost]:
    service = wiring.build(settings)
    try:
        return service.services.list()
    finally:
        service.close()


def test_a_service_with_another_master_key_does_not_start(
    tmp_path: Path, postgres: Postgres
) -> None:
    """It would have ended the operations of the others, for what it cannot open."""
    one = install(tmp_path / "one", database=postgres.new_database())
    two = sibling_of(one, tmp_path / "two", "two")
    key = two.data_dir / keys.FOLDER / keys.MASTER_KEY
    key.write_text(f"{secrets.token_hex(32)}\n")
    bring_up_to_date(one, None)
    with pytest.raises(ConfigError):
        bring_up_to_date(load(two.path), None)
    [known] = known_services(one)
    with pytest.raises(ConfigError, match="another master key") as refused:
        register(load(two.path))
    assert refused.value.found == [known.name]
    assert f"provisioner service forget {known.name}" in (refused.value.hint or "")

    # The first one is gone for good, and its keys with it.
    words = ["service", "forget", known.name, "--config", str(two.path)]
    done = CliRunner().invoke(main, words, standalone_mode=False)
    assert done.exception is None, done.exception
    bring_up_to_date(load(two.path), None)
    assert [one.name for one in known_services(one)] == [f"two@{socket.gethostname()}"]
