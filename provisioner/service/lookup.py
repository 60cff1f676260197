"""Names people type, turned into rows, with errors that help. Used by every use case."""

import difflib
import re
from collections.abc import Sequence
from typing import Final

from provisioner.core.contracts import Tx
from provisioner.core.model import Host, ReleaseRow
from provisioner.core.releases import minimum_versions
from provisioner.errors import NotFound, RequestError

DIGEST_PREFIX_MIN: Final = 8
_HEX = re.compile(r"[0-9a-f]+")
# Names compared for "did you mean": enough for a site, bounded for a large one.
_SUGGESTION_POOL_MAX: Final = 2000


def host_named(tx: Tx, name: str) -> Host:
    """Return the host with this name or id. Raises NotFound, naming close matches."""
    host = tx.host_named(name)
    if host is None:
        names = [other.name for other in tx.hosts(limit=_SUGGESTION_POOL_MAX)]
        raise NotFound(
            f"there is no host {name}", expected="a host's name or id", hint=_suggest(name, names)
        )
    return host


def find_release(tx: Tx, reference: str) -> ReleaseRow:
    """Return the release named `image@version`, `image:channel`, or by its digest or the
    start of it; also one that was revoked or removed.

    Raises RequestError for a start that is too short or fits several, NotFound otherwise.
    """
    if (channel := channel_in(reference)) is not None:
        return _by_channel(tx, reference.partition(":")[0], channel)
    if "@" in reference:
        image, version = reference.split("@", 1)
        row = tx.release_named(image, version)
        if row is not None:
            return row
    elif _HEX.fullmatch(reference):
        return _by_digest(tx.releases(), reference)
    known = [row.name for row in tx.releases()]
    raise NotFound(
        f"there is no release {reference}",
        expected="image@version, image:channel or a digest",
        found=reference,
        hint=_suggest(reference, known),
    )


def version_floor(tx: Tx, image: str) -> str | None:
    """Return the version below which nothing of this image is deployed; None without one."""
    return minimum_versions(tx.releases(image)).get(image)


def channel_in(reference: str) -> str | None:
    """Return the channel that a reference such as `web:stable` goes by, if it does."""
    return reference.partition(":")[2] if ":" in reference else None


def _by_channel(tx: Tx, image: str, name: str) -> ReleaseRow:
    channel = tx.channel(image, name)
    row = tx.release(channel.digest) if channel is not None else None
    if row is None:
        known = [str(one) for one in tx.channels()]
        raise NotFound(
            f"image {image} has no channel {name}",
            expected="a channel that a release was promoted to",
            found=f"{image}:{name}",
            hint=_suggest(f"{image}:{name}", known),
        )
    return row


def _by_digest(rows: Sequence[ReleaseRow], prefix: str) -> ReleaseRow:
    if len(prefix) < DIGEST_PREFIX_MIN:
        raise RequestError(
            "the start of a digest is too short",
            expected=f"{DIGEST_PREFIX_MIN} characters or more",
            found=prefix,
        )
    fitting = [row for row in rows if row.digest.startswith(prefix)]
    if len(fitting) > 1:
        raise RequestError(
            f"{prefix} fits several releases", found=sorted(row.name for row in fitting)
        )
    if not fitting:
        raise NotFound(
            f"no release has a digest that starts with {prefix}",
            hint="provisioner image list -o wide",
        )
    return fitting[0]


def _suggest(name: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"did you mean {', '.join(close)}?"
    return None if known else "there are none yet"
