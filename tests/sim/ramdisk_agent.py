"""A model of the ramdisk's agent: the same calls in the same order, with its own patience.

It models `provisioner/agent`: what is said when, what is asked again and for how long, and
when nothing may be written any more. The bytes are `disks.SimDisk`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from provisioner.agent.client import PATIENCE_S, REPORT_PATIENCE_S
from provisioner.agent.main import HELLO_PATIENCE_S, PAUSE_AFTER_FAILURE_S, STAY
from provisioner.agent.patience import FIRST_PAUSE_S, PAUSE_MAX_S
from provisioner.agent.permission import RENEWAL_LIMIT_S
from provisioner.agent.session import Session, parse_session
from provisioner.core.disks import Disk, choose_disk
from provisioner.errors import ProvisionerError

from .disks import CHUNKS, Seed
from .ledger import Grant
from .network import NoAnswer, Refused
from .observations import Wrote
from .scheduler import FOR_EVER_S

if TYPE_CHECKING:
    from .disks import SimDisk
    from .hosts import SimHost

T = TypeVar("T")
START_S: Final = (2.0, 8.0)
MANIFEST_S: Final = (0.5, 3.0)


class Stopped(Exception):
    """The agent gives up, and reports why."""


class RamdiskAgent:
    """One start of the ramdisk on a host, from its hello to the restart."""

    def __init__(self, host: SimHost, ticket: str) -> None:
        self._host = host
        self._world = host.world
        self._ticket = ticket
        self._token = ""
        self._generation = 0
        self._phase = "preparing"
        self._question: dict[str, Any] | None = None
        self._grant: Grant | None = None
        self._permitted_until_s = 0.0
        self._lasts_s = 0.0
        self._refusal = ""
        self._is_over = False

    def run(self) -> None:
        host, world = self._host, self._world
        world.scheduler.sleep(world.chance.uniform(*START_S))
        try:
            answer = self._hello()
        except Stopped as why:
            world.note(f"{host.name}: agent: {why}")
            world.scheduler.sleep(PAUSE_AFTER_FAILURE_S)
            host.restart_soon("its agent got no session")
            return
        try:
            session = parse_session(answer)
            if session.kind == "inspection":
                host.restart_soon("it was inspected")
                return
            if session.writes_nothing:
                self._compare(session)
            else:
                self._deploy(session)
        except (Stopped, ProvisionerError) as why:
            world.note(f"{host.name}: agent gives up: {why}")
            self._is_over = True
            said = {"code": "agent", "message": str(why)}
            if self._report("failed", said, REPORT_PATIENCE_S).get("then") == STAY:
                world.note(f"{host.name}: stays in the ramdisk")
                world.scheduler.sleep(FOR_EVER_S)
            world.scheduler.sleep(PAUSE_AFTER_FAILURE_S)
        host.restart_soon("its agent is through")

    # What it says.

    def _hello(self) -> dict[str, Any]:
        host = self._host
        inventory = {
            "firmware": "bios",
            "uuid": host.uuid,
            "serial": host.serial,
            "disks": [disk.as_inventory() for disk in host.disks],
            "nics": [{"name": "eth0", "mac": host.mac, "link": True}],
        }
        session = f"{self._world.chance.getrandbits(256):064x}"
        body = {"ticket": self._ticket, "inventory": inventory, "session": session}
        attempts = iter(range(1, 1000))
        answer = self._patiently(
            lambda: self._world.network.hello(host, {**body, "attempt": next(attempts)}),
            HELLO_PATIENCE_S,
        )
        self._token, self._generation = answer["token"], answer["generation"]
        return answer

    def _post(self, what: str, body: dict[str, Any], patience_s: float) -> dict[str, Any]:
        sent = {"generation": self._generation, **body}
        call = self._world.network.agent_call
        return self._patiently(lambda: call(self._host, what, self._token, sent), patience_s)

    def _report(self, what: str, body: dict[str, Any], patience_s: float) -> dict[str, Any]:
        try:
            return self._post(what, body, patience_s)
        except Stopped as why:
            self._world.note(f"{self._host.name}: agent: {what} was not heard: {why}")
            return {}

    def _patiently(self, ask: Callable[[], T], patience_s: float) -> T:
        """As `provisioner.agent.patience.keep_trying`: a refusal is final, silence is not."""
        ends_at_s = self._world.now_s + patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except Refused as error:
                raise Stopped(f"refused: {error}") from error
            except NoAnswer as error:
                if self._world.now_s + pause_s > ends_at_s:
                    raise Stopped("nobody answers") from error
            self._world.scheduler.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    # The permission, and the heartbeat that keeps it.

    def _begin_heartbeat(self, session: Session) -> None:
        def beat() -> None:
            while not self._refusal and not self._is_over:
                self._world.scheduler.sleep(session.heartbeat_s)
                if not self._is_over:
                    self._beat(session.heartbeat_s)

        self._world.scheduler.spawn(f"{self._host.name} heartbeat", beat, self._host.machine)

    def _beat(self, patience_s: float) -> None:
        try:
            self._once("progress", {"phase": self._phase, "done_bytes": 1}, patience_s)
            left_s = self._permitted_until_s - self._world.now_s
            if self._question is not None and left_s < self._lasts_s / 2:
                self._renew(self._question, patience_s)
        except Refused as error:
            self._refusal = str(error)
        except NoAnswer:
            pass  # no error, as long as the permission lasts

    def _once(self, what: str, body: dict[str, Any], patience_s: float) -> dict[str, Any]:
        try:
            return self._post(what, body, patience_s)
        except Stopped as why:
            raise (why.__cause__ or why) from None

    def _renew(self, question: dict[str, Any], patience_s: float) -> None:
        answer = self._once("authorise", question, patience_s)
        # Counted from when the answer is here, as the agent does.
        self._lasts_s = float(answer["expires_in_s"])
        self._permitted_until_s = self._world.now_s + self._lasts_s
        self._grant = answer["grant"]

    def _ask_permission(self, session: Session, disk: SimDisk) -> None:
        names = ("name", "serial", "wwn", "size_bytes")
        question = {
            "release": session.release,
            "disk": {name: disk.as_inventory()[name] for name in names},
        }
        try:
            self._renew(question, PATIENCE_S)
        except (Refused, NoAnswer) as error:
            raise Stopped(f"no permission to write: {error}") from error
        self._question = question

    def _check_permission(self) -> None:
        gives_up_at_s = self._world.now_s + RENEWAL_LIMIT_S
        while True:
            if self._refusal:
                raise Stopped(f"the permission was taken away: {self._refusal}")
            if self._world.now_s < self._permitted_until_s:
                return
            if self._world.now_s >= gives_up_at_s:
                raise Stopped("the permission ran out")
            self._world.scheduler.sleep(1.0)

    # What it does.

    def _deploy(self, session: Session) -> None:
        assert session.rule is not None
        self._begin_heartbeat(session)
        disk = self._target(session)
        self._pass(MANIFEST_S)
        self._ask_permission(session, disk)
        self._write_image(session, disk)
        self._enter("verifying")
        self._pass((0.2, self._host.chunk_s))
        seed = self._post("seed", {}, PATIENCE_S)
        self._write(session, disk)
        disk.seed = Seed(session.operation, seed["vendor-data"])
        self._write(session, disk)
        disk.table = session.release
        self._is_over, self._host.writing = True, None
        body: dict[str, Any] = {
            "release": session.release,
            "written_bytes": 1,
            "fetched_bytes": 1,
            "seconds": {},
        }
        self._report("done", body, PATIENCE_S)

    def _write_image(self, session: Session, disk: SimDisk) -> None:
        self._enter("writing")
        self._write(session, disk)
        self._make_unbootable(disk)
        for index in range(CHUNKS):
            if disk.chunks[index] == session.release and session.mode == "delta":
                continue
            self._write(session, disk)
            disk.chunks[index] = str(session.release)
            self._pass((0.2, self._host.chunk_s))

    def _make_unbootable(self, disk: SimDisk) -> None:
        disk.make_unbootable()

    def _compare(self, session: Session) -> None:
        self._begin_heartbeat(session)
        disk = self._target(session)
        self._pass((0.2, self._host.chunk_s))
        differing = sum(chunk != session.release for chunk in disk.chunks)
        self._is_over = True
        counts = {"compared_chunks": CHUNKS, "differing_chunks": differing, "differing_bytes": 0}
        self._report("compared", {**counts, "seconds": {}}, PATIENCE_S)

    def _target(self, session: Session) -> SimDisk:
        assert session.rule is not None
        known = {disk.serial: disk for disk in self._host.disks}
        found = [Disk.from_dict(disk.as_inventory()) for disk in self._host.disks]
        return known[str(choose_disk(session.rule, found).serial)]

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._beat(REPORT_PATIENCE_S)

    def _write(self, session: Session, disk: SimDisk) -> None:
        """Make sure of the permission, and have the world see that something is written."""
        self._hang_when_told()
        self._check_permission()
        is_first = self._host.writing is None
        self._host.writing = session.operation
        self._world.saw(Wrote(self._host, disk, session.operation, self._grant, is_first))
        if disk.at_fault:
            fault, disk.at_fault = disk.at_fault, ""
            raise Stopped(f"the disk failed: {fault}")

    def _pass(self, seconds: tuple[float, float]) -> None:
        self._hang_when_told()
        self._world.scheduler.sleep(self._world.chance.uniform(*seconds))

    def _hang_when_told(self) -> None:
        if self._host.troubles.hangs:
            self._host.troubles.hangs, self._is_over = False, True
            self._world.note(f"{self._host.name}: agent hangs")
            self._world.scheduler.sleep(FOR_EVER_S)
