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

from provisioner.errors import ConfigError, Unavailable
from provisioner.imaging.recipe_parts import Mirror
from provisioner.imaging.tools import run

ANSWER_LIMIT: Final = timedelta(seconds=30)
RELEASE_FILE_BYTES_MAX: Final = 4 * 1024 * 1024
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"

_DATE: Final = re.compile(r"^Date: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class MirrorState:
    """The sha256 over the suites' Release files, and the date of the newest of them (UTC).

    releases are the sha256 of these files (InRelease) one by one, in hex.

    sources are the mirrors as lines of sources.list. They stand in the image, so they count
    in the digest: the same digest means the same packages from the same place. apt checks
    the signatures when it fetches them, this only notices change.
    """

    digest: str
    newest_at: datetime
    sources: tuple[str, ...]
    releases: frozenset[str]


def state_of(mirrors: Iterable[Mirror]) -> MirrorState:
    """Return what the mirrors serve now.

    Raises Unavailable when one does not answer, and ConfigError when a recipe leaves the
    mirror of a suite to this machine's apt, which has none.
    """
    hasher = hashlib.sha256()
    dates = []
    sources = []
    releases = set()
    for mirror in mirrors:
        uri = mirror.uri or _own_mirror(mirror.suite)
        data = _fetch(f"{uri}/dists/{mirror.suite}/InRelease")
        hasher.update(hashlib.sha256(data).digest())
        releases.add(hashlib.sha256(data).hexdigest())
        dates.append(_date_of(data, uri, mirror.suite))
        # Trusted by Debian's own keys only, whatever else this machine's apt trusts.
        components = " ".join(mirror.components)
        line = f"deb [signed-by={KEYRING}] {uri} {mirror.suite} {components}"
        hasher.update(hashlib.sha256(line.encode()).digest())
        sources.append(line)
    return MirrorState(hasher.hexdigest(), max(dates), tuple(sources), frozenset(releases))


def _own_mirror(suite: str) -> str:
    """Return where this machine's apt gets a suite from (apt-get(8), indextargets)."""
    listed = run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"]
    ).decode()
    for line in listed.splitlines():
        release, _, uri = line.partition(" ")
        if release == suite and uri:
            return uri.rstrip("/")
    raise ConfigError(
        f"this machine's apt has no mirror for {suite}",
        expected=f"a source for {suite} in its lists",
        found=sorted({line.partition(" ")[0] for line in listed.splitlines()}),
        hint="add it to apt's sources and run apt-get update, or give the recipe's mirror a `uri`",
    )


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_LIMIT.total_seconds()) as answer:
            data: bytes = answer.read(RELEASE_FILE_BYTES_MAX)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, OSError) as error:
        raise Unavailable(
            f"the package mirror does not answer: {address}",
            found=str(error),
            hint="check its address, and the proxy settings of this machine",
        ) from error
    return data


def _date_of(data: bytes, uri: str, suite: str) -> datetime:
    match = _DATE.search(data.decode("utf-8", "replace"))
    try:
        return email.utils.parsedate_to_datetime(match[1] if match else "")
    except ValueError as error:
        raise Unavailable(
            f"{uri} does not serve a Debian suite {suite}", expected="a Date line"
        ) from error
