"""Going through a scenario with the service killed at one point of it, on several racks side by
side: most of a run is waiting."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from provisioner.client import Client
from provisioner.errors import Conflict, ProvisionerError, Unavailable
from tests.parts.rack import INTO_NETWORK, RUN_LIMIT_S, Rack, patiently, request, running_rack
from tests.parts.served_lives import HOST, publish, until

Json = dict[str, Any]
RACKS: Final = 4
ASK_S: Final = 0.1
GOOD, UNFIT = "tiny@1", "tiny@2"
# What a system says that has lost the seed of its deployment: that leaves once.
SEED_LOST: Final = "stops at seed"
MARKS: Final = ("worker mark.before", "worker mark.after")
AT_ANY_TIME: Final = [f"kill {point} 1" for point in MARKS]


@dataclass(frozen=True)
class Scenario:
    """`behave` is what the agent does, `drive` what a person does after the request. `ends` are
    the ends of the request and of what follows from it by itself. `restarts` is whether the
    host has to be brought back from the ramdisk by its BMC."""

    behave: str
    ends: tuple[tuple[str, str | None], ...]
    release: str = GOOD
    attempts: int | None = None
    drive: Callable[[Rack, Client, str], None] = lambda _rack, _client, _operation: None
    restarts: bool = False
    # Audit rows that must be there once.
    once: tuple[str, ...] = field(default=())

    @property
    def is_proven(self) -> bool:
        return self.ends[-1][0] == "succeeded"

    @property
    def goes_back(self) -> bool:
        return len(self.ends) > 1


def cancel_in_the_ramdisk(rack: Rack, client: Client, operation: str) -> None:
    """Cancel once the agent is there, and again until it is known to be done."""
    until(lambda: rack.host.said, "the agent's hello", RUN_LIMIT_S)
    while not patiently(lambda: client.operation(operation))["is_final"]:
        with suppress(Conflict, Unavailable):
            client.cancel(operation)


SCENARIOS: Final = {
    "deployment": Scenario(
        "deploy",
        (("succeeded", None),),
        once=("deployment.writing", "deployment.succeeded", "seed.taken"),
    ),
    "failed before the first write": Scenario(
        "fail", (("failed", "no_disk_matches"),), restarts=True, once=("deployment.failed",)
    ),
    "cancel": Scenario(
        "hang",
        (("cancelled", None),),
        drive=cancel_in_the_ramdisk,
        restarts=True,
        once=("deployment.cancelled",),
    ),
    # The write of another release fails, and the service goes back to the last good one.
    "rollback": Scenario(
        "deploy",
        (("failed", "disk_failed"), ("succeeded", None)),
        release=UNFIT,
        attempts=1,
        once=("deployment.failed", "deployment.succeeded", "seed.taken"),
    ),
}


def run(rack: Rack, scenario: Scenario, armed: str | None) -> str | None:
    """Go through a scenario with a failpoint armed; return what is wrong with its end."""
    rack.lives.begin()
    with rack.lives.client() as client:
        try:
            if scenario.goes_back:
                prove_good(rack, client)
            rack.host.forget()
            rack.host.behave = scenario.behave
            rack.lives.arm(armed or "kill nobody commit.before 1")
            before = patiently(lambda: rack.newest(client))
            rows_before = patiently(client.verify_audit)
            operation = request(rack, client, scenario.release, attempts=scenario.attempts)
            scenario.drive(rack, client, operation)

            def over() -> bool:
                chain = patiently(lambda: rack.newer(client, before))
                is_over = len(chain) == len(scenario.ends) and all(o["is_final"] for o in chain)
                # The mark is written now and then, perhaps only after the end.
                is_early = armed in AT_ANY_TIME and not rack.lives.has_fired()
                return is_over and not is_early and is_home(rack, scenario) and not rack.in_queue()

            until(over, "the end", RUN_LIMIT_S, pause_s=ASK_S)
            judge(rack, scenario, client, rack.newer(client, before), armed, rows_before)
        except (AssertionError, ProvisionerError) as error:
            return f"{armed}: {error!r}; BMC: {rack.host.happened()}, host: {rack.host.said}"
        finally:
            rack.lives.kill()
    return None


def prove_good(rack: Rack, client: Client) -> None:
    """See to it that the host runs the good release, proven and not failed there since."""
    host = client.host(HOST)
    good = client.release(GOOD)["digest"]
    has_failed = good in [one["release"] for one in host["failed_releases"]]
    if (host["state"], host["release"]) == ("active", good) and not has_failed:
        return
    if host["quarantine_reason"]:
        client.set_flags(HOST, release_quarantine=True)
    rack.lives.disarm()
    rack.host.forget()
    rack.host.behave = "deploy"
    operation = request(rack, client)
    until(lambda: client.operation(operation)["is_final"], "the end of the first", RUN_LIMIT_S)
    assert client.operation(operation)["phase"] == "succeeded"
    until(lambda: "is accepted" in rack.host.said, "an answer to the new system", RUN_LIMIT_S)
    until(lambda: rack.in_queue() == 0, "the end of all effects", RUN_LIMIT_S)


def is_home(rack: Rack, scenario: Scenario) -> bool:
    """Say whether the host has come to rest where the scenario leaves it."""
    if SEED_LOST in rack.host.said and scenario.goes_back:
        return rack.host.happened()[-1:] == ["off"]
    if scenario.is_proven and SEED_LOST not in rack.host.said:
        # A new system reports until it is answered, perhaps after the end.
        return rack.host.said[-1:] in (["is accepted"], ["is not accepted"])
    return "boots its disk" in rack.host.said


def judge(
    rack: Rack,
    scenario: Scenario,
    client: Client,
    chain: list[Json],
    armed: str | None,
    rows_before: int,
) -> None:
    ids = [one["id"] for one in chain]
    rows = client.audit(after=rows_before)
    rows = [row for row in rows if row["detail"].get("operation") in ids]
    actions = Counter(row["action"] for row in rows)
    ends, once = scenario.ends, scenario.once
    may_lose_answer = (armed or "").startswith("kill agent commit.after")
    if is_seed_lost := SEED_LOST in rack.host.said:
        # The seed leaves once. When its answer is lost with the process, the deployment ends
        # there: nobody may ask for the host's secrets a second time.
        assert may_lose_answer
        ends = (*ends[:-1], ("failed", "seed_gone"))
        once = () if scenario.goes_back else ("deployment.writing", "deployment.failed")
    found = tuple((one["phase"], (one["error"] or {}).get("code")) for one in chain)
    assert found == ends, [one["error"] for one in chain]
    assert {action: actions[action] for action in once} == dict.fromkeys(once, 1), actions
    assert [one["rung"] for one in chain] == [0] * len(chain), "a boot ticket was lost"
    host, last = client.host(HOST), chain[-1]
    assert host["operation"] is None
    if scenario.is_proven and not is_seed_lost:
        assert host["generation"] == last["generation"]
        assert (host["state"], host["release"]) == ("active", last["release"])
        # A report that was judged, and asks again after the end, is told that it need not.
        assert may_lose_answer or rack.host.said[-1] == "is accepted"
    if scenario.goes_back:
        judge_way_back(client, host, chain, is_seed_lost=is_seed_lost)
    judge_power(rack, scenario, armed, is_seed_lost=is_seed_lost)
    assert client.verify_audit() >= rows_before + len(rows)


def judge_way_back(client: Client, host: Json, chain: list[Json], *, is_seed_lost: bool) -> None:
    """It was taken once, by the service itself, to what was proven before."""
    failed, back = chain
    assert failed["release"] == client.release(UNFIT)["digest"]
    assert back["release"] == client.release(GOOD)["digest"]
    assert (back["pins"]["cause"], back["pins"]["after"]) == ("rollback", failed["id"])
    assert [one["release"] for one in host["failed_releases"]].count(failed["release"]) == 1
    # There is no second way back.
    assert bool(host["quarantine_reason"]) == is_seed_lost, host["quarantine_reason"]


def judge_power(rack: Rack, scenario: Scenario, armed: str | None, *, is_seed_lost: bool) -> None:
    """The BMC's own log has each thing that was due once, and nothing else."""
    happened = rack.host.happened()
    if scenario.goes_back:
        assert happened == [*INTO_NETWORK, *INTO_NETWORK, *(["off"] if is_seed_lost else [])]
    elif not scenario.restarts:
        assert happened == INTO_NETWORK
    elif "agent restarts by itself" in rack.host.said:
        # Whether a reset was carried out cannot be seen. It is noted before, so that it is
        # never done twice, and an agent that is left alone restarts by itself. One that was
        # heard just now is taken to be there still, so a reset may come after that, once.
        assert happened in (INTO_NETWORK, [*INTO_NETWORK, "reset default"])
        assert armed is not None
        assert armed.split()[1] == "worker"
    else:
        assert happened == [*INTO_NETWORK, "reset default"]


@contextmanager
def running_racks(folder: Path, count: int = RACKS) -> Iterator[list[Rack]]:
    """Install so many services with a host each, and a second release that none of these can
    be written with."""
    with ExitStack() as stack:
        racks = []
        for number in range(count):
            rack = stack.enter_context(running_rack(folder / str(number)))
            rack.host.unfit = publish(rack.lives.settings, "2")
            racks.append(rack)
        yield racks


def reached(rack: Rack, scenario: Scenario) -> Counter[str]:
    """Go through a scenario undisturbed; return how often each `part point` was reached."""
    wrong = run(rack, scenario, None)
    assert wrong is None, wrong
    return Counter(rack.lives.trace()) | Counter(MARKS)


def killed_at(rack: Rack, scenario: Scenario, point: str) -> tuple[str | None, bool]:
    """Kill at a point; return what was wrong, and whether it was reached at all.

    How often one is reached depends on the moment, so one that is not reached that often this
    time is killed at the time before.
    """
    name, _, hit = point.rpartition(" ")
    for earlier in range(int(hit), 0, -1):
        wrong = run(rack, scenario, f"kill {name} {earlier}")
        if wrong is not None or rack.lives.has_fired():
            return wrong, True
    return None, False


def sweep(racks: Sequence[Rack], scenario: Scenario, points: Sequence[str]) -> None:
    """Kill at each of the points; fail with all that was wrong, and with those never reached."""
    free: SimpleQueue[Rack] = SimpleQueue()
    for rack in racks:
        free.put(rack)

    def swept(point: str) -> tuple[str | None, bool]:
        rack = free.get()
        try:
            return killed_at(rack, scenario, point)
        finally:
            free.put(rack)

    with ThreadPoolExecutor(len(racks)) as side_by_side:
        found = list(side_by_side.map(swept, points))
    wrongs = [wrong for wrong, _ in found if wrong is not None]
    assert not wrongs, "\n".join(wrongs)
    missed = [point for point, (_, fired) in zip(points, found, strict=True) if not fired]
    assert not missed, f"never reached: {missed}"
