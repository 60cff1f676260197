"""What shows that a database was restored, and that a person has reconciled it.

Safe: before the new code starts.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

from provisioner.store.tables import JsonText, Moment

revision: Final = "0005"
down_revision: Final = "0004"


def upgrade() -> None:
    op.create_table(
        "sightings",
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("at", Moment(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("detail", JsonText(), nullable=False),
        sa.Column("operation_id", sa.String(), nullable=True),
        sa.Column("generation", sa.Integer(), nullable=True),
        sa.Column("host_id", sa.String(), nullable=True),
        sa.Column("reconciled_at", Moment(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_sightings")),
    )
    op.create_index("ix_sightings_reconciled_at", "sightings", ["reconciled_at"])
