"""Turns rows into the core's values and back. Pure, but for the sealing it is handed."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from ..core.audit import AuditRow
from ..core.contracts import AgentToken, ApiToken
from ..core.fleet import GROUP_LABEL, Breaker, Selection
from ..core.model import (
    BmcAddress,
    Channel,
    Event,
    Firmware,
    Host,
    HostId,
    HostState,
    Kind,
    LocalBoot,
    Operation,
    Phase,
    Profile,
    ReleaseFailure,
    ReleaseRow,
    ReleaseTest,
    Ticket,
)
from ..core.profile import ProfileUnreadable, text_of
from ..errors import BmcAuthFailed
from .sealing import Sealed, Sealing, sealed

Row = Mapping[str, Any]
BMC_PASSWORD = "bmc_password"
PROFILE_DOCUMENT = "profile_document"


def host_row(host: Host, sealing: Sealing) -> dict[str, Any]:
    bmc = host.bmc
    return {
        "id": host.id,
        "name": host.name,
        "state": host.state.value,
        "macs": list(host.macs),
        "firmware": host.firmware.value if host.firmware else None,
        "local_boot": host.local_boot.value,
        "uuid": plain_text(host.uuid) if host.uuid else None,
        "serial": plain_text(host.serial) if host.serial else None,
        "profile": host.profile,
        "bmc_address": bmc.address if bmc else None,
        "bmc_port": bmc.port if bmc else None,
        "bmc_user": bmc.user if bmc else None,
        "bmc_password": sealed(bmc.password, (host.id, BMC_PASSWORD), sealing) if bmc else None,
        "generation": host.generation,
        "release": host.release,
        "last_good": host.last_good,
        "is_confirmed": host.is_confirmed,
        "is_protected": host.is_protected,
        "in_maintenance": host.in_maintenance,
        "quarantine_reason": host.quarantine_reason,
        "labels": dict(host.labels),
        "group_name": host.labels.get(GROUP_LABEL) or None,
        "inventory": host.inventory,
        "root_disk": host.root_disk,
        "created_at": host.created_at,
    }


def host_of(row: Row, sealing: Sealing) -> Host:
    return Host(
        id=HostId(row["id"]),
        name=row["name"],
        state=HostState(row["state"]),
        macs=tuple(row["macs"]),
        firmware=Firmware(row["firmware"]) if row["firmware"] else None,
        local_boot=LocalBoot(row["local_boot"]),
        uuid=row["uuid"],
        serial=row["serial"],
        profile=row["profile"],
        bmc=_bmc_of(row, sealing),
        generation=row["generation"],
        release=row["release"],
        last_good=row["last_good"],
        is_confirmed=row["is_confirmed"],
        is_protected=row["is_protected"],
        in_maintenance=row["in_maintenance"],
        quarantine_reason=row["quarantine_reason"],
        labels=row["labels"],
        inventory=row["inventory"],
        root_disk=row["root_disk"],
        created_at=row["created_at"],
    )


def _bmc_of(row: Row, sealing: Sealing) -> BmcAddress | None:
    if row["bmc_address"] is None:
        return None
    at = (HostId(row["id"]), BMC_PASSWORD)
    password = Sealed(at, row["bmc_password"], sealing, partial(_password_lost, row["name"]))
    return BmcAddress(row["bmc_address"], row["bmc_port"], row["bmc_user"], password)


def _password_lost(host: str) -> BmcAuthFailed:
    # Trying again does not help, as with a BMC that refuses the login.
    return BmcAuthFailed(
        f"the stored password of the BMC of host {host} does not open",
        host=host,
        expected="sealed for this host with the configured master key",
        found="another key, the value of another row, or changed bytes",
        hint="find out why; then set it again: provisioner host change "
        f"{host} --bmc-user U --bmc-password-file F",
    )


def operation_row(operation: Operation) -> dict[str, Any]:
    values = {name: getattr(operation, name) for name in Operation.__dataclass_fields__}
    values["kind"] = operation.kind.value
    values["phase"] = operation.phase.value
    values["phase_seconds"] = dict(operation.phase_seconds)
    return values


def operation_of(row: Row) -> Operation:
    values = {name: row[name] for name in Operation.__dataclass_fields__}
    values["kind"] = Kind(row["kind"])
    values["phase"] = Phase(row["phase"])
    return Operation(**values)


def selection_row(selection: Selection) -> dict[str, Any]:
    return {
        "id": selection.request_id,
        "hosts": list(selection.hosts),
        "requested_by": selection.requested_by,
        "requested_at": selection.requested_at,
    }


def selection_of(row: Row) -> Selection:
    hosts = tuple(HostId(one) for one in row["hosts"])
    return Selection(row["id"], hosts, row["requested_by"], row["requested_at"])


def breaker_of(row: Row) -> Breaker:
    return Breaker(**{name: row[name] for name in Breaker.__dataclass_fields__})


def ticket_row(ticket: Ticket) -> dict[str, Any]:
    return {**asdict(ticket), "macs": list(ticket.macs)}


def ticket_of(row: Row) -> Ticket:
    return Ticket(**{**row, "macs": tuple(row["macs"])})


def agent_token_of(row: Row) -> AgentToken:
    return AgentToken(**row)


def api_token_of(row: Row) -> ApiToken:
    return ApiToken(**row)


def release_row(release: ReleaseRow) -> dict[str, Any]:
    return {**asdict(release), "firmware": list(release.firmware)}


def release_of(row: Row) -> ReleaseRow:
    return ReleaseRow(**{**row, "firmware": tuple(row["firmware"])})


def channel_of(row: Row) -> Channel:
    return Channel(**row)


def release_test_row(test: ReleaseTest) -> dict[str, Any]:
    return {**asdict(test), "firmware": list(test.firmware)}


def release_test_of(row: Row) -> ReleaseTest:
    values = {name: row[name] for name in ReleaseTest.__dataclass_fields__}
    return ReleaseTest(**{**values, "firmware": tuple(row["firmware"])})


def release_failure_of(row: Row) -> ReleaseFailure:
    return ReleaseFailure(**row)


def profile_row(profile: Profile, sealing: Sealing) -> dict[str, Any]:
    at = (HostId(profile.digest), PROFILE_DOCUMENT)
    return {
        "name": profile.name,
        "digest": profile.digest,
        "document": {},
        "sealed": sealed(profile.text, at, sealing),
        "created_at": profile.created_at,
    }


def profile_of(row: Row, sealing: Sealing) -> Profile:
    text = text_of(row["document"])  # in clear, as an earlier version kept it
    if row["sealed"] is not None:
        at = (HostId(row["digest"]), PROFILE_DOCUMENT)
        text = Sealed(at, row["sealed"], sealing, partial(_profile_lost, row["name"]))
    return Profile(row["name"], row["digest"], text, row["created_at"])


def _profile_lost(profile: str) -> ProfileUnreadable:
    return ProfileUnreadable(
        f"profile {profile} does not open",
        expected="sealed for this revision with the configured master key",
        found="another key, the value of another row, or changed bytes",
        hint="find out why; then save it again: provisioner profile save FILE",
    )


def audit_of(row: Row) -> AuditRow:
    return AuditRow(**row)


def event_row(event: Event) -> dict[str, Any]:
    return {**asdict(event), "text": plain_text(event.text)}


def plain_text(text: str) -> str:
    """Return a text as every database takes it."""
    # It may come from the wire. PostgreSQL takes no NUL and neither database half a
    # surrogate pair.
    return text.encode("utf-8", "replace").decode().replace("\0", "�")


def event_of(row: Row) -> tuple[int, Event]:
    values = {name: row[name] for name in Event.__dataclass_fields__}
    return row["number"], Event(**values)
