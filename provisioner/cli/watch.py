"""Watches operations until all have ended: bars on a terminal, a line per change elsewhere,
a table at the end, and an exit code by the worst outcome."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

import click

from provisioner.core.model import Kind, Phase
from provisioner.errors import DeviceError, TrustError, Unavailable

from .follow_up import is_waiting, next_operation, way_out, what_follows
from .messages import clean
from .output import show, size

if TYPE_CHECKING:
    from provisioner.client import Client

Operation = dict[str, Any]

LOOK_S: Final = 0.5
# The service may be restarting, or its machine; operations go on meanwhile.
AWAY_LIMIT_S: Final = 900.0
# Each phase has a deadline, so this only ends a watch that lost all sense.
WATCH_LIMIT_S: Final = 48 * 3600.0
QUARTERS: Final = 4

PHASES: Final = (
    Phase.QUEUED,
    Phase.NETBOOTING,
    Phase.PREPARING,
    Phase.WRITING,
    Phase.VERIFYING,
    Phase.BOOTING,
    Phase.PROVING,
    Phase.SUCCEEDED,
)
_BYTE_PHASES: Final = (Phase.WRITING, Phase.VERIFYING)
_COLUMNS: Final = ["host", "release_name", "phase", "seconds", "phases", "moved", "outcome"]


class Display(Protocol):
    """Shows the present state of the operations."""

    def update(self, operations: Sequence[Operation]) -> None: ...
    def say(self, text: str) -> None: ...


def watch(client: "Client", operations: Sequence[Operation], *, output: str = "table") -> int:
    """Watch to the end and return the exit code of the worst outcome.

    With -o json or yaml, standard output gets only the final document.
    """
    try:
        ended = until_final(client, operations)
    except KeyboardInterrupt:
        ids = [operation["id"] for operation in operations]
        click.echo("no longer watching; the operations go on:", err=True)
        click.echo(f"  provisioner operation watch {' '.join(ids)}", err=True)
        raise
    return show_ended(ended, output)


def until_final(client: "Client", operations: Sequence[Operation]) -> list[Operation]:
    """Show how the operations go until all have ended, and return them as they ended. One
    that is followed by another attempt, or the way back, gives its place to that."""
    display, live = _display()
    with live:
        ids = [operation["id"] for operation in operations]
        return _until_final(client, ids, list(operations), display)


def show_ended(ended: Sequence[Operation], output: str = "table") -> int:
    """Print how operations ended, and return the exit code of the worst outcome."""
    if output in ("table", "wide"):
        show([_result(one) for one in ended], _COLUMNS, output, wide_columns=["id", "evidence"])
        _tell_failures(ended)
    else:
        show(list(ended), ["id"], output)
    return max((exit_code(one) for one in ended), default=0)


def _until_final(
    client: "Client", ids: Sequence[str], operations: list[Operation], display: Display
) -> list[Operation]:
    ends_at = time.monotonic() + WATCH_LIMIT_S
    away_since: float | None = None
    while True:
        display.update(operations)
        if all(one["is_final"] and not _goes_on(one) for one in operations):
            return operations
        if time.monotonic() > ends_at:
            raise Unavailable(
                "the operations did not end", hint="provisioner operation list --open"
            )
        time.sleep(LOOK_S)
        try:
            operations = client.operations_by_id(ids)
            ids = [next_operation(one) or one["id"] for one in operations]
        except Unavailable as error:
            now = time.monotonic()
            if away_since is None:
                display.say(f"{error.message}; still trying")
                away_since = now
            if now - away_since > AWAY_LIMIT_S:
                raise
        else:
            if away_since is not None:
                display.say("the service answers again")
            away_since = None


def _goes_on(operation: Operation) -> bool:
    return is_waiting(operation) or next_operation(operation) is not None


def went_back(operation: Operation) -> bool:
    """Say whether what ended here is not what was asked for, but the way back from it."""
    return bool(operation["pins"].get("cause") == "rollback")


def share(operation: Operation) -> float:
    """Return how far an operation is, from 0 to 1: equal parts for the phases, and within
    one the bytes that the agent reported."""
    if operation["is_final"]:
        return 1.0
    phase = PHASES.index(Phase(operation["phase"]))
    done, total = (operation["progress"].get(key, 0) for key in ("done_bytes", "total_bytes"))
    within = min(done / total, 1.0) if total and operation["phase"] in _BYTE_PHASES else 0.0
    return (phase + within) / (len(PHASES) - 1)


# Whom an operation's error calls, where it is not the operator (code 4). Agents and checks
# report codes whose classes the command line does not load.
TRUST_CODES: Final = frozenset(
    {
        "trust",
        "chunk_corrupt",
        "manifest_digest",
        "manifest_malformed",
        "manifest_signature",
        "profile_unreadable",
        "release_expired",
        "release_revoked",
        "release_too_old",
        "release_untested",
        "identity_doubtful",
        "ticket_contested",
        "ticket_refused",
        "token_refused",
        "write_refused",
        "wrong_disk",
        "wrong_system",
    }
)
LATER_CODES: Final = frozenset({"bmc_busy", "bmc_unreachable", "unavailable"})


def exit_code(operation: Operation) -> int:
    """Return 0 for success, else the code of who must act: also when the host went back."""
    if operation["phase"] == Phase.SUCCEEDED:
        return DeviceError.exit_code if went_back(operation) else 0
    error = operation["error"]
    code = error.get("code") if isinstance(error, dict) else None
    if code in TRUST_CODES:
        return TrustError.exit_code
    return Unavailable.exit_code if code in LATER_CODES else DeviceError.exit_code


def _display() -> tuple[Display, AbstractContextManager[object]]:
    if sys.stderr.isatty():
        bars = Bars()
        return bars, bars.progress
    return Lines(), nullcontext()


class Lines:
    """One line for each change of phase, and for each quarter of the bytes."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, int, int]] = {}

    def update(self, operations: Sequence[Operation]) -> None:
        for one in operations:
            quarter = _quarter(one)
            state = (one["phase"], one["rung"], quarter)
            if self._told.get(one["id"]) != state:
                self._told[one["id"]] = state
                tail = f" {quarter * 100 // QUARTERS} %" if quarter else ""
                rung = f" (attempt {one['rung'] + 1})" if one["rung"] else ""
                self.say(f"{one['host']} {one['phase']}{rung}{tail}{_because(one)}")

    def say(self, text: str) -> None:
        now = datetime.now().astimezone()
        click.echo(f"{now:%H:%M:%S} {clean(text)}", err=True)


class Bars:
    """A bar for each host, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.fields[host]}", style="bold", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._bars: dict[str, Any] = {}

    def update(self, operations: Sequence[Operation]) -> None:
        for one in operations:
            if one["id"] not in self._bars:
                self._bars[one["id"]] = self.progress.add_task("", total=1.0, host=one["host"])
            progress = one["progress"]
            text = str(one["phase"])
            if _quarter(one):
                text += f" {size(progress['done_bytes'])} of {size(progress['total_bytes'])}"
            bar = self._bars[one["id"]]
            self.progress.update(bar, completed=share(one), description=text + _because(one))
            if one["is_final"]:
                self.progress.stop_task(bar)

    def say(self, text: str) -> None:
        self.progress.console.print(clean(text), markup=False)


def _quarter(operation: Operation) -> int:
    """Return how many quarters of the bytes are done in a phase that moves bytes."""
    if operation["phase"] not in _BYTE_PHASES:
        return 0
    progress = operation["progress"]
    total = progress.get("total_bytes", 0)
    return int(progress.get("done_bytes", 0)) * QUARTERS // total if total else 0


def _because(operation: Operation) -> str:
    if operation.get("waits"):
        return f", waits: {operation['waits']}"
    error = operation["error"]
    if operation["phase"] != Phase.FAILED or not isinstance(error, dict):
        return ""
    follows = what_follows(operation)
    return f": {error.get('message')}" + (f"; next: {follows}" if follows else "")


def _result(operation: Operation) -> Operation:
    """Return the operation with what the final table shows of it."""
    spent = operation["phase_seconds"]
    evidence, progress = operation["evidence"], operation["progress"]
    written = evidence.get("written_bytes", progress.get("written_bytes"))
    fetched = evidence.get("fetched_bytes", progress.get("fetched_bytes"))
    parts = [f"{phase} {spent[phase]:.0f}" for phase in PHASES if phase in spent]
    moved = [
        f"{size(count)} {what}"
        for count, what in ((written, "written"), (fetched, "fetched"))
        if isinstance(count, int)
    ]
    return {
        **operation,
        "seconds": f"{sum(spent.values()):.0f}",
        "phases": ", ".join(parts),
        "moved": ", ".join(moved),
        "outcome": _outcome(operation),
    }


def _outcome(operation: Operation) -> str:
    """Return by what evidence the operation succeeded, or why it did not."""
    if operation["phase"] != Phase.SUCCEEDED:
        error = operation["error"] or {}
        return str(error.get("message") or operation["phase"])
    evidence = operation["evidence"]
    if operation["kind"] == Kind.VERIFICATION:
        return _differing(evidence)
    told = [f"went back, since {operation['pins'].get('after')} failed"] * went_back(operation)
    if "nonce" in evidence:
        told.append("own nonce")
    if evidence.get("release_id"):
        told.append(f"release id {str(evidence['release_id'])[:8]}")
    disk = evidence.get("root_disk") or {}
    if disk.get("serial"):
        told.append(f"disk {disk['serial']}")
    checks = evidence.get("checks")
    if isinstance(checks, dict | list) and checks:
        told.append("checks " + ", ".join(str(check) for check in checks))
    return "; ".join(told)


def _differing(evidence: dict[str, Any]) -> str:
    """Return what a verification found on the disk."""
    count, total = (evidence.get(key, 0) for key in ("differing_chunks", "compared_chunks"))
    if not count:
        return f"equal: none of {total} chunks differs"
    return f"{count} of {total} chunks differ, {size(evidence.get('differing_bytes', 0))} to fetch"


def _tell_failures(operations: Sequence[Operation]) -> None:
    for one in operations:
        error = one["error"]
        if one["phase"] == Phase.FAILED and isinstance(error, dict):
            from provisioner.client.problems import error_from

            from .messages import show_error

            show_error(
                error_from(0, {"host": one["host"], **error, "detail": error.get("message")})
            )
            click.echo(f"  look at:  provisioner why {one['host']}", err=True)
            if (follows := what_follows(one)) is not None:
                click.echo(clean(f"  next:     {follows}"), err=True)
            if (way := way_out(one)) is not None:
                click.echo(f"  way out:  {way}", err=True)
