"""Try a release on virtual hosts: a temporary rack and a temporary site, of which nothing stays.

The site trusts the same keys and holds the same chunks as the one that the release is from.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from provisioner import wiring
from provisioner.core.profile import SOAK_DEFAULT_S
from provisioner.errors import NotFound, RequestError
from provisioner.lab.lab import Lab
from provisioner.lab.lending import lend
from provisioner.lab.model import MIB, LabHost
from provisioner.lab.site import PROFILE, Say, Site, lab_profile

if TYPE_CHECKING:
    from provisioner.core.manifest import Manifest
    from provisioner.imaging.archive import Archive

PREFIX: Final = "trial-"
DISK_MIB_MIN: Final = 4096
# Room behind the image for the partition with the seed and the second partition table.
DISK_MORE_MIB: Final = 256
# Shorter than for hardware, which may take minutes to start: who waits is a person.
BOOTING_LIMIT_S: Final = 900
PROVING_MORE_S: Final = 600
# What a virtual rack decides for itself; the rest of a profile is tried as it is.
_OF_THE_RACK: Final = ("network", "disk")


@dataclass
class Trial:
    """A rack and a site that are up, with the release published and the hosts enrolled."""

    directory: Path
    lab: Lab
    site: Site
    is_kept: bool = False


@contextlib.contextmanager
def trial(
    archive: Archive,
    manifest: Manifest,
    *,
    firmware: Sequence[str],
    trusted: Sequence[str],
    profile: Mapping[str, Any] | None,
    place: Path,
    cache: Path,
    say: Say,
) -> Iterator[Trial]:
    """Yield a rack with one host for each firmware, ready to be deployed to.

    trusted are the public keys (PEM) of the site that the archive belongs to. profile is a
    document whose cloud-config and checks are tried, or None for the lab's own. place is a
    folder on the archive's file system, so that chunks are linked and not copied.

    Everything is taken down at the end, unless the block sets `is_kept`. Raises ConfigError
    where the machine lacks a program, RequestError for firmware that the release lacks.
    """
    _check_firmware(manifest, firmware)
    with _directory(place) as directory, contextlib.ExitStack() as undo:
        say(f"a rack of virtual hosts comes up: {', '.join(firmware)}")
        size_mib = max(DISK_MIB_MIN, manifest.size_bytes // MIB + DISK_MORE_MIB)
        wanted = [LabHost(one, name=one, disks_mib=(size_mib,)) for one in firmware]  # type: ignore[arg-type]  # checked above
        lab = Lab.up(directory / "lab", wanted)
        undo.callback(lab.down)
        site = Site.create(
            directory / "site",
            lab,
            changes={"limits": limits_of(profile)},
            trusted=trusted,
            cache=cache,
            say=say,
        )
        say(f"publishing {manifest.name}")
        _publish(archive, manifest, site)
        undo.callback(site.stop)
        site.start()
        with site.client() as client:
            client.save_profile(PROFILE, document_of(site.ssh_key, profile))
        for host in lab.hosts:
            site.enrol(host)
        running = Trial(directory, lab, site)
        yield running
        if running.is_kept:
            undo.pop_all()


def clear_away(place: Path) -> None:
    """Remove trials whose process was killed; one that goes on, or was kept, stays."""
    for directory in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), _held(directory):
            if not _is_up(directory):
                shutil.rmtree(directory, ignore_errors=True)


def _check_firmware(manifest: Manifest, firmware: Sequence[str]) -> None:
    unknown = [one for one in firmware if one not in manifest.firmware]
    if unknown or not firmware:
        raise RequestError(
            f"{manifest.name} does not boot on {', '.join(unknown) or 'no firmware at all'}",
            expected=", ".join(manifest.firmware),
        )


@contextlib.contextmanager
def _directory(place: Path) -> Iterator[Path]:
    """Yield a new folder, and remove it unless something in it is still up."""
    place.mkdir(parents=True, exist_ok=True)
    clear_away(place)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    with _held(directory):
        try:
            yield directory
        finally:
            if not _is_up(directory):
                shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a trial's folder as long as its process lives. Raises BlockingIOError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_up(directory: Path) -> bool:
    try:
        return Lab.open(directory / "lab").is_up
    except NotFound:
        return False


def _publish(archive: Archive, manifest: Manifest, site: Site) -> None:
    service = wiring.build(site.settings)
    try:
        stored_bytes = lend(archive, manifest, service.archive)
        wiring.registrar(service, actor="lab")(manifest, stored_bytes)
    finally:
        service.close()


def limits_of(profile: Mapping[str, Any] | None) -> dict[str, object]:
    """Return how long a release that is not healthy is waited for."""
    soak_s = (profile or {}).get("health", {}).get("soak_s", SOAK_DEFAULT_S)
    return {"booting_s": BOOTING_LIMIT_S, "proving_s": int(soak_s) + PROVING_MORE_S}


def document_of(ssh_key: Path, profile: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the profile to try: the given one, with the rack's own network and disk."""
    own = lab_profile(ssh_key)
    if profile is None:
        return own
    return {**profile, **{key: own[key] for key in _OF_THE_RACK}}
