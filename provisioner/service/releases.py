"""Releases as the service knows them: registered, tested, promoted, revoked, given up.

The bytes are the archive's; the database keeps rows. Each change is one transaction with its
audit row, and may be repeated.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from provisioner.core.contracts import Archive, Clock, Store
from provisioner.core.manifest import FIRMWARES, Manifest
from provisioner.core.model import Channel, Json, ReleaseRow, ReleaseTest
from provisioner.core.releases import check_own_minimum, check_standing, minimum_versions
from provisioner.core.trust import check_channel
from provisioner.errors import Conflict, RequestError

from .lookup import find_release
from .promotion import move_channel
from .removal import Keeping, mark_unused, unused_now
from .revocation import revoke
from .transitions import Transitions

REASON_CHARACTERS_MAX: Final = 500
TEST_DETAIL_BYTES_MAX: Final = 64 * 1024
_MOMENT: Final = "%Y-%m-%dT%H:%M:%SZ"


class Releases:
    """`tested_channels` are those that ask for a passed test."""

    def __init__(
        self,
        store: Store,
        archive: Archive,
        clock: Clock,
        transitions: Transitions,
        *,
        tested_channels: Collection[str] = (),
        keeping: Keeping | None = None,
    ) -> None:
        self._store = store
        self._archive = archive
        self._clock = clock
        self._transitions = transitions
        self._tested_channels = frozenset(tested_channels)
        self._keeping = keeping or Keeping()

    def register(self, manifest: Manifest, stored_bytes: int, *, actor: str) -> ReleaseRow:
        """Make a release of the archive known. The archive's signature is checked again.

        A release that was removed is back with the same content, published at this moment,
        and revoked when it was. Raises Conflict when this version exists with other content,
        or another release has this one's id, and RequestError for a minimum version above its
        own.
        """
        row = _row_of(self._archive.load(manifest.digest), stored_bytes, self._clock())
        with self._store.begin() as tx:
            known = tx.release(row.digest)
            if known is not None:
                known = tx.lock_release(row.digest)
                if known.removed_at is None:
                    return known
                # Published anew: otherwise the next gc would remove it before it is used.
                row = replace(
                    known,
                    removed_at=None,
                    stored_bytes=stored_bytes,
                    published_at=row.published_at,
                )
                tx.save_release(row)
            else:
                check_own_minimum(row.image, row.version, row.minimum_version)
                _check_own_id(row, tx.releases())
                tx.add_release(row)
            tx.audit(self._clock(), actor, "release.published", row.name, {"digest": row.digest})
        return row

    def list(self, *, with_removed: bool = False) -> Sequence[ReleaseRow]:
        with self._store.read() as tx:
            return [row for row in tx.releases() if with_removed or row.removed_at is None]

    def show(self, reference: str) -> ReleaseRow:
        """Return the release named image@version, image:channel, by digest or by the start of
        its digest; also a revoked or removed one."""
        with self._store.read() as tx:
            return find_release(tx, reference)

    def manifest(self, reference: str) -> Manifest:
        return self._archive.load(self.show(reference).digest)

    def minimum_versions(self) -> dict[str, str]:
        """Return by image the version below which nothing of it is deployed."""
        with self._store.read() as tx:
            return minimum_versions(tx.releases())

    def signers(self, reference: str) -> Sequence[str]:
        """Return the ids of the trusted keys that signed this release, sorted."""
        return sorted(self._archive.signed_by(self.show(reference).digest))

    def signed(self, reference: str, *, actor: str) -> Sequence[str]:
        """Record that a signature was added; return the ids of the trusted keys that signed."""
        row = self.show(reference)
        keys = sorted(self._archive.signed_by(row.digest))
        detail: Json = {"digest": row.digest, "keys": keys}
        with self._store.begin() as tx:
            tx.audit(self._clock(), actor, "release.signed", row.name, detail)
        return keys

    def promote(self, reference: str, channel: str, *, actor: str) -> Channel:
        """Make the channel of the release's image point to it. Repeatable.

        An older release may come back this way, unless it is below the image's minimum
        version. Raises ReleaseRevoked, TrustError for what the channel's signatures, the
        expiry or the minimum version forbid, ReleaseUntested where the channel asks for a
        passed test, and Conflict for a removed release.
        """
        check_channel(channel)
        row = self.show(reference)
        check_standing(row)
        # Not in the transaction: reading what belongs to a release takes a while.
        manifest = self._archive.check(row.digest, channel=channel, now=self._clock())
        asks_for_test = channel in self._tested_channels
        with self._store.begin() as tx:
            return move_channel(
                tx, manifest, channel, asks_for_test=asks_for_test, now=self._clock(), actor=actor
            )

    def channels(self) -> Sequence[Channel]:
        with self._store.read() as tx:
            return tx.channels()

    def revoke(self, reference: str, reason: str, *, actor: str) -> ReleaseRow:
        """Let nothing deploy this release any more, and end what is deploying it. Repeatable.

        Channels go on pointing to it, and refuse deployments, until another release is
        promoted. Raises RequestError without a reason.
        """
        if not reason.strip() or len(reason) > REASON_CHARACTERS_MAX:
            raise RequestError(
                "a release is revoked for a reason",
                expected=f"1 to {REASON_CHARACTERS_MAX} characters",
                found=f"{len(reason)} characters",
            )
        with self._store.begin() as tx:
            digest = find_release(tx, reference).digest
            return revoke(
                tx, self._transitions, digest, reason.strip(), now=self._clock(), actor=actor
            )

    def record_test(
        self,
        reference: str,
        *,
        profile: str,
        firmware: Sequence[str],
        is_healthy: bool,
        detail: Json,
        actor: str,
    ) -> ReleaseTest:
        """Keep what came of booting the release on these firmwares with that profile's checks."""
        _check_test(firmware, detail)
        now = self._clock()
        with self._store.begin() as tx:
            row = find_release(tx, reference)
            test = ReleaseTest(
                row.digest, now, profile, tuple(firmware), is_healthy, detail, tested_by=actor
            )
            tx.add_release_test(test)
            told: Json = {"digest": row.digest, "profile": profile, "firmware": list(firmware)}
            outcome = "passed" if is_healthy else "failed"
            tx.audit(now, actor, f"release.test.{outcome}", row.name, told)
        return test

    def tests(self, reference: str) -> Sequence[ReleaseTest]:
        """Return the release's tests, newest first."""
        with self._store.read() as tx:
            return tx.release_tests(find_release(tx, reference).digest)

    def unused(self, *, keep_newest: int | None = None) -> Sequence[ReleaseRow]:
        """Return what `remove_unused` would give up now."""
        with self._store.read() as tx:
            return unused_now(tx, self._keep(keep_newest), self._clock())

    def remove_unused(self, *, actor: str, keep_newest: int | None = None) -> Sequence[ReleaseRow]:
        """Give up the releases that nothing refers to, and return them. Repeatable.

        keep_newest is how many of each image stay all the same, by default what is configured.
        Their bytes are still there: the caller has the archive collect what is not `kept`.
        """
        with self._store.begin() as tx:
            return mark_unused(tx, self._keep(keep_newest), now=self._clock(), actor=actor)

    def _keep(self, newest: int | None) -> Keeping:
        return self._keeping if newest is None else replace(self._keeping, newest=newest)

    def kept(self) -> set[str]:
        """Return the digests of all releases that were not removed."""
        return {row.digest for row in self.list()}


def _row_of(manifest: Manifest, stored_bytes: int, now: datetime) -> ReleaseRow:
    expires_at = manifest.expires_at
    return ReleaseRow(
        digest=manifest.digest,
        image=manifest.image,
        version=manifest.version,
        size_bytes=manifest.size_bytes,
        used_bytes=manifest.used_bytes,
        stored_bytes=stored_bytes,
        firmware=tuple(manifest.firmware),
        release_id=manifest.release_id,
        published_at=now,
        minimum_version=manifest.minimum_version,
        expires_at=datetime.strptime(expires_at, _MOMENT).replace(tzinfo=UTC)
        if expires_at
        else None,
    )


def _check_own_id(row: ReleaseRow, others: Sequence[ReleaseRow]) -> None:
    """Refuse a new release whose id another one has, also one that was removed: a host that
    still runs that one would prove with it that it runs this."""
    for other in others:
        if other.release_id == row.release_id and other.name != row.name:
            raise Conflict(
                f"{row.name} has the release id of {other.name}, so no host could prove "
                "which of them it runs",
                expected="an id that no other release has ever had",
                found=f"{row.release_id}, the id of release {other.digest}",
                hint="give the image a release.json with an id of its own: openssl rand -hex 16",
            )


def _check_test(firmware: Sequence[str], detail: Json) -> None:
    if not firmware or not set(firmware) <= FIRMWARES or len(set(firmware)) != len(firmware):
        raise RequestError(
            "a test names the firmwares that it booted on",
            expected=f"some of {', '.join(sorted(FIRMWARES))}, each once",
            found=list(firmware),
        )
    size = len(json.dumps(detail))
    if size > TEST_DETAIL_BYTES_MAX:
        raise RequestError(
            "the detail of a test is too large", expected=TEST_DETAIL_BYTES_MAX, found=size
        )
