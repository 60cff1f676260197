"""The one place that permits a write: `authorise_write`.

Pure. Every check stands alone on a line of `_refusals`, and the tests remove each in turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from ..errors import TrustError
from .disks import Disk
from .model import Host, HostId, HostState, Kind, Operation, Phase


class WriteRefused(TrustError):
    """The agent may not write; nothing was, or nothing more will be."""

    code = "write_refused"


@dataclass(frozen=True)
class WriteRequest:
    """What the agent asks for right before its first write, and again as it goes.

    `host_id` and `generation` are those of its token; `disk` is what it found in the host.
    """

    host_id: HostId
    generation: int
    release: str
    disk: Disk


def authorise_write(
    request: WriteRequest,
    operation: Operation,
    host: Host,
    chosen: Disk,
    *,
    now: datetime,
    release_is_revoked: bool,
) -> None:
    """Return when `request` may write, and raise WriteRefused otherwise.

    `chosen` is the disk that the pinned profile's rule picks from the inventory that the
    agent sent at its hello: the service chooses for itself, too. `release_is_revoked` is
    what the database says right now of the operation's release.
    """
    refusals = _refusals(request, operation, host, chosen, now, release_is_revoked)
    for expected, found, why in refusals:
        raise WriteRefused(
            f"host {host.name} may not be written: {why}",
            host=host.name,
            expected=expected,
            found=found,
            hint="nothing more is written under this permission; see the operation's timeline",
        )


_WRITING_PHASES = frozenset({Phase.PREPARING, Phase.WRITING, Phase.VERIFYING})


def _refusals(
    request: WriteRequest,
    operation: Operation,
    host: Host,
    chosen: Disk,
    now: datetime,
    release_is_revoked: bool,
) -> Iterator[tuple[object, object, str]]:
    asked, allowed = identity(request.disk), identity(chosen)
    if operation.kind is not Kind.DEPLOYMENT:
        yield Kind.DEPLOYMENT, operation.kind, "the operation is not a deployment"
    if operation.phase not in _WRITING_PHASES:
        yield "preparing", operation.phase, "the operation is in no phase that writes"
    if operation.deadline_at is None or now >= operation.deadline_at:
        yield operation.deadline_at, now, "the operation's deadline has passed"
    if request.host_id != host.id or operation.host_id != host.id:
        yield host.id, request.host_id, "the request is for another host"
    if request.generation != operation.generation:
        yield operation.generation, request.generation, "the generation is not the present one"
    if host.generation != operation.generation:
        yield host.generation, operation.generation, "a newer operation owns the host"
    if request.release != operation.release:
        yield operation.release, request.release, "the release is not the one requested"
    if release_is_revoked:
        yield "a release in good standing", "a revoked one", "the release was revoked"
    if host.state in (HostState.ENROLLED, HostState.RETIRED):
        yield "an inspected host", host.state, "the host is not in a state to be written"
    if (reason := host.why_not_rebuilt) is not None:
        yield "a host free to be rebuilt", reason, reason
    if not (request.disk.serial or request.disk.wwn):
        yield "a serial or a WWN", request.disk.name, "the disk cannot be told from others"
    if asked != allowed:
        yield allowed, asked, "the disk is not the one that the profile's rule picks"
    first = operation.evidence.get("disk")
    if first is not None and first != asked:
        yield first, asked, "the disk is not the one that was permitted first"


def identity(disk: Disk) -> dict[str, object]:
    """Return what makes a disk that disk: serial, WWN and size, never its /dev name."""
    return {"serial": disk.serial, "wwn": disk.wwn, "size_bytes": disk.size_bytes}
