"""The people: they request deployments, change their minds, set flags and revoke releases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from provisioner.core.model import Json, Kind

from .draws import labels_of
from .network import NoAnswer, Refused
from .scheduler import Group

if TYPE_CHECKING:
    from .hosts import SimHost
    from .network import Handler
    from .world import World

ACTOR: Final = "token:admin"
LOOK_S: Final = (5.0, 15.0)
BREAKER_LOOK_S: Final = (60.0, 400.0)
# Who waits for their turn so long is called off: a group may never have a host to spare.
QUEUE_LOOK_S: Final = (120.0, 600.0)
WAITS_MAX_S: Final = 1500.0
# When a backup is made, how old it is at least when it is put back, how long the service is
# down for that (longer than whoever restarts it waits), and how soon somebody reconciles.
BACKUP_S: Final = (60.0, 1500.0)
BACKUP_AGE_S: Final = (30.0, 1200.0)
DOWN_S: Final = (30.0, 120.0)
RECONCILED_S: Final = (30.0, 400.0)
TRIES_MAX: Final = 8


class Operators:
    """Everybody who asks the service for something. `busy` counts those with work left."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._size = world.size
        self._group = Group("operators")
        self.busy = 0

    def begin(self) -> None:
        """Have one person look after each host that is to be reimaged, and some others."""
        chance = self._world.chance
        self._world.scheduler.spawn("closer", self._close_the_breaker, self._group)
        self._world.scheduler.spawn("impatient", self._call_off_what_waits, self._group)
        for host in self._world.hosts_to_reimage:
            self._have("owner", partial(self._look_after, host))
        if chance.random() < self._size.revoked_share:
            self._have("revoker", self._revoke_one)
        if chance.random() < self._size.moved_share:
            self._have("mover", self._move_one)
        if self._world.keeps_backups:
            self._have("restorer", self._restore)
        for flag in ("is_protected", "in_maintenance"):
            if chance.random() < self._size.flagged_share:
                self._have("flagger", partial(self._flag_one, flag))

    def _have(self, name: str, do: Callable[[], None]) -> None:
        self.busy += 1

        def run() -> None:
            do()
            self.busy -= 1

        self._world.scheduler.spawn(name, run, self._group)

    def _look_after(self, host: SimHost) -> None:
        world, chance = self._world, self._world.chance
        for _ in range(self._size.rounds):
            world.scheduler.sleep(chance.uniform(1.0, 90.0))
            if chance.random() < 0.08:
                self._have_it_looked_at(host)
            if chance.random() < self._size.restarted_share:
                host.restart("by hand")
            if chance.random() < self._size.released_share:
                self._release(host)
            self._reimage(host)
            # Some ask for something else before what follows a failure has come.
            self._wait_until_ended(host, is_patient=chance.random() < 0.9)

    def _have_it_looked_at(self, host: SimHost) -> None:
        """Request something that writes nothing."""
        world = self._world
        world.ledger.selected.add(host.name)
        if world.chance.random() < 0.5:
            self._ask(lambda to: to.operations.request_inspection(host.name, actor=ACTOR))
        else:
            release = self._some_release()
            self._ask(
                lambda to: to.operations.request_verification([host.name], release, actor=ACTOR)
            )
        self._wait_until_ended(host)

    def _reimage(self, host: SimHost) -> None:
        """Request a deployment until it is accepted, or is not going to be."""
        world, chance = self._world, self._world.chance
        world.ledger.selected.add(host.name)
        options: Json = {"full": chance.random() < 0.2, "soft_shutdown": chance.random() < 0.8}
        for _ in range(TRIES_MAX):
            self._ask(_deploy(host.name, self._some_release(), options))
            # Whatever the answer was: a request whose answer was lost may have been heard.
            if world.ledger.now.host_named(host.name).quarantine_reason:
                return
            if world.ledger.now.open_on(host.name) is not None:
                world.faults.plan_for(host)
                self.consider(host)
                return
            world.scheduler.sleep(chance.uniform(10.0, 60.0))

    def consider(self, host: SimHost) -> None:
        """Have a person perhaps change their mind about a reimage that has begun."""
        if self._world.chance.random() < self._size.cancelled_share:
            self._have("canceller", partial(self._cancel_later, host.name))

    def _cancel_later(self, name: str) -> None:
        self._world.scheduler.sleep(
            self._world.chance.uniform(0.0, self._world.chance.choice((10.0, 300.0)))
        )
        now = self._world.ledger.now
        operation = now.open_on(name) or now.to_follow_on(name)
        if operation is not None:
            self._ask(_cancel(operation.id))

    def _wait_until_ended(self, host: SimHost, *, is_patient: bool = True) -> None:
        world = self._world
        while world.ledger.now.open_on(host.name) is not None or (
            is_patient and world.ledger.now.to_follow_on(host.name) is not None
        ):
            world.scheduler.sleep(world.chance.uniform(*LOOK_S))

    def _release(self, host: SimHost) -> None:
        """Lift the quarantine of a host, if there is one."""
        ledger = self._world.ledger
        if ledger.now.host_named(host.name).quarantine_reason:
            ledger.released.add(host.name)
            self._set_flag(host.name, "release_quarantine", True)

    def _close_the_breaker(self) -> None:
        """Have somebody look at the breaker now and then, for as long as the world lasts."""
        world = self._world
        while True:
            world.scheduler.sleep(world.chance.uniform(*BREAKER_LOOK_S))
            if world.ledger.breaker_is_open():
                self._ask(lambda to: to.breakers.close("looked at it", actor=ACTOR))

    def _call_off_what_waits(self) -> None:
        """Have somebody look through the queue now and then, for as long as the world lasts."""
        world = self._world
        while True:
            world.scheduler.sleep(world.chance.uniform(*QUEUE_LOOK_S))
            for one in world.ledger.now.open_operations:
                if not one.is_started and world.ledger.waits_s(one) > WAITS_MAX_S:
                    self._ask(_cancel(one.id))

    def _move_one(self) -> None:
        """Move a host to another group, whatever is being done to it."""
        world, chance = self._world, self._world.chance
        world.scheduler.sleep(chance.uniform(60.0, 900.0))
        host, labels = chance.choice(world.hosts_to_reimage), labels_of(world)
        world.note(f"{host.name} is labelled {labels}")
        self._ask(lambda to: to.hosts.change(host.name, labels=labels, actor=ACTOR))

    def _restore(self) -> None:
        """Put a backup back, some time after it was made, and reconcile after a while."""
        world, chance = self._world, self._world.chance
        world.scheduler.sleep(chance.uniform(*BACKUP_S))
        backup = world.back_up()
        world.scheduler.sleep(chance.uniform(*BACKUP_AGE_S))
        if not backup.is_behind(world.mark.read()):
            return  # nothing has happened since that anybody has noted
        world.stop_services()
        world.scheduler.sleep(chance.uniform(*DOWN_S))
        world.put_back(backup)
        while world.ledger.is_behind:
            world.scheduler.sleep(chance.uniform(*RECONCILED_S))
            self._reconcile()
        # A person looks after what nothing is done to: hosts that were on their way then.
        for host in world.hosts_to_reimage:
            row = world.ledger.now.host_named(host.name)
            is_busy = world.ledger.now.open_on(host.name) is not None or row.is_quarantined
            if host.runs_from is None and not is_busy:
                host.switch_off()
                host.switch_on()

    def _reconcile(self) -> None:
        """Look at the plan and carry it out, as `provisioner reconcile` does in two calls."""
        world = self._world
        try:
            plan = world.network.request("plan", lambda to: to.reconciliation.plan())
            world.scheduler.sleep(world.chance.uniform(1.0, 30.0))
            world.ledger.may_reconcile = True
            world.network.request(
                "apply", lambda to: to.reconciliation.apply(plan.digest, actor=ACTOR)
            )
        except (NoAnswer, Refused) as why:
            world.note(f"not reconciled: {why}")

    def _revoke_one(self) -> None:
        self._world.scheduler.sleep(self._world.chance.uniform(60.0, 900.0))
        # Most are found to be bad when they are being deployed.
        in_use = [one.release for one in self._world.ledger.now.open_operations if one.release]
        digest = in_use[0] if in_use else self._some_release()
        self._ask(lambda to: to.releases.revoke(digest, "it is bad", actor=ACTOR))

    def _flag_one(self, flag: str) -> None:
        world, chance = self._world, self._world.chance
        world.scheduler.sleep(chance.uniform(10.0, 600.0))
        name = chance.choice(world.hosts_to_reimage).name
        for value in (True, False):
            self._set_flag(name, flag, value)
            world.scheduler.sleep(chance.uniform(10.0, 300.0))

    def _set_flag(self, name: str, flag: str, value: bool) -> None:
        while not self._ask(lambda to: to.hosts.set_flags(name, actor=ACTOR, **{flag: value})):
            self._world.scheduler.sleep(5.0)

    def _some_release(self) -> str:
        """Return the digest of a release that is not revoked, as far as people know."""
        world = self._world
        good = [digest for digest in world.shelf.digests() if not world.ledger.revoked(digest)]
        return world.chance.choice(good)

    def _ask(self, handle: Handler[object]) -> bool:
        """Ask until there is an answer; return whether it is a yes."""
        world = self._world
        for _ in range(TRIES_MAX):
            try:
                world.network.request("request", handle)
                return True
            except NoAnswer:
                world.scheduler.sleep(world.chance.uniform(1.0, 20.0))
            except Refused as why:
                world.note(f"request refused: {why}")
                return False
        return False


def count_deployments(world: World) -> int:
    """Return how many reimages the service has accepted."""
    found = {**world.ledger.lost, **world.ledger.now.operations}.values()
    return sum(operation.kind == Kind.DEPLOYMENT for operation in found)


def _cancel(operation_id: str) -> Handler[object]:
    return lambda to: to.operations.cancel(operation_id, actor=ACTOR)


def _deploy(name: str, release: str, options: Json) -> Handler[object]:
    return lambda to: to.operations.request_deployment(
        [name], release, options=options, actor=ACTOR
    )
