"""The migrations make what the code expects, and the indexes carry ten thousand hosts."""

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from provisioner.core.contracts import Store
from provisioner.core.model import OperationId, ReleaseRow
from provisioner.errors import ConfigError
from provisioner.store import tables
from provisioner.store.engine import open_engine
from provisioner.store.migrate import MIGRATIONS, upgrade
from tests.parts.stores import a_host, opened


def test_the_migrations_make_the_tables_of_the_code(migrated_url: str) -> None:
    engine = open_engine(migrated_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_name": lambda name, kind, _: kind != "table" or is_ours(name)},
        )
        assert compare_metadata(context, tables.metadata) == []
    engine.dispose()


def is_ours(name: str | None) -> bool:
    return name in tables.metadata.tables


def test_an_upgrade_can_be_repeated_and_loses_nothing(database_url: str) -> None:
    engine = open_engine(database_url)
    upgrade(engine)
    with opened(engine) as store:
        with store.begin() as tx:
            tx.add_host(a_host())
        upgrade(engine)
        with store.read() as tx:
            assert tx.hosts() == [a_host()]


def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(database_url: str) -> None:
    engine = open_engine(database_url)
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer than this version of provisioner") as refused:
        upgrade(engine)
    assert refused.value.found == "9999"
    assert "0007" in str(refused.value.expected)
    assert "backup" in str(refused.value.hint)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT * FROM alembic_version")).all() == [("9999",)]
    engine.dispose()


def test_channels_come_to_a_database_that_has_releases(database_url: str) -> None:
    """What the first version wrote stays as it was, and has no fate yet."""
    engine = open_engine(database_url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text(
                "INSERT INTO releases (digest, image, version, size_bytes, used_bytes,"
                " stored_bytes, firmware, release_id, published_at) VALUES"
                " ('ab', 'web', '1', 3, 2, 1, '[\"bios\"]', 'cd',"
                " '2026-11-23T12:00:00.000000+00:00')"
            )
        )
    upgrade(engine)
    with opened(engine) as store, store.read() as tx:
        at = datetime(2026, 11, 23, 12, tzinfo=UTC)
        expected = ReleaseRow("ab", "web", "1", 3, 2, 1, ("bios",), "cd", at)
        assert tx.releases() == [expected]
        assert tx.channels() == []


def test_what_is_under_way_at_the_upgrade_goes_on(database_url: str) -> None:
    """The guard asks who was selected, and an operation from before says nothing of it."""
    engine = open_engine(database_url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    at, day = "'2026-11-23T12:00:00.000000+00:00'", "'2026-11-23T12:05:00.000000+00:00'"
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.execute(
            text(
                "INSERT INTO hosts (id, name, state, macs, local_boot, generation, is_confirmed,"
                " is_protected, in_maintenance, labels, created_at) VALUES ('host_1', 'r1n1',"
                " 'dirty', '[]', 'exit', 1, true, false, false, '{\"group\"\\: \"web\"}', "
                f"{at})"
            )
        )
        for number, phase in enumerate(("writing", "succeeded")):
            connection.execute(
                text(
                    "INSERT INTO operations (id, host_id, kind, phase, generation, rung, pins,"
                    " options, requested_by, requested_at, phase_at, phase_seconds, progress,"
                    f" evidence) VALUES ('op_{number}', 'host_1', 'deployment', '{phase}', 1, 0,"
                    " '{\"ramdisk\"\\: \"cd\"}', '{}', 'anna', "
                    f"{at}, {day}, '{{}}', '{{}}', '{{}}')"
                )
            )
    upgrade(engine)
    with opened(engine) as store, store.read() as tx:
        operation = tx.operation(OperationId("op_0"))
        selection = tx.selection(operation.pins["request"])
        assert selection is not None
        assert selection.hosts == ("host_1",)
        assert (selection.digest, "cd") == (operation.pins["selection"], operation.pins["ramdisk"])
        assert selection.requested_by == operation.requested_by
        assert operation.started_at == operation.phase_at
        assert tx.operation(OperationId("op_1")).started_at is None
        assert tx.group_sizes(["web"]) == {"web": (1, 0)}
        assert not tx.breaker().is_open


def test_two_processes_may_upgrade_at_once(database_url: str) -> None:
    engines = [open_engine(database_url) for _ in range(2)]
    threads = [threading.Thread(target=upgrade, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = inspect(engines[0]).get_table_names()
    assert set(tables.metadata.tables) <= set(found)
    for engine in engines:
        engine.dispose()


def test_every_migration_is_numbered_and_says_when_it_is_safe() -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    revisions = list(reversed(list(scripts.walk_revisions())))
    assert [script.revision for script in revisions] == [
        f"{number:04}" for number in range(1, len(revisions) + 1)
    ]
    for script in revisions:
        assert Path(script.path).name.startswith(f"v{script.revision}_")
        assert "\nSafe: " in script.doc + "\n" + script.longdoc


QUERIES = {
    "host by name": "SELECT * FROM hosts WHERE name = 'r1n1'",
    "host by MAC": "SELECT * FROM hosts WHERE id IN (SELECT host_id FROM nics WHERE mac = 'x')",
    "hosts by UUID": "SELECT * FROM hosts WHERE uuid = 'x'",
    "page of hosts": "SELECT * FROM hosts WHERE name > 'r1' ORDER BY name LIMIT 100",
    "open operation": f"SELECT * FROM operations WHERE host_id = 'x' AND {tables.UNFINISHED}",
    "overdue": "SELECT * FROM operations WHERE deadline_at <= '2026-11-23 12:00:00+00:00'",
    "to follow": "SELECT * FROM operations WHERE follow_up_at <= '2026-11-23 12:00:00+00:00'",
    "to follow on a host": "SELECT * FROM operations WHERE host_id = 'x' "
    "AND follow_up_at IS NOT NULL",
    "failed on a host": "SELECT * FROM release_failures WHERE host_id = 'x' ORDER BY at DESC",
    "by phase": "SELECT * FROM operations WHERE phase IN ('writing', 'queued')",
    "newest": "SELECT * FROM operations ORDER BY requested_at DESC, id DESC LIMIT 100",
    "of a host": "SELECT * FROM operations WHERE host_id = 'x' ORDER BY requested_at DESC LIMIT 9",
    "open ticket": "SELECT * FROM tickets WHERE host_id = 'x' AND consumed_at IS NULL "
    "ORDER BY generation DESC, expires_at DESC LIMIT 1",
    "permissions": "SELECT * FROM tickets WHERE operation_id = 'x'",
    "timeline": "SELECT * FROM events WHERE host_id = 'x' AND number > 5 ORDER BY number LIMIT 9",
    "tests of a release": "SELECT * FROM release_tests WHERE digest = 'x' ORDER BY number DESC",
    "channel": "SELECT * FROM channels WHERE image = 'x' AND name = 'y'",
    "end of the audit log": "SELECT * FROM audit ORDER BY number DESC LIMIT 1",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES.keys())
def test_no_query_of_every_day_walks_a_whole_table(migrated_url: str, query: str) -> None:
    engine = open_engine(migrated_url)
    assert not whole_tables(engine, query)
    engine.dispose()


def whole_tables(engine: Engine, query: str) -> list[str]:
    """The lines of the query plan that read a table from end to end."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            plan = connection.execute(text(f"EXPLAIN QUERY PLAN {query}")).all()
            lines = [row[3] for row in plan]
            return [
                line
                for line in lines
                if line.startswith("SCAN")
                and "INDEX" not in line
                and not ("audit" in line and "ORDER BY number" in query)
            ]
        # Empty tables would be scanned in any case: ask for what it would do with large ones.
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        plan = connection.execute(text(f"EXPLAIN {query}")).all()
        return [row[0] for row in plan if "Seq Scan" in row[0]]


def test_the_sqlite_file_is_private_and_its_folder_must_exist(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'state.db'}")
    upgrade(engine)
    with engine.begin():
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    engine.dispose()
    with pytest.raises(ConfigError, match="cannot be created"):
        upgrade(open_engine(f"sqlite:///{tmp_path / 'none' / 'state.db'}"))


@pytest.mark.parametrize("url", ["mysql://u:geheim@h/d", "sqlite://", "sqlite:///:memory:", "?"])
def test_any_other_database_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_engine(url)
    assert "geheim" not in str(refused.value.as_dict())


def test_a_bmc_password_is_nowhere_in_the_database(migrated_url: str, store: Store) -> None:
    with store.begin() as tx:
        tx.add_host(a_host())
    engine = open_engine(migrated_url)
    with engine.connect() as connection:
        sealed = connection.execute(text("SELECT bmc_password FROM hosts")).scalar_one()
        assert b"bmc-password-in-clear" not in bytes(sealed)
        everything = str(connection.execute(text("SELECT * FROM hosts")).all())
        assert "bmc-password-in-clear" not in everything
    engine.dispose()
