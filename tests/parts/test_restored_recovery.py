"""What waited to follow a failed deployment when the database was restored."""

from pathlib import Path

from provisioner.service.sightings import Mark, MarkFile
from tests.parts.recovery_site import fail, request, what
from tests.parts.service_site import ACTOR, Site


def test_what_was_to_follow_a_failure_is_not_done_with_a_restored_database(
    site: Site, tmp_path: Path
) -> None:
    """The host may have been rebuilt since the backup, so only a person asks for it anew."""
    site.add_host()
    failed = fail(site, request(site, "tiny@1"))
    assert what(failed) == ("retry", "waiting")
    with site.store.read() as tx:
        newest = tx.newest_audit()
    assert newest is not None
    MarkFile(tmp_path / "state.db.mark").write(Mark(newest.number + 9, "0" * 64))
    site.clock.pass_(3600)
    site.worker.tick()
    assert len(site.operations.list("r1n1")) == 1, "it only observes"

    site.reconciliation.apply(site.reconciliation.plan().digest, actor=ACTOR)

    assert what(site.at(failed)) == ("retry", "dropped")
    site.recovery.take_due()
    assert len(site.operations.list("r1n1")) == 1
