"""What an agent or a reporter sent, taken out with its type checked. Decides nothing."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from provisioner.core.disks import Disk
from provisioner.core.model import Event, Host, Json, Operation
from provisioner.core.recovery import NOT_AN_AGENTS
from provisioner.errors import RequestError

TEXT_MAX: Final = 2000
CODE_MAX: Final = 100
# The code of an agent that did not say why, or said what is not its to say.
GAVE_UP: Final = "agent"
# 32 random bytes as hexadecimal digits.
SESSION_LENGTH: Final = 64
ATTEMPTS_MAX: Final = 1_000_000
DISKS_MAX: Final = 256
LIST_MAX: Final = 50
# It is loaded with every row of its host, and an error with every row of its operation.
INVENTORY_BYTES_MAX: Final = 128 * 1024
FOUND_BYTES_MAX: Final = 64 * 1024
DETAIL_BYTES_MAX: Final = 4 * 1024


@dataclass(frozen=True)
class Hello:
    """What opens a session. session is what the ramdisk drew at its start, and no other knows;
    attempt counts its tries to say hello."""

    ticket: str
    inventory: Json
    session: str | None
    attempt: int

    def __repr__(self) -> str:
        """Leave the secrets out."""
        return f"Hello(attempt={self.attempt})"


def hello_in(body: Json) -> Hello:
    """Return the hello. Raises RequestError for what no agent of ours would send."""
    session, attempt = body.get("session"), body.get("attempt", 1)
    if session is not None and not (isinstance(session, str) and len(session) == SESSION_LENGTH):
        raise RequestError("the session is not one", expected=f"{SESSION_LENGTH} digits")
    if type(attempt) is not int or not 1 <= attempt <= ATTEMPTS_MAX:
        raise RequestError("the attempt is not one", expected="a number from 1 on", found=attempt)
    return Hello(text_in(body, "ticket"), inventory_in(body), session, attempt)


def inventory_in(body: Json) -> Json:
    """Return the inventory. Raises RequestError for what no agent of ours would send."""
    inventory = object_in(body, "inventory")
    for key in ("disks", "nics"):
        if not isinstance(inventory.get(key), list) or len(inventory[key]) > DISKS_MAX:
            raise RequestError(f"the inventory has no usable {key}", expected="a list")
    for disk in inventory["disks"]:
        Disk.from_dict(disk)
    size = len(json.dumps(inventory))
    if size > INVENTORY_BYTES_MAX:
        raise RequestError("the inventory is too large", expected=INVENTORY_BYTES_MAX, found=size)
    return inventory


def object_in(body: Json, key: str) -> Json:
    value = body.get(key)
    if not isinstance(value, dict):
        raise RequestError(f"{key} is missing", expected="an object", found=type(value).__name__)
    return value


def text_in(body: Json, key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value or len(value) > TEXT_MAX:
        raise RequestError(f"{key} is missing", expected="a text", found=type(value).__name__)
    return value


def number_in(body: Json, key: str) -> int:
    value = body.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"{key} is missing", expected="a whole number", found=value)
    return value


def bounded(value: object, bytes_max: int) -> object:
    """Return a JSON value as it is, or the start of its text when it is larger."""
    text = json.dumps(value)
    return value if len(text) <= bytes_max else f"{text[:TEXT_MAX]} … ({len(text)} bytes)"


def error_in(body: Json) -> Json:
    """Return why an agent gave up, each part within its limit. What only the service can know
    is no agent's to say: then the code is that of any agent, and the message has the other."""
    code = str(body.get("code", GAVE_UP))[:CODE_MAX]
    message = str(body.get("message", "the agent gave up"))
    if code in NOT_AN_AGENTS:
        code, message = GAVE_UP, f"the agent reported {code}: {message}"
    return {
        "code": code,
        "message": message[:TEXT_MAX],
        "expected": bounded(body.get("expected"), DETAIL_BYTES_MAX),
        "found": bounded(body.get("found"), FOUND_BYTES_MAX),
        "hint": bounded(body.get("hint"), DETAIL_BYTES_MAX),
    }


def seconds_in(body: Json) -> object:
    """Return how long the agent's steps took, within a limit."""
    return bounded(object_in(body, "seconds"), DETAIL_BYTES_MAX)


def texts_in(body: Json, key: str) -> list[str]:
    """Return a list of short texts, cut to its limits; an absent or odd one is empty."""
    value = body.get(key)
    listed = value if isinstance(value, list) else []
    return [str(item)[:TEXT_MAX] for item in listed[:LIST_MAX]]


def event_of(at: datetime, source: str, text: str, host: Host, operation: Operation) -> Event:
    return Event(at, source, text, host_id=host.id, operation_id=operation.id)
