"""Whether KVM works here, found out by booting a Linux kernel with it.

/dev/kvm may exist, and SeaBIOS may print its text, while every kernel hangs: only a kernel
that reaches user space proves anything. The verdict is kept until this machine restarts.
"""

import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

from provisioner.lab.model import Accel
from provisioner.lab.qemu import QEMU

DEVICE: Final = Path("/dev/kvm")
PROBE_LIMIT: Final = timedelta(seconds=15)
PROBE_MEMORY_MIB: Final = 256
PROOF: Final = "kvm-reached-user-space"
BUSYBOX: Final = Path("/bin/busybox")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def choose_accel(kernel: Path | None = None) -> Accel:
    """Return `kvm` where it is proven to work, else `tcg`.

    kernel is a Linux kernel to prove it with; without one, the newest readable in /boot.
    Without any, or without Debian's busybox-static, KVM is not believed to work.
    """
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return "tcg"
    if (kept := _read_verdict()) is not None:
        return kept
    kernel = kernel or next(_kernels(), None)
    if kernel is None or not BUSYBOX.exists() or not shutil.which(QEMU):
        return "tcg"
    verdict: Accel = "kvm" if _boots(kernel) else "tcg"
    _keep_verdict(verdict)
    return verdict


def _kernels() -> Iterator[Path]:
    found = Path("/boot").glob("vmlinuz-*")
    return (path for path in sorted(found, reverse=True) if os.access(path, os.R_OK))


def _boots(kernel: Path) -> bool:
    """Boot it with an initramfs that only says that it was reached."""
    with tempfile.TemporaryDirectory(prefix="kvm-probe-") as home:
        initrd = Path(home) / "initrd"
        initrd.write_bytes(_initramfs())
        command = [
            *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none"),
            *("-accel", "kvm", "-cpu", "host", "-m", str(PROBE_MEMORY_MIB), "-no-reboot"),
            *("-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"),
        ]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=PROBE_LIMIT.total_seconds(),
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            return PROOF.encode() in (expired.stdout or b"")
        return PROOF.encode() in done.stdout


def _initramfs() -> bytes:
    script = f"#!/bin/busybox sh\n/bin/busybox echo {PROOF}\n/bin/busybox reboot -f\n"
    archive = io.BytesIO()
    archive.write(_cpio_entry("bin", b"", 0o040755))
    archive.write(_cpio_entry("dev", b"", 0o040755))
    archive.write(_cpio_entry("bin/busybox", BUSYBOX.read_bytes(), 0o100755))
    archive.write(_cpio_entry("init", script.encode(), 0o100755))
    # The kernel gives init this console; without it nobody hears the proof.
    archive.write(_cpio_entry("dev/console", b"", 0o020600, device=(5, 1)))
    archive.write(_cpio_entry("TRAILER!!!", b"", 0))
    return archive.getvalue()


def _cpio_entry(name: str, data: bytes, mode: int, device: tuple[int, int] = (0, 0)) -> bytes:
    """Return one file of a `newc` archive. Source: cpio(5), "New ASCII Format"."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    header = "070701" + "".join(f"{field:08x}" for field in fields)
    head = header.encode() + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def _verdict_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "provisioner" / "kvm.json"


def _read_verdict() -> Accel | None:
    try:
        values = json.loads(_verdict_file().read_text())
    except (OSError, ValueError):
        return None
    if values.get("boot_id") != BOOT_ID.read_text().strip():
        return None
    return "kvm" if values.get("accel") == "kvm" else "tcg"


def _keep_verdict(verdict: Accel) -> None:
    file = _verdict_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"boot_id": BOOT_ID.read_text().strip(), "accel": verdict}))
    fresh.replace(file)
