"""Sets up logging for the service's processes: text on a terminal, JSON elsewhere.

Everything goes to standard error, one line each, our own and the libraries' alike.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

# A library may put a URL or a header into its message; these never reach a line of ours.
_SECRET_NAMES: Final = ("password", "token", "ticket", "secret", "authorization", "nonce")
REDACTED: Final = "…"


def set_up_logs(log_format: str, part: str, *, level: int = logging.INFO) -> None:
    """Send structlog and the standard library's records to standard error.

    `log_format` is auto, json or text; `part` names the process in every line that names none.
    """
    is_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _named(part),
        redact,
    ]
    renderer: Any = structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
    if not is_json:
        # Plain traces: the pretty ones print local variables, and those hold secrets.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    final: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if is_json:
        final.append(structlog.processors.format_exc_info)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[*final, renderer])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("httpx", "httpcore", "werkzeug", "alembic", "pyghmi", "tftpy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _named(part: str) -> Any:
    def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
        event.setdefault("part", part)  # a child has bound its own
        return event

    return add


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
    """Blank out values whose name says that they are secret, whoever logged them."""
    for name in event:
        if any(secret in name.lower() for secret in _SECRET_NAMES):
            event[name] = REDACTED
    return event
