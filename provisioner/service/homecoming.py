"""Judges what a freshly booted system reports: its nonce, its release, the disk it runs from.

Whether it is healthy beyond that is the health checks' to say.
"""

import hmac
from dataclasses import replace
from datetime import datetime
from typing import Final, NoReturn

from provisioner.core.contracts import Clock, Store, Tx
from provisioner.core.disks import bare_wwn
from provisioner.core.lifecycle import E, NotAllowed
from provisioner.core.model import Host, Json, Kind, Operation, OperationId, Phase
from provisioner.errors import Gone, ProvisionerError, TrustError

from .agent_bodies import DETAIL_BYTES_MAX, bounded, event_of, text_in, texts_in
from .chance import Derived
from .observing import check_acting
from .proof import BOOT_ID, HEALTHY_SINCE, HEARD_AT
from .transitions import Transitions

REPORTER: Final = "reporter"
_TOLD: Final = ("release_id", "root_disk", BOOT_ID, "machine_id_digest", "kernel", "os_release")
_BOOTED: Final = (Phase.BOOTING, Phase.PROVING)
# The agent was done, but could not tell: the service was away for too long.
_UNHEARD: Final = Phase.VERIFYING


class Homecoming:
    """The reporter's one call."""

    def __init__(
        self, store: Store, transitions: Transitions, clock: Clock, derived: Derived
    ) -> None:
        self._store = store
        self._transitions = transitions
        self._clock = clock
        self._derived = derived

    def phone_home(self, body: Json, source: str) -> Json:
        """Judge the report of a freshly booted system by nonce, release and root disk.

        The answer says whether it is accepted, and whether it is to be made again: until the
        system is proven, each report says that it still runs. The proven system is told so
        as often as it asks, since that answer may be lost.

        Raises TrustError when the nonce is not the one of a deployment, NotAllowed when it
        comes too early, and Gone when the deployment has ended otherwise, or another began:
        the nonce died with it. A report with the right nonce from a wrong system ends the
        deployment as failed.
        """
        nonce = text_in(body, "nonce")
        if not nonce.isascii() or not nonce.isprintable():
            _refuse_nonce()  # no database would take it as a key
        operation_id = OperationId(nonce.split(".", 1)[0])
        now = self._clock()
        with self._store.begin() as tx:
            check_acting(tx)
            operation = self._operation_of_nonce(tx, operation_id, nonce)
            host = tx.host(operation.host_id)
            if operation.is_final:
                if _is_proven(tx, operation, host, body):
                    return {"accepted": True, "ask_again": False}
                text = "a nonce came back after its deployment had ended, refused"
                tx.add_event(event_of(now, "cloud-init", text, host, operation))
            else:
                return self._judge(tx, operation, host, body, source, now)
        raise Gone(
            "this nonce is spent: its deployment has ended",
            host=host.name,
            found=str(operation.phase),
            hint="the system that sent it need not ask again",
        )

    def _judge(
        self,
        tx: Tx,
        operation: Operation,
        host: Host,
        body: Json,
        source: str,
        now: datetime,
    ) -> Json:
        mismatch = _mismatch(tx, body, operation)
        is_unheard = operation.phase is _UNHEARD and mismatch is None
        if operation.phase not in _BOOTED and not is_unheard:
            raise NotAllowed(
                "a system phoned home before its deployment was written",
                host=host.name,
                found=str(operation.phase),
            )
        if is_unheard:
            tx.save_host(replace(host, root_disk=operation.evidence.get("disk")))
        evidence = _evidence(body, source, now)
        has_restarted = operation.phase is Phase.PROVING and evidence[
            BOOT_ID
        ] != operation.evidence.get(BOOT_ID)
        if has_restarted:
            evidence[HEALTHY_SINCE] = None
        self._transitions.apply(
            tx,
            operation.id,
            E.PHONED_HOME if mismatch is None else E.EVIDENCE_REFUSED,
            generation=operation.generation,
            actor=REPORTER,
            evidence=evidence if mismatch is None else {"refused_report": evidence},
            error={"host": host.name, **mismatch} if mismatch else None,
        )
        text = "phones home"
        if mismatch is not None:
            text = f"phones home: {mismatch['message']}"
        elif has_restarted:
            text = "phones home after a restart: its soak begins anew"
        elif operation.phase is Phase.PROVING:
            return {"accepted": True, "ask_again": True}  # and no line for each
        tx.add_event(event_of(now, "cloud-init", text, host, operation))
        return {"accepted": mismatch is None, "ask_again": mismatch is None}

    def _operation_of_nonce(self, tx: Tx, operation_id: OperationId, nonce: str) -> Operation:
        try:
            operation = tx.operation(operation_id)
        except ProvisionerError:
            _refuse_nonce()
        right = self._derived.nonce(operation.id, operation.generation).reveal()
        if operation.kind is not Kind.DEPLOYMENT or not hmac.compare_digest(
            right.encode(), nonce.encode()
        ):
            _refuse_nonce()
        return operation


def _evidence(body: Json, source: str, now: datetime) -> Json:
    return {
        "nonce": "the deployment's own",
        "address": source,
        HEARD_AT: now.isoformat(),
        "ssh_host_keys": texts_in(body, "ssh_host_keys"),
        "failed_units": texts_in(body, "failed_units"),
        **{key: bounded(body.get(key), DETAIL_BYTES_MAX) for key in _TOLD},
    }


def _is_proven(tx: Tx, operation: Operation, host: Host, body: Json) -> bool:
    """Return whether it is the proven system that asks, and nothing has come after it."""
    return (
        operation.phase is Phase.SUCCEEDED
        and operation.generation == host.generation
        and _mismatch(tx, body, operation) is None
    )


def _mismatch(tx: Tx, body: Json, operation: Operation) -> Json | None:
    """Return the error for a report that is not from the deployed system, or None."""
    row = tx.release(operation.release or "")
    release_id = row.release_id if row else None
    disk = operation.evidence.get("disk", {})
    found = body["root_disk"] if isinstance(body.get("root_disk"), dict) else {}
    if release_id is None or body.get("release_id") != release_id:
        return {
            "code": "wrong_system",
            "message": "the host came up with another system than the deployed one",
            "expected": release_id,
            "found": bounded(body.get("release_id"), DETAIL_BYTES_MAX),
            "hint": "check the boot order: it may have started an old system from another disk",
        }
    if not _is_same_disk(found, disk):
        return {
            "code": "wrong_disk",
            "message": "the host runs from another disk than the deployed one",
            "expected": disk,
            "found": bounded(found, DETAIL_BYTES_MAX),
            "hint": "check the boot order, and whether two disks carry the same file system",
        }
    return None


def _is_same_disk(found: Json, permitted: Json) -> bool:
    """Compare by all that the permitted disk is known by: two name spaces of one NVMe drive
    have one serial. A WWN that the new system's kernel does not tell is not held against it
    where there is a serial."""
    serial, wwn = permitted.get("serial"), permitted.get("wwn")
    if serial and str(found.get("serial")) != serial:
        return False
    if wwn and (found.get("wwn") or not serial):
        return bare_wwn(str(found.get("wwn"))) == bare_wwn(str(wwn))
    return bool(serial or wwn)


def _refuse_nonce() -> NoReturn:
    raise TrustError("this nonce belongs to no deployment", hint="the host was rebuilt since")
