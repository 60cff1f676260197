"""A site under attack, and what is asked of it afterwards: was it noticed, did anything leak?

Every secret of the site is searched for in all that others may read, and in all that went over
the wires.
"""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from provisioner.core.model import Json, OperationId
from provisioner.keys import RELEASE_KEY
from provisioner.lab.site import PROFILE, Site, lab_profile
from provisioner.service.chance import Derived
from tests.lab.attacker import Attacker, Twin
from tests.lab.capture import Capture, segments_in, texts_in
from tests.lab.sites import MIB, TABLE_BYTES, deploy, timeline
from tests.parts.test_canaries import leaks

DISK_MIB: Final = 160
CANARY: Final = "canary-seed-of-the-lab-51c0"


@dataclass
class Attack:
    """A site under attack: what the attacker holds, and what went over the bridge."""

    site: Site
    attacker: Attacker
    captures: list[Capture]
    directory: Path
    secrets: dict[str, str] = field(default_factory=dict)
    twins: list[Twin] = field(default_factory=list)

    def query(self, name: str) -> str:
        """Return what a host's firmware says of itself when it asks for its boot script."""
        host = self.site.lab.host(name)
        return f"mac={host.mac}&uuid={host.uuid}&serial={host.serial}&platform=pcbios"

    def asks_as(self, name: str) -> str:
        """Let the attacker ask for a host's boot script, from its own address."""
        url = self.site.settings.boot.url
        script: str = self.attacker.does("fetch", url=url, query=self.query(name))
        return script

    def calls(self, call: str, body: Json, token: str = "") -> Json:
        """Let the attacker make a call of the agent's or the reporter's; token "mine" is the
        one that it was given."""
        url = self.site.settings.agent.url
        answer: Json = self.attacker.does("call", url=url, path=call, body=body, token=token)
        return answer

    def papers(self, name: str, *, disk_serial: str | None = None) -> Json:
        """Return a hello in the host's name, with everything but a ticket."""
        host = self.site.lab.host(name)
        disk = {
            **{"name": "vda", "serial": disk_serial or host.disk_serial, "wwn": None},
            **{"size_bytes": host.disks[0].size_bytes, "rotational": True, "bus": "virtio"},
        }
        inventory = {
            **{"cpu": {"model": "x", "count": 1}, "memory_bytes": 1, "firmware": "bios"},
            **{"uuid": host.uuid, "serial": host.serial, "vendor": None, "model": None},
            **{"disks": [disk], "bmc_address": None},
            "nics": [{"name": "eth0", "mac": host.mac, "link": True}],
        }
        return {"inventory": inventory, "agent_version": "test", "session": "66" * 32, "attempt": 1}


def save_profile(site: Site) -> None:
    document = lab_profile(site.ssh_key)
    document["variables"] = {"password": CANARY}
    document["cloud_config"] |= {"chpasswd": {"list": "root:${vars.password}"}}
    document["disk"] = {"bus": "virtio", "size_min_bytes": DISK_MIB * MIB}
    with site.client() as client:
        client.save_profile(PROFILE, document)


# What is asked of the site afterwards.


def begun(attack: Attack, name: str) -> str:
    """Request a deployment, and keep its secrets to be searched for."""
    operation = deploy(attack.site, [name], "tiny@1")[name]
    with attack.site.client() as client:
        generation = client.operation(operation)["generation"]
    derived = Derived(bytes.fromhex(attack.site.settings.keys.master.reveal()))
    nonce = derived.nonce(OperationId(operation), generation).reveal()
    ticket = derived.ticket(OperationId(operation), generation).reveal()
    attack.secrets[f"nonce of {operation}"] = nonce.rpartition(".")[2]
    attack.secrets[f"ticket of {operation}"] = ticket.rpartition(".")[2]
    return operation


def has_line(site: Site, name: str, operation: str, text: str) -> bool:
    with site.client() as client:
        events = client.host_events(name, limit=1000)
    return any(
        text in event["text"] and event.get("operation") in (operation, None) for event in events
    )


def audit_rows(site: Site, action: str, operation: str) -> list[Json]:
    with site.client() as client:
        rows = client.audit(limit=1000)
    return [row for row in rows if row["action"] == action and operation in json.dumps(row)]


def is_reported(attack: Attack, name: str, operation: str) -> float:
    """Check that a contest is in the audit log and in the host's timeline, and return when it
    was in both."""
    site = attack.site
    with site.client() as client:
        rows = [row for row in client.audit(limit=1000) if row["action"] == "ticket_contested"]
        events = client.host_events(name, limit=1000)
        assert client.verify_audit() > 0
    lines = [one for one in events if one["text"].startswith("ticket_contested: ")]
    assert rows, timeline(site, name)
    assert lines, timeline(site, name)
    assert rows[-1]["subject"] == name
    assert lines[-1]["operation"] == operation
    return max(datetime.fromisoformat(one["at"]).timestamp() for one in (rows[-1], lines[-1]))


def last_connection(attack: Attack, address: str, before: float, after: float) -> float:
    """Return when `address` last called the agent listener in that time, by the capture."""
    port = attack.site.settings.agent.listen.port
    found = [
        segment.at
        for segment in segments_in(attack.captures[0].file)
        if segment.opens
        and segment.source[0] == address
        and segment.target[1] == port
        and after <= segment.at <= before
    ]
    assert found, f"{address} made no call before the contest"
    return max(found)


def no_seed_left(attack: Attack, name: str, operation: str) -> None:
    assert not audit_rows(attack.site, "seed.taken", operation)
    assert not has_line(attack.site, name, operation, "seed handed out")


def cannot_boot(disk: Path) -> None:
    """There is no partition table on it, and no seed."""
    data = disk.read_bytes()
    assert not data[:TABLE_BYTES].strip(b"\0")
    assert CANARY.encode() not in data


# Canaries.


def secrets_of(site: Site) -> dict[str, str]:
    keys = site.settings.keys
    with site.client() as client:
        extra = client.create_token("somebody", "viewer").reveal()
    pem = {
        "release key": (keys.folder / RELEASE_KEY).read_text(),
        "key of the agent listener": keys.agent_tls_key.read_text(),
    }
    return {
        "seed": CANARY,
        "API token": extra,
        "first API token": keys.admin_token.reveal(),
        "master key": keys.master.reveal(),
        **{name: max(text.splitlines()[1:-1], key=len) for name, text in pem.items()},
        **{f"BMC password of {host.name}": host.bmc.password for host in site.lab.hosts},
    }


def assert_nothing_leaked(attack: Attack) -> None:
    """Search for every secret; a ticket may be where its host was told it."""
    site = attack.site
    tickets = {name for name in attack.secrets if name.startswith("ticket of ")}
    places = what_others_may_read(attack)
    assert leaks(attack.secrets, places) == []
    wires: dict[str, str | bytes] = {}
    for file in (attack.captures[0].file, attack.captures[1].file, *_captures_of(attack)):
        wires |= dict(texts_in(file))
    hosts = (*site.lab.hosts, *(twin.host for twin in attack.twins))
    for file in (attack.attacker.console, *(Path(host.console) for host in hosts)):
        wires[str(file)] = file.read_bytes() if file.exists() else b""
    kept = {name: text for name, text in attack.secrets.items() if name not in tickets}
    assert leaks(kept, wires) == []
    # What was searched holds what it should: the boot scripts, with their tickets, in clear.
    heard = {name for name in tickets if leaks({name: attack.secrets[name]}, wires)}
    script = {"boot script": "provisioner.ticket="}
    assert heard or not _ever_offered(site), "no ticket was heard"
    assert leaks(script, wires) or not _ever_offered(site)
    assert leaks({"the attacker's own words": "attacker: "}, wires)


def _ever_offered(site: Site) -> bool:
    return any(
        "deploy ramdisk" in line for host in site.lab.hosts for line in timeline(site, host.name)
    )


def _captures_of(attack: Attack) -> list[Path]:
    return [attack.attacker.capture, *(twin.capture for twin in attack.twins)]


def what_others_may_read(attack: Attack) -> Mapping[str, str | bytes]:
    """Return logs, audit log, timelines, the database and a backup of it."""
    site = attack.site
    found: dict[str, str | bytes] = {}
    with site.client() as client:
        found["audit log"] = json.dumps(client.audit(limit=1000))
        found["operations"] = json.dumps(client.operations())
        for host in site.lab.hosts:
            found[f"timeline of {host.name}"] = json.dumps(
                client.host_events(host.name, limit=1000)
            )
            found[host.name] = json.dumps(client.host(host.name))
    for file in site.directory.glob("serve-*.log"):
        found[file.name] = file.read_bytes()
    database = site.settings.data_dir / "state.db"
    for file in database.parent.glob("state.db*"):
        found[file.name] = file.read_bytes()
    found["backup"] = backup_of(database, attack.directory / "backup.db")
    assert b"ticket" in found["state.db"]
    return found


def backup_of(database: Path, target: Path) -> bytes:
    """Copy the database as SQLite does while others write to it, and return the copy."""
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    return target.read_bytes()
