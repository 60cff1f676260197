"""A QMP connection to one QEMU. Knows the protocol, and not what any command is for.

Source: docs/interop/qmp-spec of QEMU.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from provisioner.errors import DeviceError

ANSWER_LIMIT: Final = timedelta(seconds=10)
LINE_BYTES_MAX: Final = 1024 * 1024


class Qmp:
    """Commands out, events in, over a socket that is connected already."""

    def __init__(self, ours: socket.socket, on_event: Callable[[str, dict[str, Any]], None]):
        self._socket = ours
        self._on_event = on_event
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self.ended = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._open = asyncio.Event()

    async def run(self) -> None:
        """Greet QEMU and listen to it until it is gone."""
        try:
            reader, self._writer = await asyncio.open_connection(
                sock=self._socket, limit=LINE_BYTES_MAX
            )
            await reader.readline()  # its greeting
            self._writer.write(b'{"execute": "qmp_capabilities"}\n')
            await reader.readline()
            self._open.set()
            while line := await reader.readline():
                self._take(json.loads(line))
        except ConnectionError:
            pass  # a killed QEMU is an end like any other
        finally:
            self.ended.set()
            for answer in self._answers.values():
                answer.cancel()
            if self._writer:
                self._writer.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._on_event(message["event"], message.get("data", {}))
        elif answer := self._answers.pop(message.get("id", 0), None):
            if "error" in message:
                answer.set_exception(DeviceError("QEMU refused", found=message["error"]))
            else:
                answer.set_result(message["return"])

    async def ready(self) -> bool:
        """Wait until QEMU takes commands, and say whether it came to that."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._open, self.ended)]
        _, pending = await asyncio.wait(
            waits,
            timeout=ANSWER_LIMIT.total_seconds(),
            return_when=asyncio.FIRST_COMPLETED,
        )
        for wait in pending:
            wait.cancel()
        return self._open.is_set() and not self.ended.is_set()

    async def ask(self, command: str, **arguments: object) -> Any:
        """Return what QEMU returns. Raises DeviceError when it refuses, ends or is silent."""
        if not await self.ready() or self._writer is None:
            raise DeviceError(f"QEMU does not take the command {command}")
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        message = {"execute": command, "arguments": arguments, "id": self._number}
        with contextlib.suppress(ConnectionError):
            self._writer.write(json.dumps(message).encode() + b"\n")
            await self._writer.drain()
        try:
            return await asyncio.wait_for(answer, ANSWER_LIMIT.total_seconds())
        except (TimeoutError, asyncio.CancelledError) as error:
            raise DeviceError(f"QEMU did not answer the command {command}") from error
