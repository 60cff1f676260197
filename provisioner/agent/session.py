"""What the service told this agent to do: the answer to its hello, checked."""

import os
from dataclasses import dataclass
from typing import Any, Final

from provisioner.agent.client import ServiceClient
from provisioner.agent.http import Origin
from provisioner.agent.problems import ServiceRefused
from provisioner.core.disks import DiskRule
from provisioner.core.manifest import is_digest

HELLO: Final = "/agent/v1/hello"
AGENT_VERSION: Final = "2"
SECRET_BYTES: Final = 32
HEARTBEAT_MIN_S: Final = 1.0
HEARTBEAT_MAX_S: Final = 60.0
KINDS: Final = frozenset({"deployment", "inspection"})
ENDINGS: Final = frozenset({"reboot", "poweroff"})


@dataclass(frozen=True)
class Session:
    """One operation, as the agent sees it. release and rule are there for a deployment."""

    operation: str
    generation: int
    kind: str
    host: str
    heartbeat_s: float
    release: str | None
    rule: DiskRule | None
    boot: Origin
    then: str


def say_hello(
    client: ServiceClient, ticket: str, inventory: dict[str, Any], *, patience_s: float
) -> Session:
    """Trade the boot ticket for a session; the client holds the token from here on.

    The ticket is used up by the first hello that arrives. Should its answer be lost, a secret
    that only this call knows lets the service answer a further try. Raises ServiceUnreachable,
    ServiceRefused (a wrong or used ticket, among others), and RequestError for a disk rule
    that we do not understand.
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
    return parse_session(answer)


def parse_session(answer: dict[str, Any]) -> Session:
    """Return the session in an answer to hello. Raises ServiceRefused or RequestError."""
    kind, release = answer.get("kind"), answer.get("release")
    operation, host = answer.get("operation"), answer.get("host")
    generation, heartbeat_s = answer.get("generation"), answer.get("heartbeat_s")
    then = answer.get("then") or "reboot"
    is_sound = (
        kind in KINDS
        and isinstance(operation, str)
        and isinstance(host, str)
        and type(generation) is int
        and isinstance(heartbeat_s, int | float)
        and then in ENDINGS
        and (kind != "deployment" or is_digest(release))
    )
    if not is_sound:
        shown = {key: value for key, value in answer.items() if key != "token"}
        raise ServiceRefused("the service's answer to hello is not one", found=repr(shown)[:500])
    try:
        boot = Origin.parse(str(answer.get("boot_url")))
    except ValueError as error:
        raise ServiceRefused(f"the service's answer to hello: {error}") from error
    return Session(
        operation=str(operation),
        generation=int(str(generation)),
        kind=str(kind),
        host=str(host),
        heartbeat_s=min(max(float(str(heartbeat_s)), HEARTBEAT_MIN_S), HEARTBEAT_MAX_S),
        release=str(release) if kind == "deployment" else None,
        rule=DiskRule.parse(answer.get("disk_rule")) if kind == "deployment" else None,
        boot=boot,
        then=str(then),
    )
