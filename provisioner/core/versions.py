"""The order of versions: `2026.11.10` comes after `2026.11.9`. Standard library only."""

import re
from typing import Final

_PARTS: Final = re.compile(r"\d+|[A-Za-z]+|~")
# A tilde sorts before the end of the version, so that 2~rc1 comes before 2.
_TILDE, _END, _LETTERS, _NUMBER = range(4)

Key = tuple[tuple[int, int, str], ...]


def version_key(version: str) -> Key:
    """Return what versions are compared by: runs of digits as numbers, runs of letters as text.

    Everything else only separates. A number comes after letters, more parts after fewer,
    and a tilde before all (as in Debian's versions: `2~rc1` is older than `2`).
    """
    parts: list[tuple[int, int, str]] = []
    for part in _PARTS.findall(version):
        if part == "~":
            parts.append((_TILDE, 0, ""))
        elif part.isdigit():
            parts.append((_NUMBER, int(part), ""))
        else:
            parts.append((_LETTERS, 0, part))
    return (*parts, (_END, 0, ""))


def is_older(version: str, other: str) -> bool:
    """Say whether version comes before other."""
    return version_key(version) < version_key(other)
