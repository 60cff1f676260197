"""Takes the follow-ups of failed deployments when they are due: attempts and rollbacks.

Each is looked at once more in the transaction that makes the next operation, so of two that
do it at once, or twice after a crash, one finds nothing left to do.
"""

from dataclasses import replace
from datetime import datetime
from typing import Final

import structlog

from provisioner.core.contracts import Archive, Clock, Store, Tx
from provisioner.core.model import Host, Json, Kind, Operation, Phase
from provisioner.core.recovery import (
    Cause,
    Chain,
    FollowUp,
    Next,
    chain_of,
    follow_up,
    why_not_deployable,
)
from provisioner.errors import DeviceError, NotFound, ProvisionerError, Unavailable

from .agent_orders import pinned_profile
from .chance import new_operation_id
from .follow_ups import RECOVERY, drop, facts_of, operations_of, taken
from .queueing import NewId, new_operation, queue
from .requests import check_can_be_proven
from .seeds import LABELS, check_renders_for, labels_of
from .selections import ASKED, select_hosts
from .transitions import Transitions

log = structlog.get_logger(__name__)

BATCH_MAX: Final = 100
# What the archive said of a release, by digest and channel, within one round.
Said = dict[tuple[str, str | None], str | None]


class Recovery:
    """Makes the next operation of each chain of attempts. `archive` says, outside of every
    transaction, whether a release is still trusted."""

    def __init__(
        self,
        store: Store,
        transitions: Transitions,
        archive: Archive,
        clock: Clock,
        new_id: NewId = new_operation_id,
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._archive = archive
        self._clock = clock
        self._new_id = new_id

    def take_due(self) -> None:
        """Take every follow-up that is due. One that fails does not keep the others.

        Raises Unavailable when the database cannot serve.
        """
        with self._store.read() as tx:
            due = tx.due_follow_ups(self._clock(), limit=BATCH_MAX)
        said: Said = {}
        for operation in due:
            try:
                self.take(operation, said)
            except Unavailable:
                raise
            except ProvisionerError as error:
                log.error("follow-up not taken", operation=operation.id, why=error.message)
            except Exception:  # a bug: for this one, and not for all that wait behind it
                log.exception("follow-up not taken", operation=operation.id)

    def take(self, seen: Operation, said: Said | None = None) -> Operation | None:
        """Make the operation that follows `seen`, and return it; None when there is none now."""
        try:
            refused = self._refused(seen, said if said is not None else {})
        except DeviceError as error:
            waited = self._clock() - (seen.follow_up_at or self._clock())
            if waited < self._transitions.limits.phase[Phase.QUEUED]:
                log.warning("follow-up waits", operation=seen.id, why=error.message)
                return None
            refused = {_release_of(seen): error.message}
        with self._store.begin() as tx:
            return self._take(tx, seen, refused)

    def _take(self, tx: Tx, seen: Operation, refused: dict[str, str]) -> Operation | None:
        # The release first, as everybody who begins to refer to one.
        tx.hold_release(_release_of(seen))
        operation, now = tx.operation(seen.id), self._clock()
        if operation.follow_up_at is None or operation.follow_up_at > now:
            return None  # taken, dropped or superseded meanwhile
        is_another = operation.follow_up != seen.follow_up
        # An inspection or a comparison goes first; recovery waits for its end.
        if is_another or tx.open_operation(operation.host_id) is not None:
            return None
        host = tx.host(operation.host_id)
        refused = {**self._unfit(tx, operation, host), **refused}
        planned = Next((operation.follow_up or {})["what"])
        facts = facts_of(
            tx, operation, host, refused=refused, is_retry_over=planned is not Next.RETRY
        )
        decided = follow_up(operation, host, self._transitions.policy, facts, now)
        if decided is None:
            why = host.why_not_rebuilt or why_not_deployable(facts.release, host, facts, now)
            drop(tx, operation, host, why or "it is not wanted any more", RECOVERY, now)
            return None
        is_as_planned = decided.release is not None and (
            (decided.what, decided.release.digest) == (planned, _release_of(operation))
        )
        if not is_as_planned:
            self._transitions.settle(tx, operation, host, decided)
            return None
        return self._follow(tx, operation, host, decided, now)

    def _follow(
        self, tx: Tx, operation: Operation, host: Host, decided: FollowUp, now: datetime
    ) -> Operation:
        assert decided.release is not None
        following = new_operation(
            host,
            Kind.DEPLOYMENT,
            decided.release.digest,
            pins={
                **self._pins(tx, operation, host, decided),
                **select_hosts(tx, [host], actor=RECOVERY, now=now),
            },
            options=operation.options,
            actor=RECOVERY,
            now=now,
            limits=self._transitions.limits,
            new_id=self._new_id,
        )
        queue(tx, host, following)
        taken(tx, operation, following)
        return following

    def _pins(self, tx: Tx, operation: Operation, host: Host, decided: FollowUp) -> Json:
        """Return the pins of the next operation: nothing new comes in.

        An attempt repeats what was planned. The way back takes the profile's revision and the
        labels that the release was proven with, and the ramdisk that has worked on this host
        just now.
        """
        assert decided.release is not None
        if decided.what is Next.RETRY:
            chain = chain_of(operation, self._transitions.policy)
            chain = Chain(decided.attempt, chain.attempts_max, Cause.RETRY, operation.id)
            once = ("failed_before", ASKED)
            pins = {key: value for key, value in operation.pins.items() if key not in once}
            return {**pins, LABELS: dict(labels_of(operation, host)), **chain.pins()}
        source = _proof(tx, host, decided.release.digest) or operation
        return {
            "ramdisk": operation.pins.get("ramdisk"),
            "profile": source.pins.get("profile"),
            LABELS: dict(labels_of(source, host)),
            "release_name": decided.release.name,
            **Chain(1, 1, Cause.ROLLBACK, operation.id).pins(),
        }

    def _unfit(self, tx: Tx, operation: Operation, host: Host) -> dict[str, str]:
        """Return why the planned release cannot go with the pinned profile any more, if so:
        limits may have been changed since, and labels that an earlier version did not pin."""
        digest = _release_of(operation)
        is_rollback = (operation.follow_up or {})["what"] == Next.ROLLBACK
        source = (_proof(tx, host, digest) if is_rollback else None) or operation
        profile = pinned_profile(tx, source)
        if profile is None:
            return {digest: "its profile is not known any more"}
        try:
            check_renders_for(replace(host, labels=labels_of(source, host)), profile)
            check_can_be_proven(host, profile, self._transitions.limits)
        except ProvisionerError as error:
            return {digest: error.message}
        return {}

    def _refused(self, seen: Operation, said: Said) -> dict[str, str]:
        """Return why the archive does not let the planned release go, if so. Raises DeviceError
        when it cannot say."""
        digest = _release_of(seen)
        is_retry = (seen.follow_up or {}).get("what") == Next.RETRY
        channel = seen.pins.get("channel") if is_retry else None
        if (digest, channel) not in said:
            said[digest, channel] = self._ask(digest, channel)
        why = said[digest, channel]
        return {digest: why} if why is not None else {}

    def _ask(self, digest: str, channel: str | None) -> str | None:
        try:
            self._archive.check(digest, channel=channel, now=self._clock())
        except DeviceError:
            raise
        except (NotFound, OSError) as error:
            # Perhaps its file system is not mounted, or away: that is no word on the release.
            raise DeviceError(f"the archive cannot be read: {error}") from error
        except ProvisionerError as error:
            return error.message
        return None


def _release_of(operation: Operation) -> str:
    return str((operation.follow_up or {}).get("release", ""))


def _proof(tx: Tx, host: Host, release: str) -> Operation | None:
    """Return the newest deployment that proved a release on this host, if its profile is
    known."""
    for row in operations_of(tx, host):
        is_proof = row.kind is Kind.DEPLOYMENT and row.phase is Phase.SUCCEEDED
        if is_proof and row.release == release:
            return row if row.pins.get("profile") else None
    return None
