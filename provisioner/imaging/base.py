"""The base tree of an image: a Debian root made by mmdebstrap, kept as an archive file.

Holds nothing that belongs to one version, so that all versions of a recipe share it as
long as the package mirrors serve the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.errors import Unavailable
from provisioner.imaging.finishing import hooks, write_files
from provisioner.imaging.followed import BuildLog, follow
from provisioner.imaging.install_progress import InstallProgress
from provisioner.imaging.mirrors import MirrorState, state_of
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.scratch import scratch_folder
from provisioner.imaging.tools import ToolFailed, find_tool

MMDEBSTRAP_LIMIT: Final = timedelta(minutes=40)
BASES_KEPT_MAX: Final = 4
# Bump it when this module makes another tree from the same recipe.
LAYOUT: Final = 2
# Mirrors are updated a few times a day, and a tree takes minutes.
ATTEMPTS_MAX: Final = 2
# What apt itself fetched tells for certain what a tree is made of. sha256sum(1) prints
# the hash, two spaces and the path.
_SHOW_RELEASES: Final = 'sha256sum "$1"/var/lib/apt/lists/*InRelease'
_SHOWN_RELEASE: Final = re.compile(r"([0-9a-f]{64})  /\S*/var/lib/apt/lists/\S*InRelease")


class MirrorsChanged(Unavailable):
    """apt was served other packages than those that the mirrors served a moment before."""


@dataclass(frozen=True)
class BaseTree:
    """The archive of a base tree (.tar.zst), and all that was said while it was made."""

    archive: Path
    log: str


def current_tree(
    recipe: Recipe, cache: Path, say: Callable[[str], None]
) -> tuple[MirrorState, BaseTree]:
    """Return what the mirrors serve now, and the base tree of just that.

    When they change before all is fetched, it begins once more. Raises MirrorsChanged when
    that does not help, and what `state_of` and `base_tree` raise.
    """
    for attempt in range(1, ATTEMPTS_MAX + 1):
        say("asking the package mirrors")
        mirrors = state_of(recipe.mirrors)
        try:
            return mirrors, base_tree(recipe, mirrors, cache, say)
        except MirrorsChanged:
            if attempt == ATTEMPTS_MAX:
                raise
            say("the package mirrors changed meanwhile: once more")
    raise AssertionError("the last attempt returns or raises")


def base_tree(
    recipe: Recipe, mirrors: MirrorState, cache: Path, say: Callable[[str], None]
) -> BaseTree:
    """Return the base tree, making it unless it is in the cache.

    The key holds the recipe, what the mirrors serve, and this module's layout: a
    package update makes a new tree, and nothing else does. say gets one line for
    each stage. Raises ToolFailed with mmdebstrap's last lines, and MirrorsChanged when
    the mirrors do not serve that state any more; the cache is then as before.
    """
    key = hashlib.sha256(f"{LAYOUT} {recipe.tree_digest} {mirrors.digest}".encode()).hexdigest()
    bases = cache / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    target = bases / f"{recipe.image}-{key[:32]}.tar.zst"
    log_file = _log_of(target)
    if target.is_file() and log_file.is_file():
        os.utime(target)
        say("using the base tree from the cache")
        return BaseTree(target, log_file.read_text())
    say("installing packages into a new base tree")
    log = BuildLog()
    with scratch_folder(cache, "base") as work:
        try:
            _bootstrap(recipe, mirrors, work, cache / "packages", _Listener(log, say, mirrors))
        except ToolFailed as error:
            # For whoever keeps the log of a build that failed: this one goes with the folder.
            error.add_note(log.text())
            raise
        (work / "base.log").write_text(log.text())
        # The tree comes last: where it is, its log is.
        (work / "base.log").rename(log_file)
        (work / "base.tar.zst").rename(target)
    _forget_oldest(bases)
    return BaseTree(target, log.text())


class _Listener:
    """Hears each line of mmdebstrap's: keeps it, says where the work stands, and stops it
    as soon as apt was served something else."""

    def __init__(self, log: BuildLog, say: Callable[[str], None], mirrors: MirrorState) -> None:
        self._log = log
        self._say = say
        self._mirrors = mirrors
        self._progress = InstallProgress()
        self._served: set[str] = set()

    def hear(self, line: str) -> None:
        """Take one line. Raises MirrorsChanged."""
        self._log.add(line)
        if (news := self._progress.news(line)) is not None:
            self._say(news)
        if (shown := _SHOWN_RELEASE.fullmatch(line)) is not None:
            self._served.add(shown[1])
            if shown[1] not in self._mirrors.releases:
                raise _changed(self._mirrors, self._served)

    def check_all_was_served(self) -> None:
        """Raise MirrorsChanged unless apt fetched every suite in the state it had before."""
        if self._served != self._mirrors.releases:
            raise _changed(self._mirrors, self._served)


def _changed(mirrors: MirrorState, served: set[str]) -> MirrorsChanged:
    return MirrorsChanged(
        "the package mirrors changed while the packages were fetched",
        expected=sorted(mirrors.releases),
        found=sorted(served),
        hint="try again in some minutes; if it stays so, mirrors behind one name differ",
    )


def _bootstrap(
    recipe: Recipe,
    mirrors: MirrorState,
    work: Path,
    packages: Path,
    listener: _Listener,
) -> None:
    """Run mmdebstrap, leaving base.tar.zst in work and the fetched packages in packages."""
    epoch_s = int(mirrors.newest_at.timestamp())
    with tarfile.open(work / "files.tar", "w") as archive:
        write_files(archive, recipe, epoch_s)
    fetched = work / "packages"
    fetched.mkdir()
    packages.mkdir(exist_ok=True)
    # Here is mmdebstrap's tree, which it leaves when it is killed. As root, apt fetches into it
    # as a user without rights; without root, the tree belongs to another user (TMPDIR in
    # mmdebstrap(1)).
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    mode = 0o755 if os.geteuid() == 0 else 0o1777
    with scratch_folder(temporary, "tree", mode=mode) as place:
        follow(
            [*_apart(), *_mmdebstrap(recipe, mirrors, work, packages, fetched)],
            each_line=listener.hear,
            limit=MMDEBSTRAP_LIMIT,
            environment={"SOURCE_DATE_EPOCH": str(epoch_s), "TMPDIR": str(place)},
            name="mmdebstrap",
        )
    listener.check_all_was_served()
    for left in ("lock", "partial"):
        path = fetched / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # A fresh folder each time, so that outdated packages do not pile up. When two builds
    # do so at once, one folder stays, and either will do.
    with contextlib.suppress(OSError):
        packages.rename(work / "outdated")
    with contextlib.suppress(OSError):
        fetched.rename(packages)


def _mmdebstrap(
    recipe: Recipe, mirrors: MirrorState, work: Path, packages: Path, fetched: Path
) -> list[str]:
    """Return the command that makes base.tar.zst of files.tar and packages."""
    epoch_s = int(mirrors.newest_at.timestamp())
    return [
        find_tool("mmdebstrap"),
        "--verbose",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=minbase",
        "--format=tar",
        f"--architectures={recipe.architecture}",
        f"--include={','.join((*recipe.packages, recipe.kernel))}",
        '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=force-confold",
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.exclude),
        # The kernel fills /dev at boot; an unprivileged build could not make devices.
        "--skip=output/dev",
        # Packages stay outside between builds, as mmdebstrap's manual page shows.
        "--skip=download/empty",
        "--skip=essential/unlink",
        '--setup-hook=mkdir -p "$1"/var/cache/apt/archives',
        f"--setup-hook=sync-in {shlex.quote(str(packages))} /var/cache/apt/archives",
        # The first hook after the lists were fetched, which nothing fetches again.
        f"--extract-hook={_SHOW_RELEASES}",
        # Before most packages: the kernel's initrd is made by their settings.
        f"--essential-hook=tar-in {shlex.quote(str(work / 'files.tar'))} /",
        *(f"--customize-hook={hook}" for hook in hooks(recipe, epoch_s)),
        f"--customize-hook=sync-out /var/cache/apt/archives {shlex.quote(str(fetched))}",
        recipe.mirrors[0].suite,
        str(work / "base.tar.zst"),
        *mirrors.sources,
    ]


def _apart() -> tuple[str, ...]:
    """Return what comes before the command so that its mounts end with it.

    As root, mmdebstrap mounts /proc and others below its tree in our own sight, and leaves
    them there when it is stopped. Without root it is in a namespace by itself.
    """
    return ("unshare", "--mount", "--") if os.geteuid() == 0 else ()


def _forget_oldest(bases: Path) -> None:
    """Keep the most recently used base trees only, and the logs of no others."""
    trees = sorted(bases.glob("*.tar.zst"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in trees[BASES_KEPT_MAX:]:
        path.unlink()
    kept = {_log_of(path) for path in trees[:BASES_KEPT_MAX]}
    for path in bases.glob("*.log"):
        if path not in kept:
            path.unlink()


def _log_of(archive: Path) -> Path:
    return archive.with_name(archive.name.removesuffix(".tar.zst") + ".log")
