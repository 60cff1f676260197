"""Giving up releases: nothing that anything refers to, also while something begins to."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from provisioner.core.lifecycle import E
from provisioner.core.model import Channel, HostId, HostState, Kind, Phase, ReleaseRow
from provisioner.errors import Conflict, ProvisionerError
from provisioner.imaging.archive import Archive
from provisioner.imaging.garbage import collect
from provisioner.service.removal import GRACE, KEEP_NEWEST, Keeping, mark_unused
from tests.parts.service_site import ACTOR, Site, profile_document, running_site
from tests.parts.stores import NOW, a_host, an_operation
from tests.parts.test_imaging_archive import FACTS, an_archive, make_disk, publish

ROUNDS = 25
DAY = timedelta(days=1)


def a_release(number: int, **changes: object) -> ReleaseRow:
    row = ReleaseRow(
        digest=f"{number:02x}" * 32,
        image="web",
        version=str(number),
        size_bytes=1,
        used_bytes=1,
        stored_bytes=1,
        firmware=("bios",),
        release_id="0" * 32,
        published_at=NOW - timedelta(days=100 - number),
    )
    return replace(row, **changes)  # type: ignore[arg-type] # fields by name


@pytest.fixture
def on_both(migrated_url: str, archive_of_two: Archive, ramdisk_folder: Path) -> Iterator[Site]:
    """A service on SQLite and one on PostgreSQL, with six old releases of `web`."""
    with running_site(migrated_url, archive_of_two, ramdisk_folder) as site:
        with site.store.begin() as tx:
            for number in range(1, 7):
                tx.add_release(a_release(number))
        yield site


def removed(site: Site) -> list[str]:
    return [row.version for row in site.releases.remove_unused(actor=ACTOR)]


def test_what_nothing_refers_to_is_given_up_and_stays_known(on_both: Site) -> None:
    assert [row.version for row in on_both.releases.unused()] == ["1", "2", "3"]
    assert removed(on_both) == ["1", "2", "3"]
    assert removed(on_both) == []
    assert [row.version for row in on_both.releases.list()] == ["4", "5", "6"]
    assert len(on_both.releases.list(with_removed=True)) == 6
    assert on_both.releases.kept() == {a_release(number).digest for number in (4, 5, 6)}
    assert on_both.releases.show("web@1").removed_at == on_both.clock()
    audited = [row.subject for row in on_both.audit.rows() if row.action == "release.removed"]
    assert audited == ["web@1", "web@2", "web@3"]


def test_every_kind_of_reference_keeps_a_release(on_both: Site) -> None:
    digests = [a_release(number).digest for number in (1, 2, 3)]
    with on_both.store.begin() as tx:
        tx.add_host(a_host("r1n1", state=HostState.ACTIVE, release=digests[0]))
        tx.add_host(a_host("r1n2", state=HostState.DIRTY, last_good=digests[1]))
        tx.add_operation(an_operation(host="host_r1n2", release=digests[2]))
    assert removed(on_both) == []
    with on_both.store.begin() as tx:
        for name in ("r1n1", "r1n2"):
            tx.save_host(replace(tx.host(HostId(f"host_{name}")), release=None, last_good=None))
        operation = tx.operations(limit=1)[0]
        tx.save_operation(replace(operation, phase=Phase.FAILED, ended_at=NOW))
    assert removed(on_both) == ["1", "2", "3"]


def test_a_channel_and_a_verification_keep_a_release(on_both: Site) -> None:
    with on_both.store.begin() as tx:
        tx.add_host(a_host())
        tx.add_operation(an_operation(kind=Kind.VERIFICATION, release=a_release(1).digest))
        tx.save_channel(Channel("web", "old", a_release(2).digest, "web@2", NOW, ACTOR))
    assert removed(on_both) == ["3"]


def test_the_newest_and_what_was_published_just_now_stay(on_both: Site) -> None:
    assert (KEEP_NEWEST, GRACE) == (3, DAY)
    with on_both.store.begin() as tx:
        for number in range(7, 12):
            at = NOW - GRACE + timedelta(seconds=number)
            tx.add_release(a_release(number, image="db", published_at=at))
        kept = mark_unused(tx, Keeping(newest=6), now=NOW, actor=ACTOR)
    assert kept == []
    on_both.clock.pass_(9)
    assert removed(on_both) == ["1", "2", "3", "7", "8"]


def test_a_removed_release_is_refused(site: Site) -> None:
    site.add_host()
    with site.store.begin() as tx:
        row = tx.lock_release(site.releases.show("tiny@1").digest)
        tx.save_release(replace(row, removed_at=NOW))
    attempts: list[Callable[[], object]] = [
        lambda: site.deploy("r1n1", release="tiny@1"),
        lambda: site.releases.promote("tiny@1", "canary", actor=ACTOR),
        lambda: site.operations.request_verification(["r1n1"], "tiny@1", actor=ACTOR),
    ]
    for attempt in attempts:
        with pytest.raises(Conflict, match="was removed"):
            attempt()


# --- while something begins ---------------------------------------------------------------


@pytest.fixture
def racing(
    migrated_url: str, tmp_path: Path, ramdisk_folder: Path
) -> Iterator[tuple[Site, Archive]]:
    """A service over an archive of its own whose tiny@1 is old and unused, and 25 hosts."""
    archive = an_archive(tmp_path / "own")
    with running_site(migrated_url, archive, ramdisk_folder) as site:
        for number in range(1, 5):
            disk = make_disk(tmp_path / f"{number}.raw", str(number).encode())
            facts = replace(FACTS, version=str(number), release_id=str(number) * 32)
            manifest = publish(archive, disk, facts)
            site.releases.register(manifest, 1, actor=ACTOR)
            site.clock.pass_(1)
        site.clock.pass_(2 * GRACE.total_seconds())
        site.profiles.save("web", profile_document(), actor=ACTOR)
        for number in range(1, ROUNDS + 1):
            site.add_host(number)
        yield site, archive


def both(first: Callable[[], object], second: Callable[[], object]) -> tuple[object, object]:
    """Begin both calls together; return what each returned, or its error."""
    together = threading.Barrier(2)

    def begin(call: Callable[[], object]) -> object:
        together.wait(30)
        try:
            return call()
        except ProvisionerError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(begin, (first, second))
    return one, two


def bring_back(site: Site) -> None:
    with site.store.begin() as tx:
        row = tx.lock_release(site.releases.show("tiny@1").digest)
        tx.save_release(replace(row, removed_at=None))


def test_of_a_removal_and_a_deployment_at_once_exactly_one_succeeds(
    racing: tuple[Site, Archive],
) -> None:
    """And whatever won, no open operation refers to a release that was removed."""
    site, _ = racing
    wins = {"removal": 0, "deployment": 0}
    for number in range(1, ROUNDS + 1):
        gone, queued = both(
            lambda: removed(site),
            lambda number=number: site.operations.request_deployment(  # type: ignore[misc] # bound now
                [f"r1n{number}"], "tiny@1", options={}, actor=ACTOR
            ),
        )
        row = site.releases.show("tiny@1")
        if isinstance(queued, list):
            assert gone == [], (gone, queued)
            assert row.removed_at is None
            wins["deployment"] += 1
            site.operations.cancel(queued[0].id, actor=ACTOR)
        else:
            assert isinstance(queued, Conflict), queued
            assert gone == ["1"], gone
            assert row.removed_at is not None
            wins["removal"] += 1
            bring_back(site)
    assert sum(wins.values()) == ROUNDS


def test_of_a_removal_and_a_promotion_at_once_exactly_one_succeeds(
    racing: tuple[Site, Archive],
) -> None:
    site, _ = racing
    for number in range(ROUNDS):
        gone, moved = both(
            lambda: removed(site),
            lambda: site.releases.promote("tiny@1", "canary", actor=ACTOR),
        )
        assert (gone == ["1"]) is isinstance(moved, Conflict), (number, gone, moved)
        if isinstance(moved, Conflict):
            bring_back(site)
        site.releases.promote("tiny@4", "canary", actor=ACTOR)


def test_a_deployment_that_holds_its_release_makes_a_removal_wait(
    racing: tuple[Site, Archive],
) -> None:
    """The order that a race seldom takes, taken on purpose."""
    site, _ = racing
    digest = site.releases.show("tiny@1").digest
    held, go_on = threading.Event(), threading.Event()

    def request() -> None:
        with site.store.begin() as tx:
            tx.hold_release(digest)
            held.set()
            go_on.wait(30)
            host = tx.host_named("r1n1")
            assert host is not None
            tx.add_operation(an_operation(host=host.id, release=digest))

    with ThreadPoolExecutor(2) as pool:
        requesting = pool.submit(request)
        assert held.wait(30)
        removing = pool.submit(removed, site)
        with pytest.raises(TimeoutError):
            removing.result(0.3)
        go_on.set()
        requesting.result(30)
        assert removing.result(30) == []


def test_of_a_revocation_and_a_deployment_at_once_none_is_left_running(
    racing: tuple[Site, Archive],
) -> None:
    site, _ = racing
    for number in range(1, ROUNDS + 1):
        both(
            lambda: site.releases.revoke("tiny@1", "bad", actor=ACTOR),
            lambda number=number: site.operations.request_deployment(  # type: ignore[misc] # bound now
                [f"r1n{number}"], "tiny@1", options={}, actor=ACTOR
            ),
        )
        assert site.operations.list(only_open=True) == []
        with site.store.begin() as tx:
            row = tx.lock_release(site.releases.show("tiny@1").digest)
            tx.save_release(replace(row, revoked_at=None, revoked_reason=None))


@pytest.mark.parametrize("is_deleted", [False, True], ids=["ended", "deleted"])
def test_a_deployment_that_ends_meanwhile_keeps_no_release_from_being_revoked(
    racing: tuple[Site, Archive], is_deleted: bool
) -> None:
    """The revocation saw it open, and has to wait for whoever ends it."""
    site, _ = racing
    other = site.deploy("r1n2")
    operation = site.deploy("r1n1")
    held, go_on = threading.Event(), threading.Event()

    def end() -> None:
        with site.store.begin() as tx:
            if is_deleted:
                tx.delete_host(tx.operation(operation.id).host_id)
            else:
                site.transitions.apply(tx, operation.id, E.CANCEL, generation=1, actor=ACTOR)
            held.set()
            go_on.wait(30)

    with ThreadPoolExecutor(2) as pool:
        ending = pool.submit(end)
        assert held.wait(30)
        revoking = pool.submit(site.releases.revoke, "tiny@1", "bad", actor=ACTOR)
        with pytest.raises(TimeoutError):
            revoking.result(0.3)
        go_on.set()
        ending.result(30)
        assert revoking.result(30).revoked_at is not None
    assert site.phase(other) is Phase.FAILED
    if not is_deleted:
        assert site.phase(operation) is Phase.CANCELLED
    (row,) = (row for row in site.audit.rows() if row.action == "release.revoked")
    assert row.detail["deployments_ended"] == 1


def test_the_archive_loses_what_was_given_up_and_no_more(racing: tuple[Site, Archive]) -> None:
    site, archive = racing
    before = set(archive.digests())
    gone = {row.digest for row in site.releases.unused()}
    assert set(collect(archive, lambda: before - gone, dry_run=True).releases) == gone
    assert removed(site) == ["1"]
    collected = collect(archive, site.releases.kept)
    assert set(collected.releases) == gone
    assert set(archive.digests()) == before - gone
    assert collect(archive, site.releases.kept).releases == ()
    for version in ("2", "3", "4"):
        site.operations.cancel(
            site.operations.request_deployment(
                ["r1n1"], f"tiny@{version}", options={}, actor=ACTOR
            )[0].id,
            actor=ACTOR,
        )
