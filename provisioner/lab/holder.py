"""The process that is the lab: it holds the namespaces, and everything else is its child.

Runs as the first process of its own pid and network namespaces (see `lab.py`): when it ends,
however it ends, the kernel ends all the rest. Standard library only, to stay small.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from provisioner.errors import NotFound, ProvisionerError, RequestError
from provisioner.lab import network
from provisioner.lab.machine import Machine
from provisioner.lab.model import SOCKET, read_description, write_description
from provisioner.lab.processes import Process

REQUEST_BYTES_MAX: Final = 65536


class Holder:
    """All machines of a lab, and the socket on which they are asked for things."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._description = read_description(directory)
        self._machines = {
            host.name: Machine(host, self._description.accel) for host in self._description.hosts
        }
        self._over = asyncio.Event()

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Bring everything up, say so, and serve until told to end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._over.set)
        network.set_up([host.tap for host in self._description.hosts])
        router = network.open_router()
        if router:
            loop.add_reader(router, network.answer_solicitation, router)
        await asyncio.gather(*(machine.start() for machine in self._machines.values()))
        # The directory is our working directory: a socket's path has 108 bytes at most.
        server = await asyncio.start_unix_server(self._serve, SOCKET, limit=REQUEST_BYTES_MAX)
        # /proc is that of the world outside, and so names us as the world outside does.
        me = Process.of(int(os.readlink("/proc/self")))
        keeper = Process.parent_of_this_one()
        write_description(self._directory, replace(self._description, holder=me, keeper=keeper))
        on_ready()
        async with server:
            await self._over.wait()
        await asyncio.gather(*(machine.stop() for machine in self._machines.values()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError):
            request = json.loads(await reader.readline())
            try:
                answer = {"answer": await self._answer(request)}
            except ProvisionerError as error:
                answer = {"error": {"kind": type(error).__name__, **error.as_dict()}}
            except Exception as error:  # noqa: BLE001  # the top of a server: tell, and live on
                traceback.print_exc()
                answer = {"error": {"kind": "ProvisionerError", "message": repr(error)}}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _answer(self, request: dict[str, Any]) -> Any:
        match request["ask"]:
            case "status":
                return [asdict(machine.status) for machine in self._machines.values()]
            case "down":
                self._over.set()
                return None
        machine = self._machine(request["host"])
        match request["ask"]:
            case "power":
                await self._power(machine, request["verb"])
            case "fault":
                await machine.add_fault(request["name"], request["value"])
            case "clear":
                name = request["name"]
                await (machine.clear_fault(name) if name else machine.clear_faults())
        return asdict(machine.status)

    def _machine(self, name: str) -> Machine:
        if name not in self._machines:
            raise NotFound("the lab has no such host", host=name, expected=sorted(self._machines))
        return self._machines[name]

    async def _power(self, machine: Machine, verb: str) -> None:
        verbs: dict[str, Callable[[], Awaitable[Any]]] = {
            "on": machine.power_on,
            "off": machine.power_off,
            "soft": machine.soft_off,
            "reset": machine.reset,
        }
        if verb not in verbs:
            raise RequestError("no such power command", expected=sorted(verbs), found=verb)
        if await verbs[verb]() is False:
            raise RequestError("the host is off, and so cannot be reset", host=machine.host.name)
        await machine.settled()


def main() -> None:
    """Hold the lab in the directory given; tell how the start went in one line of JSON."""
    directory = Path(sys.argv[1])
    os.chdir(directory)
    os.umask(0o077)

    def tell(outcome: dict[str, Any]) -> None:
        os.write(1, json.dumps(outcome).encode() + b"\n")
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)

    try:
        asyncio.run(Holder(directory).run(lambda: tell({"ready": True})))
    except ProvisionerError as error:
        tell({"error": {"kind": type(error).__name__, **error.as_dict()}})
        sys.exit(1)


if __name__ == "__main__":
    main()
