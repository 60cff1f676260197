"""The ramdisk's archive format, its contents, its limits and its repeatability.

The base is built from Debian's packages once for the session, or taken from the cache.
"""

import hashlib
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from provisioner.core.trust import TrustPolicy
from provisioner.errors import ConfigError
from provisioner.imaging import cpio
from provisioner.imaging.ramdisk import (
    LAB_KERNEL,
    SIZE_MAX_BYTES,
    Base,
    Pins,
    about,
    build_base,
    build_ramdisk,
    ramdisks_in,
)
from provisioner.whole_files import one_after_another_in

PINS = Pins(
    TrustPolicy(("ab" * 32,)).to_bytes(),
    b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
)


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "provisioner"


@pytest.fixture(scope="module")
def base() -> Base:
    return build_base(LAB_KERNEL, cache_dir())


def unpack(initrd: Path, folder: Path) -> None:
    """Unpack as the kernel does: one compressed archive after the other.

    Each by itself: the tool reads in blocks, and would swallow the start of the second.
    """
    packed = initrd.read_bytes()
    while packed:
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        archive = unpacker.decompress(packed)
        packed = unpacker.unused_data
        subprocess.run(["cpio", "-idm", "--quiet"], cwd=folder, input=archive, check=True)


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    """Files, folders, links and modes come out as they went in."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").write_bytes(b"12345")
    (tree / "a/empty").write_bytes(b"")
    (tree / "a/run").write_bytes(b"#!")
    (tree / "a/run").chmod(0o700)
    (tree / "link").symlink_to("a/file")
    out.mkdir()
    data = cpio.archive(tree)
    assert len(data) % 4 == 0
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=out, input=data, check=True)
    assert (out / "link").read_bytes() == b"12345"
    assert (out / "a/empty").read_bytes() == b""
    assert (out / "a/run").stat().st_mode & 0o777 == 0o755
    assert (out / "a/file").stat().st_mode & 0o777 == 0o644
    assert (out / "a/b").is_dir()


def test_the_archive_does_not_depend_on_time_or_order(tmp_path: Path) -> None:
    """The same content written in another order at another time gives the same bytes."""
    archives = []
    for number, names in enumerate((["x", "y"], ["y", "x"])):
        tree = tmp_path / str(number)
        tree.mkdir()
        for name in names:
            (tree / name).write_text(name)
            os.utime(tree / name, (number, number))
        archives.append(cpio.archive(tree))
    assert archives[0] == archives[1]


def test_devices_are_refused(tmp_path: Path) -> None:
    """A pipe is neither file nor folder, and has no place in an archive."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        cpio.archive(tmp_path)


def test_a_ramdisk_is_repeatable_and_named_by_its_digest(base: Base, tmp_path: Path) -> None:
    """Twice the same inputs: one folder, whose name is the digest of what names its parts."""
    first, again = (build_ramdisk(base, PINS, tmp_path / name) for name in ("a", "b"))
    assert first.digest == again.digest
    text = (first.folder / "ramdisk.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == first.digest
    for name, digest in json.loads(text)["sha256"].items():
        assert hashlib.sha256((first.folder / name).read_bytes()).hexdigest() == digest
    assert TrustPolicy.parse(PINS.release_trust) == TrustPolicy.parse(
        json.dumps(json.loads(text)["release_trust"]).encode()
    )
    assert build_ramdisk(base, PINS, tmp_path / "a").folder == first.folder
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.digest]


def test_of_two_that_make_a_base_at_once_the_second_takes_that_of_the_first(
    base: Base, tmp_path: Path
) -> None:
    """It would take it away from the first, which reads it already."""
    made = tmp_path / base.folder.name
    with ThreadPoolExecutor(1) as pool:
        with one_after_another_in(tmp_path):
            second = pool.submit(build_base, LAB_KERNEL, tmp_path)
            with pytest.raises(TimeoutError):
                second.result(0.5)
            shutil.copytree(base.folder, made, symlinks=True, copy_function=os.link)
        assert second.result(600).folder == made
    assert (made / "base.json").samefile(base.folder / "base.json")


def test_the_one_built_last_is_the_newest(base: Base, tmp_path: Path) -> None:
    """Going back to older keys brings the older ramdisk to the front again."""
    other = Pins(TrustPolicy(("cd" * 32,)).to_bytes(), PINS.agent_ca)
    for pins in (PINS, other, PINS):
        made = build_ramdisk(base, pins, tmp_path)
    newest = ramdisks_in(tmp_path)[0]
    assert newest == made.folder
    assert about(newest)["kernel_package"] == LAB_KERNEL


def test_the_ramdisk_fits_its_limit(base: Base, tmp_path: Path) -> None:
    """Kernel and initrd of the lab's ramdisk are within 48 MiB."""
    assert build_ramdisk(base, PINS, tmp_path).size_bytes <= SIZE_MAX_BYTES[LAB_KERNEL]


def test_the_ramdisk_holds_pins_and_agent_and_no_way_in(base: Base, tmp_path: Path) -> None:
    """The agent comes compiled; there is no login, no remote shell, no private key."""
    made = build_ramdisk(base, PINS, tmp_path / "ramdisks")
    root = tmp_path / "root"
    root.mkdir()
    unpack(made.folder / "initrd", root)
    assert (root / "etc/provisioner/release-trust.json").read_bytes() == PINS.release_trust
    assert (root / "etc/provisioner/agent-ca.pem").read_bytes() == PINS.agent_ca
    assert os.access(root / "init", os.X_OK)
    names = {path.name for path in root.rglob("*")}
    assert {"main.pyc", "manifest.pyc", "trust.pyc", "virtio_blk.ko"} <= names
    assert not {"login", "getty", "telnetd", "sshd", "dropbear", "site.pyc", "shadow"} & names
    assert not any(path.suffix == ".py" for path in root.rglob("*"))


@pytest.mark.parametrize(
    "pins",
    [
        Pins(b"", PINS.agent_ca),
        Pins(PINS.release_trust, b"not PEM"),
        Pins(PINS.release_trust, PINS.agent_ca + b"-----BEGIN PRIVATE KEY-----\n"),
        Pins(PINS.release_trust.replace(b"keys", b"key"), PINS.agent_ca),
        Pins(PINS.agent_ca, PINS.release_trust),
    ],
)
def test_pins_that_are_not_what_they_should_be_are_refused(
    base: Base, tmp_path: Path, pins: Pins
) -> None:
    """Above all a private key: the ramdisk is served to everybody."""
    with pytest.raises(ConfigError):
        build_ramdisk(base, pins, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_scripts_of_the_ramdisk_are_sound() -> None:
    """shellcheck finds nothing to say."""
    scripts = sorted((Path(__file__).parents[2] / "provisioner/agent").glob("*.sh"))
    assert len(scripts) == 2
    subprocess.run(["shellcheck", *scripts], check=True)
