"""Profiles in SQL: every revision is kept, one of them is the newest of its name."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, select

from ..core.model import Profile
from ..core.profile import is_readable
from .rows import profile_of, profile_row
from .sql import Queries
from .tables import profile_revisions, profiles


class ProfileQueries(Queries):
    def save_profile(self, profile: Profile) -> None:
        """Save a revision and make it the newest of its name, also when it was before. One that
        is kept stays as it is, unless it does not open any more."""
        same = profile_revisions.c.digest == profile.digest
        named = profile_revisions.c.name == profile.name
        kept = self._profile(select(profile_revisions).where(same, named))
        is_kept = kept is not None and is_readable(kept)
        self._put(profile_revisions, profile_row(profile, self._sealing), keep=is_kept)
        newest = {"name": profile.name, "digest": profile.digest, "is_hidden": False}
        self._put(profiles, newest)

    def seal_profiles(self) -> int:
        """Seal the documents that an earlier version left in clear; return how many."""
        clear = self._all(select(profile_revisions).where(profile_revisions.c.sealed.is_(None)))
        for row in clear:
            sealed = profile_row(profile_of(row, self._sealing), self._sealing)
            same = profile_revisions.c.digest == row["digest"]
            change = profile_revisions.update().where(same, profile_revisions.c.name == row["name"])
            self._change(change.values(document={}, sealed=sealed["sealed"]))
        return len(clear)

    def profile(self, name: str) -> Profile | None:
        return self._profile(_newest().where(profiles.c.name == name))

    def profile_revision(self, digest: str) -> Profile | None:
        """Return a revision by its digest, hidden or not: operations have it pinned."""
        revision = select(profile_revisions).where(profile_revisions.c.digest == digest)
        return self._profile(revision.order_by(profile_revisions.c.name).limit(1))

    def profiles(self) -> Sequence[Profile]:
        return [
            profile_of(row, self._sealing) for row in self._all(_newest().order_by(profiles.c.name))
        ]

    def delete_profile(self, name: str) -> bool:
        shown = profiles.update().where(profiles.c.name == name, profiles.c.is_hidden.is_(False))
        return self._change(shown.values(is_hidden=True)) == 1

    def _profile(self, query: Select[Any]) -> Profile | None:
        row = self._one(query)
        return profile_of(row, self._sealing) if row is not None else None


def _newest() -> Select[Any]:
    revision = profile_revisions.c
    current = (revision.name == profiles.c.name) & (revision.digest == profiles.c.digest)
    shown = profiles.c.is_hidden.is_(False)
    return select(profile_revisions).join(profiles, current).where(shown)
