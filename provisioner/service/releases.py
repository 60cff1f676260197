"""Registering and showing releases. The bytes are the archive's; the database keeps rows."""

from collections.abc import Sequence

from provisioner.core.contracts import Archive, Clock, Store
from provisioner.core.manifest import Manifest
from provisioner.core.model import ReleaseRow

from .lookup import find_release


class Releases:
    def __init__(self, store: Store, archive: Archive, clock: Clock) -> None:
        self._store = store
        self._archive = archive
        self._clock = clock

    def register(self, manifest: Manifest, *, actor: str) -> ReleaseRow:
        """Make a release of the archive known. The archive's signature is checked again.

        Raises Conflict when this version exists with other content.
        """
        manifest = self._archive.load(manifest.digest)
        row = ReleaseRow(
            digest=manifest.digest,
            image=manifest.image,
            version=manifest.version,
            size_bytes=manifest.size_bytes,
            used_bytes=manifest.used_bytes,
            stored_bytes=manifest.stored_bytes,
            firmware=tuple(manifest.firmware),
            release_id=manifest.release_id,
            published_at=self._clock(),
        )
        with self._store.begin() as tx:
            known = tx.release(row.digest)
            if known is not None:
                return known
            tx.add_release(row)
            tx.audit(self._clock(), actor, "release.published", row.name, {"digest": row.digest})
        return row

    def list(self) -> Sequence[ReleaseRow]:
        with self._store.read() as tx:
            return tx.releases()

    def show(self, reference: str) -> ReleaseRow:
        """Return the release named image@version, by digest or by the start of its digest."""
        with self._store.read() as tx:
            return find_release(tx, reference)

    def manifest(self, reference: str) -> Manifest:
        return self._archive.load(self.show(reference).digest)
