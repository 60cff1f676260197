"""Health checks from outside: does the new system answer as its profile declares?

Opens connections and judges one round; how often and how long is the worker's.
"""

import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from provisioner.core.model import Json
from provisioner.core.profile import Check

CHECK_LIMIT_S: Final = 5.0
LINE_BYTES_MAX: Final = 256
_STATUS: Final = re.compile(r"HTTP/1\.[01] (\d{3})(?: |$)")


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
    except OSError as error:
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
    return _first_line(check, address, b"") or "no banner"


def _http(check: Check, address: str) -> str:
    # Not http.client: its timeout is for each piece, so a system that answers byte by byte
    # would hold this thread for as long as it likes.
    host = f"[{address}]" if ":" in address else address
    head = f"GET {check.path} HTTP/1.1\r\nHost: {host}:{check.port}\r\nConnection: close\r\n\r\n"
    line = _first_line(check, address, head.encode("ascii"))
    status = _STATUS.match(line)
    return status[1] if status else f"no HTTP: {line[:40]!r}"


def _first_line(check: Check, address: str, say: bytes) -> str:
    """Return the first line of what the host answers, all within CHECK_LIMIT_S."""
    ends_at = time.monotonic() + CHECK_LIMIT_S
    heard = b""
    with socket.create_connection((address, check.port), timeout=CHECK_LIMIT_S) as connection:
        connection.sendall(say)
        while b"\n" not in heard and len(heard) < LINE_BYTES_MAX:
            connection.settimeout(max(ends_at - time.monotonic(), 0.001))
            piece = connection.recv(LINE_BYTES_MAX)
            if not piece:
                break
            heard += piece
    return heard.split(b"\n", 1)[0].rstrip(b"\r").decode("ascii", "replace")


_CONNECTED: Final = {"tcp": _tcp, "ssh": _ssh, "http": _http}
