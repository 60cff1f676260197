"""A whole installation beside a lab: configuration, ramdisk, releases, running service.

What the demo, the lab tests and the benches share. The API listens on this machine's
loopback; everything that hosts talk to runs inside the lab's network.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import provisioner
from provisioner import wiring
from provisioner.client import Client
from provisioner.core.manifest import Manifest
from provisioner.errors import ProvisionerError, Unavailable
from provisioner.keys import FOLDER as KEYS
from provisioner.lab.lab import Lab
from provisioner.lab.model import BRIDGE, BRIDGE_ADDRESS, Host
from provisioner.release_keys import trust_key
from provisioner.setting_types import Address
from provisioner.settings import CONFIG_FILE, Settings, load
from provisioner.setup import Plan, initialise

if TYPE_CHECKING:
    from provisioner.imaging.recipe import Recipe

LAB_KERNEL: Final = "linux-image-cloud-amd64"
READY_LIMIT: Final = timedelta(seconds=60)
STOP_LIMIT: Final = timedelta(seconds=30)
# The kernel gives the first timer interrupt 60 ms to come, and panics. On a busy machine an
# emulated timer needs longer.
RAMDISK: Final = {"kernel_arguments": ["no_timer_check"]}
# What fails in a lab is looked at: another attempt, the way back, or a host that is switched
# off would hide it. Whoever tries those asks for them.
RECOVERY: Final = {"automatic": False}
API_PART: Final = "api"
OTHER_PARTS: Final = "boot,tftp,dhcp,worker"
PROFILE: Final = "lab"
# Not a name that Debian has already, as a user or as a group ("operator" is one).
USER: Final = "lab"

Say = Callable[[str], None]


def cache_directory() -> Path:
    """Return where what is slow to make is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "provisioner"


@dataclass
class Site:
    """One installation in `directory`, for the hosts of `lab`."""

    directory: Path
    lab: Lab
    settings: Settings
    cache: Path
    say: Say
    processes: list[subprocess.Popen[bytes]]

    @classmethod
    def create(
        cls,
        directory: Path,
        lab: Lab,
        *,
        changes: Mapping[str, Mapping[str, object]] | None = None,
        trusted: Sequence[str] = (),
        cache: Path | None = None,
        say: Say = lambda _line: None,
    ) -> Site:
        """Initialise a site with strong keys and a ramdisk; nothing runs yet.

        `changes` are settings by section: {"limits": {"netbooting_s": 60}}; `trusted` are
        further public keys (PEM) whose releases it deploys.
        """
        plan = Plan(
            listen_address=BRIDGE_ADDRESS,
            interface=BRIDGE,
            dhcp="full",
            api=Address("127.0.0.1", _free_port()),
        )
        initialise(directory, plan)
        for pem in trusted:
            trust_key(directory / KEYS, pem)
        _change(
            directory / CONFIG_FILE, {"ramdisk": RAMDISK, "recovery": RECOVERY, **(changes or {})}
        )
        site = cls(
            directory, lab, load(directory / CONFIG_FILE), cache or cache_directory(), say, []
        )
        wiring.prepare(site.settings)
        site.build_ramdisk()
        site.make_ssh_key()
        return site

    @property
    def config(self) -> Path:
        return self.directory / CONFIG_FILE

    @property
    def ssh_key(self) -> Path:
        return self.directory / "ssh" / "id_ed25519"

    @property
    def api_url(self) -> str:
        return f"http://{self.settings.api.listen}"

    def client(self) -> Client:
        return Client(self.api_url, self.settings.keys.admin_token.reveal())

    def build_ramdisk(self) -> str:
        """Build the ramdisk with this site's pins and return its digest."""
        from provisioner.imaging.ramdisk import Pins, build_base, build_ramdisk

        self.say("ramdisk")
        base = build_base(LAB_KERNEL, self.cache / "ramdisk")
        pins = Pins(
            release_trust=wiring.trust_policy(self.settings).to_bytes(),
            agent_ca=self.settings.keys.agent_tls_pem.read_bytes(),
        )
        return build_ramdisk(base, pins, self.settings.data_dir / "ramdisks").digest

    def make_ssh_key(self) -> None:
        """Make the key that opens the deployed hosts."""
        self.ssh_key.parent.mkdir(mode=0o700)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.ssh_key)], check=True
        )

    def publish(
        self, version: str, *, recipe: Recipe | None = None, parent: Manifest | None = None
    ) -> Manifest:
        """Publish a version of `debian-12`, or of another recipe, with the lab's kernel.

        It is built on `parent`, a release of this site, or else from nothing; what was built
        before comes from the cache. The site's files are copies: breaking them breaks nothing
        else.
        """
        from provisioner.imaging.signing import load_signing_key
        from provisioner.keys import RELEASE_KEY
        from provisioner.lab.lending import lend
        from provisioner.lab.shelf import Shelf, lab_recipe

        shelf = Shelf(self.cache / "lab-images", self.cache / "images", self.say)
        signer = load_signing_key(self.settings.keys.folder / RELEASE_KEY)
        service = wiring.build(self.settings)
        try:
            base = (service.archive, parent) if parent else None
            with shelf.release(recipe or lab_recipe(), version, base) as (kept, manifest):
                self.say(f"publishing {manifest.name}")
                stored_bytes = lend(
                    kept, manifest, service.archive, place=shutil.copyfile, signers=[signer]
                )
            wiring.registrar(service, actor="lab")(manifest, stored_bytes)
            return manifest
        finally:
            service.close()

    def write_image(self, manifest: Manifest, target: Path) -> None:
        """Write a release of this site as a new raw disk image."""
        wiring.archive_of(self.settings).write_image(manifest, target)

    def start(self) -> None:
        """Start the service and return when every part answers."""
        self.say("starting the service")
        for parts, enter in ((API_PART, []), (OTHER_PARTS, self.lab.nsenter_argv())):
            self.processes.append(self._serve(enter, parts))
        for process, parts in zip(self.processes, (API_PART, OTHER_PARTS), strict=True):
            self._wait_until_ready(process, parts)

    def stop(self) -> None:
        """Stop the service as systemd would, and return when all of it has ended."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        self._reap()

    def kill(self) -> None:
        """Kill the whole service without a word (`kill -9`)."""
        for process in self.processes:
            process.kill()
        self._reap()

    def _reap(self) -> None:
        for process in self.processes:
            try:
                process.wait(STOP_LIMIT.total_seconds())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes = []

    def change(self, changes: Mapping[str, Mapping[str, object]]) -> None:
        """Change settings by section; a running service reads them at its next start."""
        _change(self.config, changes)
        self.settings = load(self.config)

    @contextlib.contextmanager
    def running(self) -> Iterator[Site]:
        """The service runs in the block, and nothing of it after."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def log_path(self, parts: str) -> Path:
        return self.directory / f"serve-{parts.replace(',', '-')}.log"

    def save_profile(self, **changes: Any) -> None:
        """Save the lab's profile: the disk with serial LAB-<host>-0, ssh by key, ssh checked."""
        self.client().save_profile(PROFILE, {**lab_profile(self.ssh_key), **changes})

    def enrol(self, host: Host, **changes: Any) -> None:
        """Add a host of the lab to the service, with the lab's profile."""
        self.client().add_host(host_document(host) | changes)

    def ssh_argv(self, address: str) -> list[str]:
        """Return the command that logs in to a deployed host, through the lab's network."""
        return [
            *self.lab.nsenter_argv(),
            *("ssh", "-i", str(self.ssh_key), "-o", "BatchMode=yes"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=20"),
            f"{USER}@{address}",
        ]

    def _serve(self, enter: list[str], parts: str) -> subprocess.Popen[bytes]:
        self._ready_file(parts).unlink(missing_ok=True)
        with self.log_path(parts).open("ab") as log:
            return subprocess.Popen(
                [
                    *enter,
                    *(sys.executable, "-m", "provisioner", "serve"),
                    *("--config", str(self.config), "--only", parts),
                    *("--ready-file", str(self._ready_file(parts))),
                ],
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": str(Path(provisioner.__file__).parents[1])},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _ready_file(self, parts: str) -> Path:
        return self.directory / f"ready-{parts.replace(',', '-')}"

    def _wait_until_ready(self, process: subprocess.Popen[bytes], parts: str) -> None:
        deadline = time.monotonic() + READY_LIMIT.total_seconds()
        while not self._ready_file(parts).exists():
            if process.poll() is not None or time.monotonic() > deadline:
                said = self.log_path(parts).read_text(errors="replace")[-2000:]
                raise Unavailable(f"the service ({parts}) did not start", found=said)
            time.sleep(0.05)


def lab_profile(ssh_key: Path, *, soak_s: float = 2) -> dict[str, Any]:
    """Return the profile document of lab hosts."""
    return {
        "cloud_config": {
            "users": [
                {
                    "name": USER,
                    "shell": "/bin/bash",
                    "sudo": "ALL=(ALL) NOPASSWD:ALL",
                    "lock_passwd": True,
                    "ssh_authorized_keys": [Path(f"{ssh_key}.pub").read_text().strip()],
                }
            ],
            "ssh_pwauth": False,
        },
        # No router in the lab: waiting for one would cost each boot some seconds.
        "network": {
            "version": 2,
            "ethernets": {
                "nic0": {
                    "match": {"macaddress": "${host.mac}"},
                    "dhcp4": True,
                    "accept-ra": False,
                }
            },
        },
        "disk": {"bus": "virtio", "size_min_bytes": 3 * 1024**3},
        "health": {
            "soak_s": soak_s,
            "checks": [{"type": "ssh"}, {"type": "tcp", "port": 22}, {"type": "systemd"}],
        },
    }


def host_document(host: Host) -> dict[str, Any]:
    """Return what the API takes to enrol a host of the lab."""
    return {
        "name": host.name,
        "macs": [host.mac],
        "firmware": host.firmware,
        "uuid": host.uuid,
        "serial": host.serial,
        "profile": PROFILE,
        "bmc": asdict(host.bmc),
    }


def wait_for(
    site: Site, operation: str, *, limit: timedelta, until: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the operation once it ended, or entered one of the phases `until`.

    Raises Unavailable, with the operation as found, when that takes too long.
    """
    ends = ("succeeded", "failed", "cancelled")
    deadline = time.monotonic() + limit.total_seconds()
    shown: dict[str, Any] = {}
    while time.monotonic() < deadline:
        try:
            with site.client() as client:
                shown = client.operation(operation)
        except ProvisionerError as error:
            if error.exit_code != Unavailable.exit_code:
                raise
        if shown.get("phase") in (*ends, *until):
            return shown
        time.sleep(0.2)
    raise Unavailable(f"operation {operation} took longer than {limit}", found=shown)


def _change(config: Path, changes: Mapping[str, Mapping[str, object]]) -> None:
    text = config.read_text()
    for section, values in changes.items():
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        header = f"[{section}]\n"
        if header in text:
            kept, rest = text.split(header, 1)
            own, _, after = rest.partition("\n[")
            old = [line for line in own.splitlines() if line.split(" =")[0] not in values]
            text = kept + header + lines + "\n".join(old) + "\n" + (f"\n[{after}" if after else "")
        else:
            text += f"\n{header}{lines}"
    config.write_text(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
