"""What the tests with a rack and a running service share: waits that explain themselves,
disks compared byte by byte, and a release that is ready in seconds."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import zstandard

from provisioner import wiring
from provisioner.core.manifest import Manifest
from provisioner.errors import ProvisionerError
from provisioner.imaging.archive import ReleaseFacts
from provisioner.lab import Lab, LabHost
from provisioner.lab.site import PROFILE, Site, lab_profile, wait_for

Json = dict[str, Any]
MIB: Final = 1024 * 1024
SECTOR_BYTES: Final = 512
# The protective MBR, the GPT's header and its entries: what a deployment fits to the disk.
TABLE_BYTES: Final = 34 * SECTOR_BYTES

# One reimage takes some 70 s on two idle cores; a machine with other work takes longer.
REIMAGE_LIMIT: Final = timedelta(minutes=10)
BOOT_LIMIT: Final = timedelta(minutes=4)
SSH_LIMIT: Final = timedelta(seconds=60)
POLL_S: Final = 0.2
CONSOLE_TAIL: Final = 1500
EVENTS_TAIL: Final = 40
_ESCAPES: Final = re.compile(r"\x1b(\[[0-9;?=]*[A-Za-z]|c)")

HANGS: Final = "hangs-in-firmware"
OLD_SYSTEM: Final = "THE-OLD-SYSTEM-RUNS"
TINY_SYSTEM: Final = "THE-TINY-SYSTEM-RUNS"


@contextlib.contextmanager
def a_site(
    directory: Path, hosts: Sequence[LabHost], changes: dict[str, dict[str, object]]
) -> Iterator[Site]:
    """A rack and a service for it, with the lab's profile, until the block ends."""
    with Lab.up(directory / "lab", hosts) as lab:
        site = Site.create(directory / "site", lab, changes=changes)
        with site.running():
            site.save_profile()
            yield site


def restart_with(site: Site, changes: dict[str, dict[str, object]]) -> None:
    """Restart the service with changed settings."""
    site.stop()
    site.change(changes)
    site.start()


def deploy(site: Site, names: Sequence[str], release: str) -> dict[str, str]:
    """Request a deployment and return the operations' ids by host."""
    with site.client() as client:
        return {row["host"]: row["id"] for row in client.deploy(names, release)}


def reached(site: Site, operation: str, *phases: str, limit: timedelta = REIMAGE_LIMIT) -> Json:
    """Return the operation once it is in one of `phases`; fail, with what is known, when it
    ends otherwise or takes too long."""
    try:
        shown = wait_for(site, operation, limit=limit, until=phases)
    except ProvisionerError as error:
        shown = dict(error.found) if isinstance(error.found, dict) else {"found": error.found}
        shown.setdefault("phase", "unknown")
    if shown["phase"] not in phases:
        why = f"operation {operation} is {shown['phase']}, and not {' or '.join(phases)}"
        pytest.fail(f"{why}\n{json.dumps(shown, indent=1)}\n{account_of(site, shown)}")
    return shown


def account_of(site: Site, operation: Json) -> str:
    """Return the end of the host's console and of its timeline, for a person to read."""
    name = operation.get("host", "")
    lines = [f"--- {site.log_path('boot,tftp,dhcp,worker')}"]
    with contextlib.suppress(ProvisionerError, OSError):
        lines += [f"--- console of {name}", spoken(site, name)[-CONSOLE_TAIL:]]
        lines += ["--- timeline", *timeline(site, name)[-EVENTS_TAIL:]]
    return "\n".join(lines)


def timeline(site: Site, name: str) -> list[str]:
    """Return the host's timeline as `time source text`, oldest first."""
    with site.client() as client:
        events = client.host_events(name, limit=1000)
    return [f"{event['at'][11:23]} {event['source']}: {event['text']}" for event in events]


def until(what: str, is_so: Callable[[], bool], limit: timedelta) -> None:
    """Return when it is so; fail when it takes longer than `limit`."""
    deadline = time.monotonic() + limit.total_seconds()
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {limit}"
        time.sleep(POLL_S)


def host_of(site: Site, name: str) -> Json:
    with site.client() as client:
        return client.host(name)


def spoken(site: Site, name: str, start: int = 0) -> str:
    """Return the console from `start` on as a person reads it, without cursor movements."""
    return _ESCAPES.sub("", site.lab.console(name)[start:])


def says(site: Site, name: str, text: str, *, start: int, limit: timedelta = BOOT_LIMIT) -> str:
    """Return what the console says from `start` on, once `text` stands in it."""
    deadline = time.monotonic() + limit.total_seconds()
    while text not in (said := spoken(site, name, start)):
        if time.monotonic() > deadline:
            pytest.fail(f"{name} does not say {text!r}\n{account_of(site, {'host': name})}")
        time.sleep(POLL_S)
    return said


def written_and_off(site: Site, name: str, operation: str) -> None:
    """Return when the release is on the disk, and nothing was started from there yet: the host
    stands still in its firmware when it restarts, and is switched off then."""
    reached(site, operation, "preparing", "writing", "verifying", "booting")
    site.lab.fault(name, HANGS)
    reached(site, operation, "booting")
    site.lab.power(name, "off")
    site.lab.clear(name, HANGS)
    since = spoken(site, name).rpartition("--- lab: boot ")[2]
    assert "Booting `" not in since, "GRUB has started already, so the disk proves nothing"


def is_actionable(error: Json | ProvisionerError | None, host: str) -> Json:
    """Check that an error names host, expected, found and the next step, and return it."""
    values = error.as_dict() if isinstance(error, ProvisionerError) else error
    assert values is not None
    assert values["host"] == host
    for part in ("message", "expected", "found", "hint"):
        assert values.get(part), f"no {part} in {values}"
    return values


def is_told(site: Site, name: str, cause: str) -> Json:
    """Check that `provisioner why` names this cause, with lines that show it and what to do,
    and return what it says."""
    with site.client() as client:
        answer = client.why(name)
    assert answer["cause"] == cause, answer
    assert answer["evidence"], answer
    assert answer["next"], answer
    return answer


def ssh(site: Site, address: str, command: str) -> str:
    """Run a command on a deployed host and return what it wrote; fail when it fails."""
    done = subprocess.run(
        [*site.ssh_argv(address), command],
        capture_output=True,
        text=True,
        timeout=SSH_LIMIT.total_seconds(),
        check=False,
    )
    assert done.returncode == 0, f"ssh {address} {command}: {done.stderr}"
    return done.stdout.strip()


# Disks, compared while nothing writes to them.


def disk_path(site: Site, name: str) -> Path:
    return Path(site.lab.host(name).disks[0].path)


def disk_digest(path: Path) -> str:
    """Return a digest of a sparse file's bytes; a hole and zeros are the same."""
    digest = hashlib.blake2b()
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset in _filled_mibs(file.fileno(), size):
            data = os.pread(file.fileno(), MIB, offset)
            if data.strip(b"\0"):
                digest.update(offset.to_bytes(8) + data)
    return f"{size}:{digest.hexdigest()}"


def _filled_mibs(handle: int, size: int) -> Iterator[int]:
    """Yield the offset of each MiB that has data in it, in order."""
    offset = 0
    while offset < size:
        try:
            found = os.lseek(handle, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole follows
            return
        offset = found // MIB * MIB
        yield offset
        offset += MIB


def differing_chunks(path: Path, manifest: Manifest, archive: Path) -> list[int]:
    """Return the chunks of the release that the disk does not hold.

    Of the first chunk all that follows the partition table is compared: the table itself
    is fitted to the disk.
    """
    with path.open("rb") as file:
        return [
            index
            for index in range(len(manifest.chunks))
            if not _holds(file.fileno(), manifest, index, archive)
        ]


def _holds(handle: int, manifest: Manifest, index: int, archive: Path) -> bool:
    digest, length = manifest.chunks[index], manifest.chunk_length(index)
    data = os.pread(handle, length, index * manifest.chunk_bytes)
    if digest is None:
        return data == bytes(length)
    if index == 0:
        packed = chunk_path(archive, digest).read_bytes()
        wanted = zstandard.decompress(packed, max_output_size=length)
        return data[TABLE_BYTES:] == wanted[TABLE_BYTES:]
    return hashlib.sha256(data).hexdigest() == digest


def chunk_path(archive: Path, digest: str) -> Path:
    return archive / "chunks" / digest[:2] / digest


def partition_digest(path: Path, manifest: Manifest, name: str) -> str:
    """Return the sha256 of a partition's place on the disk."""
    partition = next(part for part in manifest.partitions if part.name == name)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(partition.start_bytes)
        left = partition.size_bytes
        while left:
            data = file.read(min(left, MIB))
            assert data, "the disk ends within the partition"
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


# Systems of one sector.


def boot_code(text: str) -> bytes:
    """Return the 446 bytes of a boot sector that says `text` on the first serial port and halts.

    16-bit machine code: cli; ds = 0; si = the text; while (al = *si++) outb(0x3f8, al);
    hlt, for ever.
    """
    code = bytes.fromhex("fa 31c0 8ed8 be167c baf803 ac 84c0 7403 ee ebf8 f4 ebfd")
    whole = code + f"\r\n{text}\r\n".encode() + b"\0"
    assert len(code) == 0x16
    return whole.ljust(446, b"\0")


def put_old_system(path: Path) -> None:
    """Write a system that says OLD_SYSTEM when it boots, and data in several places."""
    with path.open("r+b") as disk:
        disk.write(boot_code(OLD_SYSTEM) + bytes(64) + b"\x55\xaa")
        for mib in (1, 5, 30):
            disk.seek(mib * MIB)
            disk.write(hashlib.shake_256(bytes([mib])).digest(MIB))


def publish_tiny(site: Site, directory: Path, version: str, *, size_mib: int = 8) -> Manifest:
    """Publish a small release that boots on a BIOS, says TINY_SYSTEM and does no more.

    Its root, of half the size, is full.
    """
    raw = directory / f"tiny-{version}.raw"
    with raw.open("wb") as file:
        file.truncate(size_mib * MIB)
    sectors = size_mib * MIB // 2 // SECTOR_BYTES
    subprocess.run(
        ["sfdisk", "--quiet", "--no-tell-kernel", "--no-reread", str(raw)],
        input=f'label: gpt\nstart=2048, size={sectors}, name="root"\n',
        text=True,
        check=True,
    )
    with raw.open("r+b") as file:
        file.write(boot_code(TINY_SYSTEM))
        file.seek(MIB)
        file.write(hashlib.shake_256(version.encode()).digest(size_mib * MIB // 2))
    facts = ReleaseFacts(
        image="tiny",
        version=version,
        architecture="amd64",
        firmware=("bios",),
        release_id=hashlib.sha256(version.encode()).hexdigest(),
        packages={},
        recipe_digest="0" * 64,
        builder="test",
        built_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        root_partition=1,
    )
    service = wiring.build(site.settings)
    try:
        return wiring.publisher(site.settings, service, actor="test").publish(raw, facts)
    finally:
        service.close()


def tiny_profile(site: Site, name: str = PROFILE, **disk: Any) -> None:
    """Save a profile with this disk rule."""
    with site.client() as client:
        client.save_profile(name, {**lab_profile(site.ssh_key), "disk": disk})


# What a host says to the service, said by us from the hosts' network.


def ticket_offered_to(site: Site, name: str) -> str:
    """Ask for the host's boot script as its iPXE does, and return the ticket in it."""
    host = site.lab.host(name)
    url = f"{site.settings.boot.url}/boot/ipxe?mac={host.mac}&uuid={host.uuid}"
    script = site.lab.run(["curl", "-sS", "-g", url]).stdout
    assert "provisioner.ticket=" in script, script
    return script.partition("provisioner.ticket=")[2].split()[0]


def agent_says(site: Site, call: str, body: Json) -> tuple[int, Json]:
    """Make a call of the agent and return status and answer."""
    done = site.lab.run(
        [
            *("curl", "-sS", "--cacert", str(site.settings.keys.agent_tls_pem)),
            *("-H", "Content-Type: application/json", "-d", json.dumps(body)),
            *("-w", "\n%{http_code}", f"{site.settings.agent.url}/agent/v1/{call}"),
        ]
    )
    assert done.returncode == 0, done.stderr
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer)
