"""The base tree of an image: a Debian root made by mmdebstrap, kept as an archive file.

Holds nothing that belongs to one version, so that all versions of a recipe share it as
long as the package mirrors serve the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shlex
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.imaging.finishing import hooks, write_files
from provisioner.imaging.followed import BuildLog, follow
from provisioner.imaging.install_progress import InstallProgress
from provisioner.imaging.mirrors import MirrorState
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.tools import ToolFailed

MMDEBSTRAP_LIMIT: Final = timedelta(minutes=40)
BASES_KEPT_MAX: Final = 4
# Bump it when this module makes another tree from the same recipe.
LAYOUT: Final = 2


@dataclass(frozen=True)
class BaseTree:
    """The archive of a base tree (.tar.zst), and all that was said while it was made."""

    archive: Path
    log: str


def base_tree(
    recipe: Recipe, mirrors: MirrorState, cache: Path, say: Callable[[str], None]
) -> BaseTree:
    """Return the base tree, making it unless it is in the cache.

    The key holds the recipe, what the mirrors serve, and this module's layout: a
    package update makes a new tree, and nothing else does. say gets one line for
    each stage. Raises ToolFailed with mmdebstrap's last lines; the cache is then as
    before.
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
    work = bases / f"incoming-{secrets.token_hex(8)}"
    work.mkdir()
    try:
        _bootstrap(recipe, mirrors, work, cache / "packages", _listener(log, say))
        (work / "base.log").write_text(log.text())
        # The tree comes last: where it is, its log is.
        (work / "base.log").rename(log_file)
        (work / "base.tar.zst").rename(target)
    except ToolFailed as error:
        # For whoever keeps the log of a build that failed: this one goes with the folder.
        error.add_note(log.text())
        raise
    finally:
        shutil.rmtree(work)
    _forget_oldest(bases)
    return BaseTree(target, log.text())


def _listener(log: BuildLog, say: Callable[[str], None]) -> Callable[[str], None]:
    """Return what hears each line of mmdebstrap's: keeps it, and says where the work stands."""
    progress = InstallProgress()

    def hear(line: str) -> None:
        log.add(line)
        if (news := progress.news(line)) is not None:
            say(news)

    return hear


def _bootstrap(
    recipe: Recipe,
    mirrors: MirrorState,
    work: Path,
    packages: Path,
    each_line: Callable[[str], None],
) -> None:
    """Run mmdebstrap, leaving base.tar.zst in work and the fetched packages in packages."""
    epoch_s = int(mirrors.newest_at.timestamp())
    with tarfile.open(work / "files.tar", "w") as archive:
        write_files(archive, recipe, epoch_s)
    fetched = work / "packages"
    fetched.mkdir()
    packages.mkdir(exist_ok=True)
    follow(
        [
            "mmdebstrap",
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
            # Before most packages: the kernel's initrd is made by their settings.
            f"--essential-hook=tar-in {shlex.quote(str(work / 'files.tar'))} /",
            *(f"--customize-hook={hook}" for hook in hooks(recipe, epoch_s)),
            f"--customize-hook=sync-out /var/cache/apt/archives {shlex.quote(str(fetched))}",
            recipe.mirrors[0].suite,
            str(work / "base.tar.zst"),
            *mirrors.sources,
        ],
        each_line=each_line,
        limit=MMDEBSTRAP_LIMIT,
        environment={"SOURCE_DATE_EPOCH": str(epoch_s)},
    )
    for left in ("lock", "partial"):
        path = fetched / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # A fresh folder each time, so that outdated packages do not pile up. When two builds
    # do so at once, one folder stays, and either will do.
    with contextlib.suppress(OSError):
        packages.rename(work / "outdated")
    with contextlib.suppress(OSError):
        fetched.rename(packages)


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
