"""Channels, tests of releases, and what may become of a release: revoked, removed, expired.

Safe: before the new code starts.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

from provisioner.store.tables import JsonText, Moment

revision: Final = "0002"
down_revision: Final = "0001"


def upgrade() -> None:
    # All of them may be absent, so the releases that are there keep their rows as they are.
    op.add_column("releases", sa.Column("minimum_version", sa.String(), nullable=True))
    op.add_column("releases", sa.Column("expires_at", Moment(), nullable=True))
    op.add_column("releases", sa.Column("revoked_at", Moment(), nullable=True))
    op.add_column("releases", sa.Column("revoked_reason", sa.String(), nullable=True))
    op.add_column("releases", sa.Column("removed_at", Moment(), nullable=True))
    op.create_table(
        "channels",
        sa.Column("image", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("moved_at", Moment(), nullable=False),
        sa.Column("moved_by", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["releases.digest"], name=op.f("fk_channels_digest")),
        sa.PrimaryKeyConstraint("image", "name", name=op.f("pk_channels")),
    )
    op.create_table(
        "release_tests",
        sa.Column(
            "number",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("at", Moment(), nullable=False),
        sa.Column("profile", sa.String(), nullable=False),
        sa.Column("firmware", JsonText(), nullable=False),
        sa.Column("is_healthy", sa.Boolean(), nullable=False),
        sa.Column("detail", JsonText(), nullable=False),
        sa.Column("tested_by", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["digest"], ["releases.digest"], name=op.f("fk_release_tests_digest")
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_release_tests")),
    )
    op.create_index("ix_release_tests_of_release", "release_tests", ["digest", "number"])
