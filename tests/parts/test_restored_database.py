"""A database that is restored from an hour ago: nothing is done until a person reconciles."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from provisioner.core.bootplan import LocalDisk, Ramdisk
from provisioner.core.contracts import Archive, Sighting
from provisioner.core.lifecycle import LIMIT, E
from provisioner.core.model import HostState, OperationId, Phase
from provisioner.errors import Conflict
from provisioner.service.chance import digest_of
from provisioner.service.observing import ObserveOnly
from provisioner.service.reconciliation import PlanOutdated
from provisioner.service.sightings import HighWater, Mark, MarkFile
from provisioner.store.sql_sightings import SIGHTINGS_MAX
from provisioner.store.tables import sightings
from provisioner.web.agent import AgentListener, create_app
from tests.parts.command_line import commands_of
from tests.parts.http_listener import listening
from tests.parts.service_site import ACTOR, Agent, Site, mac, running_site, state_of
from tests.parts.stores import NOW

# Somewhat less than a ticket lives.
HOUR = timedelta(minutes=55)
# One that was requested at the time of the tests, and lost with the database.
OPERATION = OperationId(f"op_{int(NOW.timestamp()) + 60:08x}{'ab' * 8}")


@dataclass
class Restored:
    """A service on a database as it was an hour ago, and what a host still holds of then.

    The backup was made while the first deployment waited for its ticket; since then that one
    has succeeded, and a second one has permitted its agent to write.
    """

    site: Site
    agent: Agent
    nonce: str

    def comes(self, path: str, body: dict[str, Any], token: str = "") -> httpx.Response:
        """Send one request of a host to the real listener."""
        with listening(create_app(cast("AgentListener", self.site))) as url:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return httpx.post(url + path, json=body, headers=headers, timeout=60)

    def says_hello(self) -> httpx.Response:
        body = {"ticket": self.agent.ticket, "inventory": self.agent.inventory}
        return self.comes("/agent/v1/hello", body)

    def asks_to_write(self) -> httpx.Response:
        own = self.agent.inventory["disks"][0]
        body = {"generation": 2, "release": self.agent.release, "disk": own}
        return self.comes("/agent/v1/authorise", body, self.agent.token)

    def phones_home(self) -> httpx.Response:
        return self.comes("/report/v1/phone-home", {"nonce": self.nonce, "root_disk": {}})


@pytest.fixture(params=["with the mark", "without the mark"])
def marked(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "with the mark")


@pytest.fixture
def restored(
    site: Site,
    tmp_path: Path,
    archive_of_two: Archive,
    ramdisk_folder: Path,
    marked: bool,
) -> Iterator[Restored]:
    site.add_host()
    site.add_host(2)
    site.deploy("r1n1")
    site.perform()
    site.high_water.look()
    backup = tmp_path / "backup.db"
    with sqlite3.connect(tmp_path / "state.db") as source, sqlite3.connect(backup) as target:
        source.backup(target)

    Agent(site).until(Phase.PROVING)
    first = site.operations.list("r1n1", limit=1)[0]
    with site.store.begin() as tx:
        soaked = E.SOAKED
        site.transitions.apply(tx, first.id, soaked, generation=first.generation, actor=ACTOR)
    site.clock.pass_(HOUR.total_seconds())
    second = site.deploy("r1n1")
    site.perform()
    agent = Agent(site).until(Phase.WRITING)
    nonce = site.derived.nonce(second.id, second.generation).reveal()
    site.high_water.look()

    mark = tmp_path / ("state.db.mark" if marked else "a-new-disk.mark")
    with running_site(f"sqlite:///{backup}", archive_of_two, ramdisk_folder, mark=mark) as after:
        after.clock.at = site.clock.at
        after.pool = site.pool
        agent.site = after
        site.bmc().exchanges.clear()
        yield Restored(after, agent, nonce)


def test_nothing_is_done_until_a_person_reconciles_and_then_it_goes_on(
    restored: Restored, marked: bool
) -> None:
    site = restored.site
    site.worker.tick()
    if not marked:
        # Without the mark it takes a host to notice; this one wants to write.
        assert restored.asks_to_write().status_code == 403
    before = state_of(site)

    # Hosts come, operators ask, the queue of then is performed, deadlines pass.
    assert restored.asks_to_write().json()["code"] == "observe_only"
    assert restored.says_hello().json()["code"] == "observe_only"
    assert restored.phones_home().json()["code"] == "observe_only"
    for number in (1, 2):
        assert isinstance(site.ask(number), LocalDisk)
    with pytest.raises(ObserveOnly):
        site.operations.request_deployment(["r1n2"], "tiny@1", options={}, actor=ACTOR)
    with pytest.raises(ObserveOnly):
        site.operations.cancel(site.operations.list("r1n1")[0].id, actor=ACTOR)
    for _ in range(3):
        site.clock.pass_(60)
        site.worker.tick()
        site.perform()
    assert state_of(site) == before
    assert site.bmc().exchanges == []
    assert not site.outbox.waiting

    plan = site.reconciliation.plan()
    assert plan.is_observing
    (about,) = [one for one in plan.hosts if one.host == "r1n1"]
    assert (about.generation, about.phase) == (1, "netbooting")
    with pytest.raises(PlanOutdated):
        site.reconciliation.apply("0" * 64, actor=ACTOR)
    site.reconciliation.apply(plan.digest, actor=ACTOR)

    ended = site.operations.list("r1n1", limit=1)[0]
    assert (ended.phase, (ended.error or {})["code"]) == (Phase.FAILED, "database_restored")
    assert site.hosts.show("r1n1").generation > max(1, about.generation_seen or 0)
    assert isinstance(site.ask(), LocalDisk), "the ticket of then is none any more"
    site.worker.tick()
    site.perform()
    assert site.bmc().exchanges == [], "what the end would wish for is a person's to ask"
    assert not site.reconciliation.plan().is_observing
    assert site.audit.verify() > 0

    site.deploy("r1n1")
    site.perform()
    again = Agent(site).until(Phase.PROVING)
    assert again.operation().phase is Phase.PROVING


def test_a_restored_ticket_would_have_erased_the_host(restored: Restored, marked: bool) -> None:
    """What the boot rule says when nobody has noticed yet: the reason for all of this."""
    del marked
    assert isinstance(restored.site.ask(), Ramdisk)
    assert restored.site.operations.list("r1n1", limit=1)[0].phase is Phase.NETBOOTING


@pytest.mark.parametrize("marked", [False])
@pytest.mark.parametrize(
    ("comes", "kind", "is_known"),
    [
        (Restored.says_hello, "ticket", True),
        (Restored.asks_to_write, "token", True),
        (Restored.phones_home, "nonce", False),
    ],
)
def test_each_text_of_ours_for_what_is_not_known_is_a_proof(
    restored: Restored,
    marked: bool,
    comes: Callable[[Restored], httpx.Response],
    kind: str,
    is_known: bool,
) -> None:
    del marked
    assert comes(restored).status_code == 403
    site = restored.site
    with site.store.read() as tx:
        assert tx.is_observing()
        (seen,) = tx.sightings()
    assert (seen.kind, seen.generation, seen.source) == (kind, 2, "127.0.0.1")
    assert (seen.host_id == site.hosts.show("r1n1").id) is is_known
    plan = site.reconciliation.plan()
    ahead = {one.host: one for one in plan.hosts}
    assert ahead["r1n1"].generation_seen == (2 if is_known else None)
    assert ahead["r1n1"].generation_then == 3
    # Who did not say which host it is may be any of them.
    assert ("r1n2" in ahead) is not is_known
    site.reconciliation.apply(plan.digest, actor=ACTOR)
    if is_known:
        assert site.hosts.show("r1n1").state is HostState.ENROLLED

    # The same host, and others of that hour, are refused from now on and stop nothing.
    for again in (Restored.says_hello, Restored.asks_to_write, Restored.phones_home):
        assert again(restored).status_code == 403
    assert not site.reconciliation.plan().is_observing


@pytest.mark.parametrize(
    ("then", "now", "kind"),
    [
        (Phase.QUEUED, Phase.NETBOOTING, "ticket"),
        (Phase.NETBOOTING, Phase.PREPARING, "token"),
        (Phase.NETBOOTING, Phase.WRITING, "token"),
        (Phase.NETBOOTING, Phase.PROVING, "nonce"),
        (Phase.PREPARING, Phase.PROVING, "nonce"),
    ],
)
def test_a_host_that_is_further_than_its_operation_is_a_proof(
    site: Site,
    tmp_path: Path,
    archive_of_two: Archive,
    ramdisk_folder: Path,
    then: Phase,
    now: Phase,
    kind: str,
) -> None:
    """A snapshot of the whole machine, with the mark in it: the operation is known there."""
    site.add_host()
    site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    agent = Agent(site)

    def goes_to(phase: Phase) -> None:
        while agent.operation().phase is not phase:
            match agent.operation().phase:
                case Phase.QUEUED:
                    site.worker.start_queued()
                    site.perform()
                    agent.boots()
                case Phase.NETBOOTING:
                    agent.hello()
                case Phase.PREPARING:
                    agent.authorise()
                case Phase.WRITING:
                    agent.done()
                case _:
                    agent.phone_home()

    goes_to(then)
    backup = tmp_path / "backup.db"
    with sqlite3.connect(tmp_path / "state.db") as source, sqlite3.connect(backup) as target:
        source.backup(target)
    goes_to(now)
    with running_site(f"sqlite:///{backup}", archive_of_two, ramdisk_folder) as after:
        after.pool.bmcs = site.pool.bmcs
        restored = Restored(after, agent, nonce_of(site, agent))
        after.high_water.look()
        site.bmc().exchanges.clear()
        come = {"ticket": Restored.says_hello, "token": Restored.asks_to_write}
        assert come.get(kind, Restored.phones_home)(restored).status_code in (403, 409)

        # The grace passes, and every rung of the ladder.
        for _ in range(4):
            after.clock.pass_(LIMIT[Phase.NETBOOTING].total_seconds() + 1)
            after.worker.tick()
            after.perform()
        assert after.bmc().exchanges == [], "the running host keeps its power"
        assert isinstance(after.ask(), LocalDisk), "and is sent to its disk"
        (about,) = after.reconciliation.plan().hosts
        assert (about.host, about.phase, about.generation_seen) == ("r1n1", then, 1)
        after.reconciliation.apply(after.reconciliation.plan().digest, actor=ACTOR)
        assert after.hosts.show("r1n1").state in (HostState.DIRTY, HostState.ENROLLED)
        assert not after.reconciliation.plan().is_observing


def test_what_is_not_ours_and_what_is_only_old_stop_nothing(site: Site, agent: Agent) -> None:
    agent.until(Phase.WRITING)
    operation = agent.operation()
    own = [agent.ticket, agent.token, nonce_of(site, agent)]
    forged = [text[:-1] + ("A" if text[-1] != "A" else "B") for text in own]
    forged += ["", "bt_", "op_1.1.x", "bt_" + "A" * 43, "at_op_0.1.x", "\ud800", own[0][3:]]
    site.sightings.look([*own, *forged], [mac(1)], "10.0.0.1")
    agent.failed()
    site.hosts.delete("r1n1", actor=ACTOR)
    with site.store.read() as tx:
        assert tx.is_audited(operation.id), "the audit log outlives the host"
    site.sightings.look([*own, *forged], [mac(1)], "10.0.0.1")
    with site.store.read() as tx:
        assert not tx.is_observing()


def nonce_of(site: Site, agent: Agent) -> str:
    operation = agent.operation()
    return site.derived.nonce(operation.id, operation.generation).reveal()


def test_texts_of_ours_say_what_they_are_for_and_no_two_tokens_are_the_same(site: Site) -> None:
    host = site.add_host()
    operation = site.deploy("r1n1")
    key, derived = (operation.id, operation.generation), site.derived
    for text, kind in ((derived.ticket(*key), "ticket"), (derived.nonce(*key), "nonce")):
        issued = derived.issued(text.reveal())
        assert issued is not None
        assert (issued.kind, issued.operation_id, issued.generation) == (kind, *key)
    tokens = {derived.agent_token(*key, host.id).reveal() for _ in range(9)}
    assert len(tokens) == 9
    for token in tokens:
        issued = derived.issued(token)
        assert issued is not None
        assert (issued.kind, issued.host_id) == ("token", host.id)
        assert derived.issued(token.replace("at_", "bt_")) is None
    assert len({digest_of(token) for token in tokens}) == 9


def test_the_mark_is_written_after_the_fact_and_a_broken_one_is_none(
    site: Site, tmp_path: Path
) -> None:
    file = MarkFile(tmp_path / "marks" / "mark.json")
    high_water = HighWater(site.store, site.clock, file)
    high_water.look()  # the folder is not there: said in the log, and tried again
    (tmp_path / "marks").mkdir()
    high_water.look()
    first = file.read()
    assert first is not None
    site.add_host()
    high_water.look()
    second = file.read()
    assert second is not None
    assert second.number == first.number + 1
    for broken in ("", "[]", "{}", '{"number": "x", "row_hash": 1}', "\0"):
        (tmp_path / "marks" / "mark.json").write_text(broken)
        assert file.read() is None
        high_water.look()
        assert file.read() == second
    with site.store.read() as tx:
        assert not tx.is_observing()
    # Another history of the same length is an older database, too.
    file.write(Mark(second.number, "0" * 64))
    high_water.look()
    high_water.look()
    with site.store.read() as tx:
        assert [one.kind for one in tx.sightings()] == ["mark"]
    assert file.read() == Mark(second.number, "0" * 64), "the proof stays"


@contextmanager
def observing(site: Site) -> Iterator[None]:
    """A service that was restored as its mark shows."""
    site.add_host()
    with site.store.read() as tx:
        newest = tx.newest_audit()
    assert newest is not None
    file = MarkFile(Path(f"{site.store._engine.url.database}.mark"))
    file.write(Mark(newest.number + 9, "0" * 64))
    site.worker.tick()
    yield


def test_everybody_who_asks_is_told_and_an_admin_leads_out_of_it(site: Site) -> None:
    with observing(site), commands_of(site) as run:
        listed = run("host", "list")
        assert "r1n1" in listed.stdout
        assert "OBSERVE ONLY" in listed.stderr
        health = httpx.get(f"{run.url}/healthz", timeout=60)
        assert (health.status_code, health.json()["status"]) == (200, "observe_only")
        refused = run("reimage", "r1n1", "--release", "tiny@1", exit_code=4)
        assert "provisioner reconcile --plan" in refused.stderr
        run("reconcile", exit_code=2)
        shown = run("reconcile", "--plan").stdout
        assert "mark" in shown
        digest = run.json("reconcile", "--plan")["digest"]
        assert f"provisioner reconcile --apply {digest}" in shown

        viewer = site.tokens.create("eve", "operator", expires_in=None, actor=ACTOR).reveal()
        place = f"{run.url}/api/v1/reconciliation"
        may_not = httpx.post(
            place, json={"digest": digest}, headers={"Authorization": f"Bearer {viewer}"}
        )
        assert may_not.json()["code"] == "role_refused"
        outdated = run("reconcile", "--apply", "0" * 64, exit_code=2)
        assert "not the present plan" in outdated.stderr

        assert "works again" in run("reconcile", "--apply", digest).stdout
        assert "OBSERVE ONLY" not in run("host", "list").stderr
        assert httpx.get(f"{run.url}/healthz", timeout=60).json() == {"status": "ok"}
        assert "nothing is to be reconciled" in run("reconcile", "--plan").stdout
        assert run.json("reconcile", "--plan")["is_observing"] is False
        actions = [row["action"] for row in run.json("audit", "list")]
        assert actions.index("service.observes") < actions.index("service.reconciled")
        # The mark is that of this database now.
        site.clock.pass_(60)
        site.worker.tick()
        site.high_water.look()
        assert not site.reconciliation.plan().is_observing


def test_what_is_seen_meanwhile_outdates_the_plan(site: Site) -> None:
    with observing(site):
        digest = site.reconciliation.plan().digest
        lost = site.derived.ticket(OPERATION, 7).reveal()
        site.sightings.look([lost], [mac(1)], "10.77.0.9")
        with pytest.raises(PlanOutdated):
            site.reconciliation.apply(digest, actor=ACTOR)
        plan = site.reconciliation.plan()
        assert [one.generation_then for one in plan.hosts] == [8]
        site.reconciliation.apply(plan.digest, actor=ACTOR)
        with pytest.raises(Conflict):
            site.reconciliation.apply(plan.digest, actor=ACTOR)


def test_so_many_proofs_are_open_at_a_time_and_those_of_before_do_not_count(site: Site) -> None:
    def proofs(first: int) -> list[dict[str, Any]]:
        one = Sighting("", "ticket", NOW, "10.0.0.1", {}).__dict__
        return [{**one, "key": str(first + number)} for number in range(SIGHTINGS_MAX)]

    last = Sighting("last", "ticket", NOW, "10.0.0.1", {})
    for life in (0, 1):
        with site.store._engine.begin() as connection:
            connection.execute(sightings.insert(), proofs(life * SIGHTINGS_MAX))
        with site.store.begin() as tx:
            assert not tx.add_sighting(last), "the limit is reached"
            tx.reconcile_sightings(NOW)
            assert not tx.is_observing()
    with site.store.begin() as tx:
        assert tx.add_sighting(last)
        assert tx.is_observing()
