"""How alembic runs our migrations: on the connection and in the transaction it is handed."""

from alembic import context

from provisioner.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite can change little about a table: alembic then makes it anew and copies.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
