"""What each service on this database has found of the host that it runs on; and no two hosts
with one BMC.

Safe: before the new code starts.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

from provisioner.errors import ConfigError
from provisioner.store.tables import JsonText, Moment

revision: Final = "0007"
down_revision: Final = "0006"


_SHARED: Final = sa.text(
    "SELECT a.name, b.name FROM hosts a JOIN hosts b ON a.bmc_address = b.bmc_address"
    " AND a.bmc_port = b.bmc_port AND a.name < b.name ORDER BY a.name, b.name LIMIT 20"
)


def upgrade() -> None:
    if shared := op.get_bind().execute(_SHARED).all():
        raise ConfigError(
            "there are hosts that share a BMC, so that one would be switched for another",
            expected="one host for each BMC",
            found=[f"{one} and {other}" for one, other in shared],
            hint="with the version before: provisioner host change, or host delete",
        )
    op.create_index("uq_hosts_bmc", "hosts", ["bmc_address", "bmc_port"], unique=True)
    op.create_table(
        "services",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("uuid", sa.String(), nullable=True),
        sa.Column("serial", sa.String(), nullable=True),
        sa.Column("macs", JsonText(), nullable=False),
        sa.Column("names", JsonText(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("started_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_services")),
    )
