"""Hosts in maintenance or quarantine are not counted as healthy ones of their group.

Safe: before the new code starts.
"""

from typing import Final

from alembic import op

revision: Final = "0006"
down_revision: Final = "0005"

_COUNTED: Final = ("state", "in_maintenance", "quarantine_reason")


def upgrade() -> None:
    for name, columns in (
        ("ix_hosts_of_group", ("group_name",)),
        ("ix_hosts_group_by_id", ("id", "group_name")),
    ):
        op.drop_index(name, "hosts")
        op.create_index(name, "hosts", [*columns, *_COUNTED])
