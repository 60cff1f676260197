"""Brings a database to the tables of this version, ours and those of the effects."""

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, text

from ..errors import ConfigError
from .durable import prepare_effects
from .serving import served

MIGRATIONS: Final = Path(__file__).parent / "migrations"
# Any number that nothing else in the database takes an advisory lock on.
MIGRATION_LOCK: Final = 0x70726F77


def upgrade(engine: Engine) -> None:
    """Run the migrations that are missing, in one transaction. Repeatable; of two processes
    that begin at once, one waits.

    Raises ConfigError when the SQLite file cannot be made, and for a database that a newer
    version has changed, to which nothing is done; Unavailable when the database does not
    serve, such as on a full disk.
    """
    if engine.dialect.name == "sqlite":
        _create_file(Path(str(engine.url.database)))
    with served():
        with engine.begin() as connection:
            if engine.dialect.name != "sqlite":
                lock = text("SELECT pg_advisory_xact_lock(:number)")
                connection.execute(lock, {"number": MIGRATION_LOCK})
            _migrate(connection)
        prepare_effects(engine)


def _create_file(path: Path) -> None:
    # SQLite would create it readable for all; its companions (-wal, -shm) take its mode.
    try:
        path.touch(mode=0o600, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the database {path} cannot be created") from error


def _migrate(connection: Connection) -> None:
    # Alembic takes a while to import, and only whoever opens a database needs it.
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    newer = sorted(set(MigrationContext.configure(connection).get_current_heads()) - known)
    if newer:
        raise ConfigError(
            "the database is newer than this version of provisioner",
            expected=f"{scripts.get_current_head()} or older",
            found=", ".join(newer),
            hint="start the version that made it or a later one, or restore the backup from "
            "before the upgrade",
        )
    command.upgrade(config, "head")
