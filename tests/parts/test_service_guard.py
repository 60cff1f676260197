"""What the guard permits, seen from the use cases: who was selected, how much at once, and the
breaker. (The services' own hosts: `test_own_hosts.py`.)"""

import re
from datetime import timedelta

import pytest

from provisioner.core.fleet import Floor
from provisioner.core.guard import WriteRefused
from provisioner.core.lifecycle import LIMIT, WAITING_LIMIT, E
from provisioner.core.model import Json, Operation, Phase
from provisioner.errors import Conflict, NotFound, RequestError
from provisioner.service.breaker import Breakers
from provisioner.service.worker import PER_GROUP_MAX
from tests.parts.service_site import ACTOR, Agent, Site, inventory, tamper

A_MINUTE = timedelta(minutes=1)


def request(site: Site, *names: str) -> list[Operation]:
    return site.operations.request_deployment(names, "tiny@1", options={}, actor=ACTOR)


def in_turn(site: Site, *names: str) -> list[Operation]:
    """Request one after the other: of one request nobody says which is first."""
    made = []
    for name in names:
        made += request(site, name)
        site.clock.pass_(0.001)
    return made


def phases(site: Site, operations: list[Operation]) -> list[str]:
    return [site.phase(one).value for one in operations]


def waits(site: Site, operation: Operation) -> str:
    return site.operations.why_waiting([site.at(operation)]).get(operation.id, "")


def lines(site: Site, number: int = 1) -> list[str]:
    events = [event for _, event in site.hosts.timeline(f"r1n{number}")]
    return [event.text for event in events if event.text.startswith("waits: ")]


def group_of_web(site: Site, count: int) -> list[str]:
    return [site.add_host(n, labels={"group": "web"}).name for n in range(1, count + 1)]


def make_active(site: Site, *numbers: int) -> None:
    for number in numbers:
        tamper(site, f"UPDATE hosts SET state = 'active' WHERE name = 'r1n{number}'")


# --- who was selected -----------------------------------------------------------------------


def test_every_operation_of_a_request_pins_what_the_request_selected(site: Site) -> None:
    hosts = [site.add_host(number) for number in (3, 1, 2)]
    made = request(site, "r1n3", "r1n1", "r1n2")
    assert len({one.pins["request"] for one in made}) == 1
    with site.store.read() as tx:
        selection = tx.selection(made[0].pins["request"])
    assert selection is not None
    assert selection.hosts == tuple(sorted(host.id for host in hosts))
    assert {one.pins["selection"] for one in made} == {selection.digest}
    assert selection.requested_by == ACTOR


@pytest.mark.parametrize(
    ("tampered", "why"),
    [
        ("UPDATE requests SET hosts = '[]'", "did not select the host"),
        ("DELETE FROM requests", "nobody requested the operation"),
        ("UPDATE requests SET requested_by = 'x'", "somebody else requested it"),
    ],
)
def test_a_host_that_its_request_did_not_select_gets_nothing(
    site: Site, tampered: str, why: str
) -> None:
    site.add_host()
    (operation,) = request(site, "r1n1")
    tamper(site, tampered)
    site.worker.start_queued()
    assert site.phase(operation) is Phase.FAILED
    error = site.at(operation).error or {}
    assert (error["code"], error["host"]) == ("host_refused", "r1n1")
    assert why in error["message"]
    assert site.outbox.waiting == []


def test_what_changes_between_ticket_and_write_is_seen_before_the_write(
    site: Site, agent: Agent
) -> None:
    agent.until(Phase.PREPARING)
    tamper(site, "UPDATE requests SET hosts = '[]'")
    with pytest.raises(WriteRefused, match="did not select"):
        agent.authorise()
    assert site.phase(agent.operation()) is Phase.PREPARING


def test_nothing_starts_or_writes_without_the_guards_permit(site: Site, agent: Agent) -> None:
    agent.until(Phase.PREPARING)
    operation = agent.operation()
    with pytest.raises(TypeError, match="without a WritePermit"), site.store.begin() as tx:
        site.transitions.apply(tx, operation.id, E.WRITE_PERMITTED, generation=1, actor=ACTOR)
    assert site.phase(operation) is Phase.PREPARING


# --- typed ids, blank fields --------------------------------------------------------------------


def test_public_ids_of_the_wrong_kind_select_nothing(site: Site) -> None:
    """883 customers were deleted because ids of another kind were passed."""
    host = site.add_host()
    (operation,) = request(site, "r1n1")
    for wrong in (operation.id, operation.pins["request"], operation.release or "", "*", ""):
        with pytest.raises((NotFound, RequestError)):
            request(site, wrong)
        with pytest.raises(NotFound):
            site.operations.cancel(host.id, actor=ACTOR)
    # No name can be taken for an id of ours: they have an underscore, and names have none.
    for taken in (operation.id, host.id):
        with pytest.raises(RequestError):
            site.add_host(2, name=taken)
    assert [one.id for one in site.operations.list()] == [operation.id]


@pytest.mark.parametrize(
    "blank", [{"hosts": []}, {"hosts": [""]}, {"release": ""}, {"release": "tiny@"}], ids=str
)
def test_public_a_blank_field_destroys_nothing(site: Site, blank: Json) -> None:
    """A pension fund's cloud was deleted by the default of a field that was left blank."""
    site.add_host()
    asked: Json = {"hosts": ["r1n1"], "release": "tiny@1", **blank}
    with pytest.raises((NotFound, RequestError)):
        site.operations.request_deployment(
            asked["hosts"], asked["release"], options={}, actor=ACTOR
        )
    assert site.operations.list() == []


# --- how much at once -----------------------------------------------------------------------


@pytest.mark.rules(in_flight_max=1)
def test_field_22_who_finds_no_place_waits_and_says_so_once(site: Site) -> None:
    operations = in_turn(site, site.add_host(1).name, site.add_host(2).name)
    for _ in range(50):
        site.worker.start_queued()
        site.clock.pass_(1)
    assert phases(site, operations) == ["netbooting", "queued"]
    assert re.search(r"in flight .*deployments_in_flight_max 1", waits(site, operations[1]))
    assert waits(site, operations[0]) == ""
    assert lines(site, 2) == [f"waits: {waits(site, operations[1])}"]
    assert lines(site, 1) == []
    site.operations.cancel(operations[0].id, actor=ACTOR)
    site.worker.start_queued()
    assert site.phase(operations[1]) is Phase.NETBOOTING


@pytest.mark.rules(in_flight_max=50, starts_per_minute_max=2)
def test_so_many_start_within_a_minute_and_the_others_after_it(site: Site) -> None:
    operations = in_turn(site, *(site.add_host(n).name for n in (1, 2, 3)))
    site.worker.start_queued()
    assert phases(site, operations).count("netbooting") == 2
    # One that ended since has drawn its power all the same.
    site.operations.cancel(operations[0].id, actor=ACTOR)
    site.worker.start_queued()
    assert site.phase(operations[2]) is Phase.QUEUED
    assert "starts_per_minute_max 2" in waits(site, operations[2])
    site.clock.pass_(61)
    site.worker.start_queued()
    assert site.phase(operations[2]) is Phase.NETBOOTING


@pytest.mark.rules(in_flight_max=50, group_in_flight_max=1, group_starts_per_minute_max=1)
def test_a_group_that_waits_holds_up_no_other_one(site: Site) -> None:
    web = in_turn(site, *group_of_web(site, 3))
    site.clock.pass_(1)
    others = request(site, site.add_host(8, labels={"group": "db"}).name, site.add_host(9).name)
    site.worker.start_queued()
    assert phases(site, web) == ["netbooting", "queued", "queued"]
    assert phases(site, others) == ["netbooting", "netbooting"]
    assert "group_in_flight_max 1" in waits(site, web[1])
    site.operations.cancel(web[0].id, actor=ACTOR)
    site.worker.start_queued()
    assert "group_starts_per_minute_max 1" in waits(site, web[1])


@pytest.mark.rules(in_flight_max=50, group_floor=Floor(percent=50))
def test_a_group_keeps_its_healthy_hosts(site: Site) -> None:
    names = group_of_web(site, 4)
    make_active(site, 1, 2, 3)  # r1n4 is no loss to anybody
    operations = in_turn(site, *names)
    site.worker.start_queued()
    assert phases(site, operations) == ["netbooting", "queued", "queued", "netbooting"]
    assert "group web must not have fewer healthy hosts" in waits(site, operations[1])
    # The first one comes back healthy, so that the next may go.
    site.perform()
    Agent(site).until(Phase.PROVING)
    tamper(site, f"UPDATE operations SET phase = 'succeeded' WHERE id = '{operations[0].id}'")
    make_active(site, 1)
    site.worker.start_queued()
    assert phases(site, operations)[1:] == ["netbooting", "queued", "netbooting"]


@pytest.mark.rules(in_flight_max=50, group_floor=Floor(hosts=PER_GROUP_MAX + 1))
def test_healthy_hosts_that_wait_do_not_hide_the_repair_of_their_group(site: Site) -> None:
    *healthy, broken = group_of_web(site, PER_GROUP_MAX + 2)
    make_active(site, *range(1, PER_GROUP_MAX + 2))
    held = request(site, *healthy)
    site.clock.pass_(1)
    (repair,) = request(site, broken)
    site.worker.start_queued()
    assert site.phase(repair) is Phase.NETBOOTING
    assert set(phases(site, held)) == {"queued"}
    assert "must not have fewer healthy hosts" in waits(site, held[0])


@pytest.mark.rules(in_flight_max=50, group_floor=Floor(hosts=1))
def test_an_inspection_takes_a_healthy_host_away_as_well(site: Site) -> None:
    (name,) = group_of_web(site, 1)
    make_active(site, 1)
    operation = site.operations.request_inspection(name, actor=ACTOR)
    site.worker.start_queued()
    assert site.phase(operation) is Phase.QUEUED


# --- a turn that does not come ------------------------------------------------------------------


@pytest.mark.rules(in_flight_max=1)
def test_waiting_for_its_turn_does_not_end_an_operation(site: Site) -> None:
    first, second = in_turn(site, site.add_host(1).name, site.add_host(2).name)
    site.worker.start_queued()
    site.perform()
    rows = len(site.audit.rows())
    tamper(site, f"UPDATE operations SET deadline_at = NULL WHERE id = '{first.id}'")
    for _ in range(3):
        site.pass_(LIMIT[Phase.QUEUED])
        assert site.phase(second) is Phase.QUEUED
    assert len(site.audit.rows()) == rows
    site.operations.cancel(first.id, actor=ACTOR)
    site.worker.start_queued()
    assert site.phase(second) is Phase.NETBOOTING


@pytest.mark.rules(in_flight_max=1)
def test_nobody_waits_for_ever(site: Site) -> None:
    first, second = in_turn(site, site.add_host(1).name, site.add_host(2).name)
    site.worker.start_queued()
    site.perform()
    tamper(site, f"UPDATE operations SET deadline_at = NULL WHERE id = '{first.id}'")
    waited = timedelta()
    while site.phase(second) is Phase.QUEUED:
        assert waited < WAITING_LIMIT
        site.pass_(A_MINUTE * 60)
        waited += A_MINUTE * 60
    assert waited == WAITING_LIMIT
    error = site.at(second).error or {}
    assert error["code"] == "queued_timed_out"
    assert "in flight" in error["found"]


def test_an_operation_that_nobody_started_ends_by_its_own_limit(site: Site) -> None:
    """Nothing kept it waiting, so the worker was gone; what nobody remembers must not begin."""
    site.add_host()
    (operation,) = request(site, "r1n1")
    site.pass_(LIMIT[Phase.QUEUED])
    assert site.phase(operation) is Phase.FAILED


# --- the breaker ------------------------------------------------------------------------------


def fail(site: Site, number: int, phase: Phase = Phase.PREPARING) -> Operation:
    site.add_host(number)
    (operation,) = request(site, f"r1n{number}")
    site.worker.start_queued()
    site.perform()
    agent = Agent(site, number).until(phase)
    agent.failed()
    site.perform()
    assert site.phase(operation) is Phase.FAILED
    return operation


BREAKER = pytest.mark.rules(in_flight_max=50, breaker_hosts_max=2)


@BREAKER
def test_too_many_failures_open_the_breaker_until_a_person_closes_it(site: Site) -> None:
    fail(site, 1)
    assert not site.breakers.show().is_open
    fail(site, 2)
    opened = site.breakers.show()
    assert (opened.is_open, opened.reason) == (
        True,
        "deployments failed within 10 minutes, on so many hosts: 2",
    )
    (row,) = [row for row in site.audit.rows() if row.action == "breaker.opened"]
    assert (row.subject, len(row.detail["hosts"])) == ("fleet", 2)
    site.add_host(3)
    (third,) = request(site, "r1n3")
    for _ in range(3):
        site.clock.pass_(3600)  # the window has passed, and nobody has looked at it
        site.worker.start_queued()
    assert site.phase(third) is Phase.QUEUED
    assert "breaker close" in waits(site, third)
    assert lines(site, 3) == [f"waits: {waits(site, third)}"]
    site.breakers.close("a bad switch, replaced", actor="token:anna")
    site.worker.start_queued()
    assert site.phase(third) is Phase.NETBOOTING
    last = [row for row in site.audit.rows() if row.action == "breaker.closed"][-1]
    assert (last.actor, last.detail["reason"]) == ("token:anna", "a bad switch, replaced")


@BREAKER
def test_what_a_person_has_judged_counts_no_more(site: Site) -> None:
    fail(site, 1)
    fail(site, 2)
    site.breakers.close("known", actor=ACTOR)
    site.clock.pass_(1)
    fail(site, 3)
    assert not site.breakers.show().is_open
    fail(site, 4)
    assert site.breakers.show().is_open


@BREAKER
def test_failures_that_are_far_apart_do_not_open_it(site: Site) -> None:
    fail(site, 1)
    site.clock.pass_(601)
    fail(site, 2)
    assert not site.breakers.show().is_open


@BREAKER
def test_what_never_disturbed_a_host_or_was_stopped_by_a_person_does_not_count(
    site: Site,
) -> None:
    for number in (1, 2, 3):
        site.add_host(number)
    request(site, "r1n1")
    site.hosts.set_flags("r1n1", is_protected=True, actor=ACTOR)
    site.worker.start_queued()
    request(site, "r1n2", "r1n3")
    site.worker.start_queued()
    site.releases.revoke("tiny@1", "known bad", actor=ACTOR)
    assert phases(site, list(site.operations.list())) == ["failed"] * 3
    assert not site.breakers.show().is_open


@BREAKER
def test_an_open_breaker_stops_the_first_write_and_no_later_one(site: Site) -> None:
    for number in (3, 4):
        site.add_host(number)
    writing, preparing = request(site, "r1n3", "r1n4")
    site.worker.start_queued()
    site.perform()
    begun = Agent(site, 3).until(Phase.WRITING)
    late = Agent(site, 4).until(Phase.PREPARING)
    fail(site, 1)
    fail(site, 2)
    assert begun.authorise()["permitted"] is True
    with pytest.raises(WriteRefused, match="breaker is open"):
        late.authorise()
    assert phases(site, [writing, preparing]) == ["writing", "preparing"]


# --- the breaker, and clocks that are set or differ -----------------------------------------------


@BREAKER
def test_a_breaker_is_closed_by_a_clock_that_was_set_back(site: Site) -> None:
    fail(site, 1)
    fail(site, 2)
    site.clock.pass_(-600)
    assert not site.breakers.close("a bad switch", actor=ACTOR).is_open
    assert not site.breakers.show().is_open
    site.clock.pass_(1)
    fail(site, 3)
    assert not site.breakers.show().is_open, "those before it were judged"


@BREAKER
def test_a_breaker_opens_again_although_the_clock_was_set_back_since(site: Site) -> None:
    fail(site, 1)
    fail(site, 2)
    site.clock.pass_(60)
    site.breakers.close("a bad switch", actor=ACTOR)
    site.clock.pass_(1)
    fail(site, 3)  # it stands after the close, and the next before it
    site.clock.pass_(-3600)
    assert not site.breakers.show().is_open
    fail(site, 4)
    assert site.breakers.show().is_open
    site.clock.pass_(60)
    assert not site.breakers.close("known", actor=ACTOR).is_open


@BREAKER
@pytest.mark.parametrize("ahead_s", [-3, 3])
def test_services_whose_clocks_differ_a_little_move_one_breaker(site: Site, ahead_s: int) -> None:
    other = Breakers(site.store, lambda: site.clock() + timedelta(seconds=ahead_s))
    fail(site, 1)
    fail(site, 2)
    site.clock.pass_(1)
    assert not other.close("a bad switch", actor=ACTOR).is_open
    site.clock.pass_(1)
    fail(site, 3)
    assert not site.breakers.show().is_open, "those before it were judged"
    fail(site, 4)
    assert site.breakers.show().is_open


def test_closing_a_breaker_needs_a_reason_and_an_open_one(site: Site) -> None:
    with pytest.raises(Conflict, match="is closed"):
        site.breakers.close("x", actor=ACTOR)
    for reason in ("", "  ", "x" * 501):
        with pytest.raises(RequestError):
            site.breakers.close(reason, actor=ACTOR)


def test_field_12_a_host_that_is_refused_does_not_hold_up_the_others(site: Site) -> None:
    same = inventory(1)["uuid"]
    site.add_host(1, uuid=same)
    site.add_host(2, uuid=same)
    site.add_host(3)
    operations = request(site, "r1n1", "r1n3")
    site.worker.start_queued()
    assert phases(site, operations) == ["failed", "netbooting"]
    error = site.at(operations[0]).error or {}
    assert (error["code"], error["found"]) == ("host_refused", ["r1n2"])
