"""Talks to the service: the agent listener by TLS, signed files by plain HTTP.

It asks and repeats; what the answers mean is decided elsewhere.
"""

import itertools
import json
import threading
from typing import Any, Final

from provisioner.agent.http import (
    AnswerTooLarge,
    Buffer,
    Connection,
    Origin,
    lazy_buffer,
    pinned_context,
)
from provisioner.agent.patience import OutOfPatience, keep_trying
from provisioner.agent.problems import (
    ChunkUnavailable,
    FileMissing,
    ServiceRefused,
    ServiceUnreachable,
)

ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
API_TIMEOUT_S: Final = 15.0
FILE_TIMEOUT_S: Final = 20.0
# The service may be restarting, which must not fail a deployment.
PATIENCE_S: Final = 600.0
REPORT_PATIENCE_S: Final = 60.0
OK: Final = 200
# Answers that mean "not now": asked again. All other errors are final.
BUSY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class Busy(OSError):
    """The service answered that it cannot answer now."""


class ServiceClient:
    """The agent listener. Safe to use from several threads; requests take turns."""

    def __init__(self, origin: Origin, ca_file: str) -> None:
        context = pinned_context(ca_file)
        self._connection = Connection(origin, context=context, timeout_s=API_TIMEOUT_S)
        self._turn = threading.Lock()
        self._into = lazy_buffer(ANSWER_BYTES_MAX)
        self._token: str | None = None

    def use_token(self, token: str) -> None:
        """Send this token with every request from now on."""
        self._token = token

    def post(
        self, path: str, body: dict[str, Any], *, patience_s: float, counts_attempts: bool = False
    ) -> dict[str, Any]:
        """Send JSON, return JSON; try again while nobody answers.

        With counts_attempts each try carries its number, from 1 on, as "attempt". Raises
        ServiceUnreachable after patience_s seconds, and ServiceRefused with the service's own
        code in `found` when it says no.
        """
        numbers = itertools.count(1)

        def once() -> tuple[int, bytes]:
            return self._once(path, {**body, "attempt": next(numbers)} if counts_attempts else body)

        try:
            status, data = keep_trying(once, patience_s=patience_s)
        except OutOfPatience as error:
            raise ServiceUnreachable(
                f"the service did not answer {path} for {patience_s:.0f} s", found=str(error)
            ) from error
        answer = _object(path, data)
        if status == OK:
            return answer
        raise ServiceRefused(
            f"the service refused {path}: {answer.get('detail') or answer.get('title') or status}",
            expected=answer.get("expected"),
            found=answer.get("code") or status,
            hint=_text(answer.get("hint")),
        )

    def _once(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        with self._turn:
            data = json.dumps(body).encode()
            status, length = self._connection.request(
                "POST", path, headers=headers, body=data, into=self._into
            )
            if status in BUSY:
                raise Busy(f"the service answered {status}")
            return status, bytes(memoryview(self._into)[:length])


class FileClient:
    """Files of a release from one place, over one connection. For one thread.

    Once `stop` is set nothing more is asked for or read.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        patience_s: float = PATIENCE_S,
        stop: threading.Event | None = None,
    ) -> None:
        self._connection = Connection(origin, timeout_s=FILE_TIMEOUT_S, stop=stop)
        self._patience_s = patience_s
        self._stop = stop

    def get(self, path: str, into: Buffer) -> tuple[int, int]:
        """Ask once; return the status, and how many bytes are now in the buffer.

        Raises OSError when there is no whole answer, or "not now"; see `Connection.request`.
        """
        status, length = self._connection.request("GET", path, into=into)
        if status in BUSY:
            raise Busy(f"the service answered {status}")
        return status, length

    def fetch(self, path: str, into: Buffer) -> int:
        """Fetch one file into a buffer, and return its length; try again while none comes.

        Raises FileMissing when it is not there, and ChunkUnavailable when it does not fit
        or could not be fetched in time.
        """
        try:
            status, length = keep_trying(
                lambda: self._get_what_fits(path, into),
                patience_s=self._patience_s,
                stop=self._stop,
            )
        except OutOfPatience as error:
            raise ChunkUnavailable(
                f"could not fetch {path} for {self._patience_s:.0f} s", found=str(error)
            ) from error
        if status != OK:
            raise FileMissing(
                f"the service does not have {path}", expected=str(OK), found=str(status)
            )
        return length

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _get_what_fits(self, path: str, into: Buffer) -> tuple[int, int]:
        try:
            return self.get(path, into)
        except AnswerTooLarge as error:
            raise ChunkUnavailable(
                f"{path} is larger than it can be",
                expected=f"at most {len(into)} bytes",
                found=str(error),
                hint="check the release in the archive: provisioner image verify",
            ) from error


def _object(path: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data) if data else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServiceRefused(f"the service's answer to {path} is not a JSON object")
    return value


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
