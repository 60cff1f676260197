"""What the guard asks: who was selected, groups, starts, the breaker; and whose a ticket is.

Safe: before the new code starts.
"""

import hashlib
from typing import Final

import sqlalchemy as sa
from alembic import op

from provisioner.store.tables import IN_FLIGHT, UNFINISHED, JsonText, Moment

revision: Final = "0003"
down_revision: Final = "0002"


def upgrade() -> None:
    op.add_column("hosts", sa.Column("group_name", sa.String(), nullable=True))
    op.create_index("ix_hosts_of_group", "hosts", ["group_name", "state"])
    op.create_index("ix_hosts_group_by_id", "hosts", ["id", "group_name", "state"])
    op.add_column("operations", sa.Column("started_at", Moment(), nullable=True))
    for name, column, where in (
        ("ix_operations_in_flight", "id", str(IN_FLIGHT)),
        ("ix_operations_started", "started_at", "started_at IS NOT NULL"),
        ("ix_operations_failed", "ended_at", "phase = 'failed'"),
    ):
        condition = sa.text(where)
        op.create_index(
            name, "operations", [column], sqlite_where=condition, postgresql_where=condition
        )
    op.create_table(
        "requests",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("requested_by", sa.String(), nullable=False),
        sa.Column("requested_at", Moment(), nullable=False),
        sa.Column("hosts", JsonText(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_requests")),
    )
    op.create_index("ix_requests_requested_at", "requests", ["requested_at"])
    op.create_table(
        "breaker",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("opened_at", Moment(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("closed_at", Moment(), nullable=True),
        sa.Column("closed_by", sa.String(), nullable=True),
        sa.Column("closed_reason", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_breaker")),
    )
    op.execute("INSERT INTO breaker (id) VALUES ('fleet')")
    op.add_column("tickets", sa.Column("macs", JsonText(), nullable=False, server_default="[]"))
    op.add_column("tickets", sa.Column("uuid", sa.String(), nullable=True))
    op.add_column("tickets", sa.Column("serial", sa.String(), nullable=True))
    # The key is not the migration's to know: whoever prepares the database seals what is there.
    op.add_column("profile_revisions", sa.Column("sealed", sa.LargeBinary(), nullable=True))
    _name_groups()
    _select_hosts_of_open_operations()


def _name_groups() -> None:
    bind = op.get_bind()
    hosts = sa.table(
        "hosts",
        sa.column("id", sa.String),
        sa.column("labels", JsonText),
        sa.column("group_name", sa.String),
    )
    for row in bind.execute(sa.select(hosts.c.id, hosts.c.labels)).all():
        if group := row.labels.get("group"):
            bind.execute(hosts.update().where(hosts.c.id == row.id).values(group_name=group))


def _select_hosts_of_open_operations() -> None:
    """Give each unfinished operation a request of its own host, or it could not go on."""
    bind = op.get_bind()
    table = sa.table(
        "operations",
        *(sa.column(name, sa.String) for name in ("id", "host_id", "phase", "requested_by")),
        *(sa.column(name, Moment) for name in ("requested_at", "phase_at", "started_at")),
        sa.column("pins", JsonText),
    )
    requests = sa.table(
        "requests",
        *(sa.column(name, sa.String) for name in ("id", "requested_by")),
        sa.column("requested_at", Moment),
        sa.column("hosts", JsonText),
    )
    for row in bind.execute(sa.select(table).where(UNFINISHED)).all():
        request = f"rq_{row.id.removeprefix('op_')}"
        pins = {**row.pins, "request": request}
        pins["selection"] = hashlib.sha256(row.host_id.encode()).hexdigest()
        started = None if row.phase == "queued" else row.phase_at
        change = table.update().where(table.c.id == row.id)
        bind.execute(change.values(pins=pins, started_at=started))
        bind.execute(
            requests.insert().values(
                id=request,
                requested_by=row.requested_by,
                requested_at=row.requested_at,
                hosts=[row.host_id],
            )
        )
