"""What needs the guard's word: the permission to write, and the seed that is written last."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from provisioner.core.contracts import AgentToken, Clock, Tx
from provisioner.core.disks import Disk, DiskRule, NoDiskMatches, SeveralDisksMatch, choose_disk
from provisioner.core.guard import (
    WritePermit,
    WriteRefused,
    WriteRequest,
    authorise_write,
    identity,
)
from provisioner.core.lifecycle import E
from provisioner.core.model import Host, Json, Kind, Operation, Phase, Profile
from provisioner.errors import Gone

from .agent_access import AGENT, check_not_revoked
from .agent_bodies import event_of, number_in, object_in, text_in
from .agent_orders import pinned_profile
from .chance import Derived
from .identity import TokenRefused
from .seeds import render_seed
from .token_sessions import Session, TokenSessions
from .transitions import Transitions

PERMISSION_S: Final = 30


class NoneToWrite(NoDiskMatches):
    """Said to an agent that found one: an answer for good, which is not asked for again."""

    status = 403


class SeveralToWrite(SeveralDisksMatch):
    """Said to an agent that found one: an answer for good, which is not asked for again."""

    status = 403


class Permissions:
    """Answers an agent that asks to write, and for its seed. `vendor_data` renders the
    reporter's vendor data from a nonce."""

    def __init__(
        self,
        sessions: TokenSessions,
        transitions: Transitions,
        clock: Clock,
        derived: Derived,
        vendor_data: Callable[[str], str],
    ) -> None:
        self._sessions = sessions
        self._transitions = transitions
        self._clock = clock
        self._derived = derived
        self._vendor_data = vendor_data

    def authorise(self, token: str, body: Json, source: str) -> Json:
        """Return a permission to write, or raise WriteRefused. The host is saved as dirty,
        in the same transaction, before the agent hears of it."""
        with self._noting_refusals(token, source):
            return self._authorise(token, body, source)

    def _authorise(self, token: str, body: Json, source: str) -> Json:
        generation, release = number_in(body, "generation"), text_in(body, "release")
        disk = Disk.from_dict({"rotational": False, "bus": "virtio", **object_in(body, "disk")})
        now = self._clock()
        with self._sessions.open(token, source) as session:
            tx, operation, host = session.tx, session.operation, session.host
            chosen = self._chosen_disk(tx, operation, host)
            asked = WriteRequest(session.agent.host_id, generation, release, disk)
            permit = self._permit(tx, asked, operation, host, chosen)
            first = operation.phase is Phase.PREPARING
            self._transitions.apply(
                tx,
                operation.id,
                E.WRITE_PERMITTED if first else E.REPORTED,
                generation=generation,
                actor=AGENT,
                evidence={"disk": identity(chosen), "disk_name": chosen.name} if first else None,
                permit=permit,
            )
            if first:
                where = f"may write {chosen.name}, serial {chosen.serial}, WWN {chosen.wwn}"
                tx.add_event(event_of(now, "agent", where, host, operation))
            return {"permitted": True, "expires_in_s": PERMISSION_S}

    def seed(self, token: str, body: Json, source: str) -> Json:
        """Return the seed, once, to the agent that may write still. Raises Gone the second time,
        and WriteRefused when its permission would not be renewed."""
        generation = number_in(body, "generation")
        with self._noting_refusals(token, source), self._sessions.open(token, source) as session:
            documents = self._take_seed(session, generation)
        if documents is None:
            raise Gone(
                "the seed has left already",
                host=session.host.name,
                hint="reimage the host for a new one",
            )
        return documents

    def _take_seed(self, session: Session, generation: int) -> Json | None:
        """Return the seed, and note that it leaves; None when it has left before. One that
        cannot be rendered was not taken."""
        now = self._clock()
        tx, operation, host = session.tx, session.operation, session.host
        documents: Json | None = None
        has_left = tx.is_seed_taken(operation.id)
        if not has_left:
            self._check_seed(tx, session.agent, operation, host, generation)
            documents = self._rendered(tx, operation, host)
            tx.take_seed(operation.id, now)
        text = "seed asked for a second time, refused" if has_left else "seed handed out"
        tx.add_event(event_of(now, "agent", text, host, operation))
        action = "seed.refused" if has_left else "seed.taken"
        tx.audit(now, AGENT, action, host.name, {"operation": operation.id})
        return documents

    def _rendered(self, tx: Tx, operation: Operation, host: Host) -> Json:
        profile = _profile_to_write(tx, operation, host)
        nonce = self._derived.nonce(operation.id, operation.generation)
        vendor_data = self._vendor_data(nonce.reveal())
        return dict(render_seed(operation, host, profile, vendor_data=vendor_data))

    def _check_seed(
        self, tx: Tx, agent: AgentToken, operation: Operation, host: Host, generation: int
    ) -> None:
        """Raise unless the seed is for this agent, now: it may write, and has begun to."""
        check_not_revoked(tx, operation)
        writes = operation.phase in (Phase.WRITING, Phase.VERIFYING)
        if (
            generation != operation.generation
            or operation.kind is not Kind.DEPLOYMENT
            or not writes
        ):
            raise TokenRefused(
                "the seed is only for the agent that writes",
                host=host.name,
                expected="writing or verifying",
                found=str(operation.phase),
            )
        chosen = self._chosen_disk(tx, operation, host)
        asked = WriteRequest(agent.host_id, generation, operation.release or "", chosen)
        self._permit(tx, asked, operation, host, chosen)

    def _permit(
        self, tx: Tx, asked: WriteRequest, operation: Operation, host: Host, chosen: Disk
    ) -> WritePermit:
        """Ask the guard with what the database says now."""
        facts = self._transitions.guard.of(tx, operation, host)
        return authorise_write(asked, operation, host, chosen, facts, now=self._clock())

    @contextmanager
    def _noting_refusals(self, token: str, source: str) -> Iterator[None]:
        """Record what the guard refuses, when its transaction is over."""
        try:
            yield
        except (WriteRefused, NoneToWrite, SeveralToWrite) as error:
            with self._sessions.open(token, source) as session:
                host, operation = session.host, session.operation
                now, why = self._clock(), f"write refused: {error.message}"
                session.tx.add_event(event_of(now, "agent", why, host, operation))
                session.tx.audit(now, AGENT, "write.refused", host.name, error.as_dict())
            raise

    def _chosen_disk(self, tx: Tx, operation: Operation, host: Host) -> Disk:
        profile = _profile_to_write(tx, operation, host)
        if host.inventory is None:
            raise _writes_nothing(host)
        disks = [Disk.from_dict(disk) for disk in host.inventory["disks"]]
        try:
            return choose_disk(DiskRule.parse(profile.document["disk"]), disks)
        except (NoDiskMatches, SeveralDisksMatch) as error:
            # The agent chose among other disks than it told of before: asking again is no help.
            refusal = NoneToWrite if isinstance(error, NoDiskMatches) else SeveralToWrite
            raise refusal(
                f"host {host.name} may not be written: {error.message}",
                host=host.name,
                expected=error.expected,
                found=error.found,
                hint="disks came or went since the agent's hello; request the operation again",
            ) from error


def _profile_to_write(tx: Tx, operation: Operation, host: Host) -> Profile:
    profile = pinned_profile(tx, operation)
    if profile is None:
        raise _writes_nothing(host)
    return profile


def _writes_nothing(host: Host) -> TokenRefused:
    return TokenRefused("this operation writes no disk", host=host.name)
