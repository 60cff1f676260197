"""Kills the service in the middle of many deployments, and sees when each of them goes on.

A deployment goes on when anything happens to it: an exchange with its BMC begins, a call of its
host is answered, its timeline has an event. Those that had ended before are not counted; where one
process was killed, nor are those that went on without it.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from provisioner.client import Client
from script.bench_parts.figures import Say
from script.bench_parts.survival_hosts import RackHost, running_hosts
from script.bench_parts.survival_service import ALL, Service
from tests.parts.rack import patiently
from tests.parts.served_lives import install, until

HOSTS: Final = 24
RELEASE: Final = "tiny@1"
# Every process that the service is made of, and all of them at once, several times: that is
# what a machine does that loses its power.
VICTIMS: Final = (
    *(ALL, "prov-worker", "prov-agent", "prov-agent-w", "prov-boot"),
    *(ALL, "prov-boot-w", "prov-api", "prov-api-w"),
)
# At most this share of an undisturbed round passes before the kill.
LATEST: Final = 0.7
ROUND_LIMIT_S: Final = 120.0
# What arrives so soon after a kill was still sent by the process that died.
LAST_WORDS_S: Final = 0.25
LOOK_S: Final = 0.25
# No limit of the fleet's holds anybody up, and a second attempt follows at once: a seed whose
# answer is lost with its process is not given out again, so that its deployment is redone.
SETTINGS: Final = """
[limits]
deployments_in_flight_max = 1000
starts_per_minute_max = 0
breaker_hosts_max = 1000

[recovery]
backoff_s = 1
"""

Json = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """A deployment and what followed from it by itself. `ended_at` is the first one's end; `why`
    says how each attempt failed, and what was decided then, when the last one did."""

    host: str
    attempts: int
    ended_at: float
    why: str = ""

    @property
    def is_proven(self) -> bool:
        return not self.why


@dataclass
class Kill:
    """One kill: `resumed_s` has the seconds from the restart for each deployment that stood
    still until then, `open_` how many had not ended, `proven` how many of those did well."""

    victim: str
    restart_s: float = 0.0
    open_: int = 0
    proven: int = 0
    again: int = 0
    resumed_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class Resumed:
    """All kills of a run, and how long a bare restart takes until a health request is answered."""

    seed: int
    kills: list[Kill] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)

    def of(self, victim: str) -> list[float]:
        return [one for kill in self.kills if kill.victim == victim for one in kill.resumed_s]

    def all(self) -> list[float]:
        return [one for kill in self.kills for one in kill.resumed_s]


def measure_resume(folder: Path, runs: int, seed: int, say: Say) -> Resumed:
    """Go through all victims so many times, each with another round of deployments."""
    settings = install(folder / "installation", more=SETTINGS)
    chance, found = random.Random(seed), Resumed(seed)
    with running_hosts(settings, HOSTS) as hosts:
        service = Service(settings)
        try:
            for run in range(runs):
                found.bare_s.append(_bare_restart(service))
                found.round_s.append(_round(service, hosts, None, chance, 0.0)[1])
                usual_s = min(found.round_s)
                say(f"survival, run {run + 1}: {HOSTS} deployments in {usual_s:.1f} s")
                for victim in VICTIMS:
                    kill, _ = _round(service, hosts, victim, chance, usual_s * LATEST)
                    found.kills.append(kill)
                    worst = max(kill.resumed_s, default=0.0)
                    say(f"killed {victim}: {kill.open_} open, {kill.proven} well, {worst:.1f} s")
        finally:
            service.end()
    return found


def _bare_restart(service: Service) -> float:
    """Kill it while it has nothing to do, and start it again; return until it answered."""
    service.end()
    service.start()
    service.wait_until_healthy()
    service.kill()
    return service.wait_until_healthy()


def _round(
    service: Service,
    hosts: Sequence[RackHost],
    victim: str | None,
    chance: random.Random,
    latest_s: float,
) -> tuple[Kill, float]:
    """Deploy to all hosts at once and kill at a random moment; return what came of it, and how
    long it took. Each round begins with a new life: whoever died before starts slower."""
    service.end()
    service.start()
    service.wait_until_healthy()
    kill = Kill(victim or "nobody")
    with service.client() as client:
        asked = client.deploy([host.name for host in hosts], RELEASE, soft_shutdown=False)
        began_at = killed_at = restarted_at = time.monotonic()
        if victim is not None:
            time.sleep(chance.uniform(0, latest_s))
            killed_at = time.monotonic()
            restarted_at = service.kill(victim, chance.choice)
            kill.restart_s = restarted_at - killed_at
        ended = ends(client, asked)
        took_s = time.monotonic() - began_at
        if victim is not None:
            _judge(kill, client, hosts, ended, killed_at, restarted_at)
    return kill, took_s


def ends(client: Client, asked: Sequence[Json]) -> list[Ended]:
    """Wait until nothing is open and nothing is to come, and return how each request ended."""
    until(lambda: patiently(lambda: _is_over(client)), "the end", ROUND_LIMIT_S, pause_s=LOOK_S)
    newest = patiently(lambda: client.operations(limit=1000))
    ended = []
    for first in asked:
        chain = [one for one in newest if one["host"] == first["host"]]
        chain = [one for one in chain if one["generation"] >= first["generation"]]
        (own,) = [one for one in chain if one["id"] == first["id"]]
        ended_at = as_monotonic(own["ended_at"])
        ended.append(Ended(first["host"], len(chain), ended_at, how_it_failed(chain)))
    return ended


def how_it_failed(chain: Sequence[Json]) -> str:
    """Return how a chain of attempts, the newest first, failed; nothing when it did not."""
    if chain[0]["phase"] == "succeeded":
        return ""
    attempts = []
    for one in reversed(chain):
        error, follow_up = one["error"] or {}, one["follow_up"] or {}
        parts = [one["phase"], error.get("code"), error.get("message"), error.get("found")]
        parts += [follow_up.get("what"), follow_up.get("why")]
        attempts.append(", ".join(str(part) for part in parts if part))
    return f"{chain[0]['host']}: " + "; then ".join(attempts)


def _is_over(client: Client) -> bool:
    if client.operations(only_open=True, limit=1):
        return False
    newest = client.operations(limit=200)
    return not [one for one in newest if one["follow_up_at"] is not None]


def _judge(
    kill: Kill,
    client: Client,
    hosts: Sequence[RackHost],
    ended: Sequence[Ended],
    killed_at: float,
    restarted_at: float,
) -> None:
    by_name = {host.name: host for host in hosts}
    for one in ended:
        if one.ended_at <= killed_at:
            continue
        kill.open_ += 1
        kill.proven += one.is_proven
        kill.failures += [f"{kill.victim} killed: {one.why}"] if one.why else []
        kill.again += one.attempts > 1
        events = client.host_events(one.host, limit=1000)
        told = [as_monotonic(event["at"]) for event in events]
        host = by_name[one.host]
        moments = [*host.exchanged_at(), *host.answered_at, *told, one.ended_at]
        seconds = resumed_after(moments, killed_at, restarted_at)
        if seconds is not None:
            kill.resumed_s.append(seconds)


def resumed_after(moments: Sequence[float], killed_at: float, restarted_at: float) -> float | None:
    """Return the seconds from the restart to the first moment at which anything happened; None
    when something had happened between the kill and the restart: then it did not stand still."""
    after = [moment for moment in moments if moment > killed_at + LAST_WORDS_S]
    if not after or min(after) < restarted_at:
        return None
    return min(after) - restarted_at


def as_monotonic(text: str) -> float:
    """Return a moment that the service wrote down, by this process's steady clock."""
    return datetime.fromisoformat(text).timestamp() - time.time() + time.monotonic()


def p99(values: Sequence[float]) -> float:
    """Return what 99 of 100 values do not exceed; the largest of fewer."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * 99 // 100) - 1, 0)]
