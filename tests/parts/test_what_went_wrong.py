"""What went wrong elsewhere, done here on purpose: the controller moves or forgets, images and
profiles change, secrets are the default ones. No host is rebuilt by any of it."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from provisioner import keys
from provisioner.core.bootplan import LocalDisk
from provisioner.core.model import HostState, Phase
from provisioner.errors import ConfigError, TrustError
from provisioner.imaging.archive import Archive
from provisioner.service.agents import TicketRefused, TokenRefused
from provisioner.settings import CONFIG_FILE, load
from provisioner.setup import Plan, initialise
from tests.parts.service_site import (
    ACTOR,
    STORED_BYTES,
    Agent,
    Site,
    profile_document,
    running_site,
)


def database_of(site: Site) -> Path:
    return Path(str(site.store._engine.url.database))


def copy_of(site: Site, target: Path) -> Path:
    """Return a backup of the database, as somebody takes one while the service runs."""
    with (
        closing(sqlite3.connect(database_of(site))) as now,
        closing(sqlite3.connect(target)) as old,
    ):
        now.backup(old)
    return target


def test_field_06_a_controller_that_moved_and_knows_nobody_rebuilds_nobody(
    agent: Agent,
    tmp_path: Path,
    archive_of_two: Archive,
    ramdisk_folder: Path,
    sqlite_template: Path,
) -> None:
    """The hosts still ask, their tickets and tokens are the old controller's."""
    agent.until(Phase.WRITING)
    fresh = tmp_path / "fresh.db"
    fresh.write_bytes(sqlite_template.read_bytes())
    with running_site(f"sqlite:///{fresh}", archive_of_two, ramdisk_folder) as moved:
        assert isinstance(moved.ask(1), LocalDisk)
        agent.site = moved
        with pytest.raises(TicketRefused):
            agent.hello()
        for call in (agent.authorise, agent.progress, agent.seed, agent.done):
            with pytest.raises(TokenRefused):
                call()
        moved.worker.tick()
        assert moved.outbox.waiting == []
        assert moved.operations.list() == []


def test_field_06_a_restored_database_gives_no_host_to_what_ran_before_or_since(
    site: Site, tmp_path: Path, archive_of_two: Archive, ramdisk_folder: Path
) -> None:
    """What was under way at the backup has ended since, and what began since is not known."""
    site.add_host()
    first = site.deploy("r1n1")
    site.perform()
    early = Agent(site).boots()
    old = copy_of(site, tmp_path / "backup.db")
    early.hello()
    early.failed()
    site.clock.pass_(1)
    site.deploy("r1n1")
    site.perform()
    late = Agent(site).boots()
    late.hello()
    with running_site(f"sqlite:///{old}", archive_of_two, ramdisk_folder) as restored:
        late.site = restored
        for call in (late.authorise, late.seed, late.progress):
            with pytest.raises(TokenRefused):
                call()
        with pytest.raises(TicketRefused):
            late.hello()
        with pytest.raises(TrustError):
            late.phone_home(nonce=late.ticket)
        # Long after the backup its ticket has expired: the host boots its own disk.
        restored.clock.pass_(3600)
        assert isinstance(restored.ask(1), LocalDisk)
        restored.worker.end_overdue()
        assert restored.hosts.show("r1n1").state is not HostState.ACTIVE
        assert restored.operations.show(first.id).generation == 1


def test_field_07_no_change_of_image_or_profile_rebuilds_any_host(
    site: Site, archive_of_two: Archive
) -> None:
    """How can they be sure that changing the image does not rebuild every host at once?
    Only a request that names the hosts makes operations, and each of them pins what it said."""
    for number in (1, 2, 3):
        site.add_host(number, labels={"group": "web"})
    (before,) = site.operations.request_deployment(["r1n1"], "tiny@1", options={}, actor=ACTOR)
    for manifest in archive_of_two.releases():
        site.releases.register(manifest, STORED_BYTES, actor=ACTOR)
    site.releases.promote("tiny@2", "canary", actor=ACTOR)
    site.releases.promote("tiny@1", "canary", actor=ACTOR)
    changed = {**profile_document(), "cloud_config": {"hostname": "changed"}}
    site.profiles.save("web", changed, actor=ACTOR)
    site.hosts.change("r1n2", labels={"group": "db"}, actor=ACTOR)
    site.worker.tick()
    assert [one.id for one in site.operations.list()] == [before.id]
    pinned = site.at(before)
    assert (pinned.release, pinned.pins["profile"]) == (before.release, before.pins["profile"])
    with site.store.read() as tx:
        selection = tx.selection(before.pins["request"])
    assert selection is not None
    assert selection.hosts == (before.host_id,)


DEFAULTS: dict[str, Callable[[Path], object]] = {
    "minus one": lambda folder: (folder / keys.ADMIN_TOKEN).write_text("-1"),
    "one letter": lambda folder: (folder / keys.ADMIN_TOKEN).write_text("a" * 64),
    "an empty token": lambda folder: (folder / keys.ADMIN_TOKEN).write_text(""),
    "no token": lambda folder: (folder / keys.ADMIN_TOKEN).unlink(),
    "zeros": lambda folder: (folder / keys.MASTER_KEY).write_text("00" * 32),
    "a password": lambda folder: (folder / keys.MASTER_KEY).write_text("changeme"),
    "no key": lambda folder: (folder / keys.MASTER_KEY).unlink(),
}


@pytest.mark.parametrize("spoil", DEFAULTS.values(), ids=DEFAULTS)
def test_public_a_default_or_missing_secret_starts_no_service(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    """A shared secret was always "-1", and nobody looked."""
    folder = tmp_path / "installation"
    initialise(folder, Plan(listen_address="10.77.0.1"))
    load(folder / CONFIG_FILE)
    spoil(folder / keys.FOLDER)
    with pytest.raises(ConfigError, match=r"key (master\.key|admin\.token|/)"):
        load(folder / CONFIG_FILE)


def test_public_two_installations_share_no_secret(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        initialise(tmp_path / name, Plan(listen_address="10.77.0.1"))
        found = load(tmp_path / name / CONFIG_FILE).keys
        made.append({found.master.reveal(), found.admin_token.reveal()})
    assert not made[0] & made[1]
