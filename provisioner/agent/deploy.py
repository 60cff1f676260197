"""A deployment, from the choice of the disk to the partition table.

Everything that can be found wrong is found before the permission to write is asked for.
After that the disk has no partition table until the last step, so that it cannot boot
half-written. It does not restart the host, and reports only progress.
"""

import os
from typing import Any, Final

from provisioner.agent.client import PATIENCE_S, ServiceClient
from provisioner.agent.console import say
from provisioner.agent.disk_io import DiskFile
from provisioner.agent.fat import fat_image
from provisioner.agent.layout import (
    CIDATA_BYTES,
    CIDATA_LABEL,
    HEAD_BYTES,
    SECTOR_BYTES,
    TAIL_BYTES,
    Layout,
    plan_layout,
    read_table,
)
from provisioner.agent.permission import Permission
from provisioner.agent.problems import ReadBackMismatch, SeedGone, SeedUnfit, ServiceRefused
from provisioner.agent.progress import Progress
from provisioner.agent.session import Session
from provisioner.agent.target import Machine, find_target, heartbeat, sources_of
from provisioner.agent.write import ImageWriter, thread_count
from provisioner.core.disks import Disk
from provisioner.errors import ConfigError

SEED: Final = "/agent/v1/seed"
SEED_FILES: Final = ("meta-data", "user-data", "vendor-data", "network-config")
# The service's own code for a seed that was handed out before.
SEED_HAS_LEFT: Final = "gone"
# A disk may take a second for each of these, and the permission is looked at between them.
DISCARD_BYTES: Final = 16 * 1024 * 1024 * 1024


def deploy(session: Session, machine: Machine, client: ServiceClient, progress: Progress) -> None:
    """Put the session's release onto the host's disk; on return it is complete and verified.

    Raises a ProvisionerError that says what stopped it.
    """
    if session.writes_nothing:
        raise ConfigError("a deployment that may write nothing")
    with heartbeat(session, client, progress) as permission:
        target = find_target(session, machine, progress, permission.stop)
        manifest, sources = target.manifest, sources_of(session)
        threads = thread_count(manifest.chunk_bytes, os.cpu_count() or 1)
        with target.open() as file:
            job = ImageWriter(file, manifest, sources, permission, progress, threads=threads)
            _Deployment(session, client, job, target.disk).run()


class _Deployment:
    """The steps of one deployment, in the order of `run`."""

    def __init__(
        self, session: Session, client: ServiceClient, job: ImageWriter, disk: Disk
    ) -> None:
        self._session = session
        self._client = client
        self._job = job
        self._file = job.disk
        self._permission = job.permission
        self._progress = job.progress
        self._disk = disk

    def run(self) -> None:
        with self._progress.stage("prepare"):
            first = self._job.first_chunk()
            layout = plan_layout(
                first,
                image_bytes=self._job.manifest.size_bytes,
                disk_bytes=self._file.size_bytes,
                disk=f"disk {self._file.name}",
            )
            compare_first = (
                self._session.mode == "delta" and self._job.looks_like_an_earlier_release()
            )
        self._permission.ask(self._question(), patience_s=PATIENCE_S)
        say("permission to write; comparing first" if compare_first else "permission to write")
        with self._progress.stage("write"):
            make_unbootable(
                self._file,
                self._permission,
                first_bytes=len(first),
                image_bytes=self._job.manifest.size_bytes,
            )
            self._job.write(compare_first=compare_first)
        with self._progress.stage("read_back"):
            self._job.read_back()
        with self._progress.stage("finish"):
            self._write_behind_table(layout, first)
            # The seed leaves the service once, so it is asked for late. Only the tables follow:
            # firmware boots by either of them, and nothing may boot without its seed.
            self._write_seed(layout)
            self._write_tables(layout)

    def _question(self) -> dict[str, Any]:
        names = ("name", "serial", "wwn", "size_bytes")
        disk = self._disk.as_dict()
        return {"release": self._session.release, "disk": {name: disk[name] for name in names}}

    def _write_behind_table(self, layout: Layout, first: bytes) -> None:
        if rest := first[len(layout.head) :]:
            self._write_checked(rest, len(layout.head), "the space behind the partition table")

    def _write_seed(self, layout: Layout) -> None:
        image = seed_image(self._fetch_seed())
        self._write_checked(image, layout.cidata_at, "CIDATA")

    def _fetch_seed(self) -> dict[str, Any]:
        body = {"generation": self._session.generation}
        try:
            return self._client.post(SEED, body, patience_s=PATIENCE_S)
        except ServiceRefused as error:
            if error.found != SEED_HAS_LEFT:
                raise
            raise SeedGone(
                "the seed has left the service, and did not arrive here; the image is on the "
                "disk, without a partition table to boot by",
                host=self._session.host,
                expected="the seed, which is handed out once for each operation",
                found="an answer that was lost on its way, or that went to somebody else",
                hint="reimage the host again: what is on its disk is not fetched again. Had "
                "neither service nor network trouble just now, see the audit log: seed.taken",
            ) from error

    def _write_tables(self, layout: Layout) -> None:
        """Write the backup table, and at last the table itself."""
        self._write_checked(layout.backup, layout.backup_at, "the backup partition table")
        self._write_checked(layout.head, 0, "the partition table")
        if read_table(self._file.read(HEAD_BYTES, 0)) != layout.table:
            raise ReadBackMismatch("the partition table on the disk is not the one written")
        self._file.let_kernel_read_table()
        say("partition table written; the disk is complete")

    def _write_checked(self, data: bytes, offset: int, what: str) -> None:
        self._permission.check()
        self._file.write(data, offset)
        self._file.flush()
        if self._file.read(len(data), offset) != data:
            raise ReadBackMismatch(
                f"disk {self._file.name} does not return {what} as written",
                hint="the disk or its controller is failing; replace it",
            )
        self._progress.add(written=len(data))


def make_unbootable(
    disk: DiskFile, permission: Permission, *, first_bytes: int, image_bytes: int
) -> None:
    """Erase both partition tables, and tell the disk to forget what lies behind the image.

    Firmware falls back to the table at the disk's end, so that one goes as well. Raises
    DiskFailed, and what `Permission.check` raises before any of the steps.
    """
    end = disk.size_bytes // SECTOR_BYTES * SECTOR_BYTES
    behind = -(-image_bytes // SECTOR_BYTES) * SECTOR_BYTES
    permission.check()
    disk.zero(0, first_bytes)
    for at in range(behind, end, DISCARD_BYTES):
        permission.check()
        disk.discard(at, min(DISCARD_BYTES, end - at))
    permission.check()
    disk.zero(end - TAIL_BYTES, TAIL_BYTES)
    disk.flush()


def seed_image(documents: dict[str, Any]) -> bytes:
    """Return the CIDATA file system with the four documents. Raises SeedUnfit."""
    texts = {name: documents.get(name) for name in SEED_FILES}
    if not all(isinstance(text, str) for text in texts.values()):
        raise SeedUnfit("the seed lacks a document", expected=", ".join(SEED_FILES))
    files = {name: str(text).encode() for name, text in texts.items()}
    try:
        return fat_image(files, label=CIDATA_LABEL, size_bytes=CIDATA_BYTES)
    except ValueError as error:
        raise SeedUnfit(f"the seed cannot be written: {error}") from error
