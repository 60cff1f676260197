"""Compares a disk with a release, and writes nothing: the disk is opened for reading only."""

import os
import threading

from provisioner.agent.client import ServiceClient
from provisioner.agent.console import say
from provisioner.agent.fetch import ChunkFetcher, first_chunk
from provisioner.agent.image_io import ImageOnDisk
from provisioner.agent.layout import plan_layout
from provisioner.agent.parallel import run_parallel
from provisioner.agent.permission import Permission
from provisioner.agent.progress import Progress
from provisioner.agent.regions import Span, regions_of
from provisioner.agent.session import Session
from provisioner.agent.target import Machine, find_target, heartbeat, sources_of
from provisioner.agent.write import thread_count


class Comparison:
    """The counts of one comparison of a whole image with a disk, with `threads` threads."""

    def __init__(
        self, image: ImageOnDisk, heartbeat: Permission, progress: Progress, *, threads: int
    ) -> None:
        self.image = image
        self.progress = progress
        self.compared_chunks = 0
        self.differing_chunks = 0
        self.differing_bytes = 0
        self._heartbeat = heartbeat
        self._threads = threads
        self._lock = threading.Lock()

    def run(self, first: bytes) -> None:
        """Compare every chunk; `first` is the image's first.

        That one is compared as a deployment leaves it: its partition table fitted to the
        disk. Raises DiskFailed, PermissionRefused when the service wants the agent to stop,
        and what `plan_layout` raises.
        """
        manifest, disk = self.image.manifest, self.image.disk
        layout = plan_layout(first, image_bytes=manifest.size_bytes, disk_bytes=disk.size_bytes)
        self.progress.enter("comparing", manifest.used_bytes)
        self._heartbeat.beat_now()
        fitted = layout.head + first[len(layout.head) :]
        self.count(Span(0, 1, is_zero=False), [0] if disk.read(len(first), 0) != fitted else [])
        try:
            run_parallel(
                regions_of(manifest),
                lambda: _Comparer(self),
                threads=self._threads,
                stop=self._heartbeat.stop,
            )
        finally:
            self._heartbeat.raise_refusal()

    def count(self, span: Span, differing: list[int]) -> None:
        """Note what was found in a span."""
        with self._lock:
            self.compared_chunks += len(span.indexes)
            self.differing_chunks += len(differing)
            self.differing_bytes += sum(map(self.image.manifest.chunk_length, differing))
        self.progress.add(done=self.image.data_bytes(span))


class _Comparer:
    """One thread of `Comparison.run`."""

    def __init__(self, job: Comparison) -> None:
        self._job = job
        self._buffer = job.image.region_buffer()

    def work(self, region: Span) -> None:
        for span in self._job.image.steps(region):
            self._job.count(span, self._job.image.differing(self._buffer, span))

    def close(self) -> None:
        self._buffer.close()


def compare(
    session: Session, machine: Machine, client: ServiceClient, progress: Progress
) -> Comparison:
    """Compare the host's disk with the session's release; return what was counted.

    Asks for no permission, and cannot write. Raises a ProvisionerError that says what
    stopped it.
    """
    with heartbeat(session, client, progress) as beating:
        target = find_target(session, machine, progress, beating.stop)
        manifest, sources = target.manifest, sources_of(session)
        threads = thread_count(manifest.chunk_bytes, os.cpu_count() or 1)
        with target.open(is_read_only=True) as file, progress.stage("compare"):
            image = ImageOnDisk(file, manifest)
            first = first_chunk(manifest, ChunkFetcher(sources, manifest, progress, beating.stop))
            found = Comparison(image, beating, progress, threads=threads)
            found.run(first)
    say(f"{found.differing_chunks} of {found.compared_chunks} chunks differ")
    return found
