"""Takes over the effects of a worker that died on another machine and did not come back.

Every worker holds the lock on its name while it lives, so whoever gets that lock knows.
"""

from datetime import timedelta
from typing import Final

from dbos import DBOS
from sqlalchemy import Engine

from .name_lock import NameLock

TAKEOVER_INTERVAL: Final = timedelta(seconds=5)
# Effects looked at in one round; the next round sees the rest.
TAKEOVER_BATCH_MAX: Final = 500


def worker_lock(engine: Engine, name: str) -> NameLock:
    return NameLock(engine, f"worker {name}")


def take_over(engine: Engine, queue: str, own_name: str) -> int:
    """Queue again what dead workers left half done; return how many effects that were.

    Their order within a partition stays. DBOS must run in this process.
    """
    running = DBOS.list_workflows(
        status="PENDING",
        queue_name=queue,
        limit=TAKEOVER_BATCH_MAX,
        load_input=False,
        load_output=False,
    )
    left: dict[str, list[str]] = {}
    for workflow in running:
        if workflow.executor_id not in (None, own_name):
            left.setdefault(str(workflow.executor_id), []).append(workflow.workflow_id)
    return sum(_take_from(engine, queue, name, keys) for name, keys in left.items())


def _take_from(engine: Engine, queue: str, name: str, keys: list[str]) -> int:
    lock = worker_lock(engine, name)
    if not lock.acquire(wait=timedelta(0)):
        return 0  # it lives
    try:
        # While we hold its name nobody else performs these; asked again, because it may
        # have ended some of them before it died.
        still = DBOS.list_workflows(
            workflow_ids=keys,
            status="PENDING",
            executor_id=name,
            load_input=False,
            load_output=False,
        )
        if still:
            # Without the queue's name DBOS would run them outside of its limits.
            DBOS.resume_workflows([one.workflow_id for one in still], queue_name=queue)
        return len(still)
    finally:
        lock.release()
