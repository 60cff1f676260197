"""The store keeps its contract on SQLite and on PostgreSQL alike: what is saved comes back."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from provisioner.core.audit import verify
from provisioner.core.contracts import AgentToken, ApiToken, Outgoing, Store
from provisioner.core.effects import PowerOff
from provisioner.core.model import (
    BmcAddress,
    Channel,
    Event,
    Firmware,
    HostId,
    HostState,
    OperationId,
    Phase,
    Profile,
    ReleaseRow,
    ReleaseTest,
    Secret,
    Ticket,
)
from provisioner.core.profile import text_of
from provisioner.errors import Conflict, NotFound
from tests.parts.stores import NOW, a_host, an_operation

HOST, OP = HostId("host_r1n1"), OperationId("op_1")
LATER = NOW + timedelta(seconds=1)


@pytest.fixture
def with_operation(store: Store) -> Store:
    with store.begin() as tx:
        tx.add_host(a_host())
        tx.add_operation(an_operation())
    return store


def test_a_host_comes_back_as_it_was_saved(store: Store) -> None:
    bare = a_host("r1n2", bmc=None, firmware=None, inventory=None, labels={}, macs=())
    with store.begin() as tx:
        tx.add_host(a_host())
        tx.add_host(bare)
    with store.read() as tx:
        assert tx.host(HOST) == a_host()
        assert tx.host(bare.id) == bare
        assert tx.host_named("r1n1") == a_host() == tx.host_named(HOST)
        assert tx.host_named("r9n9") is None
        with pytest.raises(NotFound, match="host_r9n9"):
            tx.host(HostId("host_r9n9"))


def test_a_host_changes_in_every_field(store: Store) -> None:
    changed = a_host(
        "r1n7",
        id=HOST,
        state=HostState.ACTIVE,
        macs=("52:54:00:00:00:02", "52:54:00:00:00:01"),
        uuid="4c4c4544",
        bmc=BmcAddress("127.0.1.9", 6230, "root", Secret("other")),
        generation=7,
        release="ab" * 32,
        last_good="ab" * 32,
        is_protected=True,
        quarantine_reason="failed twice",
        firmware=Firmware.SECURE_BOOT,
        labels={"rack": "r2", "ü": "✓"},
        inventory=None,
        root_disk={"serial": "X", "size_bytes": 1 << 45},
    )
    with store.begin() as tx:
        tx.add_host(a_host(macs=("52:54:00:00:00:01", "52:54:00:00:00:03")))
        tx.save_host(changed)
    with store.read() as tx:
        assert tx.host(HOST) == changed
        assert tx.hosts_with_mac("52:54:00:00:00:02") == [changed]
        assert tx.hosts_with_mac("52:54:00:00:00:03") == []
        assert tx.hosts_with_uuid("4c4c4544") == [changed]
        assert tx.macs_of_firmware(Firmware.SECURE_BOOT) == sorted(changed.macs)
        assert tx.macs_of_firmware(Firmware.UEFI) == []
    with store.begin() as tx, pytest.raises(NotFound):
        tx.save_host(a_host("r9n9"))


def test_hosts_are_listed_by_name_in_pages(store: Store) -> None:
    with store.begin() as tx:
        for number in (3, 1, 2):
            tx.add_host(a_host(f"r1n{number}"))
    with store.read() as tx:
        assert [host.name for host in tx.hosts(limit=2)] == ["r1n1", "r1n2"]
        assert [host.name for host in tx.hosts(after="r1n2")] == ["r1n3"]


def test_a_used_name_or_mac_is_refused_and_the_transaction_goes_on(store: Store) -> None:
    with store.begin() as tx:
        tx.add_host(a_host())
        with pytest.raises(Conflict, match="a host named r1n1"):
            tx.add_host(a_host(id=HostId("other"), macs=()))
        with pytest.raises(Conflict, match="belongs to another host") as refused:
            tx.add_host(a_host("r1n8", macs=a_host().macs))
        assert "r1n1" in (refused.value.hint or "")
        tx.add_host(a_host("r1n9"))
        with pytest.raises(Conflict, match="another host named r1n1"):
            tx.save_host(replace(a_host("r1n9"), name="r1n1"))
        with pytest.raises(Conflict, match="belongs to another host"):
            tx.save_host(a_host("r1n9", macs=a_host().macs, generation=9))
        assert tx.host(HostId("host_r1n9")) == a_host("r1n9")
    with store.read() as tx:
        assert [host.name for host in tx.hosts()] == ["r1n1", "r1n9"]


def test_a_deleted_host_takes_everything_of_its_own_along(with_operation: Store) -> None:
    with with_operation.begin() as tx:
        tx.add_ticket(Ticket("t", OP, HOST, 1, LATER))
        tx.add_agent_token(AgentToken("a", OP, HOST, 1, LATER))
        tx.add_event(Event(NOW, "bmc", "on", host_id=HOST))
        tx.add_event(Event(NOW, "dhcp", "asks", mac="52:54:00:00:00:99"))
    with with_operation.begin() as tx:
        tx.delete_host(HOST)
    with with_operation.begin() as tx:
        assert not tx.hosts()
        assert not tx.operations()
        assert tx.ticket("t") is None
        assert tx.agent_token("a") is None
        assert [event.source for _, event in tx.events()] == ["dhcp"]
        tx.add_event(Event(NOW, "http", "too late", host_id=HOST))
    with with_operation.read() as tx:
        assert len(tx.events()) == 1


def test_an_operation_comes_back_as_it_was_saved(with_operation: Store) -> None:
    changed = an_operation(
        phase=Phase.FAILED,
        rung=2,
        phase_at=LATER,
        deadline_at=None,
        ended_at=LATER,
        phase_seconds={"queued": 1.5, "netbooting": 0.1},
        progress={},
        error={"code": "bmc_unreachable"},
        evidence={"disk": {"serial": "X"}},
    )
    with with_operation.begin() as tx:
        assert tx.operation(OP) == an_operation() == tx.open_operation(HOST)
        tx.save_operation(changed)
        assert tx.operation(OP) == changed
        assert tx.open_operation(HOST) is None
        for call in (tx.operation, lambda key: tx.save_operation(an_operation(key))):
            with pytest.raises(NotFound, match="op_9"):
                call(OperationId("op_9"))


def test_a_host_has_one_unfinished_operation(with_operation: Store) -> None:
    with with_operation.begin() as tx:
        with pytest.raises(Conflict) as busy:
            tx.add_operation(an_operation("op_2"))
        assert busy.value.found == {"operation": "op_1", "phase": "queued"}
        tx.save_operation(an_operation(phase=Phase.SUCCEEDED))
        tx.add_operation(an_operation("op_2"))
        with pytest.raises(Conflict):
            tx.add_operation(an_operation("op_3"))


def test_operations_are_found_by_host_phase_and_deadline(store: Store) -> None:
    with store.begin() as tx:
        for number, phase in enumerate((Phase.SUCCEEDED, Phase.WRITING, Phase.QUEUED)):
            at = NOW + timedelta(minutes=number)
            tx.add_host(a_host(f"r1n{number}"))
            end = None if phase is Phase.SUCCEEDED else at
            tx.add_operation(
                an_operation(
                    f"op_{number}",
                    f"host_r1n{number}",
                    phase=phase,
                    requested_at=at,
                    deadline_at=end,
                )
            )

    def found(**wanted: object) -> list[str]:
        with store.read() as tx:
            return [operation.id for operation in tx.operations(**wanted)]  # type: ignore[arg-type]  # passed through

    assert found() == ["op_2", "op_1", "op_0"]
    assert found(newest_first=False, limit=2) == ["op_0", "op_1"]
    assert found(host_id="host_r1n1") == ["op_1"]
    assert found(phases=[Phase.QUEUED, Phase.SUCCEEDED]) == ["op_2", "op_0"]
    assert found(phases=[]) == []
    assert found(overdue_at=NOW + timedelta(minutes=1)) == ["op_1"]
    with store.read() as tx:
        assert tx.count_operations([Phase.WRITING, Phase.QUEUED]) == 2
        assert tx.count_operations([]) == 0


def test_a_ticket_is_consumed_once(with_operation: Store) -> None:
    old, new = Ticket("old", OP, HOST, 1, NOW), Ticket("new", OP, HOST, 2, LATER)
    with with_operation.begin() as tx:
        tx.add_ticket(new)
        tx.add_ticket(old)
        assert tx.ticket("old") == old
        assert tx.ticket("none") is None
        assert tx.open_ticket(HOST) == new
        assert tx.consume_ticket("new", NOW)
        assert not tx.consume_ticket("new", LATER)
        assert not tx.consume_ticket("none", NOW)
        assert tx.ticket("new") == replace(new, consumed_at=NOW)
        assert tx.open_ticket(HOST) == old


def test_a_revoked_operation_leaves_no_permission(with_operation: Store) -> None:
    token = AgentToken("a", OP, HOST, 1, LATER)
    with with_operation.begin() as tx:
        tx.add_ticket(Ticket("t", OP, HOST, 1, LATER))
        tx.add_agent_token(token)
        assert tx.agent_token("a") == token
        tx.revoke_operation(OP, NOW)
        assert tx.agent_token("a") is None
        assert tx.open_ticket(HOST) is None


def test_a_seed_is_taken_once_whatever_else_is_saved(with_operation: Store) -> None:
    with with_operation.begin() as tx:
        assert tx.take_seed(OP, NOW)
        tx.save_operation(an_operation(phase=Phase.WRITING))
        assert not tx.take_seed(OP, LATER)
        assert not tx.take_seed(OperationId("op_9"), NOW)


def test_api_tokens_are_listed_and_revoked_by_name(store: Store) -> None:
    token = ApiToken("d1", "ci", "operator", NOW, LATER)
    with store.begin() as tx:
        tx.add_api_token(token)
        with pytest.raises(Conflict, match="named ci"):
            tx.add_api_token(replace(token, digest="d2"))
        assert tx.revoke_api_token("ci", LATER)
        assert not tx.revoke_api_token("ci", LATER)
        tx.add_api_token(replace(token, digest="d2", created_at=LATER, expires_at=None))
        assert tx.api_token("d1") == replace(token, revoked_at=LATER)
        assert tx.api_token("d3") is None
        assert [known.digest for known in tx.api_tokens()] == ["d1", "d2"]


def test_a_reply_is_remembered_for_its_time(store: Store) -> None:
    with store.begin() as tx:
        assert tx.recall("key") is None
        tx.remember("key", {"status": 202}, NOW)
        assert tx.recall("key") == {"status": 202}
        with pytest.raises(Conflict):
            tx.remember("key", {"status": 500}, NOW)
        tx.remember("other", {}, NOW + timedelta(days=2))
        assert tx.recall("key") is None


def test_a_release_never_changes(store: Store) -> None:
    release = ReleaseRow(
        "ab" * 32, "debian-12", "1", 1 << 40, 2, 3, ("bios", "uefi"), "cd" * 16, NOW
    )
    with store.begin() as tx:
        tx.add_release(release)
        tx.add_release(release)
        assert tx.hold_release(release.digest) == tx.lock_release(release.digest) == release
        with pytest.raises(Conflict, match="debian-12@1 is published already"):
            tx.add_release(replace(release, digest="ef" * 32))
        with pytest.raises(Conflict):
            tx.add_release(replace(release, version="2"))
        assert tx.release("ab" * 32) == release == tx.release_named("debian-12", "1")
        assert tx.release("ef" * 32) is tx.release_named("debian-12", "2") is None
        assert tx.releases() == tx.releases("debian-12") == [release]
        assert tx.releases("other") == []
        for take in (tx.hold_release, tx.lock_release):
            with pytest.raises(NotFound, match="no release ef"):
                take("ef" * 32)


def test_what_becomes_of_a_release_is_kept(store: Store) -> None:
    first = ReleaseRow("ab" * 32, "web", "1", 1, 2, 3, ("bios",), "cd" * 16, NOW)
    changed = replace(
        first,
        minimum_version="0.9",
        expires_at=LATER,
        revoked_at=LATER,
        revoked_reason="loses data ✓",
        removed_at=LATER,
    )
    with store.begin() as tx:
        tx.add_release(first)
        tx.save_release(changed)
        with pytest.raises(NotFound):
            tx.save_release(replace(first, digest="ef" * 32))
    with store.read() as tx:
        assert tx.release(first.digest) == changed
        # A reading transaction locks nothing, and may ask all the same.
        assert tx.hold_release(first.digest) == changed


def test_a_channel_is_moved_and_named_after_its_release(store: Store) -> None:
    one, two = (
        ReleaseRow(digest * 32, "web", version, 1, 2, 3, ("bios",), "cd" * 16, NOW)
        for digest, version in (("ab", "1"), ("cd", "2"))
    )
    stable = Channel("web", "stable", one.digest, "web@1", NOW, "anna")
    moved = Channel("web", "stable", two.digest, "web@2", LATER, "bert")
    canary = replace(stable, name="canary")
    with store.begin() as tx:
        tx.add_release(one)
        tx.add_release(two)
        assert tx.channel("web", "stable") is None
        tx.save_channel(stable)
        tx.save_channel(canary)
        assert tx.channel("web", "stable") == stable
        tx.save_channel(moved)
    with store.read() as tx:
        assert tx.channels() == tx.channels("web") == [canary, moved]
        assert tx.channels("db") == []


def test_tests_of_a_release_come_newest_first(store: Store) -> None:
    release = ReleaseRow("ab" * 32, "web", "1", 1, 2, 3, ("bios",), "cd" * 16, NOW)
    made = [
        ReleaseTest(release.digest, at, "web", ("bios", "uefi"), is_healthy, {"n": [1]}, "anna")
        for at, is_healthy in ((NOW, False), (LATER, True))
    ]
    with store.begin() as tx:
        tx.add_release(release)
        for test in made:
            tx.add_release_test(test)
    with store.read() as tx:
        assert tx.release_tests(release.digest) == made[::-1]
        assert tx.release_tests("ef" * 32) == []


def test_operations_are_found_by_their_release(with_operation: Store) -> None:
    with with_operation.read() as tx:
        assert len(tx.operations(release="ab" * 32)) == 1
        assert tx.operations(release="cd" * 32) == []
        assert tx.used_releases() == {"ab" * 32}


def test_a_profile_keeps_its_revisions_and_shows_the_newest(store: Store) -> None:
    first, second = (
        Profile("web", digest, text_of({"is": digest}), NOW) for digest in ("d1", "d2")
    )
    base = Profile("base", "d1", text_of({"is": "d1"}), NOW)
    with store.begin() as tx:
        for profile in (first, second, base):
            tx.save_profile(profile)
        assert tx.profile("web") == second
        assert tx.profiles() == [base, second]
        tx.save_profile(replace(first, created_at=LATER))
        assert tx.profile("web") == first, "the same again is the revision that it was"
        assert tx.delete_profile("web")
        assert not tx.delete_profile("web")
        assert tx.profile("web") is None
        assert tx.profiles() == [base]
        assert tx.profile_revision("d2") == second
        assert tx.profile_revision("d9") is None
        tx.save_profile(second)
        assert tx.profile("web") == second


def test_audit_rows_are_chained_and_hold_over_a_read(store: Store) -> None:
    elsewhere = datetime(2026, 11, 23, 14, 0, 0, 5, tzinfo=timezone(timedelta(hours=2)))
    detail = {"b": [1, 2.5, 1e30, None], "a": {"ü": "✓\u0000"}}
    with store.begin() as tx:
        tx.audit(elsewhere, "anna", "host.added", "r1n1", detail)
        tx.audit(NOW, "anna", "host.saved", "r1n1", {})
    with store.begin() as tx:
        tx.audit(LATER, "bert", "host.deleted", "r1n1", {})
        assert len(tx.audit_rows()) == 3
    with store.read() as tx:
        rows = tx.audit_rows()
        assert tx.audit_rows(after=1, limit=1) == [rows[1]]
        assert tx.audit_rows(limit=2) == rows[1:], "the newest, in their order"
    assert verify(rows) == 3
    assert rows[0].at == elsewhere
    assert rows[0].at.tzinfo is UTC
    assert rows[0].detail == detail


def test_events_are_numbered_in_order(with_operation: Store) -> None:
    event = Event(NOW, "agent", "writes\0 \ud800", HOST, OP, "52:54:00:00:00:01", {"n": 1})
    stray = Event(LATER, "dhcp", "asks", mac="52:54:00:00:00:99")
    with with_operation.begin() as tx:
        tx.add_event(event)
        tx.add_event(stray)
    with with_operation.read() as tx:
        (first, one), (second, two) = tx.events()
        assert one == replace(event, text="writes� ?")
        assert two == stray
        assert first < second
        assert tx.events(after=first) == [(second, stray)]
        assert tx.events(host_id=HOST) == [(first, one)]
        assert tx.events(limit=1) == [(second, stray)], "the newest"
        assert tx.events(after=0, limit=1) == [(first, one)]


def test_everything_of_a_failed_transaction_is_gone(store: Store) -> None:
    asked = Outgoing("key", "127.0.1.1:623", OP, 1, PowerOff(soft=True))

    def fail() -> None:
        with store.begin() as tx:
            tx.add_host(a_host())
            tx.audit(NOW, "anna", "host.added", "r1n1", {})
            tx.add_event(Event(NOW, "service", "added", host_id=HOST))
            tx.enqueue(asked)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with store.read() as tx:
        assert not tx.hosts()
        assert not tx.audit_rows()
        assert not tx.events()


def test_a_bmc_is_one_hosts_only(store: Store) -> None:
    """What is done to the one would be done to the other."""
    first, second = a_host(), a_host("r1n2")
    with store.begin() as tx:
        tx.add_host(first)
    twin = replace(second, bmc=first.bmc)
    with store.begin() as tx:
        with pytest.raises(Conflict, match="is that of r1n1"):
            tx.add_host(twin)
        tx.add_host(second)
        with pytest.raises(Conflict, match="is that of r1n1") as refused:
            tx.save_host(twin)
        assert refused.value.host == "r1n2"
    other_port = replace(first.bmc, port=624) if first.bmc else None
    with store.begin() as tx:
        tx.save_host(replace(second, bmc=other_port))
        tx.save_host(replace(second, bmc=None))
        tx.add_host(a_host("r1n3", bmc=None))
    with store.read() as tx:
        assert tx.host(first.id) == first


def test_a_reading_transaction_cannot_write(store: Store) -> None:
    with store.read() as tx, pytest.raises(RuntimeError, match="cannot write"):
        tx.add_host(a_host())
    with store.read() as tx, pytest.raises(RuntimeError, match="cannot write"):
        tx.enqueue(Outgoing("key", "p", OP, 1, PowerOff(soft=True)))
