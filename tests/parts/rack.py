"""A rack of one: the real service as processes, a host behind a real IPMI BMC, its agent."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text

from provisioner.client import Client
from provisioner.errors import Conflict, Unavailable
from provisioner.store.engine import open_engine
from tests.parts.ipmi import running_ipmi_sim
from tests.parts.served_lives import HOST, Lives, enrol, install, lives
from tests.parts.simulated_host import SimulatedHost
from tests.parts.test_imaging_archive import FACTS

RUN_LIMIT_S: Final = 120.0
# What the BMC does to a host that is on: off, and into the network, each of them once.
INTO_NETWORK: Final = ["off", "on pxe"]


@dataclass
class Rack:
    """One service, one host, its BMC, and how to look at all of them."""

    lives: Lives
    host: SimulatedHost

    def newest(self, client: Client) -> str | None:
        found = client.operations(host=HOST, limit=1)
        return found[0]["id"] if found else None

    def newer(self, client: Client, than: str | None) -> list[dict[str, Any]]:
        """Return the host's operations since that one, the oldest first."""
        found = client.operations(host=HOST, limit=10)
        ids = [one["id"] for one in found]
        return found[: ids.index(than) if than is not None else None][::-1]

    def in_queue(self) -> int:
        """Return how many effects wait or are performed."""
        engine = open_engine(self.lives.database_url)
        with engine.connect() as connection:
            schema = "" if engine.dialect.name == "sqlite" else "dbos."
            waiting = connection.execute(
                text(
                    f"SELECT count(*) FROM {schema}workflow_status"
                    " WHERE status IN ('ENQUEUED', 'PENDING')"
                )
            ).scalar_one()
        engine.dispose()
        return int(waiting)


def patiently(ask: Callable[[], Any]) -> Any:
    """Ask until the service answers, as everybody does who talks to it."""
    end = time.monotonic() + RUN_LIMIT_S
    while True:
        try:
            return ask()
        except Unavailable:
            assert time.monotonic() < end
            time.sleep(0.05)


def request(
    rack: Rack, client: Client, release: str = "tiny@1", *, attempts: int | None = None
) -> str:
    """Request a deployment whose answer may be lost: look before asking again."""
    before = patiently(lambda: rack.newest(client))

    def ask() -> str:
        # The first of them: what follows from its failure may be there already.
        if newer := rack.newer(client, before):
            return str(newer[0]["id"])
        with suppress(Conflict):
            asked = client.deploy([HOST], release, soft_shutdown=False, attempts=attempts)
            return str(asked[0]["id"])
        raise Unavailable("busy with what was just asked for")

    return str(patiently(ask))


@contextmanager
def running_rack(folder: Path, *, small_disk: bool = False, **how: Any) -> Iterator[Rack]:
    """Install a service into `folder` and enrol its host; no life of it has begun yet. `how` is
    what `install` takes."""
    with running_ipmi_sim(folder / "bmc") as sim:
        settings = install(folder / "installation", **how)
        enrol(settings, sim.where())
        host = SimulatedHost(settings, folder / "bmc", release_id=FACTS.release_id)
        host.install()
        with lives(settings, small_disk=small_disk) as served:
            host.start()
            try:
                yield Rack(served, host)
            finally:
                host.stop()
