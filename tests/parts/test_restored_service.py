"""The real service, started on a backup of its database that was made in the middle of things."""

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import httpx

from provisioner.service.sightings import MarkFile
from tests.parts.rack import INTO_NETWORK, Rack, patiently, request, running_rack
from tests.parts.served_lives import HOST, until

LIMIT_S: Final = 180.0


def is_at_the_end(mark: MarkFile, state: Path) -> bool:
    """Say whether the mark names the last row of the audit log."""
    found = mark.read()
    with closing(sqlite3.connect(state, timeout=LIMIT_S)) as database:
        ((last,),) = database.execute("SELECT max(number) FROM audit")
    return found is not None and found.number == last


def ends(rack: Rack, operation: str) -> str:
    with rack.lives.client() as client:
        until(
            lambda: patiently(lambda: client.operation(operation))["is_final"], "the end", LIMIT_S
        )
        return str(client.operation(operation)["phase"])


def test_field_06_a_service_on_a_restored_database_rebuilds_nothing_by_itself(
    tmp_path: Path,
) -> None:
    """The backup holds an effect that was being performed: the host was about to be switched
    off for a deployment that has succeeded since."""
    with running_rack(tmp_path) as rack:
        state = rack.lives.settings.data_dir / "state.db"
        rack.lives.begin()
        rack.lives.arm("stop worker bmc.power_off.before 1")
        with rack.lives.client() as client:
            operation = request(rack, client)
        until(rack.lives.has_fired, "the worker frozen", LIMIT_S)
        with sqlite3.connect(state) as source, sqlite3.connect(tmp_path / "backup") as target:
            source.backup(target)
        os.kill(rack.lives.pid_of("prov-worker"), signal.SIGCONT)
        assert ends(rack, operation) == "succeeded"
        mark = MarkFile(rack.lives.settings.data_dir / "high-water.json")
        until(lambda: is_at_the_end(mark, state), "the mark of all that happened", LIMIT_S)
        rack.lives.kill()

        for old in state.parent.glob("state.db*"):
            old.unlink()
        (tmp_path / "backup").rename(state)
        rack.host.forget()
        rack.lives.begin()
        with rack.lives.client() as client:
            health = httpx.get(
                f"http://{rack.lives.settings.api.listen}/healthz", timeout=60
            ).json()
            assert health["status"] == "observe_only"
            time.sleep(3)  # many looks at the queue and at what is due
            assert rack.host.happened() == []
            url = f"{rack.lives.settings.boot.url}/boot/ipxe?mac=52:54:00:77:00:01"
            assert "kernel" not in httpx.get(url, timeout=60).text
            assert client.operation(operation)["phase"] == "netbooting", "as in the backup"

            rack.lives.kill()
            rack.lives.begin()
            assert client.reconciliation()["is_observing"], "a restart changes nothing"
            client.reconcile(client.reconciliation()["digest"])
            assert client.operation(operation)["error"]["code"] == "database_restored"
            until(lambda: rack.in_queue() == 0, "the queue of then", LIMIT_S)
            assert rack.host.happened() == []
            again = request(rack, client)
            assert ends(rack, again) == "succeeded"
            assert rack.host.happened() == INTO_NETWORK
            assert client.host(HOST)["state"] == "active"
            assert client.verify_audit() > 0
