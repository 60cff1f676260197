"""Saving and showing profiles: configuration as code for a set of hosts."""

from collections.abc import Callable, Sequence

from provisioner.core.contracts import Clock, SchemaCheck, Store
from provisioner.core.model import Json, Profile
from provisioner.core.profile import is_readable, revision
from provisioner.errors import Conflict, NotFound, RequestError

from .seeds import check_renders, example_user_data

NOT_ASKED = SchemaCheck(note="nobody was asked to look")


class CloudConfigUnfit(RequestError):
    """cloud-init would not take the profile's cloud_config."""

    code = "cloud_config_unfit"


class Profiles:
    """Each save is a revision with a digest; a deployment pins the one it was planned with."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        check_cloud_config: Callable[[str], SchemaCheck] = lambda _text: NOT_ASKED,
    ) -> None:
        self._store = store
        self._clock = clock
        self._check_cloud_config = check_cloud_config

    def check(self, name: str, document: Json) -> SchemaCheck:
        """Return what cloud-init's schema says of a profile's cloud_config; save nothing.

        It is shown what an example of a host would get, a second or so: call it outside of a
        transaction. Raises RequestError as `save` does, and CloudConfigUnfit.
        """
        found = self._check_cloud_config(example_user_data(revision(name, document, self._clock())))
        if found.errors is not None:
            raise CloudConfigUnfit(
                f"profile {name}: its cloud_config does not fit the schema of {found.checked_by}",
                expected="what https://cloudinit.readthedocs.io/ says of these keys",
                found=found.errors,
                hint="if the cloud-init of your images knows better: "
                "`provisioner profile save --no-schema`",
            )
        return found

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
