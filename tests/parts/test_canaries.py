"""Canaries: a deployment over the real listeners, with a text that can be searched for in every
secret; none of them is found where others could read it.

The BMC is OpenIPMI's, the agent and the new system are this test. What may hold which secret:
the boot script its ticket, the answer to the hello its token, the seed its user data and nonce.
"""

import base64
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from provisioner import wiring
from provisioner.client import Client
from provisioner.core.model import OperationId
from provisioner.service.chance import Derived
from provisioner.settings import Settings
from tests.parts.ipmi import PASSWORD as BMC_PASSWORD
from tests.parts.ipmi import USER, IpmiSim, running_ipmi_sim
from tests.parts.service_site import inventory, mac
from tests.parts.test_cli_serve import ROOT, Served, config, serving
from tests.parts.test_imaging_archive import FACTS, make_disk

__all__ = ["config"]  # the fixture of an installation on free ports

VARIABLE: Final = "canary-user-data-7f3a"
RAMDISK: Final = "cd" * 32
LIMIT_S: Final = 180.0
PROFILE: Final = {
    "variables": {"password": VARIABLE},
    "cloud_config": {"chpasswd": {"list": "admin:${vars.password}"}},
    "disk": {"bus": "virtio"},
    "health": {"soak_s": 0, "checks": [{"type": "systemd"}]},
}


class Host:
    """The host r1n1: asks for its boot script, and speaks as its agent and its reporter."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        trust = ssl.create_default_context(cafile=str(settings.keys.agent_tls_pem))
        self.http = httpx.Client(base_url=settings.agent.url, verify=trust, timeout=60)
        self.secrets: dict[str, str] = {}
        self.told: dict[str, Any] = {}

    def boot_script(self) -> str:
        query = {"mac": mac(1), "serial": "SN-1", "uuid": inventory(1)["uuid"]}
        return httpx.get(f"{self.settings.boot.url}/boot/ipxe", params=query, timeout=60).text

    def boots(self) -> None:
        """Ask until there is a ticket, as a host does that is restarted into the network."""
        scripts: list[str] = []

        def has_ticket() -> bool:
            scripts.append(self.boot_script())
            return "provisioner.ticket=" in scripts[-1]

        until(has_ticket)
        self.secrets["ticket"] = scripts[-1].partition("provisioner.ticket=")[2].split()[0]

    def hello(self, session: str) -> httpx.Response:
        body = {
            "ticket": self.secrets["ticket"],
            "inventory": inventory(1),
            "session": session,
            "attempt": 1,
        }
        answer = self.http.post("/agent/v1/hello", json=body)
        if answer.is_success:
            self.told = answer.json()
            self.secrets["agent token"] = self.told["token"]
            self.secrets["session"] = session
        return answer

    def says(self, call: str, *, token: str | None = None, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token or self.told['token']}"}
        body = {"generation": self.told["generation"], **more}
        return self.http.post(f"/agent/v1/{call}", json=body, headers=headers)

    def writes(self) -> None:
        disk = {
            key: inventory(1)["disks"][0][key] for key in ("name", "serial", "wwn", "size_bytes")
        }
        permitted = self.says("authorise", release=self.told["release"], disk=disk)
        assert permitted.is_success, permitted.text
        assert self.says("progress", phase="writing", done_bytes=1, total_bytes=2).is_success

    def is_done(self) -> None:
        counts: dict[str, Any] = {"written_bytes": 2, "fetched_bytes": 2, "seconds": {"write": 1}}
        assert self.says("done", release=self.told["release"], **counts).is_success

    def phones_home(self, nonce: str, release_id: str) -> httpx.Response:
        body = {
            "nonce": nonce,
            "release_id": release_id,
            "root_disk": {"name": "vda", "serial": "LAB-r1n1-0", "wwn": None},
            "boot_id": "b",
            "ssh_host_keys": [],
            "failed_units": [],
        }
        return self.http.post("/report/v1/phone-home", json=body)


def until(condition: Callable[[], object]) -> None:
    ends_at = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.1)


@contextmanager
def running_site(config: Path, bmc: IpmiSim) -> Iterator[tuple[Served, Client]]:
    """A service with a release, a ramdisk, a profile full of secrets, and the host r1n1."""
    with serving(config) as served:
        settings = served.settings
        ramdisk = settings.data_dir / "ramdisks" / RAMDISK
        ramdisk.mkdir(parents=True)
        for name, text in (("ramdisk.json", "{}"), ("initrd", ""), ("vmlinuz", "")):
            (ramdisk / name).write_text(text)
        service = wiring.build(settings)
        try:
            raw = make_disk(config.parent / "tiny.raw", b"tiny")
            wiring.publisher(settings, service, actor="test").publish(raw, FACTS)
        finally:
            service.close()
        with Client(served.api, settings.keys.admin_token) as client:
            client.save_profile("web", PROFILE)
            where = {"address": "127.0.0.1", "port": bmc.port, "user": USER}
            client.add_host(
                {
                    "name": "r1n1",
                    "macs": [mac(1)],
                    "profile": "web",
                    "bmc": {**where, "password": BMC_PASSWORD},
                }
            )
            yield served, client


def deploy(host: Host, client: Client) -> None:
    """A whole deployment, with every mistake and attack that is answered with an error."""
    (operation,) = client.deploy(["r1n1"], "tiny@1")
    host.boots()
    assert host.hello("5e" * 32).is_success
    for token in ("at_wrong", host.secrets["ticket"], client_token(host)):
        assert host.says("seed", token=token).status_code == 403
    host.writes()
    seed, again = host.says("seed"), host.says("seed")
    assert (seed.is_success, again.status_code) == (True, 410)
    assert VARIABLE in seed.json()["user-data"]
    assert host.says("progress", phase="verifying", done_bytes=2, total_bytes=2).is_success
    host.is_done()
    master = bytes.fromhex(host.settings.keys.master.reveal())
    derived = Derived(master)
    nonce = derived.nonce(OperationId(operation["id"]), operation["generation"]).reveal()
    host.secrets["nonce"] = nonce.partition(".")[2]
    assert host.phones_home(f"{operation['id']}.{'A' * 43}", FACTS.release_id).status_code == 403
    assert host.phones_home(nonce, FACTS.release_id).status_code == 202
    until(lambda: client.operation(operation["id"])["is_final"])
    ended = client.operation(operation["id"])
    assert ended["phase"] == "succeeded", ended["error"]
    assert host.phones_home(nonce, FACTS.release_id).status_code == 200
    assert host.phones_home(nonce, "0" * 32).status_code == 410


def client_token(host: Host) -> str:
    return host.settings.keys.admin_token.reveal()


def be_contested(host: Host, client: Client) -> None:
    """A second deployment, whose ticket two come with; what they bring is secret, too."""
    first = dict(host.secrets)
    (operation,) = client.deploy(["r1n1"], "tiny@1")
    host.boots()
    assert host.hello("07" * 32).is_success
    host.writes()
    assert host.hello("aa" * 32).json()["code"] == "ticket_contested"
    until(lambda: client.operation(operation["id"])["is_final"])
    host.secrets = {
        **{f"first {name}": value for name, value in first.items()},
        **{f"second {name}": value for name, value in host.secrets.items()},
        "the second claimant's session": "aa" * 32,
    }


def processes_below(served: Served) -> Mapping[str, str]:
    """Return arguments and environment of the service's processes, by their name."""
    found = {}
    for pid, name in {served.process.pid: "serve", **served.children()}.items():
        for part in ("cmdline", "environ"):
            try:
                text = Path(f"/proc/{pid}/{part}").read_bytes().decode(errors="replace")
            except OSError:
                continue  # a child of a moment ago
            found[f"{part} of {name} {pid}"] = text
    return found


def what_others_may_read(served: Served, client: Client) -> dict[str, str]:
    """Return by its name every text that holds no secret: files, and what the API shows."""
    found = dict(processes_below(served))
    found["audit export"] = exported_audit(served)
    found["timeline"] = json.dumps(client.host_events("r1n1", limit=1000))
    found["operations"] = json.dumps(client.operations())
    found["hosts"] = json.dumps([client.host("r1n1"), client.hosts()])
    found["metrics"] = httpx.get(f"{served.api}/metrics", timeout=60).text
    return found


def exported_audit(served: Served) -> str:
    command = [
        sys.executable,
        "-m",
        "provisioner",
        "audit",
        "list",
        "-o",
        "json",
        "--limit",
        "1000",
    ]
    configured = {"PROVISIONER_CONFIG": str(served.folder / "provisioner.toml")}
    done = subprocess.run(
        ["env", *(f"{name}={value}" for name, value in configured.items()), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert "seed.taken" in done.stdout
    return done.stdout


def files_below(folder: Path) -> dict[str, bytes]:
    """Return every file of the installation but the keys, the database's and its WAL too."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != "keys" and path.name != "client.toml":
            with suppress(FileNotFoundError):  # it was there a moment ago
                found[str(name)] = path.read_bytes()
    return found


def ways_to_write(secret: str) -> Iterator[tuple[str, bytes]]:
    """Yield a secret in clear, as digits, and as base64, wherever in its text it begins."""
    clear = secret.encode()
    yield "in clear", clear
    yield "as digits", clear.hex().encode()
    for shift, begin in enumerate((0, 2, 3)):
        packed = base64.b64encode(b"." * shift + clear).rstrip(b"=")
        yield "as base64", packed[begin:-1]


def leaks(secrets: Mapping[str, str], places: Mapping[str, str | bytes]) -> list[str]:
    """Return where which secret was found, and how it is written there."""
    texts = {
        place: text if isinstance(text, bytes) else text.encode() for place, text in places.items()
    }
    return [
        f"{name} {how} in {place}"
        for name, secret in secrets.items()
        for how, way in ways_to_write(secret)
        for place, text in texts.items()
        if way in text
    ]


@pytest.fixture
def bmc(tmp_path: Path) -> Iterator[IpmiSim]:
    with running_ipmi_sim(tmp_path / "bmc") as sim:
        yield sim


def test_field_21_no_secret_is_found_where_others_can_read(config: Path, bmc: IpmiSim) -> None:
    """BMC passwords stood in logs, in `ps`, and in files that everybody could read."""
    with running_site(config, bmc) as (served, client):
        extra = client.create_token("somebody", "viewer").reveal()
        host = Host(served.settings)
        watched: dict[str, str] = {}
        deploy(host, client)
        watched |= processes_below(served)
        be_contested(host, client)
        watched |= what_others_may_read(served, client)
        keys = served.settings.keys
        secrets = {
            **host.secrets,
            "BMC password": BMC_PASSWORD,
            "user data": VARIABLE,
            "API token": extra,
            "first API token": keys.admin_token.reveal(),
            "master key": keys.master.reveal(),
        }
        while_running = files_below(config.parent)
        assert any(name.endswith("-wal") and data for name, data in while_running.items())
        log = served.log()
    assert leaks(secrets, watched) == []
    assert leaks(secrets, while_running) == []
    assert leaks(secrets, files_below(config.parent)) == []
    # What was looked at holds what it should, and the search can find something.
    assert "ticket_contested" in watched["audit export"]
    assert "r1n1" in log
    assert leaks({"host": "r1n1"}, {"log": log, "timeline": watched["timeline"]})


def test_a_secret_in_any_of_the_places_would_be_found() -> None:
    """In clear, packed into JSON, as base64 or as digits: the search is no decoration."""
    secret = {"x": VARIABLE}
    for text in (
        VARIABLE,
        json.dumps({"list": f"admin:{VARIABLE}"}),
        *(base64.b64encode(f"{'x' * n}{VARIABLE}: y".encode()).decode() for n in range(4)),
        VARIABLE.encode().hex(),
    ):
        assert len(leaks(secret, {"here": f"…{text}…"})) == 1
    assert leaks(secret, {"here": "nothing"}) == []
