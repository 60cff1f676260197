"""The service is killed at every commit and every external effect, in the middle of a
deployment, of one that fails before its first write, and of a cancel; and goes on.

Whichever point it is: the operation ends as it should, the BMC's own log shows each effect
once, the audit chain holds, and nothing is left in the queue. A few points of each kind are in
every run; `script/soak` takes them all.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from provisioner.client import Client
from provisioner.errors import Conflict, ProvisionerError, Unavailable
from tests.parts.rack import INTO_NETWORK, RUN_LIMIT_S, Rack, patiently, request, running_rack
from tests.parts.served_lives import HOST, until

Json = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """`drive` is what a person does after the request; `behave` what the agent does. `restarts`
    is whether the host has to be brought back from the ramdisk by its BMC."""

    behave: str
    phase: str
    code: str | None = None
    drive: Callable[[Rack, Client, str], None] = lambda _rack, _client, _operation: None
    restarts: bool = False
    host_state: tuple[str, ...] = ("dirty", "active")
    # Audit rows that must be there once.
    once: tuple[str, ...] = field(default=())


def cancel_in_the_ramdisk(rack: Rack, client: Client, operation: str) -> None:
    """Cancel once the agent is there, and again until it is known to be done."""
    until(lambda: rack.host.said, "the agent's hello", RUN_LIMIT_S)
    while not patiently(lambda: client.operation(operation))["is_final"]:
        with suppress(Conflict, Unavailable):
            client.cancel(operation)


SCENARIOS: Final = {
    "deployment": Scenario(
        "deploy",
        "succeeded",
        host_state=("active",),
        once=("deployment.writing", "deployment.succeeded", "seed.taken"),
    ),
    # What follows from a failure, such as the way back to the last good release, is another
    # operation: add its scenario here.
    "failed before the first write": Scenario(
        "fail", "failed", "no_disk_matches", restarts=True, once=("deployment.failed",)
    ),
    "cancel": Scenario(
        "hang",
        "cancelled",
        drive=cancel_in_the_ramdisk,
        restarts=True,
        once=("deployment.cancelled",),
    ),
}


def run(rack: Rack, scenario: Scenario, armed: str | None) -> str | None:
    """Go through a scenario with a failpoint armed; return what is wrong with its end."""
    rack.lives.begin()
    rack.host.forget()
    rack.host.behave = scenario.behave
    rack.lives.arm(armed or "kill nobody commit.before 1")
    with rack.lives.client() as client:
        try:
            rows_before = client.verify_audit()
            operation = request(rack, client)
            scenario.drive(rack, client, operation)

            def over() -> bool:
                ended = patiently(lambda: client.operation(operation))["is_final"]
                # A new system reports until it is answered, perhaps after the end.
                is_new = scenario.phase == "succeeded" and "stops at seed" not in rack.host.said
                home = "is accepted" if is_new else "boots its disk"
                return bool(ended) and home in rack.host.said and rack.in_queue() == 0

            until(over, "the end", RUN_LIMIT_S)
            judge(rack, scenario, client, operation, armed, rows_before)
        except (AssertionError, ProvisionerError) as error:
            return f"{armed}: {error!r}; BMC: {rack.host.happened()}, host: {rack.host.said}"
        finally:
            rack.lives.kill()
    return None


def judge(
    rack: Rack,
    scenario: Scenario,
    client: Client,
    operation: str,
    armed: str | None,
    rows_before: int,
) -> None:
    ended, host = client.operation(operation), client.host(HOST)
    rows = client.audit(after=rows_before)
    rows = [row for row in rows if row["detail"].get("operation") == operation]
    actions = Counter(row["action"] for row in rows)
    phase, code, once = scenario.phase, scenario.code, scenario.once
    if "stops at seed" in rack.host.said:
        # The seed leaves once. When its answer is lost with the process, the deployment ends
        # there: nobody may ask for the host's secrets a second time.
        assert armed is not None
        assert armed.startswith("kill agent commit.after")
        phase, code, once = "failed", "seed_gone", ("deployment.writing", "deployment.failed")
    assert (ended["phase"], (ended["error"] or {}).get("code")) == (phase, code), ended["error"]
    assert {action: actions[action] for action in once} == dict.fromkeys(once, 1), actions
    assert ended["rung"] == 0, "a boot ticket was lost"
    assert host["generation"] == ended["generation"]
    assert host["operation"] is None
    if phase == "succeeded":
        assert (host["state"], host["release"]) == ("active", ended["release"])
        assert rack.host.said[-1] == "is accepted"
    happened = rack.host.happened()
    if not scenario.restarts:
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
    assert client.verify_audit() >= rows_before + len(rows)


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    with running_rack(tmp_path_factory.mktemp("swept")) as rack:
        yield rack


def reached(rack: Rack, scenario: Scenario) -> Counter[str]:
    """Go through a scenario undisturbed; return how often each `part point` was reached."""
    wrong = run(rack, scenario, None)
    assert wrong is None, wrong
    return Counter(rack.lives.trace())


def swept(rack: Rack, scenario: Scenario, points: list[str]) -> None:
    """Kill at each point; how often one is reached depends on the moment, so one that is not
    reached that often this time is killed at the time before."""
    failures, missed = [], []
    for point in points:
        name, _, hit = point.rpartition(" ")
        for earlier in range(int(hit), 0, -1):
            wrong = run(rack, scenario, f"kill {name} {earlier}")
            if wrong is not None:
                failures.append(wrong)
            if wrong is not None or rack.lives.has_fired():
                break
        else:
            missed.append(name)
    assert not failures, "\n".join(failures)
    assert not missed


AS_IN_A_DEPLOYMENT: Final = re.compile(r"^boot |power_o(n|ff)")


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_a_point_of_each_kind_it_goes_on(rack: Rack, name: str) -> None:
    """At the first of each kind in a deployment; at the last of each, where they are on the
    way back, in the others."""
    scenario = SCENARIOS[name]
    counted = reached(rack, scenario)
    if scenario.restarts:
        points = [f"{point} {hits}" for point, hits in sorted(counted.items())]
        points = [point for point in points if not AS_IN_A_DEPLOYMENT.search(point)]
    else:
        points = [f"{point} 1" for point in sorted(counted)]
    swept(rack, scenario, points)


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_point_it_goes_on(rack: Rack, name: str) -> None:
    counted = reached(rack, SCENARIOS[name])
    points = [
        f"{point} {hit}" for point, hits in sorted(counted.items()) for hit in range(1, hits + 1)
    ]
    swept(rack, SCENARIOS[name], points)
