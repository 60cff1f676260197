"""What each service on this database has found of the host that it runs on.

Safe: before the new code starts.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

from provisioner.store.tables import JsonText, Moment

revision: Final = "0007"
down_revision: Final = "0006"


def upgrade() -> None:
    op.create_table(
        "services",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("uuid", sa.String(), nullable=True),
        sa.Column("serial", sa.String(), nullable=True),
        sa.Column("macs", JsonText(), nullable=False),
        sa.Column("names", JsonText(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("started_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_services")),
    )
