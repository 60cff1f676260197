"""The service is killed three times during one deployment, which goes on and succeeds."""

import sqlite3
from typing import Any

import pytest

from provisioner.lab.site import Site, lab_profile
from tests.lab.attacker import standing_still
from tests.lab.conftest import Fleet
from tests.lab.sites import BOOT_LIMIT, deploy, host_of, reached, timeline, until

pytestmark = pytest.mark.lab

# Long enough for the soak to be under way when the kill comes.
SOAK_S = 8


def rows(fleet: Fleet, query: str, *values: str) -> list[tuple[Any, ...]]:
    """Read the database past the service."""
    path = fleet.site.settings.data_dir / "state.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        return database.execute(query, values).fetchall()


def test_field_04_a_deployment_survives_three_kills_of_the_service(fleet: Fleet) -> None:
    site, name = fleet.site, fleet.names[0]
    with site.client() as client:
        document = lab_profile(site.ssh_key, soak_s=SOAK_S)
        client.save_profile("patient", document)
        client.change_host(name, {"profile": "patient"})
    before = host_of(site, name)
    release = fleet.newer if fleet.running_on(name) == fleet.older else fleet.older
    deployments = len(rows(fleet, "select id from operations"))
    permitted, boots = _permissions(fleet, name), len(site.lab.boots(name))
    operation = deploy(site, [name], release.name)[name]

    reached(site, operation, "netbooting")
    until("the host is started", lambda: is_started(site, name, boots), BOOT_LIMIT)
    # Firmware that nobody answers gives up: another rung then, and not what is shown here.
    with standing_still(site.lab.host(name)):
        is_killed_and_comes_back(fleet, operation, "netbooting")
    for phase in ("writing", "proving"):
        reached(site, operation, phase)
        is_killed_and_comes_back(fleet, operation, phase)

    ended = reached(site, operation, "succeeded")
    host = host_of(site, name)
    assert (host["state"], host["release"]) == ("active", release.digest)
    assert host["generation"] == ended["generation"] == before["generation"] + 1
    assert ended["rung"] == 0, "no ticket was lost"
    assert len(rows(fleet, "select id from operations")) == deployments + 1
    tickets = rows(
        fleet,
        "select generation, consumed_at is not null from tickets where operation_id = ?",
        operation,
    )
    assert tickets == [(ended["generation"], 1)]
    tokens = rows(fleet, "select generation from agent_tokens where operation_id = ?", operation)
    assert tokens in ([], [(ended["generation"],)])
    assert _permissions(fleet, name) == permitted + 1
    with site.client() as client:
        moves = [row for row in client.audit(limit=1000) if row["detail"].get("operation")]
        mine = [row["action"] for row in moves if row["detail"]["operation"] == operation]
        assert mine.count("deployment.writing") == 1
        assert mine.count("deployment.succeeded") == 1
        assert mine.count("seed.taken") == 1
        assert client.verify_audit() > 0


def is_started(site: Site, name: str, boots: int) -> bool:
    """Say whether the host is on, and was started once more than `boots` times."""
    return len(site.lab.boots(name)) > boots and site.lab.status_of(name).power == "on"


def is_killed_and_comes_back(fleet: Fleet, operation: str, phase: str) -> None:
    fleet.site.kill()
    kept = rows(fleet, "select phase from operations where id = ?", operation)
    assert kept[0][0] in (phase, "verifying", "preparing"), "what was saved is the truth"
    fleet.site.start()


def _permissions(fleet: Fleet, name: str) -> int:
    return sum("may write" in line for line in timeline(fleet.site, name))
