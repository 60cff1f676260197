"""Health checks from outside: does the new system answer as its profile declares?

Opens connections and judges one round; how often and how long is the worker's.
"""

import http.client
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from provisioner.core.model import Json
from provisioner.core.profile import Check

CHECK_LIMIT_S: Final = 5.0
BANNER_BYTES_MAX: Final = 256


@dataclass(frozen=True)
class Finding:
    check: Check
    is_healthy: bool
    found: str


def check_all(checks: Sequence[Check], address: str, evidence: Json) -> list[Finding]:
    """Return a finding for each check of the host at `address`; it never raises."""
    return [_check(check, address, evidence) for check in checks]


def _check(check: Check, address: str, evidence: Json) -> Finding:
    if check.kind == "systemd":
        failed = evidence.get("failed_units", [])
        return Finding(check, not failed, ", ".join(failed) or "no failed units")
    try:
        found = _CONNECTED[check.kind](check, address)
    except (OSError, http.client.HTTPException) as error:
        return Finding(check, False, str(error) or type(error).__name__)
    return Finding(check, _is_good(check, found), found)


def _is_good(check: Check, found: str) -> bool:
    if check.kind == "ssh":
        return found.startswith("SSH-2.0-")
    if check.kind == "http":
        return found == str(check.status)
    return True


def _tcp(check: Check, address: str) -> str:
    with socket.create_connection((address, check.port), timeout=CHECK_LIMIT_S):
        return "connected"


def _ssh(check: Check, address: str) -> str:
    with socket.create_connection((address, check.port), timeout=CHECK_LIMIT_S) as connection:
        banner = connection.recv(BANNER_BYTES_MAX)
    return banner.split(b"\r\n", 1)[0].decode("ascii", "replace") or "no banner"


def _http(check: Check, address: str) -> str:
    connection = http.client.HTTPConnection(address, check.port, timeout=CHECK_LIMIT_S)
    try:
        connection.request("GET", check.path)
        return str(connection.getresponse().status)
    finally:
        connection.close()


_CONNECTED: Final = {"tcp": _tcp, "ssh": _ssh, "http": _http}
