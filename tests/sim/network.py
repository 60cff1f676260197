"""Calls from hosts and people to the service, with what networks do to them.

A call is handled in a task of a service's process, so that the process may die over it, and
the host waits for the answer in its own. What the answer held is known to the world the
moment it leaves the service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from provisioner.agent.client import API_TIMEOUT_S
from provisioner.core.bootplan import BootPlan, BootRequest, LocalDisk, Ramdisk
from provisioner.core.model import LocalBoot
from provisioner.errors import Gone, ProvisionerError, Unavailable
from provisioner.service.chance import digest_of
from provisioner.web.agent import REFUSED

from .ledger import Grant
from .observations import AgentAnswered, BootAnswered, BugRaised, Permitted, SeedLeft
from .scheduler import Answer, Killed

if TYPE_CHECKING:
    from .hosts import SimHost
    from .service_process import ServiceProcess
    from .world import World

T = TypeVar("T")
Handler = Callable[["ServiceProcess"], T]
LATENCY_S: Final = (0.001, 0.05)
SERVER_ERROR: Final = 500
LATE_S: Final = (5.0, 120.0)
REQUEST_LIMIT_S: Final = 30.0


class NoAnswer(Exception):
    """None came in time, or one that says "not now"."""


class Refused(Exception):
    """The service said no, for good. `is_spent`: what was shown has ended."""

    def __init__(self, why: str, *, is_spent: bool = False) -> None:
        super().__init__(why)
        self.is_spent = is_spent


class Network:
    def __init__(self, world: World) -> None:
        self._world = world

    # What hosts say.

    def ask_how_to_boot(self, host: SimHost) -> BootPlan:
        """Return what the boot listener answers; every failure there ends at the disk."""

        def handle(service: ServiceProcess) -> BootPlan:
            request = BootRequest(host.mac, uuid=host.uuid, serial=host.serial)
            try:
                plan = service.boot.answer(request, host.address)
            except ProvisionerError as error:
                return LocalDisk(LocalBoot.AUTO, error.message)
            if isinstance(plan, Ramdisk):
                ticket = plan.ticket.reveal()
                self._world.ledger.secrets.add(ticket)
                self._world.saw(BootAnswered(host.mac, ticket))
            return plan

        return self._call(host, "boot", handle)

    def hello(self, host: SimHost, body: dict[str, Any]) -> dict[str, Any]:
        def handle(service: ServiceProcess) -> dict[str, Any]:
            answer = service.agents.hello(body, host.address)
            self._world.ledger.secrets |= {answer["token"], body["session"]}
            self._world.saw(AgentAnswered("hello", answer["operation"]))
            return answer

        texts = [body["ticket"]]
        return self._call(host, "hello", self._looked_at(handle, host, texts, [host.mac]))

    def agent_call(
        self, host: SimHost, what: str, token: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        """Carry one of the agent's calls that need a token."""

        def handle(service: ServiceProcess) -> dict[str, Any]:
            answer: dict[str, Any] = getattr(service.agents, what)(token, body, host.address)
            operation = self._world.ledger.operation_of_token(digest_of(token)) or "?"
            if what not in ("failed", "compared"):  # which may be said once more
                self._world.saw(AgentAnswered(what, operation))
            if what == "authorise":
                answer = {**answer, "grant": self._granted(host, operation, body)}
            if what == "seed":
                self._world.ledger.secrets.add(answer["vendor-data"])
                self._world.saw(SeedLeft(operation))
            return answer

        return self._call(host, what, self._looked_at(handle, host, [token]))

    def phone_home(self, host: SimHost, body: dict[str, Any]) -> dict[str, Any]:
        def handle(service: ServiceProcess) -> dict[str, Any]:
            # Noted before: the process may die between saving the report and answering it.
            operation = body["nonce"].split(".")[0]
            self._world.ledger.reported_from[operation] = body["root_disk"]["serial"]
            self._world.ledger.heard_s[operation] = self._world.now_s
            return service.agents.phone_home(body, host.address)

        return self._call(host, "phone home", self._looked_at(handle, host, [body["nonce"]]))

    def _looked_at(
        self, handle: Handler[T], host: SimHost, texts: list[str], macs: Sequence[str] = ()
    ) -> Handler[T]:
        """Have what was refused looked at, as the real listener does."""

        def handled(service: ServiceProcess) -> T:
            try:
                return handle(service)
            except ProvisionerError as error:
                if error.status in REFUSED and self._world.keeps_backups:
                    with suppress(Unavailable):
                        service.sightings.look(texts, macs, host.address)
                raise

        return handled

    def _granted(self, host: SimHost, operation: str, body: dict[str, Any]) -> Grant:
        serial, generation = body["disk"]["serial"], body["generation"]
        grant = Grant(host.name, operation, generation, body["release"], serial, self._world.now_s)
        self._world.ledger.grants.append(grant)
        self._world.saw(Permitted(host, operation, generation, body["release"], serial))
        return grant

    # What people say.

    def request(self, what: str, handle: Handler[T]) -> T:
        """Carry an operator's request; nothing happens to it on its way."""
        answer = self._hand_over(what, handle)
        if not self._world.scheduler.wait(answer, REQUEST_LIMIT_S):
            raise NoAnswer(what)
        return answer.take()

    # The wire.

    def _call(self, host: SimHost, what: str, handle: Handler[T]) -> T:
        world = self._world
        fate = world.faults.fate_of_message(host, what)
        if world.now_s < host.troubles.is_apart_until_s or fate == "lost":
            world.scheduler.sleep(API_TIMEOUT_S)
            raise NoAnswer(what)
        world.scheduler.sleep(world.chance.uniform(*LATENCY_S))
        if fate == "late":
            late_s = world.chance.uniform(*LATE_S)
            world.scheduler.after(late_s, lambda: self._hand_over_quietly(what, handle))
            world.scheduler.sleep(API_TIMEOUT_S)
            raise NoAnswer(what)
        if fate == "doubled":
            late_s = world.chance.uniform(0.0, LATE_S[1])
            world.scheduler.after(late_s, lambda: self._hand_over_quietly(what, handle))
        answer = self._hand_over(what, handle)
        came = world.scheduler.wait(answer, API_TIMEOUT_S)
        is_apart = world.now_s < host.troubles.is_apart_until_s
        if not came or fate == "unanswered" or is_apart:
            world.scheduler.sleep(0.0 if not came else API_TIMEOUT_S / 2)
            raise NoAnswer(what)
        world.scheduler.sleep(world.chance.uniform(*LATENCY_S))
        return answer.take()

    def _hand_over_quietly(self, what: str, handle: Handler[T]) -> None:
        """Deliver a message whose answer nobody waits for."""
        self._world.note(f"a {what} arrives late, or once more")
        self._hand_over(what, handle)

    def _hand_over(self, what: str, handle: Handler[T]) -> Answer[T]:
        answer: Answer[T] = Answer()
        service = self._world.front()
        if service is None:
            self._world.scheduler.after(0.5, lambda: answer.give(error=NoAnswer("no service")))
            return answer

        def run() -> None:
            try:
                answer.give(handle(service))
            except ProvisionerError as error:
                is_passing = error.status >= SERVER_ERROR
                why = f"{error.code}: {error.message}"
                no = Refused(why, is_spent=isinstance(error, Gone))
                answer.give(error=NoAnswer(why) if is_passing else no)
            except Killed:
                answer.give(error=NoAnswer("the connection broke"))
                raise
            except Exception as error:  # noqa: BLE001 # the top of a server
                self._world.saw(BugRaised(what, error))
                answer.give(error=NoAnswer("a bug"))

        self._world.scheduler.spawn(f"{service.name} {what}", run, service.group)
        return answer
