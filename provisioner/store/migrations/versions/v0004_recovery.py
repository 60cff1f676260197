"""What follows a failed operation, and the releases that failed on a host.

Safe: before the new code starts.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

from provisioner.store.tables import JsonText, Moment

revision: Final = "0004"
down_revision: Final = "0003"


def upgrade() -> None:
    # Absent for all operations that have ended: nothing follows them any more.
    op.add_column("operations", sa.Column("follow_up", JsonText(), nullable=True))
    op.add_column("operations", sa.Column("follow_up_at", Moment(), nullable=True))
    is_waiting = sa.text("follow_up_at IS NOT NULL")
    op.create_index(
        "ix_operations_to_follow",
        "operations",
        ["follow_up_at"],
        sqlite_where=is_waiting,
        postgresql_where=is_waiting,
    )
    op.create_table(
        "release_failures",
        sa.Column("host_id", sa.String(), nullable=False),
        sa.Column("release", sa.String(), nullable=False),
        sa.Column("operation_id", sa.String(), nullable=False),
        sa.Column("at", Moment(), nullable=False),
        sa.Column("code", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["host_id"],
            ["hosts.id"],
            name=op.f("fk_release_failures_host_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("host_id", "release", name=op.f("pk_release_failures")),
    )
