"""Saving and showing profiles: configuration as code for a set of hosts."""

from collections.abc import Sequence

from provisioner.core.contracts import Clock, Store
from provisioner.core.model import Json, Profile
from provisioner.core.profile import is_readable, revision
from provisioner.errors import Conflict, NotFound

from .seeds import check_renders


class Profiles:
    """Each save is a revision with a digest; a deployment pins the one it was planned with."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def save(self, name: str, document: Json, *, actor: str) -> Profile:
        """Save a revision. Saving the same content again changes nothing, unless what is kept
        of it does not open any more.

        Raises RequestError that names the key at fault.
        """
        profile = revision(name, document, self._clock())
        check_renders(profile)
        with self._store.begin() as tx:
            newest = tx.profile(name)
            is_same = newest is not None and newest.digest == profile.digest
            if newest is not None and is_same and is_readable(newest):
                return newest
            tx.save_profile(profile)
            tx.audit(self._clock(), actor, "profile.saved", name, {"digest": profile.digest})
        return profile

    def list(self) -> Sequence[Profile]:
        with self._store.read() as tx:
            return tx.profiles()

    def show(self, name: str) -> Profile:
        with self._store.read() as tx:
            found = tx.profile(name)
            if found is None:
                known = [profile.name for profile in tx.profiles()]
                raise NotFound(f"there is no profile {name}", expected=known, found=name)
            return found

    def delete(self, name: str, *, actor: str) -> None:
        """Delete a profile that no host uses. Its revisions stay for past deployments."""
        self.show(name)
        with self._store.begin() as tx:
            users = [host.name for host in tx.hosts(limit=100_000) if host.profile == name]
            if users:
                raise Conflict(f"profile {name} is in use", expected="no host", found=users[:20])
            tx.delete_profile(name)
            tx.audit(self._clock(), actor, "profile.deleted", name, {})
