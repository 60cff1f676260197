"""Lines of the field notes that no other test speaks of: each does what people report."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from provisioner.core.bootplan import Ramdisk
from provisioner.core.model import HostState, Phase
from provisioner.imaging.archive import Archive
from provisioner.service.ramdisks import Ramdisks
from provisioner.web.api import create_app
from provisioner.web.api.app import PREFIX
from tests.parts.command_line import Cli, commands_of
from tests.parts.http_listener import listening
from tests.parts.recovery_site import request, running, with_a_profile_that_proves
from tests.parts.service_site import (
    ACTOR,
    RAMDISK,
    Agent,
    Site,
    profile_document,
    running_site,
)

ANOTHER_RAMDISK = "ef" * 32


@pytest.fixture
def cli(site: Site) -> Iterator[Cli]:
    with commands_of(site) as cli:
        yield cli


def test_field_08_a_host_is_rebuilt_with_nothing_changed_and_gets_its_user_data_anew(
    site: Site,
) -> None:
    """The same release again is no reason to refuse; what changed is the profile alone."""
    with_a_profile_that_proves(site)
    host = running(site)
    document = site.profiles.show("web").document
    changed = {**document["cloud_config"], "hostname": "another"}
    site.profiles.save("web", {**document, "cloud_config": changed}, actor=ACTOR)

    first = Agent(site).operation()
    again = request(site, "tiny@1")
    site.worker.start_queued()
    site.perform()
    agent = Agent(site).until(Phase.WRITING)
    seed = agent.seed()
    assert again.release == first.release == host.release
    assert yaml.safe_load(seed["user-data"])["hostname"] == "another"
    instance = yaml.safe_load(seed["meta-data"])["instance-id"]
    assert again.id in instance
    assert first.id not in instance


def test_field_19_a_ramdisk_that_is_still_being_written_is_nobodys(tmp_path: Path) -> None:
    """It has its name only once it is whole; a copy that somebody makes by hand has its
    description last, as `ls` shows it."""
    shelf = Ramdisks(tmp_path)
    (tmp_path / ".new-abc" / "ramdisk").mkdir(parents=True)
    (tmp_path / ".new-abc" / "ramdisk" / "ramdisk.json").write_text("{}")
    (tmp_path / RAMDISK).mkdir()
    (tmp_path / RAMDISK / "initrd").write_bytes(b"half")
    assert shelf.newest_or_none() is None
    (tmp_path / RAMDISK / "ramdisk.json").write_text("{}")
    assert shelf.newest() == RAMDISK


def test_field_27_who_asks_for_its_data_has_not_succeeded(agent: Agent, site: Site) -> None:
    """Neither the seed that was fetched, nor the agent's end, nor a first report is a host in
    service: its health has to hold for the soak time."""
    operation = agent.operation()
    agent.until(Phase.WRITING)
    agent.seed()
    assert site.phase(operation) is Phase.WRITING
    agent.progress("verifying")
    agent.done()
    site.perform()
    assert site.phase(operation) is Phase.BOOTING
    agent.phone_home()
    site.worker.check(operation.id)
    assert site.phase(operation) is Phase.PROVING
    assert site.hosts.show("r1n1").state is HostState.DIRTY
    assert site.hosts.show("r1n1").release is None


DESTRUCTIVE = (
    ("reimage", "--release", "tiny@1"),
    ("reimage",),
    ("host", "delete"),
    ("host", "inspect"),
    ("host", "power"),
    ("host", "power", "off"),
    ("host", "release"),
    ("operation", "cancel"),
    ("image", "revoke"),
    ("profile", "delete"),
)


@pytest.mark.parametrize("words", DESTRUCTIVE, ids=" ".join)
def test_public_a_command_without_its_target_does_nothing(
    cli: Cli, site: Site, words: tuple[str, ...]
) -> None:
    """The tool's target flag was missing, and everything restarted."""
    for number in (1, 2):
        site.add_host(number)
    before = site.texts()
    refused = cli(*words, exit_code=2)
    assert "Missing argument" in refused.stderr or "needs" in refused.stderr
    assert site.texts() == before
    assert site.bmc(1).exchanges == site.bmc(2).exchanges == []


def test_public_a_deployment_goes_on_with_what_it_was_planned_with(
    agent: Agent, site: Site, tmp_path: Path, archive_of_two: Archive
) -> None:
    """A script was replaced while it ran: here a newer ramdisk and another profile appear."""
    planned = agent.operation()
    document = profile_document()
    changed = {**document["cloud_config"], "hostname": "another"}
    site.profiles.save("web", {**document, "cloud_config": changed}, actor=ACTOR)
    newer = tmp_path / "ramdisks"
    for digest in (RAMDISK, ANOTHER_RAMDISK):
        (newer / digest).mkdir(parents=True)
        (newer / digest / "ramdisk.json").write_text("{}")
    os.utime(newer / RAMDISK, (0, 0))
    assert Ramdisks(newer).newest() == ANOTHER_RAMDISK

    url = f"sqlite:///{site.store._engine.url.database}"
    with running_site(url, archive_of_two, newer) as after_a_restart:
        plan = after_a_restart.ask()
        assert isinstance(plan, Ramdisk)
        assert plan.digest == planned.pins["ramdisk"] == RAMDISK
        agent.site = after_a_restart
        agent.until(Phase.WRITING)
        assert yaml.safe_load(agent.seed()["user-data"])["hostname"] == "r1n1"


@pytest.mark.parametrize("path", ["/hosts", "/deployments", "/profiles/web"])
def test_public_a_form_with_parts_is_not_even_parsed(site: Site, path: str) -> None:
    """Werkzeug's multipart parser had holes; no route of ours takes what it parses."""
    token = site.tokens.create("admin", "admin", expires_in=None, actor=ACTOR).reveal()
    with listening(create_app(site, stopping=threading.Event())) as url:
        verb = "PUT" if path.startswith("/profiles") else "POST"
        answer = httpx.request(
            verb,
            url + PREFIX + path,
            headers={"Authorization": f"Bearer {token}"},
            files={"name": ("x", b"r1n1")},
            data={"name": "r1n1", "hosts": "r1n1", "release": "tiny@1"},
            timeout=60,
        )
    assert 400 <= answer.status_code < 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert site.hosts.list() == []


@pytest.mark.parametrize(
    "release", ["file:///etc/shadow", "../../keys", "http://10.0.0.1/x", "/etc/passwd", "tiny@../1"]
)
def test_public_a_deployment_names_a_release_and_never_a_place(site: Site, release: str) -> None:
    site.add_host()
    before = site.texts()
    with pytest.raises(Exception, match=r"there is no release|too short|no channel"):
        site.operations.request_deployment(["r1n1"], release, options={}, actor=ACTOR)
    assert site.texts() == before
    assert site.hosts.show("r1n1").generation == 0
