"""The agent's whole run: hello, the operation, the report, and the restart.

Whatever happens, it ends by restarting the host or switching it off; unless the service wants
a quarantined host to be found in the ramdisk.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final, NoReturn

from provisioner.agent.bmc import BmcQuestion
from provisioner.agent.boot_args import COMMAND_LINE, BootArgs, parse_boot_args
from provisioner.agent.client import PATIENCE_S, REPORT_PATIENCE_S, ServiceClient
from provisioner.agent.compare import Comparison, compare
from provisioner.agent.console import say, since_start_s
from provisioner.agent.deploy import deploy
from provisioner.agent.inventory import disks, firmware, inventory
from provisioner.agent.patience import pause
from provisioner.agent.problems import ServiceRefused
from provisioner.agent.progress import Progress
from provisioner.agent.session import Session, parse_session, say_hello
from provisioner.agent.target import Machine
from provisioner.errors import ProvisionerError

CA_FILE: Final = "/etc/provisioner/agent-ca.pem"
TRUST_FILE: Final = "/etc/provisioner/release-trust.json"
DONE: Final = "/agent/v1/done"
COMPARED: Final = "/agent/v1/compared"
FAILED: Final = "/agent/v1/failed"
# The NIC may need a while for its link, and a switch port longer still.
HELLO_PATIENCE_S: Final = 180.0
# Time for a person at the console to read why, before the host restarts.
PAUSE_AFTER_FAILURE_S: Final = 10.0
PAUSE_WHILE_STAYING_S: Final = 60.0
FOUND_MAX: Final = 8000
# The service quarantined the host: it stays in the ramdisk, and writes nothing more.
STAY: Final = "stay"
INPUT_BYTES_MAX: Final = 65536


def main() -> NoReturn:
    """Run once, then restart the host."""
    ending = "reboot"
    try:
        bmc = BmcQuestion()
        bmc.start()
        # /init brings drivers and network up meanwhile, and closes our input when it is done.
        sys.stdin.buffer.read(INPUT_BYTES_MAX)
        with open(COMMAND_LINE, encoding="ascii") as file:
            args = parse_boot_args(file.read())
        ending = run(args, bmc)
    except ProvisionerError as error:
        _show(error)
        pause(PAUSE_AFTER_FAILURE_S)
    except BaseException:  # noqa: BLE001 - whatever it was, the host must restart
        say(traceback.format_exc().replace("\n", " | "))
        pause(PAUSE_AFTER_FAILURE_S)
    restart(ending)


def run(args: BootArgs, bmc: BmcQuestion) -> str:
    """Do what the service wants of this host; return "reboot", "poweroff" or "stay".

    Raises ProvisionerError when it did not work out; the service was told, if it could be.
    """
    started_s = since_start_s()
    client = ServiceClient(args.agent, CA_FILE)
    found = inventory(bmc_address=bmc.answer())
    answer = say_hello(client, args.ticket, found, patience_s=HELLO_PATIENCE_S)
    progress = Progress()
    progress.seconds["start"] = round(started_s, 3)
    progress.seconds["hello"] = round(since_start_s() - started_s, 3)
    return carry_out(answer, client, progress, this_machine)


def this_machine() -> Machine:
    """Return what an operation needs to know of this host."""
    return Machine(tuple(disks()), firmware(), TRUST_FILE)


def carry_out(
    answer: dict[str, Any],
    client: ServiceClient,
    progress: Progress,
    find_machine: Callable[[], Machine],
) -> str:
    """Do what the service's answer to hello says, and report it; return how the host ends.

    The ticket is spent, so that nobody asks again why this failed: whatever is raised here
    was reported, if it could be. "stay" is the service's answer to such a report.
    """
    generation = answer.get("generation")
    try:
        session = parse_session(answer)
        say(f"{session.operation}: {session.kind} of {session.host}")
        if session.kind == "inspection":
            return session.then
        machine = find_machine()
        if session.writes_nothing:
            path, body = COMPARED, compared(compare(session, machine, client, progress))
        else:
            deploy(session, machine, client, progress)
            path, body = DONE, done(session, progress)
    except BaseException as error:
        if report_failure(client, generation, error) == STAY:
            say(f"FAILED: {error}")
            return STAY
        raise
    say(f"done: {progress.seconds}")
    report(client, path, {**body, "generation": generation, "seconds": progress.seconds})
    # A switch to kexec comes with a table of the hardware that survives it.
    return session.then


def report(client: ServiceClient, path: str, body: dict[str, Any]) -> None:
    """Tell the service what was done, as well as that can be done.

    When nobody listens the host restarts all the same: its disk is right, and the new system
    speaks for itself. Nothing speaks for a comparison, so that the service is told at least
    that it did not like its result.
    """
    try:
        client.post(path, body, patience_s=PATIENCE_S)
    except ServiceRefused as error:
        _show(error)
        if path == COMPARED:
            report_failure(client, body["generation"], error)
    except ProvisionerError as error:
        _show(error)


def done(session: Session, progress: Progress) -> dict[str, Any]:
    """Return what the service is told of a disk that is complete."""
    return {
        "release": session.release,
        "written_bytes": progress.written_bytes,
        "fetched_bytes": progress.fetched_bytes,
    }


def compared(found: Comparison) -> dict[str, Any]:
    """Return what the service is told of a comparison."""
    return {
        "compared_chunks": found.compared_chunks,
        "differing_chunks": found.differing_chunks,
        "differing_bytes": found.differing_bytes,
    }


def report_failure(client: ServiceClient, generation: object, error: BaseException) -> str:
    """Tell the service why the operation stopped, as well as that can be done; return how it
    wants the host to end."""
    known = error if isinstance(error, ProvisionerError) else None
    text = known.message if known else f"{type(error).__name__}: {error}"
    body: dict[str, Any] = {
        "generation": generation,
        "code": known.code if known else "agent_broken",
        "message": text[:FOUND_MAX],
        "expected": known.expected if known else None,
        "found": known.found if known else _where(error),
        "hint": known.hint if known else None,
    }
    try:
        answer = client.post(FAILED, body, patience_s=REPORT_PATIENCE_S)
    except ProvisionerError as refusal:
        _show(refusal)
        return "reboot"
    return STAY if answer.get("then") == STAY else "reboot"


def restart(ending: str) -> NoReturn:
    """Restart the host, or switch it off, or wait until somebody else does."""
    say(ending)
    os.sync()
    while ending == STAY:
        pause(PAUSE_WHILE_STAYING_S)
    program = "poweroff" if ending == "poweroff" else "reboot"
    os.execv("/bin/busybox", [program, "-f"])


def _where(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-FOUND_MAX:]


def _show(error: ProvisionerError) -> None:
    parts = (f"{key} {value}" for key, value in error.as_dict().items() if key != "message")
    say(f"FAILED: {error.message} ({'; '.join(parts)})")
