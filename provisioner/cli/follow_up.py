"""Says what follows a failed operation, and what a person can do about it. Decides nothing."""

from datetime import datetime
from typing import Any

Operation = dict[str, Any]


def is_waiting(operation: Operation) -> bool:
    """Say whether something is still to come after this operation."""
    return operation.get("follow_up_at") is not None


def next_operation(operation: Operation) -> str | None:
    """Return the id of the operation that followed this one, if one did."""
    kept = operation.get("follow_up") or {}
    return kept.get("operation") if kept.get("state") == "taken" else None


def what_follows(operation: Operation) -> str | None:
    """Return what comes after a failed operation, or came of that; None for nothing."""
    kept = operation.get("follow_up")
    if not isinstance(kept, dict):
        return None
    if kept.get("what") == "quarantine":
        return f"quarantined: {kept.get('why')}"
    if kept.get("what") == "rollback":
        step = f"back to {kept.get('release_name')}"
    else:
        step = f"attempt {kept.get('attempt')} of {kept.get('attempts_max')}"
    if is_waiting(operation):
        return f"{step} at {_clock(operation['follow_up_at'])}"
    if kept.get("state") == "taken":
        return f"{step}, as {kept.get('operation')}"
    return f"not {step}: {kept.get('dropped')}"


def way_out(operation: Operation) -> str | None:
    """Return the command that stops what is to come, or lifts the quarantine."""
    if is_waiting(operation):
        return f"provisioner operation cancel {operation['id']}"
    if (operation.get("follow_up") or {}).get("what") == "quarantine":
        return f"provisioner host release {operation['host']}"
    return None


def _clock(text: str) -> str:
    moment = datetime.fromisoformat(text).astimezone()
    today = datetime.now().astimezone().date()
    return moment.strftime("%H:%M:%S" if moment.date() == today else "%Y-%m-%d %H:%M:%S")
