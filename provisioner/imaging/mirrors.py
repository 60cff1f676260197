"""Ask package mirrors which state of each suite they serve. Downloads no packages."""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from provisioner.errors import Unavailable
from provisioner.imaging.recipe import Mirror

ANSWER_LIMIT: Final = timedelta(seconds=30)
RELEASE_FILE_BYTES_MAX: Final = 4 * 1024 * 1024
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"

_DATE: Final = re.compile(r"^Date: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class MirrorState:
    """The sha256 over the suites' Release files, and the date of the newest of them (UTC).

    The same digest means the same packages; apt checks the signatures when it
    fetches them, this only notices change.
    """

    digest: str
    newest_at: datetime


def state_of(mirrors: Iterable[Mirror]) -> MirrorState:
    """Return what the mirrors serve now. Raises Unavailable when one does not answer."""
    hasher = hashlib.sha256()
    dates = []
    for mirror in mirrors:
        data = _fetch(f"{mirror.uri}/dists/{mirror.suite}/InRelease")
        hasher.update(hashlib.sha256(data).digest())
        dates.append(_date_of(data, mirror))
    return MirrorState(hasher.hexdigest(), max(dates))


def source_line(mirror: Mirror) -> str:
    """Return the mirror as a line of sources.list, trusted by Debian's own keys only."""
    components = " ".join(mirror.components)
    return f"deb [signed-by={KEYRING}] {mirror.uri} {mirror.suite} {components}"


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_LIMIT.total_seconds()) as answer:
            data: bytes = answer.read(RELEASE_FILE_BYTES_MAX)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as error:
        raise Unavailable(
            f"the package mirror does not answer: {address}",
            found=str(error),
            hint="check the address in the recipe, and the proxy settings of this machine",
        ) from error
    return data


def _date_of(data: bytes, mirror: Mirror) -> datetime:
    match = _DATE.search(data.decode("utf-8", "replace"))
    try:
        return email.utils.parsedate_to_datetime(match[1] if match else "")
    except ValueError as error:
        raise Unavailable(
            f"{mirror.uri} does not serve a Debian suite {mirror.suite}", expected="a Date line"
        ) from error
