"""The tables, as SQLAlchemy sees them; `migrations/` makes them. No queries."""

from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TextClause,
    TypeDecorator,
    text,
)
from sqlalchemy.types import TypeEngine

from ..core.model import FINAL, Phase

# Named by rule, so that a later migration can name what it changes on either database.
metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Moment(TypeDecorator[datetime]):
    """An aware UTC datetime. SQLite has no such type: there it is text of one width, which
    sorts as time does. A naive datetime is a bug and is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(String(32))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone")
        moment = value.astimezone(UTC)
        if dialect.name == "sqlite":
            return moment.isoformat(timespec="microseconds")
        return moment

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == "sqlite":
            return datetime.fromisoformat(value)
        moment: datetime = value
        return moment.astimezone(UTC)


class JsonText(TypeDecorator[Any]):
    """JSON as text on both databases: what is read is what was written, to the byte, so a
    hash over it stays true. None is NULL."""

    impl = JSON(none_as_null=True)
    cache_ok = True


# Rowids of SQLite count only where the type is INTEGER; PostgreSQL needs the width.
_Number: Final = BigInteger().with_variant(Integer(), "sqlite")

UNFINISHED: Final = text(
    "phase NOT IN ({})".format(", ".join(f"'{phase}'" for phase in sorted(FINAL)))
)

IN_FLIGHT: Final = text(
    "phase IN ({})".format(
        ", ".join(f"'{phase}'" for phase in sorted(set(Phase) - FINAL - {Phase.QUEUED}))
    )
)


def _where(name: str, column: str, condition: TextClause, *, unique: bool = False) -> Index:
    """Return an index of the rows that fulfil a condition."""
    return Index(name, column, unique=unique, sqlite_where=condition, postgresql_where=condition)


_COUNTED: Final = ("state", "in_maintenance", "quarantine_reason")

hosts: Final = Table(
    "hosts",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("state", String, nullable=False),
    # The order is the user's. `nics` holds the same MACs, to find and to keep them unique.
    Column("macs", JsonText, nullable=False),
    Column("firmware", String),
    Column("local_boot", String, nullable=False),
    Column("uuid", String, index=True),
    Column("serial", String),
    Column("profile", String),
    Column("bmc_address", String),
    Column("bmc_port", Integer),
    Column("bmc_user", String),
    Column("bmc_password", LargeBinary),  # sealed; never in clear
    Column("generation", Integer, nullable=False),
    Column("release", String),
    Column("last_good", String),
    Column("is_confirmed", Boolean, nullable=False),
    Column("is_protected", Boolean, nullable=False),
    Column("in_maintenance", Boolean, nullable=False),
    Column("quarantine_reason", String),
    Column("labels", JsonText, nullable=False),
    Column("group_name", String),  # the label `group`, to count by
    Column("inventory", JsonText),
    Column("root_disk", JsonText),
    Column("created_at", Moment, nullable=False),
    CheckConstraint(
        "(bmc_address IS NULL) = (bmc_password IS NULL)",
        name="bmc_has_password",
    ),
    # A BMC switches one host: with two of them the one would be cut off for the other.
    Index("uq_hosts_bmc", "bmc_address", "bmc_port", unique=True),
    # All that counting needs of a host, so that its inventory is not read past.
    Index("ix_hosts_of_group", "group_name", *_COUNTED),
    Index("ix_hosts_group_by_id", "id", "group_name", *_COUNTED),
)

nics: Final = Table(
    "nics",
    metadata,
    Column("mac", String, primary_key=True),
    Column(
        "host_id", String, ForeignKey("hosts.id", ondelete="CASCADE"), nullable=False, index=True
    ),
)

operations: Final = Table(
    "operations",
    metadata,
    Column("id", String, primary_key=True),
    Column("host_id", String, ForeignKey("hosts.id", ondelete="CASCADE"), nullable=False),
    Column("kind", String, nullable=False),
    Column("phase", String, nullable=False, index=True),
    Column("generation", Integer, nullable=False),
    Column("rung", Integer, nullable=False),
    Column("release", String),
    Column("pins", JsonText, nullable=False),
    Column("options", JsonText, nullable=False),
    Column("requested_by", String, nullable=False),
    Column("requested_at", Moment, nullable=False, index=True),
    Column("phase_at", Moment, nullable=False),
    Column("deadline_at", Moment),
    Column("started_at", Moment),
    Column("ended_at", Moment),
    Column("phase_seconds", JsonText, nullable=False),
    Column("progress", JsonText, nullable=False),
    Column("error", JsonText),
    Column("evidence", JsonText, nullable=False),
    Column("follow_up", JsonText),
    Column("follow_up_at", Moment),
    # Not part of the Operation: set once, when the agent fetched its seed.
    Column("seed_taken_at", Moment),
    # At most one unfinished operation per host, whatever a race would like.
    _where("ux_operations_one_open_per_host", "host_id", UNFINISHED, unique=True),
    Index("ix_operations_of_host", "host_id", "requested_at"),
    _where("ix_operations_overdue", "deadline_at", text("deadline_at IS NOT NULL")),
    _where("ix_operations_to_follow", "follow_up_at", text("follow_up_at IS NOT NULL")),
    _where("ix_operations_in_flight", "id", IN_FLIGHT),
    _where("ix_operations_started", "started_at", text("started_at IS NOT NULL")),
    _where("ix_operations_failed", "ended_at", text("phase = 'failed'")),
)

# Who asked for which hosts, once for all operations of the request: a thousand ids in each
# of a thousand operations would be written anew with every heartbeat.
requests: Final = Table(
    "requests",
    metadata,
    Column("id", String, primary_key=True),
    Column("requested_by", String, nullable=False),
    Column("requested_at", Moment, nullable=False, index=True),
    Column("hosts", JsonText, nullable=False),
)

breaker: Final = Table(
    "breaker",
    metadata,
    Column("id", String, primary_key=True),
    Column("opened_at", Moment),
    Column("reason", String),
    Column("closed_at", Moment),
    Column("closed_by", String),
    Column("closed_reason", String),
)


def _of_operation() -> Column[str]:
    key = ForeignKey("operations.id", ondelete="CASCADE")
    return Column("operation_id", String, key, nullable=False, index=True)


tickets: Final = Table(
    "tickets",
    metadata,
    Column("digest", String, primary_key=True),
    _of_operation(),
    Column("host_id", String, ForeignKey("hosts.id", ondelete="CASCADE"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("consumed_at", Moment),
    Column("macs", JsonText, nullable=False, server_default="[]"),
    Column("uuid", String),
    Column("serial", String),
    Index("ix_tickets_of_host", "host_id", "generation", "expires_at"),
)

agent_tokens: Final = Table(
    "agent_tokens",
    metadata,
    Column("digest", String, primary_key=True),
    _of_operation(),
    Column(
        "host_id", String, ForeignKey("hosts.id", ondelete="CASCADE"), nullable=False, index=True
    ),
    Column("generation", Integer, nullable=False),
    Column("expires_at", Moment, nullable=False),
)

api_tokens: Final = Table(
    "api_tokens",
    metadata,
    Column("digest", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("role", String, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Column("revoked_at", Moment),
    _where("ux_api_tokens_one_valid_per_name", "name", text("revoked_at IS NULL"), unique=True),
)

replies: Final = Table(
    "replies",
    metadata,
    Column("key", String, primary_key=True),
    Column("reply", JsonText, nullable=False),
    Column("at", Moment, nullable=False, index=True),
)

releases: Final = Table(
    "releases",
    metadata,
    Column("digest", String, primary_key=True),
    Column("image", String, nullable=False),
    Column("version", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("used_bytes", BigInteger, nullable=False),
    Column("stored_bytes", BigInteger, nullable=False),
    Column("firmware", JsonText, nullable=False),
    Column("release_id", String, nullable=False),
    Column("published_at", Moment, nullable=False),
    Column("minimum_version", String),
    Column("expires_at", Moment),
    Column("revoked_at", Moment),
    Column("revoked_reason", String),
    Column("removed_at", Moment),
    # The same version cannot be published twice.
    Index("ux_releases_image_version", "image", "version", unique=True),
)

channels: Final = Table(
    "channels",
    metadata,
    Column("image", String, primary_key=True),
    Column("name", String, primary_key=True),
    # Rows of releases stay for ever, also when a release was removed.
    Column("digest", String, ForeignKey("releases.digest"), nullable=False),
    Column("moved_at", Moment, nullable=False),
    Column("moved_by", String, nullable=False),
)

release_tests: Final = Table(
    "release_tests",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("digest", String, ForeignKey("releases.digest"), nullable=False),
    Column("at", Moment, nullable=False),
    Column("profile", String, nullable=False),
    Column("firmware", JsonText, nullable=False),
    Column("is_healthy", Boolean, nullable=False),
    Column("detail", JsonText, nullable=False),
    Column("tested_by", String, nullable=False),
    Index("ix_release_tests_of_release", "digest", "number"),
)

release_failures: Final = Table(
    "release_failures",
    metadata,
    Column("host_id", String, ForeignKey("hosts.id", ondelete="CASCADE"), primary_key=True),
    Column("release", String, primary_key=True),
    # No foreign key: what failed is remembered for longer than the operation.
    Column("operation_id", String, nullable=False),
    Column("at", Moment, nullable=False),
    Column("code", String, nullable=False),
    Column("message", String, nullable=False),
)

profile_revisions: Final = Table(
    "profile_revisions",
    metadata,
    Column("digest", String, primary_key=True),
    Column("name", String, primary_key=True),
    # Empty since it is sealed: users' data holds passwords and keys.
    Column("document", JsonText, nullable=False),
    Column("sealed", LargeBinary),
    Column("created_at", Moment, nullable=False),
)

profiles: Final = Table(
    "profiles",
    metadata,
    Column("name", String, primary_key=True),
    Column("digest", String, nullable=False),  # of its newest revision
    Column("is_hidden", Boolean, nullable=False),
)

audit: Final = Table(
    "audit",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=False),
    Column("at", Moment, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("subject", String, nullable=False),
    Column("detail", JsonText, nullable=False),
    Column("before_hash", String, nullable=False, unique=True),
    Column("row_hash", String, nullable=False),
)

events: Final = Table(
    "events",
    metadata,
    Column("number", _Number, primary_key=True, autoincrement=True),
    Column("at", Moment, nullable=False),
    Column("source", String, nullable=False),
    Column("text", String, nullable=False),
    Column("host_id", String, ForeignKey("hosts.id", ondelete="CASCADE")),
    # No foreign key: the line outlives an operation that was forgotten.
    Column("operation_id", String),
    Column("mac", String),
    Column("detail", JsonText, nullable=False),
    Index("ix_events_of_host", "host_id", "number"),
    sqlite_autoincrement=True,
)

services: Final = Table(
    "services",
    metadata,
    Column("name", String, primary_key=True),
    Column("uuid", String),
    Column("serial", String),
    Column("macs", JsonText, nullable=False),
    Column("names", JsonText, nullable=False),
    Column("version", String, nullable=False),
    Column("key_id", String, nullable=False),
    Column("started_at", Moment, nullable=False),
)

sightings: Final = Table(
    "sightings",
    metadata,
    Column("key", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("at", Moment, nullable=False),
    Column("source", String, nullable=False),
    Column("detail", JsonText, nullable=False),
    # No foreign keys: the point of it is that the operation is not there.
    Column("operation_id", String),
    Column("generation", Integer),
    Column("host_id", String),
    Column("reconciled_at", Moment, index=True),
)
