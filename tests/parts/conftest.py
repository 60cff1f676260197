"""Fixtures that several part tests share."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from provisioner.core.fleet import Rules
from provisioner.core.recovery import Policy
from provisioner.imaging.archive import Archive
from provisioner.store.engine import open_engine
from provisioner.store.migrate import upgrade
from provisioner.store.sql_store import SqlStore
from tests.parts.postgres import Postgres, running_postgres
from tests.parts.recovery_site import with_releases
from tests.parts.service_site import (
    ACTOR,
    RAMDISK,
    STORED_BYTES,
    Agent,
    Site,
    profile_document,
    running_site,
)
from tests.parts.stores import opened_at
from tests.parts.test_imaging_archive import FACTS, an_archive, make_disk, publish


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that we support."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """The name of a database with all tables, to copy from."""
    url = postgres.new_database()
    engine = open_engine(url)
    upgrade(engine)
    engine.dispose()
    return str(engine.url.database)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "state.db"
    engine = open_engine(f"sqlite:///{path}")
    upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of each kind with all tables and no rows."""
    if request.param == "sqlite":
        path = tmp_path / "state.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database(request.getfixturevalue("postgres_template"))


@pytest.fixture
def store(migrated_url: str) -> Iterator[SqlStore]:
    with opened_at(migrated_url) as store:
        yield store


@pytest.fixture(scope="session")
def archive_of_two(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """A real archive with two signed releases, tiny@1 for any host and tiny@2 for BIOS only.
    Only to be read."""
    folder = tmp_path_factory.mktemp("archive")
    archive = an_archive(folder / "archive")
    for version, firmware in (("1", ("bios", "uefi")), ("2", ("bios",))):
        disk = make_disk(folder / f"{version}.raw", version.encode())
        facts = replace(FACTS, version=version, release_id=version * 32, firmware=firmware)
        publish(archive, disk, facts)
    return archive


@pytest.fixture(scope="session")
def ramdisk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one ramdisk in it, as far as the service looks at it."""
    folder = tmp_path_factory.mktemp("ramdisks")
    (folder / RAMDISK).mkdir()
    (folder / RAMDISK / "ramdisk.json").write_text("{}")
    (folder / RAMDISK / "initrd").write_text("")
    return folder


@pytest.fixture
def site(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    sqlite_template: Path,
    archive_of_two: Archive,
    ramdisk_folder: Path,
) -> Iterator[Site]:
    """A whole service on SQLite with two releases and the profile `web`; no host yet.

    Mark a test with `discovering` to have discovery switched on, and with `rules` to have
    other ones than two in flight.
    """
    path = tmp_path / "state.db"
    shutil.copy(sqlite_template, path)
    discovery = request.node.get_closest_marker("discovering") is not None
    marked = request.node.get_closest_marker("rules")
    rules = Rules(**marked.kwargs) if marked else None
    with running_site(
        f"sqlite:///{path}", archive_of_two, ramdisk_folder, discovery=discovery, rules=rules
    ) as site:
        for manifest in archive_of_two.releases():
            site.releases.register(manifest, STORED_BYTES, actor=ACTOR)
        site.profiles.save("web", profile_document(), actor=ACTOR)
        yield site


@pytest.fixture
def agent(site: Site) -> Agent:
    """The ramdisk of host r1n1, whose deployment waits for its ticket to come back."""
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    return Agent(site)


@pytest.fixture
def open_site(
    migrated_url: str, archive_of_two: Archive, ramdisk_folder: Path
) -> Iterator[Callable[..., Site]]:
    """Open the service over a database of each kind, with the given policy; a second time it
    is the same installation after a restart."""
    opened = []

    def open_(**policy: object) -> Site:
        chosen = replace(Policy(), **policy)  # type: ignore[arg-type] # fields by name
        manager = running_site(migrated_url, archive_of_two, ramdisk_folder, policy=chosen)
        opened.append(manager)
        return manager.__enter__()

    yield open_
    for manager in opened:
        manager.__exit__(None, None, None)


@pytest.fixture
def either_site(open_site: Callable[..., Site], archive_of_two: Archive) -> Site:
    """A whole service over a database of each kind, with two releases and a profile that a
    report alone makes healthy; no host yet."""
    return with_releases(open_site(), archive_of_two)
