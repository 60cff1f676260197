"""Releases and profiles in SQL: what a host may be given."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, or_, select

from ..core.model import Profile, ReleaseRow
from ..errors import Conflict
from .rows import profile_of, release_of, release_row
from .sql import Queries
from .tables import profile_revisions, profiles, releases


class CatalogueQueries(Queries):
    def add_release(self, release: ReleaseRow) -> None:
        """Add a release; the same again does nothing. Raises Conflict for other content."""
        table = releases.c
        same_name = (table.image == release.image) & (table.version == release.version)
        taken = Conflict(
            f"{release.name} is published already, and a release never changes",
            found=release.digest,
            hint="publish it as another version",
        )
        known = select(releases).where(or_(table.digest == release.digest, same_name))
        others = [release_of(row) for row in self._all(known)]
        if not others:
            self._add(releases, release_row(release), taken)
        elif any(other.digest != release.digest or other.name != release.name for other in others):
            taken.expected = others[0].digest
            raise taken

    def release(self, digest: str) -> ReleaseRow | None:
        return self._release(select(releases).where(releases.c.digest == digest))

    def release_named(self, image: str, version: str) -> ReleaseRow | None:
        named = (releases.c.image == image) & (releases.c.version == version)
        return self._release(select(releases).where(named))

    def _release(self, query: Select[Any]) -> ReleaseRow | None:
        row = self._one(query)
        return release_of(row) if row is not None else None

    def releases(self) -> Sequence[ReleaseRow]:
        order = (releases.c.image, releases.c.published_at, releases.c.version)
        return [release_of(row) for row in self._all(select(releases).order_by(*order))]

    def save_profile(self, profile: Profile) -> None:
        """Save a revision and make it the newest of its name, also when it was before."""
        row = {
            "name": profile.name,
            "digest": profile.digest,
            "document": profile.document,
            "created_at": profile.created_at,
        }
        self._put(profile_revisions, row, keep=True)
        newest = {"name": profile.name, "digest": profile.digest, "is_hidden": False}
        self._put(profiles, newest)

    def profile(self, name: str) -> Profile | None:
        return self._profile(_newest().where(profiles.c.name == name))

    def profile_revision(self, digest: str) -> Profile | None:
        """Return a revision by its digest, hidden or not: operations have it pinned."""
        revision = select(profile_revisions).where(profile_revisions.c.digest == digest)
        return self._profile(revision.order_by(profile_revisions.c.name).limit(1))

    def profiles(self) -> Sequence[Profile]:
        return [profile_of(row) for row in self._all(_newest().order_by(profiles.c.name))]

    def delete_profile(self, name: str) -> bool:
        shown = profiles.update().where(profiles.c.name == name, profiles.c.is_hidden.is_(False))
        return self._change(shown.values(is_hidden=True)) == 1

    def _profile(self, query: Select[Any]) -> Profile | None:
        row = self._one(query)
        return profile_of(row) if row is not None else None


def _newest() -> Select[Any]:
    revision = profile_revisions.c
    current = (revision.name == profiles.c.name) & (revision.digest == profiles.c.digest)
    shown = profiles.c.is_hidden.is_(False)
    return select(profile_revisions).join(profiles, current).where(shown)
