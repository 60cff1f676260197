"""The audit chain: every row carries the hash of the one before, so none can be edited,
removed or slipped in unseen. Pure: rows in, hashes and verdicts out."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from ..errors import TrustError
from .model import Json

FIRST_HASH: Final = "0" * 64


@dataclass(frozen=True)
class AuditRow:
    """One change: who did what to which thing. `number` counts from 1 without gaps."""

    number: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: Json
    before_hash: str
    row_hash: str


def chained(
    number: int,
    at: datetime,
    actor: str,
    action: str,
    subject: str,
    detail: Json,
    before_hash: str,
) -> AuditRow:
    """Return the row with its hash, SHA-256 over canonical JSON of everything before it."""
    content = [number, at.isoformat(), actor, action, subject, detail, before_hash]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # An agent may have sent half a surrogate pair, which JSON keeps and UTF-8 does not know.
    row_hash = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return AuditRow(number, at, actor, action, subject, detail, before_hash, row_hash)


def verify(rows: Iterable[AuditRow]) -> int:
    """Return how many rows were checked, in order from the first.

    Raises TrustError that names the first row where the chain is broken.
    """
    before, count = FIRST_HASH, 0
    for row in rows:
        count += 1
        good = chained(count, row.at, row.actor, row.action, row.subject, row.detail, before)
        if row != good:
            raise TrustError(
                f"the audit log is broken at row {count}",
                expected=good.row_hash,
                found=row.row_hash,
                hint="compare with an exported copy: rows were edited, removed or added",
            )
        before = row.row_hash
    return count
