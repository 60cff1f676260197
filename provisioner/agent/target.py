"""Finds what an operation is about: the one disk, and the release proven to be the one asked for.

Nothing is written, and no permission asked for.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from provisioner.agent.client import FileClient, ServiceClient
from provisioner.agent.console import say
from provisioner.agent.disk_io import DiskFile
from provisioner.agent.layout import HEAD_BYTES, SECTOR_BYTES
from provisioner.agent.permission import Permission
from provisioner.agent.problems import HostUnfit, ImageUnfit
from provisioner.agent.progress import Progress
from provisioner.agent.release import fetch_manifest
from provisioner.agent.session import Session
from provisioner.agent.sources import Sources
from provisioner.agent.trust import Asked
from provisioner.core.disks import Disk, choose_disk
from provisioner.core.manifest import Manifest, boots_on
from provisioner.errors import ConfigError, ProvisionerError

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Machine:
    """What an operation needs to know of the host, and where the host keeps things."""

    disks: tuple[Disk, ...]
    firmware: str
    trust_file: str
    devices: str = "/dev"


@dataclass(frozen=True)
class Target:
    """The disk that the rule chose, and the release that is for it."""

    disk: Disk
    manifest: Manifest
    devices: str

    def open(self, *, is_read_only: bool = False) -> DiskFile:
        """Open the disk. Raises DiskFailed or HostUnfit."""
        disk = self.disk
        # Who replaces a disk goes by what is printed on it.
        mark = disk.serial or disk.wwn
        name = f"{disk.name} ({mark})" if mark else disk.name
        return DiskFile(f"{self.devices}/{disk.name}", name=name, is_read_only=is_read_only)


def find_target(
    session: Session, machine: Machine, progress: Progress, stop: threading.Event
) -> Target:
    """Choose the disk, and fetch and prove the release, unless told to stop meanwhile.

    Raises NoDiskMatches, SeveralDisksMatch, HostUnfit, ImageUnfit, and what
    `fetch_manifest` raises.
    """
    if session.release is None or session.rule is None:
        raise ConfigError(f"a {session.kind} without a release or a disk rule")
    disk = choose_disk(session.rule, machine.disks)
    say(f"disk {disk.name}, serial {disk.serial}, {disk.size_bytes} bytes")
    with progress.stage("manifest"):
        files = FileClient(session.boot, stop=stop)
        try:
            manifest = fetch_manifest(files, _asked(session), machine.trust_file, progress)
        finally:
            files.close()
        check_fit(manifest, machine.firmware)
    say(f"release {manifest.name}, {manifest.used_bytes} of {manifest.size_bytes} bytes used")
    return Target(disk, manifest, machine.devices)


def _asked(session: Session) -> Asked:
    # A host's clock may say anything, and the service may have been asked a while ago.
    own = datetime.fromtimestamp(time.time(), UTC)
    return Asked(
        release=str(session.release),
        channel=session.channel,
        minimum_version=session.minimum_version,
        now=max(own, session.now or own),
        to_compare=session.writes_nothing,
    )


def check_fit(manifest: Manifest, firmware: str) -> None:
    """Raise HostUnfit or ImageUnfit when this release cannot run on such a host."""
    machine = os.uname().machine
    architecture = _ARCHITECTURES.get(machine, machine)
    if manifest.architecture != architecture:
        raise HostUnfit(
            "the release is for another architecture; nothing was written",
            expected=manifest.architecture,
            found=architecture,
        )
    if not boots_on(manifest.firmware, firmware):
        raise HostUnfit(
            "the release does not boot on this firmware; nothing was written",
            expected=", ".join(manifest.firmware),
            found=firmware,
        )
    if manifest.size_bytes % SECTOR_BYTES or manifest.size_bytes < HEAD_BYTES:
        raise ImageUnfit("the image is not whole sectors", found=manifest.size_bytes)


def sources_of(session: Session) -> Sources:
    """Return the places that have the release's chunks."""
    return Sources(str(session.release), session.boot, session.mirrors)


@contextmanager
def heartbeat(session: Session, client: ServiceClient, progress: Progress) -> Iterator[Permission]:
    """Report progress while it lasts; a permission to write has to be asked for.

    What fails because the service told the agent to stop is raised as that refusal.
    """
    permission = Permission(
        client,
        generation=session.generation,
        heartbeat_s=session.heartbeat_s,
        progress=progress.as_dict,
    )
    permission.start()
    try:
        yield permission
    except ProvisionerError:
        permission.raise_refusal()
        raise
    finally:
        permission.end()
