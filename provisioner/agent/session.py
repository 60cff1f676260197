"""What the service told this agent to do: the answer to its hello, checked."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from provisioner.agent.client import ServiceClient
from provisioner.agent.console import say
from provisioner.agent.http import Origin
from provisioner.agent.problems import ServiceRefused
from provisioner.core.disks import DiskRule
from provisioner.core.manifest import is_digest

HELLO: Final = "/agent/v1/hello"
AGENT_VERSION: Final = "3"
SECRET_BYTES: Final = 32
HEARTBEAT_MIN_S: Final = 1.0
HEARTBEAT_MAX_S: Final = 60.0
KINDS: Final = frozenset({"deployment", "inspection", "verification"})
MODES: Final = frozenset({"delta", "full", "verify"})
MIRRORS_MAX: Final = 16
ENDINGS: Final = frozenset({"reboot", "poweroff"})


@dataclass(frozen=True)
class Session:
    """One operation, as the agent sees it.

    release and rule are there for a deployment and for a verification. mode says how much
    a deployment does: "delta" compares before it fetches, "full" writes everything, "verify"
    writes nothing. channel, now and minimum_version are for `trust`; they can only make it
    stricter. mirrors also have the chunks.
    """

    operation: str
    generation: int
    kind: str
    host: str
    heartbeat_s: float
    release: str | None
    rule: DiskRule | None
    boot: Origin
    then: str
    mode: str = "delta"
    channel: str | None = None
    mirrors: tuple[Origin, ...] = ()
    now: datetime | None = None
    minimum_version: str | None = None

    @property
    def writes_nothing(self) -> bool:
        """Whether the disk is only looked at."""
        return self.kind == "verification" or self.mode == "verify"


def say_hello(
    client: ServiceClient, ticket: str, inventory: dict[str, Any], *, patience_s: float
) -> dict[str, Any]:
    """Trade the boot ticket for a session; the client holds the token from here on.

    Returns the answer for `parse_session`: whoever fails over what else is in it can, and
    must, tell the service so. The ticket is used up by the first hello that arrives. Should
    its answer be lost, a secret that only this call knows lets the service answer a further
    try. Raises ServiceUnreachable, and ServiceRefused (a wrong or used ticket, among others).
    """
    body = {
        "ticket": ticket,
        "inventory": inventory,
        "agent_version": AGENT_VERSION,
        "session": os.urandom(SECRET_BYTES).hex(),
    }
    answer = client.post(HELLO, body, patience_s=patience_s, counts_attempts=True)
    token = answer.get("token")
    if not isinstance(token, str) or not token:
        raise ServiceRefused("the service's answer to hello holds no token")
    client.use_token(token)
    return answer


def parse_session(answer: dict[str, Any]) -> Session:
    """Return the session in an answer to hello. Raises ServiceRefused or RequestError."""
    kind, release = answer.get("kind"), answer.get("release")
    operation, host = answer.get("operation"), answer.get("host")
    generation, heartbeat_s = answer.get("generation"), answer.get("heartbeat_s")
    then = answer.get("then") or "reboot"
    mode = answer.get("mode") or "delta"
    is_about_a_release = kind in ("deployment", "verification")
    is_sound = (
        kind in KINDS
        and isinstance(operation, str)
        and isinstance(host, str)
        and type(generation) is int
        and isinstance(heartbeat_s, int | float)
        and then in ENDINGS
        and mode in MODES
        and (not is_about_a_release or is_digest(release))
    )
    if not is_sound:
        shown = {key: value for key, value in answer.items() if key != "token"}
        raise ServiceRefused("the service's answer to hello is not one", found=repr(shown)[:500])
    try:
        boot = Origin.parse(str(answer.get("boot_url")))
        now = _moment(answer.get("now"))
        channel = _text_or_none(answer.get("channel"))
        minimum_version = _text_or_none(answer.get("minimum_version"))
    except ValueError as error:
        raise ServiceRefused(f"the service's answer to hello: {error}") from error
    return Session(
        operation=str(operation),
        generation=int(str(generation)),
        kind=str(kind),
        host=str(host),
        heartbeat_s=min(max(float(str(heartbeat_s)), HEARTBEAT_MIN_S), HEARTBEAT_MAX_S),
        release=str(release) if is_about_a_release else None,
        rule=DiskRule.parse(answer.get("disk_rule")) if is_about_a_release else None,
        boot=boot,
        then=str(then),
        mode=str(mode),
        channel=channel,
        mirrors=_mirrors(answer.get("mirrors")),
        now=now,
        minimum_version=minimum_version,
    )


def _moment(value: object) -> datetime | None:
    """Return a moment of the service's; one without a zone is UTC. Raises ValueError."""
    if value is None:
        return None
    moment = datetime.fromisoformat(str(value))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _mirrors(value: object) -> tuple[Origin, ...]:
    """Return the mirrors that the ramdisk can ask; it resolves no names and pins no others."""
    found: list[Origin] = []
    for url in value if isinstance(value, list) else []:
        try:
            origin = Origin.parse(str(url))
        except ValueError as error:
            say(f"mirror left out: {error}")
            continue
        if origin.is_tls:
            say(f"mirror left out: {url!r} is not plain HTTP")
        else:
            found.append(origin)
    return tuple(found[:MIRRORS_MAX])


def _text_or_none(value: object) -> str | None:
    # Anything else is no "none": what the service asks for here makes trust stricter.
    if value is not None and not isinstance(value, str):
        raise ValueError(f"not a text: {value!r}")
    return value or None
