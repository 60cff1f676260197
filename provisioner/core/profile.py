"""What a profile may say, checked strictly, and how its values reach a seed.

A profile is data: `${...}` stands only inside its text values and is replaced after the
YAML was parsed, so a value can never change the structure around it. No I/O.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from provisioner.errors import RequestError, TrustError

from .disks import DiskRule
from .model import Json, Profile, Secret

SOAK_DEFAULT_S: Final = 10
SOAK_MAX_S: Final = 3600
CHECKS_MAX: Final = 32
DOCUMENT_BYTES_MAX: Final = 256 * 1024
DEPTH_MAX: Final = 24
NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_KEYS: Final = ("variables", "cloud_config", "network", "disk", "health")
# Printable ASCII without spaces: nothing that could end a request line.
_HTTP_PATH: Final = re.compile(r"/[!-~]{0,1023}")
_PLACE: Final = re.compile(r"\$\{([^}]*)\}")


class ProfileUnreadable(TrustError):
    """A profile is kept sealed, and does not open: whoever needs what it says has to stop."""

    code = "profile_unreadable"


@dataclass(frozen=True)
class Check:
    """One health check. `kind` is tcp, ssh, http or systemd; `port` and `path` where they
    apply. `status` is the HTTP status that counts as healthy."""

    kind: str
    port: int = 0
    path: str = "/"
    status: int = 200

    def __str__(self) -> str:
        return f"{self.kind}:{self.port}" if self.port else self.kind


_CHECKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "tcp": {"port": None},
    "ssh": {"port": 22},
    "http": {"port": 80, "path": "/", "status": 200},
    "systemd": {},
}


@dataclass(frozen=True)
class Health:
    """All checks must hold for `soak_s` seconds."""

    checks: tuple[Check, ...]
    soak_s: float


def revision(name: str, document: Json, created_at: datetime) -> Profile:
    """Return the checked profile; its digest is that of the canonical document.

    Raises RequestError that names the key, what was expected and what was found.
    """
    if not NAME.fullmatch(name):
        raise RequestError("that is not a usable profile name", expected="a-z, 0-9, -", found=name)
    _known_keys(_mapping(document, f"profile {name}"), _KEYS, f"profile {name}")
    for key in _KEYS:
        _mapping(document.get(key, {}), f"profile {name}: {key}")
    if not document.get("disk"):
        raise RequestError(
            f"profile {name} has no disk rule, and no disk is written by default",
            expected="disk: with serial, wwn, size_min_bytes, bus … (exactly one disk must fit)",
            found=document.get("disk"),
        )
    DiskRule.parse(document["disk"])
    health_of(document)
    text = canonical(document)
    if len(text) > DOCUMENT_BYTES_MAX:
        raise RequestError(
            f"profile {name} is too large", expected=DOCUMENT_BYTES_MAX, found=len(text)
        )
    digest = hashlib.sha256(name.encode() + b"\0" + text).hexdigest()
    return Profile(name, digest, text_of(document), created_at)


def text_of(document: Json) -> Secret:
    """Return the document as a profile holds it, its keys in the order that they were given."""
    return Secret(json.dumps(document, ensure_ascii=False))


def is_readable(profile: Profile) -> bool:
    """Say whether what is kept of the profile opens."""
    try:
        profile.text.reveal()
    except ProfileUnreadable:
        return False
    return True


def canonical(document: Json) -> bytes:
    """Return the document as canonical JSON. Raises RequestError for what JSON cannot hold."""
    try:
        text = json.dumps(
            document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            "a profile holds text, numbers, true and false, lists and mappings only",
            found=str(error),
            hint="quote dates and the like in YAML",
        ) from error
    return text


def health_of(document: Json) -> Health:
    """Return the health section with its defaults. Raises RequestError as `revision` does."""
    section = document.get("health", {})
    _known_keys(section, ("soak_s", "checks"), "health")
    soak = section.get("soak_s", SOAK_DEFAULT_S)
    if isinstance(soak, bool) or not isinstance(soak, int | float) or not 0 <= soak <= SOAK_MAX_S:
        raise RequestError(
            "health: soak_s is not usable", expected=f"0 to {SOAK_MAX_S} seconds", found=soak
        )
    listed = section.get("checks", [{"type": "ssh"}])
    if not isinstance(listed, list) or len(listed) > CHECKS_MAX:
        raise RequestError(
            "health: checks is not usable",
            expected=f"a list of at most {CHECKS_MAX}",
            found=listed,
        )
    return Health(tuple(_check(item) for item in listed), float(soak))


def _check(item: object) -> Check:
    entry = _mapping(item, "health check")
    kind = str(entry.get("type"))
    if kind not in _CHECKS:
        raise RequestError("unknown health check", expected=sorted(_CHECKS), found=kind)
    fields = _CHECKS[kind]
    _known_keys(entry, ("type", *fields), f"health check {kind}")
    values = {key: entry.get(key, default) for key, default in fields.items()}
    port = values.get("port", 1)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        raise RequestError(f"health check {kind}: port", expected="1 to 65535", found=port)
    if kind == "http":
        _check_http(values["path"], values["status"])
    return Check(kind, **values)


def _check_http(path: object, status: object) -> None:
    if not isinstance(path, str) or not _HTTP_PATH.fullmatch(path):
        raise RequestError("health check http: path", expected="a path like /up", found=path)
    if isinstance(status, bool) or not isinstance(status, int) or not 100 <= status <= 599:
        raise RequestError("health check http: status", expected="100 to 599", found=status)


def filled(value: Any, lookup: Callable[[str], str], *, depth: int = 0) -> Any:
    """Return `value` with every `${name}` in its texts replaced by `lookup(name)`.

    `$${` is written as `${`. Keys are left alone. Raises what `lookup` raises.
    """
    if depth > DEPTH_MAX:
        raise RequestError("a profile is nested too deeply", expected=DEPTH_MAX, found=depth)
    if isinstance(value, str):
        return _fill_text(value, lookup)
    if isinstance(value, Mapping):
        return {key: filled(item, lookup, depth=depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, lookup, depth=depth + 1) for item in value]
    return value


def _fill_text(text: str, lookup: Callable[[str], str]) -> str:
    parts = text.split("$${")
    return "${".join(_PLACE.sub(lambda match: lookup(match[1].strip()), part) for part in parts)


def _mapping(value: object, where: str) -> Json:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RequestError(f"{where} must be a mapping", expected="key: value", found=value)
    return value


def _known_keys(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else None
            raise RequestError(
                f"{where} has an unknown key", expected=sorted(known), found=key, hint=hint
            )
