"""A host for the agent's code in this process: its disk is a file, its service real listeners."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provisioner.agent.client import ServiceClient
from provisioner.agent.compare import Comparison, compare
from provisioner.agent.deploy import deploy
from provisioner.agent.http import Origin
from provisioner.agent.main import carry_out
from provisioner.agent.progress import Progress
from provisioner.agent.session import Session, parse_session, say_hello
from provisioner.agent.target import Machine
from provisioner.core.disks import Disk
from tests.parts.agent_service import MIB, Release, Service, deployment, running

DISK_MIB = 64
OLD = b"\xa5"


@dataclass
class Rig:
    """A host whose disk is a file, full of an old system's bytes."""

    folder: Path
    service: Service
    release: Release
    progress: Progress
    disk_bytes: int

    @property
    def disk(self) -> Path:
        return self.folder / "dev" / "vda"

    def machine(self, **changes: Any) -> Machine:
        disk = Disk("vda", "LAB-1-0", None, self.disk.stat().st_size, False, "virtio")
        values: dict[str, Any] = {
            "disks": (disk,),
            "firmware": "bios",
            "trust_file": str(self.folder / "trust.json"),
            "devices": str(self.folder / "dev"),
        }
        return Machine(**{**values, **changes})

    def hello(self) -> tuple[Session, ServiceClient]:
        answer, client = self.answer_to_hello()
        return parse_session(answer), client

    def answer_to_hello(self) -> tuple[dict[str, Any], ServiceClient]:
        (self.folder / "ca.pem").write_bytes(self.service.ca_pem)
        client = ServiceClient(Origin.parse(self.service.agent_url), str(self.folder / "ca.pem"))
        return say_hello(client, self.service.ticket, {}, patience_s=60), client

    def carry_out(self) -> str:
        """Hello, then whatever the service says, with its report; return how the host ends."""
        answer, client = self.answer_to_hello()
        return carry_out(answer, client, self.progress, self.machine)

    def run(self, **changes: Any) -> None:
        """Hello, then the deployment."""
        session, client = self.hello()
        deploy(session, self.machine(**changes), client, self.progress)

    def compare(self) -> Comparison:
        """Hello, then the comparison."""
        session, client = self.hello()
        return compare(session, self.machine(), client, self.progress)

    def forget(self) -> None:
        """Begin to count anew."""
        self.service.fetched.clear()
        self.service.calls.clear()
        self.progress = Progress()

    def serve(self, release: Release) -> None:
        """Have the service hand out another release."""
        self.release = release
        self.service.files = release.files()
        self.service.hello = deployment(release)
        (self.folder / "trust.json").write_bytes(release.trust)

    def assert_untouched(self) -> None:
        assert self.disk.read_bytes().count(OLD) == self.disk_bytes
        assert not self.service.told("authorise")
        assert not self.service.told("seed")


@contextmanager
def rig_with(folder: Path, release: Release, *, disk_mib: int = DISK_MIB) -> Iterator[Rig]:
    """A host whose service hands out the release, with all listeners running."""
    (folder / "dev").mkdir(parents=True)
    (folder / "dev" / "vda").write_bytes(OLD * disk_mib * MIB)
    service = Service(files={}, hello={})
    with running(service):
        rig = Rig(folder, service, release, Progress(), disk_mib * MIB)
        rig.serve(release)
        yield rig
