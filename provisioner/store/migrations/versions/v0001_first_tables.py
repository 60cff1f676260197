"""The first tables.

Safe: before the new code starts.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

from provisioner.store.tables import JsonText, Moment

revision: Final = "0001"
down_revision: Final = None


def upgrade() -> None:
    op.create_table(
        "api_tokens",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("expires_at", Moment(), nullable=True),
        sa.Column("revoked_at", Moment(), nullable=True),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_api_tokens")),
    )
    op.create_index(
        "ux_api_tokens_one_valid_per_name",
        "api_tokens",
        ["name"],
        unique=True,
        sqlite_where=sa.text("revoked_at IS NULL"),
        postgresql_where=sa.text("revoked_at IS NULL"),
    )
    op.create_table(
        "audit",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("at", Moment(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("detail", JsonText(), nullable=False),
        sa.Column("before_hash", sa.String(), nullable=False),
        sa.Column("row_hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit")),
        sa.UniqueConstraint("before_hash", name=op.f("uq_audit_before_hash")),
    )
    op.create_table(
        "hosts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("macs", JsonText(), nullable=False),
        sa.Column("firmware", sa.String(), nullable=True),
        sa.Column("local_boot", sa.String(), nullable=False),
        sa.Column("uuid", sa.String(), nullable=True),
        sa.Column("serial", sa.String(), nullable=True),
        sa.Column("profile", sa.String(), nullable=True),
        sa.Column("bmc_address", sa.String(), nullable=True),
        sa.Column("bmc_port", sa.Integer(), nullable=True),
        sa.Column("bmc_user", sa.String(), nullable=True),
        sa.Column("bmc_password", sa.LargeBinary(), nullable=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("release", sa.String(), nullable=True),
        sa.Column("last_good", sa.String(), nullable=True),
        sa.Column("is_confirmed", sa.Boolean(), nullable=False),
        sa.Column("is_protected", sa.Boolean(), nullable=False),
        sa.Column("in_maintenance", sa.Boolean(), nullable=False),
        sa.Column("quarantine_reason", sa.String(), nullable=True),
        sa.Column("labels", JsonText(), nullable=False),
        sa.Column("inventory", JsonText(), nullable=True),
        sa.Column("root_disk", JsonText(), nullable=True),
        sa.Column("created_at", Moment(), nullable=False),
        sa.CheckConstraint(
            "(bmc_address IS NULL) = (bmc_password IS NULL)", name=op.f("ck_hosts_bmc_has_password")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hosts")),
        sa.UniqueConstraint("name", name=op.f("uq_hosts_name")),
    )
    op.create_index(op.f("ix_hosts_uuid"), "hosts", ["uuid"], unique=False)
    op.create_table(
        "profile_revisions",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("document", JsonText(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("digest", "name", name=op.f("pk_profile_revisions")),
    )
    op.create_table(
        "profiles",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("is_hidden", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_profiles")),
    )
    op.create_table(
        "releases",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("image", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("used_bytes", sa.BigInteger(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("firmware", JsonText(), nullable=False),
        sa.Column("release_id", sa.String(), nullable=False),
        sa.Column("published_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_releases")),
    )
    op.create_index("ux_releases_image_version", "releases", ["image", "version"], unique=True)
    op.create_table(
        "replies",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("reply", JsonText(), nullable=False),
        sa.Column("at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_replies")),
    )
    op.create_index(op.f("ix_replies_at"), "replies", ["at"], unique=False)
    op.create_table(
        "events",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("at", Moment(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("host_id", sa.String(), nullable=True),
        sa.Column("operation_id", sa.String(), nullable=True),
        sa.Column("mac", sa.String(), nullable=True),
        sa.Column("detail", JsonText(), nullable=False),
        sa.ForeignKeyConstraint(
            ["host_id"], ["hosts.id"], name=op.f("fk_events_host_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_events")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_of_host", "events", ["host_id", "number"], unique=False)
    op.create_table(
        "nics",
        sa.Column("mac", sa.String(), nullable=False),
        sa.Column("host_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["host_id"], ["hosts.id"], name=op.f("fk_nics_host_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("mac", name=op.f("pk_nics")),
    )
    op.create_index(op.f("ix_nics_host_id"), "nics", ["host_id"], unique=False)
    op.create_table(
        "operations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("host_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("rung", sa.Integer(), nullable=False),
        sa.Column("release", sa.String(), nullable=True),
        sa.Column("pins", JsonText(), nullable=False),
        sa.Column("options", JsonText(), nullable=False),
        sa.Column("requested_by", sa.String(), nullable=False),
        sa.Column("requested_at", Moment(), nullable=False),
        sa.Column("phase_at", Moment(), nullable=False),
        sa.Column("deadline_at", Moment(), nullable=True),
        sa.Column("ended_at", Moment(), nullable=True),
        sa.Column("phase_seconds", JsonText(), nullable=False),
        sa.Column("progress", JsonText(), nullable=False),
        sa.Column("error", JsonText(), nullable=True),
        sa.Column("evidence", JsonText(), nullable=False),
        sa.Column("seed_taken_at", Moment(), nullable=True),
        sa.ForeignKeyConstraint(
            ["host_id"], ["hosts.id"], name=op.f("fk_operations_host_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operations")),
    )
    op.create_index(
        "ix_operations_of_host", "operations", ["host_id", "requested_at"], unique=False
    )
    op.create_index(
        "ix_operations_overdue",
        "operations",
        ["deadline_at"],
        unique=False,
        sqlite_where=sa.text("deadline_at IS NOT NULL"),
        postgresql_where=sa.text("deadline_at IS NOT NULL"),
    )
    op.create_index(op.f("ix_operations_phase"), "operations", ["phase"], unique=False)
    op.create_index(
        op.f("ix_operations_requested_at"), "operations", ["requested_at"], unique=False
    )
    op.create_index(
        "ux_operations_one_open_per_host",
        "operations",
        ["host_id"],
        unique=True,
        sqlite_where=sa.text("phase NOT IN ('cancelled', 'failed', 'succeeded')"),
        postgresql_where=sa.text("phase NOT IN ('cancelled', 'failed', 'succeeded')"),
    )
    op.create_table(
        "agent_tokens",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("operation_id", sa.String(), nullable=False),
        sa.Column("host_id", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("expires_at", Moment(), nullable=False),
        sa.ForeignKeyConstraint(
            ["host_id"], ["hosts.id"], name=op.f("fk_agent_tokens_host_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["operation_id"],
            ["operations.id"],
            name=op.f("fk_agent_tokens_operation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_agent_tokens")),
    )
    op.create_index(op.f("ix_agent_tokens_host_id"), "agent_tokens", ["host_id"], unique=False)
    op.create_index(
        op.f("ix_agent_tokens_operation_id"), "agent_tokens", ["operation_id"], unique=False
    )
    op.create_table(
        "tickets",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("operation_id", sa.String(), nullable=False),
        sa.Column("host_id", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("expires_at", Moment(), nullable=False),
        sa.Column("consumed_at", Moment(), nullable=True),
        sa.ForeignKeyConstraint(
            ["host_id"], ["hosts.id"], name=op.f("fk_tickets_host_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["operation_id"],
            ["operations.id"],
            name=op.f("fk_tickets_operation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_tickets")),
    )
    op.create_index(
        "ix_tickets_of_host", "tickets", ["host_id", "generation", "expires_at"], unique=False
    )
    op.create_index(op.f("ix_tickets_operation_id"), "tickets", ["operation_id"], unique=False)
