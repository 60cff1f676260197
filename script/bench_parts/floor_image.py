"""Makes what the floor of a reimage is served: its initramfs, its image and its boot script.

The image is the release's own, with the seed appended offline; nothing here runs on a host.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
import zstandard

from provisioner.agent.deploy import seed_image
from provisioner.agent.layout import HEAD_BYTES, plan_layout, smallest_disk_bytes
from provisioner.imaging import cpio
from provisioner.imaging.ramdisk import Base
from provisioner.lab.model import BRIDGE_ADDRESS, Host

PORT: Final = 8090
URL: Final = f"http://{BRIDGE_ADDRESS}:{PORT}"
SCRIPT: Final = "floor.ipxe"
SPARSE_SCRIPT: Final = "floor-sparse.ipxe"
CHECKED_SCRIPT: Final = "floor-checked.ipxe"
IMAGE: Final = "image.zst"
LEVEL: Final = 3
INITRD_LEVEL: Final = 12
STEP_LIMIT_S: Final = 300
PROGRAMS: Final = ("curl", "dd", "sha256sum", "zstd")
DRIVERS: Final = ("virtio_pci", "virtio_blk", "virtio_net")

# As ours, except that nothing is retried.
_SCRIPT: Final = f"""#!ipxe
kernel --name vmlinuz {URL}/vmlinuz initrd=initrd floor.address=${{{{netX/ip}}}} \
floor.netmask=${{{{netX/netmask}}}} floor.image={URL}/{IMAGE}{{more}} console=ttyS0,115200 \
quiet panic=30 no_timer_check
initrd --name initrd {URL}/initrd
boot
"""


@dataclass(frozen=True)
class FloorFiles:
    """A folder to serve, and the sizes of what is in it."""

    folder: Path
    initrd_mib: float
    image_mib: float
    raw_mib: float


def make_floor(
    folder: Path, base: Base, disk: Path, host: Host, cloud_config: dict[str, Any]
) -> FloorFiles:
    """Make all files in `folder`: `disk` is the release's raw image, cloud_config its user data."""
    folder.mkdir()
    shutil.copyfile(base.kernel, folder / "vmlinuz")
    tree = folder.parent / "floor-root"
    _fill_tree(tree, base.root)
    packed = zstandard.ZstdCompressor(level=INITRD_LEVEL).compress(cpio.archive(tree))
    (folder / "initrd").write_bytes(packed)
    raw = folder.parent / "floor.raw"
    _add_seed(disk, raw, _seed(host, cloud_config))
    digest = _run("sha256sum", str(raw)).split()[0]
    checked = f" floor.bytes={raw.stat().st_size} floor.sha256={digest}"
    (folder / SCRIPT).write_text(_SCRIPT.format(more=""))
    (folder / SPARSE_SCRIPT).write_text(_SCRIPT.format(more=" floor.dd=conv=sparse"))
    (folder / CHECKED_SCRIPT).write_text(_SCRIPT.format(more=checked))
    _run("zstd", "-q", f"-{LEVEL}", "-T0", "-f", str(raw), "-o", str(folder / IMAGE))
    raw_mib = raw.stat().st_size / 2**20
    raw.unlink()
    image_mib = (folder / IMAGE).stat().st_size / 2**20
    return FloorFiles(folder, len(packed) / 2**20, image_mib, raw_mib)


def _fill_tree(tree: Path, base: Path) -> None:
    for name in ("bin", "dev", "proc", "sys", "sbin", "lib", "lib64", "tmp"):
        (tree / name).mkdir(parents=True)
    for name in ("bin/busybox", "bin/kmod"):
        shutil.copy(base / name, tree / name)
    (tree / "sbin/modprobe").symlink_to("../bin/kmod")
    programs = [Path(str(shutil.which(name))) for name in PROGRAMS]
    for program in programs:
        shutil.copy(program.resolve(), tree / "bin" / program.name)
    for library in _libraries([*programs, base / "bin/kmod"]):
        target = tree / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library.resolve(), target)
    _add_drivers(tree, base)
    shutil.copyfile(Path(__file__).with_name("floor_init.sh"), tree / "init")
    (tree / "init").chmod(0o755)


def _libraries(programs: list[Path]) -> set[Path]:
    said = _run("ldd", *map(str, programs))
    words = {word for line in said.splitlines() for word in line.split()}
    return {Path(word) for word in words if word.startswith("/lib")}


def _add_drivers(tree: Path, base: Path) -> None:
    """Copy the three drivers and what they need; the index is that of the deploy ramdisk."""
    (source,) = (base / "lib/modules").iterdir()
    target = tree / "lib/modules" / source.name
    target.mkdir(parents=True)
    for index in source.glob("modules.*"):
        shutil.copy(index, target)
    chosen: set[str] = set()
    for driver in DRIVERS:
        for line in _modprobe(base, source.name, driver).splitlines():
            verb, _, rest = line.partition(" ")
            if verb == "insmod":
                chosen.add(str(Path(rest.split()[0]).relative_to(source)))
    for name in chosen:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)


def _modprobe(base: Path, version: str, driver: str) -> str:
    """Return the `insmod` lines that would load a driver; kmod is the deploy ramdisk's own."""
    done = subprocess.run(
        ["modprobe", "-d", str(base), "-S", version, "--show-depends", driver],
        executable=base / "bin/kmod",
        capture_output=True,
        text=True,
        check=True,
        timeout=STEP_LIMIT_S,
    )
    return done.stdout


def _seed(host: Host, cloud_config: dict[str, Any]) -> bytes:
    nic = {"match": {"macaddress": host.mac}, "dhcp4": True, "optional": False}
    meta = {"instance-id": "floor", "local-hostname": host.name}
    documents = {
        "meta-data": yaml.safe_dump(meta),
        "user-data": "#cloud-config\n" + yaml.safe_dump(cloud_config),
        "vendor-data": "",
        "network-config": yaml.safe_dump({"version": 2, "ethernets": {"nic0": nic}}),
    }
    return seed_image(documents)


def _add_seed(disk: Path, raw: Path, seed: bytes) -> None:
    """Copy the image to the smallest disk that also holds the seed, with a fitting table."""
    _run("cp", "--sparse=always", "--reflink=auto", str(disk), str(raw))
    image_bytes = disk.stat().st_size
    disk_bytes = smallest_disk_bytes(image_bytes)
    with raw.open("r+b") as file:
        file.truncate(disk_bytes)
        head = file.read(HEAD_BYTES)
        layout = plan_layout(head, image_bytes=image_bytes, disk_bytes=disk_bytes)
        for at, data in (
            (layout.cidata_at, seed),
            (layout.backup_at, layout.backup),
            (0, layout.head),
        ):
            file.seek(at)
            file.write(data)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=STEP_LIMIT_S)
    return done.stdout
