"""Enrolling, showing, flagging and retiring hosts, and their power by hand."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from provisioner.core.contracts import BmcPool, Clock, Store, Tx
from provisioner.core.model import (
    BmcAddress,
    Event,
    Firmware,
    Host,
    HostId,
    Json,
    LocalBoot,
    PowerState,
    WeakLogin,
    new_host,
)
from provisioner.core.own_host import OwnHost, ServiceHosts, known_uuid
from provisioner.errors import Conflict, RequestError

from .chance import new_host_id
from .follow_ups import forget_refused_login, hand_over
from .lookup import host_named

NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
MACS_MAX: Final = 16
HOSTS_PER_IMPORT_MAX: Final = 10_000


@dataclass(frozen=True)
class HostSpec:
    """What a person says of a host when enrolling it. Only name, MACs and BMC matter for a
    first deployment; UUID, serial and firmware are learnt from the agent when left out."""

    name: str
    macs: tuple[str, ...]
    bmc: BmcAddress | None = None
    firmware: Firmware | None = None
    uuid: str | None = None
    serial: str | None = None
    profile: str | None = None
    local_boot: LocalBoot = LocalBoot.AUTO
    labels: Mapping[str, str] = field(default_factory=dict)


# What a BMC does that lets people in without a password, and the next step.
_WEAK: Final[Mapping[WeakLogin, Json]] = {
    WeakLogin.CIPHER_ZERO: {
        "message": "accepts cipher suite 0, with which any password opens it",
        "hint": "switch cipher suite 0 off in the BMC: `ipmitool lan set CHANNEL "
        "cipher_privs Xaaaaaaaaaaaaaa` where suite 0 is the first letter",
    },
    WeakLogin.ANONYMOUS: {
        "message": "lets a user without a name log in without a password",
        "hint": "disable user 1, whose name is empty, in the BMC: `ipmitool user disable 1`",
    },
}


class Hosts:
    """The use cases around one host that are not operations."""

    def __init__(
        self,
        store: Store,
        pool: BmcPool,
        clock: Clock,
        weak_logins: Callable[[BmcAddress], Sequence[WeakLogin]] = lambda _where: (),
        new_id: Callable[[], HostId] = new_host_id,
    ) -> None:
        self._weak_logins = weak_logins
        self._store = store
        self._pool = pool
        self._clock = clock
        self._new_id = new_id

    def add(self, spec: HostSpec, *, actor: str) -> Host:
        return self.add_many([spec], actor=actor)[0]

    def add_many(self, specs: Sequence[HostSpec], *, actor: str) -> list[Host]:
        """Enrol all hosts, or none. Raises RequestError for a bad name or MAC and Conflict
        for one that is already in use."""
        if not specs:
            raise RequestError("no host was given", expected="one or more hosts", found="none")
        if len(specs) > HOSTS_PER_IMPORT_MAX:
            raise RequestError(
                "too many hosts at once", expected=HOSTS_PER_IMPORT_MAX, found=len(specs)
            )
        made = []
        with self._store.begin() as tx:
            for spec in specs:
                host = self._enrolled(tx, check_spec(spec))
                tx.add_host(host)
                tx.audit(self._clock(), actor, "host.added", host.name, _public(spec))
                made.append(host)
        return made

    def list(self, after: str = "", limit: int = 1000) -> Sequence[Host]:
        with self._store.read() as tx:
            return tx.hosts(after=after, limit=limit)

    def show(self, name: str) -> Host:
        with self._store.read() as tx:
            return host_named(tx, name)

    def own(self, own: OwnHost) -> dict[str, str]:
        """Return by name why a host is a service's own, of all that are."""
        with self._store.read() as tx:
            services = ServiceHosts(own, tuple(tx.services()))
            found: list[Host] = []
            for one in (own, *(service.found for service in services.known)):
                found += [host for mac in sorted(one.macs) for host in tx.hosts_with_mac(mac)]
                found += tx.hosts_with_uuid(known_uuid(one.uuid) or "")
                found += [host for name in sorted(one.names) if (host := tx.host_named(name))]
        return {host.name: why for host in found if (why := services.why(host)) is not None}

    def delete(self, name: str, *, actor: str) -> None:
        """Stop managing a host. Its disk is left as it is. Raises Conflict while it is
        protected or an operation is open."""
        with self._store.begin() as tx:
            host = host_named(tx, name)
            busy = tx.open_operation(host.id)
            if busy is not None or host.is_protected:
                found = f"{busy.id} is {busy.phase}" if busy else "it is protected"
                raise Conflict(
                    f"host {host.name} is not deleted",
                    host=host.name,
                    expected="no open operation and no protection",
                    found=found,
                    hint=f"provisioner operation cancel {busy.id}"
                    if busy
                    else f"provisioner host unprotect {host.name}",
                )
            tx.delete_host(host.id)
            tx.audit(self._clock(), actor, "host.deleted", host.name, {"id": host.id})

    def set_flags(
        self,
        name: str,
        *,
        is_protected: bool | None = None,
        in_maintenance: bool | None = None,
        release_quarantine: bool = False,
        actor: str,
    ) -> Host:
        """Set the flags that are not None; the others stay as they are. Whoever protects a host
        or takes it into maintenance ends what was to follow on it by itself."""
        with self._store.begin() as tx:
            before = host_named(tx, name)
            after = before
            if is_protected is not None:
                after = replace(after, is_protected=is_protected)
            if in_maintenance is not None:
                after = replace(after, in_maintenance=in_maintenance)
            if release_quarantine:
                after = replace(after, quarantine_reason=None)
            self._save(tx, before, after, "host.flags", actor)
            if is_protected or in_maintenance:
                hand_over(tx, after, actor, self._clock())
            return after

    def confirm(
        self,
        name: str,
        *,
        new_name: str | None,
        bmc: BmcAddress | None,
        profile: str | None,
        actor: str,
    ) -> Host:
        """Take a discovered host into management."""
        with self._store.begin() as tx:
            before = host_named(tx, name)
            if before.is_confirmed:
                raise Conflict(f"host {before.name} is already confirmed", host=before.name)
            _check_profile(tx, profile, before.name)
            after = replace(
                before,
                name=_check_name(new_name or before.name),
                is_confirmed=True,
                bmc=bmc or before.bmc,
                profile=profile or before.profile,
            )
            self._save(tx, before, after, "host.confirmed", actor)
            return after

    def change(
        self,
        name: str,
        *,
        profile: str | None = None,
        firmware: Firmware | None = None,
        local_boot: LocalBoot | None = None,
        bmc: BmcAddress | None = None,
        labels: Mapping[str, str] | None = None,
        actor: str,
    ) -> Host:
        """Change what is not None. Raises RequestError for a profile that does not exist."""
        with self._store.begin() as tx:
            before = host_named(tx, name)
            _check_profile(tx, profile, before.name)
            after = replace(
                before,
                profile=profile if profile is not None else before.profile,
                firmware=firmware if firmware is not None else before.firmware,
                local_boot=local_boot if local_boot is not None else before.local_boot,
                bmc=bmc if bmc is not None else before.bmc,
                labels=labels if labels is not None else before.labels,
            )
            self._save(tx, before, after, "host.changed", actor)
            return after

    def power(self, name: str, action: str, *, actor: str) -> PowerState | None:
        """Carry out one power action by hand and return the state for `status`.

        Raises Conflict while an operation owns the host: its power is the operation's.
        """
        host = self.show(name)
        bmc_address = _bmc_of(host)
        bmc = self._pool.bmc(bmc_address)
        if action == "status":
            return bmc.power()
        verbs: dict[str, Callable[[], None]] = {
            "on": bmc.power_on,
            "off": lambda: bmc.power_off(soft=False),
            "soft-off": lambda: bmc.power_off(soft=True),
            "reset": bmc.reset,
        }
        if action not in verbs:
            raise RequestError(
                f"there is no power action {action}", expected=["status", *verbs], found=action
            )
        with self._store.begin() as tx:
            busy = tx.open_operation(host.id)
            if busy is not None:
                raise Conflict(
                    f"host {host.name} belongs to {busy.id}",
                    host=host.name,
                    found=f"{busy.kind} in {busy.phase}",
                    hint=f"provisioner operation cancel {busy.id}",
                )
            tx.audit(self._clock(), actor, f"host.power.{action}", host.name, {})
            text = f"power {action} by {actor}"
            tx.add_event(Event(self._clock(), "bmc", text, host_id=host.id))
        verbs[action]()
        return None

    def check_bmc(self, name: str) -> Sequence[Json]:
        """Return what makes the host's BMC open to people without a password, each with a hint,
        and put it into its timeline. Raises Conflict without a BMC, and DeviceError."""
        host = self.show(name)
        bmc_address = _bmc_of(host)
        found = [{"code": str(way), **_WEAK[way]} for way in self._weak_logins(bmc_address)]
        with self._store.begin() as tx:
            for one in found:
                text = f"warning: the BMC {one['message']}"
                detail = {"code": one["code"], "hint": one["hint"]}
                tx.add_event(Event(self._clock(), "bmc", text, host_id=host.id, detail=detail))
        return found

    def timeline(
        self, name: str, after: int | None = None, limit: int = 200
    ) -> Sequence[tuple[int, Event]]:
        """Return a host's events after a number, or the newest; oldest first."""
        with self._store.read() as tx:
            return tx.events(host_id=host_named(tx, name).id, after=after, limit=limit)

    def _enrolled(self, tx: Tx, spec: HostSpec) -> Host:
        _check_profile(tx, spec.profile, spec.name)
        return new_host(
            self._new_id(),
            spec.name,
            spec.macs,
            self._clock(),
            local_boot=spec.local_boot,
            firmware=spec.firmware,
            uuid=known_uuid(spec.uuid),
            serial=spec.serial,
            profile=spec.profile,
            bmc=spec.bmc,
            labels=spec.labels,
        )

    def _save(self, tx: Tx, before: Host, after: Host, action: str, actor: str) -> None:
        if after == before:
            return
        tx.save_host(after)
        old = _facts(before)
        changed = {key: value for key, value in _facts(after).items() if old[key] != value}
        if after.bmc != before.bmc:
            changed["bmc_credentials"] = "replaced"
            forget_refused_login(tx, after)
        tx.audit(self._clock(), actor, action, after.name, changed)


def check_spec(spec: HostSpec) -> HostSpec:
    """Return the spec with its MACs in one spelling. Raises RequestError, naming the host."""
    _check_name(spec.name)
    macs = tuple(mac.lower().replace("-", ":") for mac in spec.macs)
    bad = [mac for mac in macs if not MAC.fullmatch(mac) or int(mac[:2], 16) & 1]
    if not macs or bad or len(set(macs)) != len(macs) or len(macs) > MACS_MAX:
        raise RequestError(
            f"the MAC addresses of host {spec.name} are not usable",
            host=spec.name,
            expected=f"1 to {MACS_MAX} different unicast addresses like 52:54:00:12:34:56",
            found=list(spec.macs),
        )
    if spec.uuid and known_uuid(spec.uuid) is None:
        raise RequestError(
            f"the UUID of host {spec.name} identifies nobody",
            host=spec.name,
            expected="a UUID of its own, or none",
            found=spec.uuid,
            hint="leave it out; but a host that reports such a one is given no ticket",
        )
    return replace(spec, macs=macs)


def _bmc_of(host: Host) -> BmcAddress:
    """Return the host's BMC. Raises Conflict when it has none."""
    if host.bmc is None:
        raise Conflict(
            f"host {host.name} has no BMC",
            host=host.name,
            hint=f"provisioner host change {host.name} --bmc ADDRESS --bmc-user USER",
        )
    return host.bmc


def _check_profile(tx: Tx, profile: str | None, host: str) -> None:
    if profile is not None and tx.profile(profile) is None:
        known = [one.name for one in tx.profiles()]
        raise RequestError(
            f"there is no profile {profile}",
            host=host,
            expected=known or "a saved profile",
            found=profile,
            hint="provisioner profile save FILE",
        )


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise RequestError(
            "that is not a usable host name",
            expected="1 to 63 of a-z, 0-9 and -, not at either end",
            found=name,
        )
    return name


def _public(spec: HostSpec) -> Json:
    """Return what may stand in an audit row: everything but the BMC's credentials."""
    return {
        "macs": list(spec.macs),
        "bmc": f"{spec.bmc.address}:{spec.bmc.port}" if spec.bmc else None,
        "profile": spec.profile,
        "labels": dict(spec.labels),
    }


def _facts(host: Host) -> Json:
    return {
        "name": host.name,
        "is_protected": host.is_protected,
        "in_maintenance": host.in_maintenance,
        "quarantine_reason": host.quarantine_reason,
        "is_confirmed": host.is_confirmed,
        "profile": host.profile,
        "firmware": host.firmware,
        "local_boot": host.local_boot,
        "bmc": f"{host.bmc.address}:{host.bmc.port}" if host.bmc else None,
        "labels": dict(host.labels),
    }
