"""Releases in SQL, with their channels and tests. A row of a release is never deleted."""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Select, or_, select, union

from ..core.model import Channel, HostId, ReleaseFailure, ReleaseRow, ReleaseTest
from ..errors import Conflict, NotFound
from .rows import (
    Row,
    channel_of,
    plain_text,
    release_failure_of,
    release_of,
    release_row,
    release_test_of,
    release_test_row,
)
from .sql import Queries
from .tables import (
    UNFINISHED,
    channels,
    hosts,
    operations,
    release_failures,
    release_tests,
    releases,
)

# Tests kept for one release; the audit log keeps the fact of every one.
TESTS_PER_RELEASE_MAX: Final = 100
# Failed releases remembered for one host; nobody has tried more than these lately.
FAILURES_PER_HOST_MAX: Final = 100


class ReleaseQueries(Queries):
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

    def save_release(self, release: ReleaseRow) -> None:
        """Save every field. Raises NotFound when there is no such release."""
        same = releases.c.digest == release.digest
        if self._change(releases.update().where(same), release_row(release)) < 1:
            raise NotFound(f"there is no release {release.digest}")

    def release(self, digest: str) -> ReleaseRow | None:
        return _found(self._one(_of(digest)))

    def hold_release(self, digest: str) -> ReleaseRow:
        """Return the release, and let nobody change it until this transaction ends.

        Any number may hold it at once. Raises NotFound when there is none.
        """
        return self._sure(digest, self._one(_of(digest), hold=True))

    def lock_release(self, digest: str) -> ReleaseRow:
        """Return the release, and let nobody change or hold it until this transaction ends.

        What those who held it began to refer to is seen by the queries that follow.
        """
        return self._sure(digest, self._one(_of(digest), lock=True))

    def _sure(self, digest: str, row: Row | None) -> ReleaseRow:
        if row is None:
            raise NotFound(f"there is no release {digest}")
        return release_of(row)

    def release_named(self, image: str, version: str) -> ReleaseRow | None:
        named = (releases.c.image == image) & (releases.c.version == version)
        return _found(self._one(select(releases).where(named)))

    def releases(self, image: str | None = None) -> Sequence[ReleaseRow]:
        """Return the releases of one image, or all, by image and time."""
        order = (releases.c.image, releases.c.published_at, releases.c.version)
        query = select(releases).order_by(*order)
        if image is not None:
            query = query.where(releases.c.image == image)
        return [release_of(row) for row in self._all(query)]

    def used_releases(self) -> set[str]:
        """Return the digests that a host, a channel or an operation refers to that is
        unfinished, or that is to be tried again.

        One statement, so one state: a deployment that ends at this moment is seen as the
        operation that it was, or as what its host runs, never as neither.
        """
        used = union(
            select(hosts.c.release),
            select(hosts.c.last_good),
            select(channels.c.digest),
            select(operations.c.release).where(UNFINISHED),
            select(operations.c.release).where(operations.c.follow_up_at.is_not(None)),
        )
        return {digest for (digest,) in self._connection.execute(used) if digest is not None}

    def channel(self, image: str, name: str) -> Channel | None:
        named = (channels.c.image == image) & (channels.c.name == name)
        row = self._one(_channels().where(named))
        return channel_of(row) if row is not None else None

    def channels(self, image: str | None = None) -> Sequence[Channel]:
        """Return the channels of one image, or all, by image and name."""
        query = _channels().order_by(channels.c.image, channels.c.name)
        if image is not None:
            query = query.where(channels.c.image == image)
        return [channel_of(row) for row in self._all(query)]

    def save_channel(self, channel: Channel) -> None:
        """Make the channel point to its release, whether it was there before or not."""
        names = ("image", "name", "digest", "moved_at", "moved_by")
        self._put(channels, {name: getattr(channel, name) for name in names})

    def add_release_test(self, test: ReleaseTest) -> None:
        """Add a test, and forget the oldest ones over the limit."""
        self._add(release_tests, release_test_row(test))
        table = release_tests.c
        oldest_kept = (
            select(table.number)
            .where(table.digest == test.digest)
            .order_by(table.number.desc())
            .limit(1)
            .offset(TESTS_PER_RELEASE_MAX - 1)
            .scalar_subquery()
        )
        old = (table.digest == test.digest) & (table.number < oldest_kept)
        self._change(release_tests.delete().where(old))

    def release_tests(self, digest: str) -> Sequence[ReleaseTest]:
        table = release_tests.c
        query = select(release_tests).where(table.digest == digest).order_by(table.number.desc())
        return [release_test_of(row) for row in self._all(query)]

    def remember_failure(self, failure: ReleaseFailure) -> None:
        """Remember that a release failed on a host, and forget the oldest ones over the limit."""
        self._put(
            release_failures,
            {
                **failure.__dict__,
                "code": plain_text(failure.code),
                "message": plain_text(failure.message),
            },
        )
        table = release_failures.c
        old = (
            select(table.release)
            .where(table.host_id == failure.host_id)
            .order_by(table.at.desc(), table.release)
            .limit(FAILURES_PER_HOST_MAX)  # SQLite takes no OFFSET without it
            .offset(FAILURES_PER_HOST_MAX)
        )
        of_host = (table.host_id == failure.host_id) & table.release.in_(old)
        self._change(release_failures.delete().where(of_host))

    def failures_on(self, host_id: HostId) -> Sequence[ReleaseFailure]:
        """Return the releases that failed on a host, the newest failure first."""
        table = release_failures.c
        query = select(release_failures).where(table.host_id == host_id)
        return [release_failure_of(row) for row in self._all(query.order_by(table.at.desc()))]

    def forget_failure(self, host_id: HostId, release: str) -> None:
        table = release_failures.c
        same = (table.host_id == host_id) & (table.release == release)
        self._change(release_failures.delete().where(same))


def _of(digest: str) -> Select[Any]:
    return select(releases).where(releases.c.digest == digest)


def _found(row: Row | None) -> ReleaseRow | None:
    return release_of(row) if row is not None else None


def _channels() -> Select[Any]:
    release_name = (releases.c.image + "@" + releases.c.version).label("release_name")
    return select(channels, release_name).join(releases, channels.c.digest == releases.c.digest)
