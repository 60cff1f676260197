"""What a builder notes of a build: its log, and where all came from. Never part of the release."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from provisioner.imaging.followed import BuildLog
from provisioner.imaging.mirrors import MirrorState
from provisioner.imaging.parent import Parent
from provisioner.imaging.tools import PACKAGE_OF, ToolFailed, run
from provisioner.own_identity import own_version

GIT_LIMIT: Final = timedelta(seconds=20)
# Those whose version may show in an image's bytes.
TOOLS: Final = ("mmdebstrap", "mke2fs", "grub-mkimage", "mkfs.fat", "mcopy", "sfdisk", "tar")

Say = Callable[[str], None]
"""Takes one line about the stage that a build is in."""


def quiet(line: str) -> None:
    """Say nothing."""


class BuildNotes:
    """The log of one build, which began at started_at (aware); says each stage on the way."""

    def __init__(self, started_at: datetime, say: Say) -> None:
        self.started_at = started_at.astimezone(UTC)
        self._say = say
        self._began_s = time.monotonic()
        self._log = BuildLog()

    @property
    def duration(self) -> timedelta:
        """How long the build has taken so far."""
        return timedelta(seconds=round(time.monotonic() - self._began_s, 1))

    def say(self, line: str) -> None:
        """Tell about a stage, and keep the line."""
        self._log.add(f"[{self.duration.total_seconds():7.1f}] {line}")
        self._say(line)

    def add(self, text: str) -> None:
        """Keep what a program said."""
        for line in text.splitlines():
            self._log.add(line)

    def text(self) -> str:
        """Return the log."""
        return self._log.text()


def record_of(
    notes: BuildNotes,
    recipe_digest: str,
    mirrors: MirrorState,
    source: Path | None,
    parent: Parent | None,
    without_parent: str | None,
) -> dict[str, Any]:
    """Return what build.json says: JSON values, different in each build."""
    return {
        "builder": f"provisioner {own_version()}",
        "started_at": _written(notes.started_at),
        "finished_at": _written(notes.started_at + notes.duration),
        "seconds": notes.duration.total_seconds(),
        "recipe_digest": recipe_digest,
        "source": source_of(source) if source else None,
        "mirrors": {
            "digest": mirrors.digest,
            "newest_at": _written(mirrors.newest_at),
            "sources": list(mirrors.sources),
        },
        "parent": {"name": parent.name, "digest": parent.digest} if parent else None,
        "without_parent": without_parent,
        "tools": tool_versions(),
    }


def source_of(recipe: Path) -> dict[str, Any] | None:
    """Return {"commit", "is_changed"} of the git checkout that holds the recipe, if one does.

    is_changed says whether files beside the recipe differ from that commit.
    """
    folder = str(recipe.resolve().parent)
    if shutil.which("git") is None:
        return None
    # A checkout of somebody else's is for reading, too.
    git = ["git", "-c", "safe.directory=*", "-C", folder]
    try:
        commit = run([*git, "rev-parse", "HEAD"], limit=GIT_LIMIT).decode().strip()
        changed = run([*git, "status", "--porcelain", "--", "."], limit=GIT_LIMIT)
    except ToolFailed:
        return None
    return {"commit": commit, "is_changed": bool(changed.strip())}


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that the tools come from, as far as dpkg knows them."""
    packages = sorted({PACKAGE_OF[tool] for tool in TOOLS if tool in PACKAGE_OF})
    if shutil.which("dpkg-query") is None:
        return {}
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Version}\\n", *packages],
        capture_output=True,
        check=False,
        timeout=GIT_LIMIT.total_seconds(),
        text=True,
    ).stdout
    return dict(line.split(" ", 1) for line in listed.splitlines() if " " in line)


def _written(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
