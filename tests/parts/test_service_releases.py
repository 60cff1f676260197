"""What people do with releases: promote, test, revoke, sign. Real archive, real database."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.core.manifest import Manifest
from provisioner.core.model import Channel, HostState, Operation, Phase, ReleaseRow, ReleaseTest
from provisioner.core.releases import CHANNELS_PER_IMAGE_MAX, ReleaseRevoked, ReleaseUntested
from provisioner.core.trust import TrustPolicy
from provisioner.errors import Conflict, Gone, NotFound, ProvisionerError, RequestError, TrustError
from provisioner.imaging import signing
from provisioner.imaging.archive import Archive, folder_of
from provisioner.imaging.blobs import FileBlobs
from provisioner.imaging.publish import Publisher
from provisioner.service.identity import TokenRefused
from provisioner.service.releases import REASON_CHARACTERS_MAX, TEST_DETAIL_BYTES_MAX
from provisioner.service.removal import GRACE
from tests.parts.service_site import ACTOR, STORED_BYTES, TESTED_CHANNEL, Agent, Site, tamper
from tests.parts.test_imaging_archive import FACTS, SIGNER, make_disk, publish, root_of, spoil
from tests.parts.test_service_deadlines import agent_of, deployed_to

SECOND = Ed25519PrivateKey.generate()
CAREFUL = "careful"  # a channel that asks for two signatures


@pytest.fixture
def archive_of_two(archive_of_two: Archive, tmp_path: Path) -> Archive:
    """The archive with tiny@1 and tiny@2, for this test alone, trusting two keys."""
    root = tmp_path / "archive"
    shutil.copytree(root_of(archive_of_two), root)
    trusted = tuple(signing.public_hex(key.public_key()) for key in (SIGNER, SECOND))
    policy = TrustPolicy(trusted, channels={CAREFUL: 2})
    return Archive(FileBlobs(root), policy, root / "lock", space_reserve_bytes=0)


@pytest.fixture
def publish_more(site: Site, archive_of_two: Archive, tmp_path: Path) -> Callable[..., Manifest]:
    """Publish another version of tiny, with further facts about it."""

    def register(manifest: Manifest, stored_bytes: int) -> None:
        site.releases.register(manifest, stored_bytes, actor=ACTOR)

    def more(version: str, *, content: str = "", **facts: Any) -> Manifest:
        disk = tmp_path / f"{version}-{content}.raw"
        if not disk.exists():  # a partition table made anew would be another one
            make_disk(disk, (content or version).encode())
        facts = {"release_id": sha256(version.encode()).hexdigest()[:32], **facts}
        named = replace(FACTS, version=version, **facts)
        return publish(archive_of_two, disk, named, register)

    return more


def promote(site: Site, release: str, channel: str = "canary") -> Channel:
    return site.releases.promote(release, channel, actor=ACTOR)


def record(site: Site, release: str, *firmware: str, is_healthy: bool = True) -> ReleaseTest:
    return site.releases.record_test(
        release, profile="web", firmware=firmware, is_healthy=is_healthy, detail={}, actor=ACTOR
    )


def deploy(site: Site, release: str, **options: bool) -> Operation:
    return site.operations.request_deployment(["r1n1"], release, options=options, actor=ACTOR)[0]


def actions(site: Site) -> Sequence[str]:
    return [audited.action for audited in site.audit.rows()]


# --- registering --------------------------------------------------------------------------


def test_a_row_has_what_the_manifest_says(
    site: Site, publish_more: Callable[..., Manifest]
) -> None:
    manifest = publish_more("3", minimum_version="2", expires_at="2027-01-01T00:00:00Z")
    row = site.releases.show("tiny@3")
    assert (row.digest, row.minimum_version) == (manifest.digest, "2")
    assert str(row.expires_at) == "2027-01-01 00:00:00+00:00"
    assert row.stored_bytes > 0
    assert site.releases.show("tiny@1").stored_bytes == STORED_BYTES
    assert site.releases.minimum_versions() == {"tiny": "2"}


def test_the_same_version_with_other_content_is_refused_and_leaves_nothing(
    site: Site, archive_of_two: Archive, publish_more: Callable[..., Manifest]
) -> None:
    publish_more("3")
    before = sorted(archive_of_two.digests())
    with pytest.raises(Conflict, match="other content"):
        publish_more("3", content="another")
    assert sorted(archive_of_two.digests()) == before
    assert [row.version for row in site.releases.list()] == ["1", "2", "3"]


def test_an_id_belongs_to_one_release_also_after_that_was_removed(
    site: Site, publish_more: Callable[..., Manifest]
) -> None:
    first = publish_more("3")
    assert publish_more("3") == first  # the same once more is no other
    for version in ("5", "6"):
        with pytest.raises(Conflict, match="has the release id of tiny@3") as refused:
            publish_more(version, release_id=first.release_id)
        assert first.digest in str(refused.value.found)
        site.clock.pass_(2 * GRACE.total_seconds())
        publish_more("4")
        site.releases.remove_unused(actor=ACTOR, keep_newest=1)
    assert first.digest not in site.releases.kept()


def test_a_version_that_was_removed_takes_no_other_content(
    site: Site, archive_of_two: Archive, publish_more: Callable[..., Manifest]
) -> None:
    """The archive has forgotten it; the database has not."""
    digest = publish_more("3").digest
    tamper(site, f"UPDATE releases SET removed_at = published_at WHERE digest = '{digest}'")
    shutil.rmtree(root_of(archive_of_two) / folder_of(digest))
    with pytest.raises(Conflict, match="never changes"):
        publish_more("3", content="another")
    assert publish_more("3").digest == digest
    assert site.releases.show("tiny@3").removed_at is None
    assert actions(site)[-1] == "release.published"


def test_what_comes_back_has_its_time_of_grace_again(
    site: Site, publish_more: Callable[..., Manifest]
) -> None:
    publish_more("3")
    first = site.releases.show("tiny@3").published_at
    site.clock.pass_(GRACE.total_seconds())
    with site.store.begin() as tx:  # the newest of an image stays otherwise
        row = tx.lock_release(site.releases.show("tiny@3").digest)
        tx.save_release(replace(row, removed_at=site.clock()))
    publish_more("3")
    back = site.releases.show("tiny@3")
    assert (back.removed_at, back.published_at) == (None, first + GRACE)
    site.clock.pass_(1)
    publish_more("4")
    site.clock.pass_(GRACE.total_seconds() - 2)
    assert "tiny@3" not in names(site.releases.unused(keep_newest=1))
    site.clock.pass_(1)
    assert "tiny@3" in names(site.releases.unused(keep_newest=1))


def names(rows: Sequence[ReleaseRow]) -> list[str]:
    return [row.name for row in rows]


# --- channels -----------------------------------------------------------------------------


def test_a_channel_points_to_what_was_promoted_last(site: Site) -> None:
    channel = promote(site, "tiny@1")
    assert (str(channel), channel.release_name, channel.moved_by) == (
        "tiny:canary",
        "tiny@1",
        ACTOR,
    )
    assert site.releases.show("tiny:canary").name == "tiny@1"
    promote(site, "tiny@2")
    assert site.releases.show("tiny:canary").name == "tiny@2"
    assert [one.release_name for one in site.releases.channels()] == ["tiny@2"]
    assert site.audit.rows()[-1].detail["from"] == "tiny@1"
    # An older one may come back.
    assert promote(site, "tiny@1").release_name == "tiny@1"


def test_a_release_is_promoted_from_channel_to_channel(site: Site) -> None:
    promote(site, "tiny@2", "candidate")
    assert promote(site, "tiny:candidate", "canary").release_name == "tiny@2"


def test_promoting_again_records_nothing(site: Site) -> None:
    first = promote(site, "tiny@1")
    rows = len(site.audit.rows())
    assert promote(site, "tiny@1") == first
    assert len(site.audit.rows()) == rows


def test_a_deployment_by_channel_pins_the_release_and_the_channel(site: Site) -> None:
    site.add_host()
    promote(site, "tiny@1")
    operation = deploy(site, "tiny:canary")
    promote(site, "tiny@2")
    assert (operation.pins["channel"], operation.pins["release_name"]) == ("canary", "tiny@1")
    assert operation.release == site.releases.show("tiny@1").digest


@pytest.mark.parametrize("name", ["", "Stable", "a b", "../x", "a" * 32, "1st"])
def test_a_channel_has_a_plain_name(site: Site, name: str) -> None:
    with pytest.raises(RequestError, match="not a channel"):
        promote(site, "tiny@1", name)


def test_an_unknown_channel_names_close_ones(site: Site) -> None:
    promote(site, "tiny@1")
    with pytest.raises(NotFound, match="no channel canari") as caught:
        site.releases.show("tiny:canari")
    assert caught.value.hint == "did you mean tiny:canary?"


def test_an_image_has_so_many_channels_at_most(site: Site) -> None:
    for number in range(CHANNELS_PER_IMAGE_MAX):
        promote(site, "tiny@1", f"c{number}")
    with pytest.raises(Conflict, match="too many channels"):
        promote(site, "tiny@1", "one-more")
    promote(site, "tiny@2", "c0")


# --- what a channel, and trust, ask for ---------------------------------------------------


def test_a_channel_that_asks_for_a_test_refuses_a_release_without(site: Site) -> None:
    with pytest.raises(ReleaseUntested, match="on bios, uefi"):
        promote(site, "tiny@1", TESTED_CHANNEL)
    record(site, "tiny@1", "bios")
    record(site, "tiny@1", "uefi", is_healthy=False)
    with pytest.raises(ReleaseUntested, match="on uefi"):
        promote(site, "tiny@1", TESTED_CHANNEL)
    assert site.releases.channels() == []
    record(site, "tiny@1", "uefi")
    assert promote(site, "tiny@1", TESTED_CHANNEL).name == TESTED_CHANNEL
    healthy = [test.is_healthy for test in site.releases.tests("tiny@1")]
    assert healthy == [True, False, True]
    assert site.releases.tests("tiny@2") == []


@pytest.mark.parametrize(
    ("firmware", "detail"),
    [([], {}), (["bios", "bios"], {}), (["coreboot"], {}), (["bios"], {"x": "y" * 65536})],
    ids=["none", "twice", "unknown", "too much detail"],
)
def test_a_test_that_says_nothing_is_not_kept(
    site: Site, firmware: list[str], detail: dict[str, str]
) -> None:
    assert TEST_DETAIL_BYTES_MAX <= 65536
    with pytest.raises(RequestError):
        site.releases.record_test(
            "tiny@1", profile="p", firmware=firmware, is_healthy=True, detail=detail, actor=ACTOR
        )
    assert site.releases.tests("tiny@1") == []


def test_a_channel_with_a_threshold_asks_for_more_signatures(
    site: Site, archive_of_two: Archive
) -> None:
    site.add_host()
    with pytest.raises(TrustError, match="too few signatures for the channel careful"):
        promote(site, "tiny@1", CAREFUL)
    digest = site.releases.show("tiny@1").digest
    Publisher(archive_of_two, [SECOND]).sign(digest)
    assert len(site.releases.signed("tiny@1", actor=ACTOR)) == 2
    assert actions(site)[-1] == "release.signed"
    promote(site, "tiny@1", CAREFUL)
    assert site.releases.signers("tiny:careful") == site.releases.signers("tiny@1")
    assert deploy(site, f"tiny:{CAREFUL}").pins["channel"] == CAREFUL


Refusal = tuple[dict[str, Any], str]
REFUSED: dict[str, Refusal] = {
    "expired": ({"expires_at": "2026-11-23T12:00:00Z"}, "has expired"),
    "below a minimum": ({"minimum_version": None}, "older than what this image may go back to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_trust_forbids_is_neither_promoted_nor_deployed(
    site: Site, publish_more: Callable[..., Manifest], case: str
) -> None:
    facts, words = REFUSED[case]
    site.add_host()
    publish_more("0", **facts)
    if case == "below a minimum":
        publish_more("3", minimum_version="2")
    for attempt in (
        lambda: promote(site, "tiny@0"),
        lambda: deploy(site, "tiny@0"),
    ):
        with pytest.raises(TrustError, match=words):
            attempt()
    assert site.operations.list() == []
    assert site.releases.channels() == []
    # A disk may be compared with it: where it still runs is worth knowing.
    site.operations.request_verification(["r1n1"], "tiny@0", actor=ACTOR)


def test_a_comparison_asks_for_signatures(
    site: Site, archive_of_two: Archive, publish_more: Callable[..., Manifest]
) -> None:
    site.add_host()
    digest = publish_more("3").digest
    archive_of_two.policy = replace(archive_of_two.policy, threshold=2)
    with pytest.raises(TrustError, match="too few signatures"):
        site.operations.request_verification(["r1n1"], "tiny@3", actor=ACTOR)
    Publisher(archive_of_two, [SECOND]).sign(digest)
    site.operations.request_verification(["r1n1"], "tiny@3", actor=ACTOR)


def test_a_minimum_counts_from_publishing_and_is_not_above_the_own_version(
    site: Site, archive_of_two: Archive, publish_more: Callable[..., Manifest]
) -> None:
    before = sorted(archive_of_two.digests())
    with pytest.raises(RequestError, match="tiny@3 cannot ask for the minimum version 4"):
        publish_more("3", minimum_version="4")
    assert sorted(archive_of_two.digests()) == before
    assert site.releases.minimum_versions() == {}
    publish_more("3", content="again", minimum_version="3")
    assert site.releases.minimum_versions() == {"tiny": "3"}
    with pytest.raises(TrustError, match="older"):
        promote(site, "tiny@2")


def test_a_revoked_release_sets_no_minimum(
    site: Site, publish_more: Callable[..., Manifest]
) -> None:
    publish_more("9", minimum_version="9")
    with pytest.raises(TrustError, match="older"):
        promote(site, "tiny@1")
    site.releases.revoke("tiny@9", "its minimum was a mistake", actor=ACTOR)
    promote(site, "tiny@1")


@pytest.mark.parametrize("file", ["manifest.json", "manifest.sig", "files.json.zst"])
def test_a_release_that_was_changed_is_found_out_before_anything_is_queued(
    site: Site, archive_of_two: Archive, publish_more: Callable[..., Manifest], file: str
) -> None:
    site.add_host()
    digest = publish_more("3", attachments={"files.json": b'{"format":1,"files":[]}'}).digest
    spoil(archive_of_two, f"{folder_of(digest)}/{file}")
    with pytest.raises(TrustError):
        deploy(site, "tiny@3")
    with pytest.raises(TrustError):
        promote(site, "tiny@3")
    assert site.operations.list() == []


# --- revoking -----------------------------------------------------------------------------


def revoke(site: Site, release: str = "tiny@1", reason: str = "it loses data") -> None:
    site.releases.revoke(release, reason, actor=ACTOR)


def test_a_revoked_release_is_shown_and_not_deployed(site: Site) -> None:
    site.add_host()
    promote(site, "tiny@1")
    revoke(site)
    row = site.releases.show("tiny@1")
    assert (row.revoked_at, row.revoked_reason) == (site.clock(), "it loses data")
    attempts: list[Callable[[], object]] = [
        lambda: deploy(site, "tiny@1"),
        lambda: deploy(site, "tiny:canary"),
        lambda: promote(site, "tiny@1", "candidate"),
    ]
    for attempt in attempts:
        with pytest.raises(ReleaseRevoked, match="tiny@1 was revoked") as caught:
            attempt()
        assert "it loses data" in str(caught.value.found)
    # The way out: the channel is moved to another release.
    promote(site, "tiny@2")
    deploy(site, "tiny:canary")


def test_revoking_again_keeps_the_first_reason(site: Site) -> None:
    revoke(site)
    revoke(site, reason="another")
    assert site.releases.show("tiny@1").revoked_reason == "it loses data"
    assert actions(site).count("release.revoked") == 1


@pytest.mark.parametrize("reason", ["", "  ", "x" * (REASON_CHARACTERS_MAX + 1)])
def test_a_release_is_revoked_for_a_reason(site: Site, reason: str) -> None:
    with pytest.raises(RequestError, match="for a reason"):
        revoke(site, reason=reason)
    assert site.releases.show("tiny@1").revoked_at is None


OPEN = [Phase.NETBOOTING, Phase.PREPARING, Phase.WRITING, Phase.VERIFYING, Phase.BOOTING]


@pytest.mark.parametrize("phase", [*OPEN, Phase.PROVING])
def test_revoking_ends_a_deployment_in_any_phase(site: Site, phase: Phase) -> None:
    operation = deployed_to(site, phase)
    before = site.hosts.show("r1n1").state
    revoke(site)
    after = site.at(operation)
    assert after.phase is Phase.FAILED
    assert after.error is not None
    assert after.error["code"] == "release_revoked"
    assert after.error["host"] == "r1n1"
    assert "it loses data" in after.error["found"]
    assert site.hosts.show("r1n1").state is before
    assert f"deployment failed in {phase}" in site.texts()
    site.perform()
    # Half of a revoked release, and nothing to go back to, is for a person to see.
    is_half = phase not in (Phase.NETBOOTING, Phase.PREPARING)
    assert (site.hosts.show("r1n1").quarantine_reason is not None) == is_half
    site.hosts.set_flags("r1n1", release_quarantine=True, actor=ACTOR)
    deploy(site, "tiny@2")  # nothing keeps the host


def test_revoking_ends_a_deployment_that_waits(site: Site) -> None:
    site.add_host()
    operation = deploy(site, "tiny@1")
    revoke(site)
    assert site.phase(operation) is Phase.FAILED
    site.worker.start_queued()
    assert site.bmc().changes() == []


def test_revoking_leaves_other_deployments_and_verifications_alone(site: Site) -> None:
    site.add_host(1)
    site.add_host(2)
    other = site.deploy("r1n1", release="tiny@2")
    compared = site.operations.request_verification(["r1n2"], "tiny@1", actor=ACTOR)[0]
    revoke(site)
    assert site.phase(other) is Phase.NETBOOTING
    assert site.phase(compared) is Phase.QUEUED


def test_the_agent_of_a_revoked_release_is_stopped_before_its_next_write(site: Site) -> None:
    operation = deployed_to(site, Phase.WRITING)
    agent = agent_of(site, operation)
    agent.authorise()
    revoke(site)
    calls: list[Callable[[], object]] = [agent.progress, agent.authorise, agent.seed, agent.done]
    for call in calls:
        with pytest.raises(TokenRefused):
            call()
    assert site.hosts.show("r1n1").state is HostState.DIRTY


def test_a_deployment_that_a_revocation_missed_may_not_write_either(site: Site) -> None:
    """As if the row had been changed without ending what deploys it."""
    operation = deployed_to(site, Phase.PREPARING)
    agent = agent_of(site, operation)
    digest = operation.release
    tamper(
        site,
        "UPDATE releases SET revoked_reason = 'x', revoked_at = published_at "
        f"WHERE digest = '{digest}'",
    )
    refused: list[tuple[Callable[[], object], type[ProvisionerError]]] = [
        (agent.authorise, TrustError),
        (agent.progress, ReleaseRevoked),
        (agent.seed, ReleaseRevoked),
    ]
    for call, kind in refused:
        with pytest.raises(kind, match="was revoked"):
            call()
    assert site.phase(operation) is Phase.PREPARING


def test_a_new_system_of_a_revoked_release_is_not_believed(site: Site) -> None:
    operation = deployed_to(site, Phase.BOOTING)
    revoke(site)
    with pytest.raises(Gone):
        agent_of(site, operation).phone_home()
    assert site.phase(operation) is Phase.FAILED
    assert site.hosts.show("r1n1").release is None


# --- what the agent is told ---------------------------------------------------------------


def test_full_is_an_option_of_a_deployment(site: Site) -> None:
    site.add_host()
    assert deploy(site, "tiny@1", full=True).options == {"full": True}
    site.worker.start_queued()
    site.perform()
    told = Agent(site).boots().hello()
    assert told["mode"] == "full"


def test_an_agent_hears_what_makes_it_stricter(
    site: Site, publish_more: Callable[..., Manifest]
) -> None:
    site.add_host()
    publish_more("3", minimum_version="2")
    promote(site, "tiny@2")
    site.worker.start_queued()
    operation = deploy(site, "tiny:canary")
    site.worker.start_queued()
    site.perform()
    told = Agent(site).boots().hello()
    assert told["operation"] == operation.id
    assert (told["mode"], told["channel"], told["minimum_version"]) == ("delta", "canary", "2")
    assert told["now"] == "2026-11-23T12:00:00Z"
    assert told["mirrors"] == ["http://10.77.1.1:8081"]
