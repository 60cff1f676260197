"""The reporter: what it reads, how it insists, and how it gets onto a host."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from provisioner.reporter import reporter
from provisioner.reporter.vendor_data import vendor_data
from provisioner.service.proof import REPORT_AGE_MAX, REPORT_EVERY
from tests.parts.agent_service import Service, running, self_signed


def put(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def add_root(root: Path, mount: str) -> Path:
    """Add a disk 8:0 with a partition 8:1, and what the kernel says is mounted at /."""
    disk = root / "sys/devices/pci/virtio1/block/vda"
    put(disk, "vda1/partition", "1\n")
    put(disk, "serial", "LAB-1-0\n")
    (root / "sys/dev/block").mkdir(parents=True)
    (root / "sys/dev/block/8:0").symlink_to(disk)
    (root / "sys/dev/block/8:1").symlink_to(disk / "vda1")
    put(root, "proc/self/mountinfo", f"20 1 0:5 / /proc rw - proc proc rw\n{mount}\n")
    return disk


def test_the_root_disk_is_that_of_the_mounted_root(tmp_path: Path) -> None:
    """A partition leads to its disk, and the disk to its serial."""
    add_root(tmp_path, "21 1 8:1 / / rw - ext4 /dev/vda1 rw")
    assert reporter.root_disk(str(tmp_path)) == {"name": "vda", "serial": "LAB-1-0", "wwn": None}


def test_a_mapped_root_leads_to_the_disk_below(tmp_path: Path) -> None:
    """An encrypted or LVM root lies on a partition of a disk."""
    disk = add_root(tmp_path, "21 1 254:0 / / rw - ext4 /dev/mapper/root rw")
    (tmp_path / "sys/devices/virtual/block/dm-0/slaves").mkdir(parents=True)
    (tmp_path / "sys/devices/virtual/block/dm-0/slaves/vda1").symlink_to(disk / "vda1")
    (tmp_path / "sys/dev/block/254:0").symlink_to(tmp_path / "sys/devices/virtual/block/dm-0")
    assert reporter.root_disk(str(tmp_path))["serial"] == "LAB-1-0"


def test_a_scsi_disk_has_its_serial_in_its_product_data(tmp_path: Path) -> None:
    """Page 0x80 and the WWN, as sd shows them."""
    disk = add_root(tmp_path, "21 1 8:0 / / rw - ext4 /dev/sda rw")
    (disk / "serial").unlink()
    put(disk, "device/vpd_pg80", b"\0\x80\0\x07WD-1234")
    put(disk, "device/wwid", "naa.50014ee2\n")
    found = reporter.root_disk(str(tmp_path))
    assert (found["serial"], found["wwn"]) == ("WD-1234", "naa.50014ee2")


def test_a_root_that_is_no_disk_is_reported_as_unknown(tmp_path: Path) -> None:
    """A live system from memory must not pass for the disk that was written."""
    add_root(tmp_path, "21 1 0:2 / / rw - rootfs rootfs rw")
    assert reporter.root_disk(str(tmp_path)) == {"name": None, "serial": None, "wwn": None}


def test_the_report_has_every_part_of_the_protocol(tmp_path: Path) -> None:
    """Release id, keys, names: from files; nothing is missing when the files are."""
    put(tmp_path, "usr/lib/provisioner/release.json", '{"release_id": "abc"}')
    put(tmp_path, "etc/os-release", 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian 12"\nX=1\n')
    put(tmp_path, "etc/ssh/ssh_host_ed25519_key.pub", "ssh-ed25519 AAAA root@x\n")
    found = reporter.report_from(str(tmp_path))
    assert found["release_id"] == "abc"
    assert found["os_release"] == {"ID": "debian", "VERSION_ID": "12", "PRETTY_NAME": "Debian 12"}
    assert found["ssh_host_keys"] == ["ssh-ed25519 AAAA root@x"]
    assert set(found) == {
        "release_id", "root_disk", "boot_id", "machine_id_digest", "ssh_host_keys", "kernel",
        "os_release", "failed_units", "addresses",
    }  # fmt: skip
    assert set(reporter.report_from(str(tmp_path / "nothing"))) == set(found)


@dataclass
class ReportService(Service):
    """A service that answers its reports by these, and says when each came."""

    answers: tuple[int, ...] = (200,)
    came_at: list[float] = field(default_factory=list)
    # As on the host at that moment.
    had_config: list[bool] = field(default_factory=list)
    config: Path = Path()

    def answer(self, name: str, body: dict[str, Any], _: str) -> tuple[int, dict[str, Any]]:
        self.calls.append((name, body))
        self.came_at.append(time.monotonic())
        self.had_config.append(self.config.exists())
        return self.answers[len(self.calls) - 1], {}


def reported(folder: Path, monkeypatch: pytest.MonkeyPatch, *answers: int) -> ReportService:
    """Run the reporter until it ends by itself, and return who heard it."""
    config = folder / "reporter.json"
    heard = ReportService(files={}, hello={}, answers=answers, config=config)
    with running(heard) as service:
        pem = service.ca_pem.decode()
        config.write_text(json.dumps({"url": service.agent_url, "nonce": "n-1", "ca_pem": pem}))
        monkeypatch.setattr(reporter, "CONFIG", str(config))
        assert reporter.main() == 0
    assert not config.exists()
    return heard


def test_it_reports_until_its_system_is_proven_and_then_forgets_the_nonce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy service is asked again, and one that looks at its health is told how it is until
    that has ended; afterwards the file with the nonce is gone."""
    heard = reported(tmp_path, monkeypatch, 503, 202, 202, 200)
    assert [name for name, _ in heard.calls] == ["/report/v1/phone-home"] * 4
    assert {body["nonce"] for _, body in heard.calls} == {"n-1"}
    assert len({body["boot_id"] for _, body in heard.calls}) == 1
    assert heard.had_config == [True] * 4


def test_its_first_reports_follow_soon_and_then_at_even_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A soak may be short. The service was long in coming, and that is forgotten; a report
    that is refused for the moment is made again as soon as any other."""
    monkeypatch.setattr(reporter, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(reporter, "REPORT_EVERY_S", 0.6)
    answers = (503, 503, 503, 503, 202, 202, 202, 202, 202, 503, 200)
    heard = reported(tmp_path, monkeypatch, *answers)
    said = re.findall(r"reports again in ([\d.]+) s", capsys.readouterr().out)
    until_heard = ["0.2", "0.4", "0.8", "1.6"]  # doubled three times, and anew
    assert said == [*until_heard, "0.2", "0.4", "0.6", "0.6", "0.6", "0.6"]
    pauses = [after - before for before, after in pairwise(heard.came_at)]
    assert all(pause >= float(least) for pause, least in zip(pauses, said, strict=True))


def test_the_service_counts_on_its_interval() -> None:
    assert REPORT_EVERY.total_seconds() == reporter.REPORT_EVERY_S
    # One report may be lost in a connection that nobody answers.
    assert REPORT_AGE_MAX.total_seconds() > reporter.TIMEOUT_S + reporter.REPORT_EVERY_S


def test_it_gives_up_when_its_deployment_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deployment was given up, perhaps within the soak: no unit fails."""
    assert len(reported(tmp_path, monkeypatch, 410).calls) == 1
    assert len(reported(tmp_path, monkeypatch, 202, 410).calls) == 2


def test_it_does_not_report_to_a_stranger() -> None:
    """Another certificate than the pinned one gets no nonce."""
    _, pem = self_signed("127.0.0.1")
    with (
        running(ReportService(files={}, hello={})) as service,
        pytest.raises(OSError, match="certificate"),
    ):
        reporter.send(service.agent_url, {"nonce": "n-1"}, pem.decode())
    assert not service.calls


@pytest.mark.parametrize("url", ["http://1.2.3.4", "https://", "file:///etc/passwd", ""])
def test_other_urls_are_refused(url: str) -> None:
    """A report never travels in clear."""
    with pytest.raises(ValueError, match="not an https URL"):
        reporter.send(url, {}, "")


def test_the_reporter_runs_with_the_standard_library_alone(tmp_path: Path) -> None:
    """As on a host: isolated, without site packages, from a copy of the one file."""
    copy = tmp_path / "reporter.py"
    copy.write_bytes(Path(reporter.__file__).read_bytes())
    program = f"import runpy; print(runpy.run_path({str(copy)!r})['report_from']('/')['kernel'])"
    command = [sys.executable, "-I", "-S", "-c", program]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert found == os.uname().release


def test_the_vendor_data_installs_the_reporter(tmp_path: Path) -> None:
    """Run as a script below another root: the files are there, the nonce for root alone."""
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    (tmp_path / "var/lib").mkdir(parents=True)
    log = tmp_path / "systemctl.log"
    text = vendor_data("https://10.77.0.1:8443", "n-1", "PEM")
    assert "n-1" not in text.replace("/", " ").split(), "not in clear, where a log might show it"
    script = text.replace(" /etc/", f" {tmp_path}/etc/").replace(" /var/", f" {tmp_path}/var/")
    script = script.replace("systemctl ", f"echo >> {log} ")
    subprocess.run(["sh", "-c", script], check=True)
    config = tmp_path / "etc/provisioner/reporter.json"
    assert json.loads(config.read_text()) == {
        "url": "https://10.77.0.1:8443",
        "nonce": "n-1",
        "ca_pem": "PEM",
    }
    assert config.stat().st_mode & 0o777 == 0o600
    copied = tmp_path / "var/lib/provisioner/reporter.py"
    assert copied.read_bytes() == Path(reporter.__file__).read_bytes()
    unit = (tmp_path / "etc/systemd/system/provisioner-reporter.service").read_text()
    assert "After=cloud-final.service" in unit
    assert log.read_text().split("\n")[-2].startswith("start --no-block")


def test_the_vendor_data_is_a_sound_script(tmp_path: Path) -> None:
    """shellcheck finds nothing to say."""
    script = tmp_path / "vendor-data"
    script.write_text(vendor_data("https://10.77.0.1:8443", "n", "PEM"))
    subprocess.run(["shellcheck", script], check=True)
