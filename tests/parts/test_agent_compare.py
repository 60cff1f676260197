"""A disk is compared with a release, and nothing is written to it."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from provisioner.agent.compare import Comparison
from provisioner.agent.deploy import deploy
from provisioner.agent.disk_io import DiskFile
from provisioner.agent.main import compared
from provisioner.agent.problems import (
    DiskFailed,
    ManifestSignature,
    PermissionRefused,
    ReleaseExpired,
)
from provisioner.agent.progress import Progress
from provisioner.errors import ConfigError
from tests.parts.agent_rig import Rig, rig_with
from tests.parts.agent_service import CHUNK, MIB, deployment, is_batch, make_image, make_release

IMAGE_MIB = 24


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    image = make_image(tmp_path / "image", size_mib=IMAGE_MIB)
    with rig_with(tmp_path / "host", make_release(image)) as rig:
        yield rig


def verified(rig: Rig) -> Comparison:
    """Compare; the disk has the same bytes and the same age afterwards."""
    rig.forget()
    rig.service.hello = deployment(rig.release, kind="verification", mode="verify")
    before, age = rig.disk.read_bytes(), rig.disk.stat().st_mtime_ns
    rig.disk.chmod(0o444)
    found = rig.compare()
    assert rig.disk.read_bytes() == before
    assert rig.disk.stat().st_mtime_ns == age
    names = {name for name, _ in rig.service.calls}
    assert names <= {"hello", "progress"}, "no permission is asked, and no seed"
    assert rig.progress.written_bytes == 0
    return found


def counted(found: Comparison) -> tuple[int, int, int]:
    return found.compared_chunks, found.differing_chunks, found.differing_bytes


def test_a_deployed_disk_differs_in_nothing(rig: Rig) -> None:
    """The partition table is compared as a deployment leaves it, fitted to the disk."""
    rig.run()
    chunks = IMAGE_MIB * MIB // CHUNK
    assert counted(verified(rig)) == (chunks, 0, 0)
    assert rig.service.asked_for() == [0], "the first chunk, for its table"
    phases = [body["phase"] for body in rig.service.told("progress")]
    assert "comparing" in phases


def test_each_difference_is_counted(rig: Rig) -> None:
    """In data, in zeros short and long, and in the table."""
    rig.run()
    with rig.disk.open("r+b") as file:
        for at in (600, MIB + 5, 3 * MIB + 5, 3 * MIB + CHUNK, 23 * MIB):
            file.seek(at)
            [byte] = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    found = verified(rig)
    assert counted(found)[1:] == (5, 5 * CHUNK)
    assert compared(found) == {
        "compared_chunks": IMAGE_MIB * MIB // CHUNK,
        "differing_chunks": 5,
        "differing_bytes": 5 * CHUNK,
    }


def test_another_systems_disk_differs_everywhere(rig: Rig) -> None:
    found = verified(rig)
    assert found.differing_chunks == found.compared_chunks
    assert found.differing_bytes == IMAGE_MIB * MIB


def test_a_release_that_nobody_signed_is_not_compared_with(rig: Rig) -> None:
    rig.service.hello = deployment(rig.release, kind="verification", mode="verify")
    rig.service.files[f"{rig.release.folder}/manifest.sig"] = b"{}"
    with pytest.raises(ManifestSignature):
        rig.compare()


def test_a_release_that_has_expired_is_compared_with(rig: Rig) -> None:
    """It is on disks all the same; only to write it is refused."""
    rig.run()
    image = (rig.folder.parent / "image").read_bytes()
    rig.serve(make_release(image, expires_at="2026-01-01T00:00:00Z"))
    rig.forget()
    with pytest.raises(ReleaseExpired):
        rig.run()
    rig.forget()
    rig.service.hello = deployment(
        rig.release, kind="verification", mode="verify", minimum_version="9"
    )
    assert rig.compare().differing_chunks == 0


def test_the_service_can_stop_it(rig: Rig) -> None:
    rig.service.hello = deployment(rig.release, kind="verification", mode="verify")
    rig.service.on_call = lambda name, _: 409 if name == "progress" else None
    with pytest.raises(PermissionRefused):
        rig.compare()


def test_a_disk_that_cannot_be_read_is_no_difference(rig: Rig) -> None:
    """Nothing will be written that could cure it, and nobody knows what is there."""
    rig.run()
    rig.forget()
    rig.service.hello = deployment(rig.release, kind="verification", mode="verify")

    def cut_short(path: str) -> None:
        if is_batch(path):
            os.truncate(rig.disk, 9 * MIB)

    rig.service.on_file = cut_short
    with pytest.raises(DiskFailed, match="could not read"):
        rig.compare()


def test_a_disk_opened_for_reading_cannot_be_written(tmp_path: Path) -> None:
    """The kernel refuses, whatever the code above it does."""
    (tmp_path / "disk").write_bytes(b"\xa5" * MIB)
    with DiskFile(str(tmp_path / "disk"), name="vda", is_read_only=True) as disk:
        modes = [
            fcntl.fcntl(int(number), fcntl.F_GETFL) & os.O_ACCMODE
            for number in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{number}") == str(tmp_path / "disk")
        ]
        assert modes == [os.O_RDONLY]
        with pytest.raises(DiskFailed, match="could not write"):
            disk.write(bytes(512), 0)
        with pytest.raises(DiskFailed, match="could not write"):
            disk.zero(0, MIB)
    assert (tmp_path / "disk").read_bytes() == b"\xa5" * MIB


def test_a_session_that_may_write_nothing_is_not_deployed(rig: Rig) -> None:
    """Should the two be mixed up one day, it ends before the disk is looked for."""
    rig.service.hello["mode"] = "verify"
    session, client = rig.hello()
    with pytest.raises(ConfigError):
        deploy(session, rig.machine(), client, Progress())
    rig.assert_untouched()
