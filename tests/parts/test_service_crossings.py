"""Two things that happen at once, or one that comes late: neither may harm a host."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.core.bootplan import LocalDisk, Ramdisk
from provisioner.core.lifecycle import NotAllowed
from provisioner.core.model import Phase
from provisioner.core.profile import Check
from provisioner.errors import ProvisionerError, RequestError
from provisioner.service.health import check_all
from provisioner.service.performer import Performer
from provisioner.store.engine import open_engine
from provisioner.store.sql_store import SqlStore
from tests.parts.service_site import ACTOR, SOFT_SHUTDOWN, Agent, Site, inventory, mac, tamper
from tests.parts.stores import sealing
from tests.parts.test_service_deadlines import agent_of, deployed_to


def reason(plan: object) -> str:
    assert isinstance(plan, LocalDisk), plan
    return plan.reason


# --- discovery ----------------------------------------------------------------------------


@pytest.mark.discovering
def test_another_nic_of_a_managed_host_is_not_discovered_as_a_host(site: Site) -> None:
    """A second host with its UUID would keep both from ever being deployed."""
    uuid = inventory()["uuid"]
    site.add_host(uuid=uuid)
    told = reason(site.ask(9, uuid=uuid))
    assert "r1n1" in told
    assert len(site.hosts.list()) == 1
    site.deploy("r1n1")
    assert isinstance(site.ask(1, uuid=uuid), Ramdisk)
    assert mac(9) in site.texts()


@pytest.mark.discovering
def test_discovered_hosts_take_no_place_from_deployments(site: Site) -> None:
    for number in (7, 8, 9):
        assert isinstance(site.ask(number), Ramdisk)
    site.add_host()
    assert site.phase(site.deploy("r1n1")) is Phase.NETBOOTING


# --- a host that boots while it is being shut down -----------------------------------------


def test_a_host_whose_agent_writes_is_not_switched_off_any_more(site: Site) -> None:
    """It was about to ask the network when the shutdown was requested, and saw no button."""
    site.add_host()
    bmc, agent = site.bmc(), Agent(site)
    bmc.ignores_soft_off = True
    operation = site.deploy("r1n1")

    def boot_meanwhile(verb: str) -> None:
        if verb == "soft_off":
            bmc.on_exchange = lambda _: None
            agent.boots().hello()
            agent.authorise()

    bmc.on_exchange = boot_meanwhile
    site.perform()
    assert site.phase(operation) is Phase.WRITING
    assert bmc.changes() == ["soft_off"]


def test_a_host_is_not_reset_long_after_its_operation_ended(site: Site) -> None:
    """The worker was away; the host has restarted by itself and runs its old system again."""
    operation = deployed_to(site, Phase.PREPARING)
    agent_of(site, operation).failed()
    site.clock.pass_(3600)
    site.perform()
    assert "reset" not in site.bmc().changes()


def test_an_effect_waits_for_a_database_that_is_away(site: Site, tmp_path: Path) -> None:
    """Ended with an error it would never be performed again, and the host would stay off."""
    site.add_host()
    operation = site.deploy("r1n1")
    engine = open_engine(f"sqlite:///{tmp_path / 'state.db'}", lock_wait=timedelta(milliseconds=20))
    store = SqlStore(engine, site.outbox, sealing())
    other = engine.connect()
    site.bmc().refuses_login = True

    def go_away(_: str) -> None:
        other.begin()

    site.bmc().on_exchange = go_away
    waited: list[float] = []

    def come_back(seconds: float) -> None:
        waited.append(seconds)
        other.rollback()

    performer = Performer(
        store, site.transitions, site.pool, site.clock,
        soft_shutdown_limit=SOFT_SHUTDOWN, pause=come_back,
    )  # fmt: skip
    performer.perform(site.outbox.waiting.pop(0))
    other.close()
    store.close()
    assert waited
    assert site.phase(operation) is Phase.FAILED
    assert site.bmc().exchanges == ["power"]  # the wrong password was used once


# --- a system that speaks before its agent was heard ----------------------------------------


def test_field_02_a_system_that_came_up_proves_what_its_agent_could_not_tell(site: Site) -> None:
    operation = deployed_to(site, Phase.VERIFYING)
    with pytest.raises(NotAllowed):
        Agent(site).phone_home(release_id="another")
    assert Agent(site).phone_home() == {"accepted": True, "ask_again": True}
    assert site.phase(operation) is Phase.PROVING
    assert site.hosts.show("r1n1").root_disk is not None


# --- one bad row ---------------------------------------------------------------------------


def test_one_host_that_cannot_be_read_does_not_stop_the_others(site: Site) -> None:
    first = site.add_host(1)
    site.add_host(2)
    site.operations.request_deployment(["r1n1", "r1n2"], "tiny@1", options={}, actor=ACTOR)
    tamper(site, f"UPDATE hosts SET bmc_password = x'00' WHERE id = '{first.id}'")
    site.worker.start_queued()
    assert site.operations.list("r1n2")[0].phase is Phase.NETBOOTING


# --- after an outage ------------------------------------------------------------------------


def test_after_an_outage_those_who_live_may_speak_first(site: Site) -> None:
    operation = deployed_to(site, Phase.WRITING)
    agent = agent_of(site, operation)
    site.clock.pass_(300)
    site.worker.tick()
    agent.progress()
    site.clock.pass_(120)
    site.worker.tick()
    assert site.phase(operation) is Phase.WRITING


# --- limits that contradict each other --------------------------------------------------------


def test_a_soak_that_outlasts_its_phase_is_refused_before_anything_is_written(site: Site) -> None:
    site.add_host()
    document = site.profiles.show("web").document
    site.profiles.save("web", {**document, "health": {"soak_s": 1800}}, actor=ACTOR)
    with pytest.raises(ProvisionerError, match="soak"):
        site.deploy("r1n1")


# --- odd texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["\ud800", "a\0b"])
def test_odd_texts_from_the_wire_are_refused_or_kept_and_no_bug(site: Site, odd: str) -> None:
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    agent = Agent(site)
    agent.ticket = odd
    with pytest.raises(ProvisionerError):
        agent.hello()
    agent = Agent(site, inventory=inventory(serial=odd)).boots()
    agent.hello()
    report = {"code": odd, "message": odd, "found": {odd: [odd]}}
    site.agents.failed(agent.token, {"generation": agent.generation, **report}, agent.source)
    assert site.audit.verify() > 0
    with pytest.raises(ProvisionerError):
        site.agents.phone_home({"nonce": f"op_x.{odd}"}, "x")
    with pytest.raises(ProvisionerError):
        site.agents.phone_home({"nonce": f"{agent.operation().id}.{odd}"}, "x")


def test_a_token_has_a_name_that_can_be_revoked(site: Site) -> None:
    for name in ("a/b", "a\nb", ""):
        with pytest.raises(RequestError):
            site.tokens.create(name, "viewer", expires_in=None, actor=ACTOR)


# --- health ---------------------------------------------------------------------------------------


# Five minutes in all.
DRIPS: Final = 1000
DRIP_S: Final = 0.3


@contextmanager
def dripping_server() -> Iterator[int]:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                for byte in b"HTTP/1.1 200 OK\r\n".ljust(DRIPS, b"x"):
                    if over.wait(DRIP_S):
                        return
                    try:
                        connection.sendall(bytes([byte]))
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        over.set()
        thread.join()


@pytest.mark.parametrize("kind", ["http", "ssh"])
def test_a_system_that_answers_byte_by_byte_holds_nobody_up(kind: str) -> None:
    with dripping_server() as port:
        began = time.monotonic()
        (finding,) = check_all([Check(kind, port)], "127.0.0.1", {})
        assert time.monotonic() - began < DRIPS * DRIP_S / 5
    assert not finding.is_healthy
