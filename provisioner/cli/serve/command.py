"""`provisioner serve`: check everything, bring the database up to date, run the parts."""

import os
import socket
from pathlib import Path
from typing import Final

import click

from provisioner.errors import ConfigError, RequestError, Unavailable
from provisioner.failpoints import VARIABLE, Failpoints, find_failpoints
from provisioner.settings import Settings, find_settings
from provisioner.whole_files import replace_whole

from .logs import set_up_logs
from .supervisor import Part, Supervisor

PREPARE_LIMIT_S: Final = 300


def serve(config: Path | None, only: tuple[str, ...], ready_file: Path | None) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raises ConfigError, before anything listens, with every problem of the configuration.
    """
    from . import parts

    settings = find_settings(config)
    chosen = frozenset(only or parts.NAMES)
    if unknown := chosen - set(parts.NAMES):
        raise RequestError(
            f"there is no part {', '.join(sorted(unknown))}", expected=list(parts.NAMES)
        )
    set_up_logs(settings.service.log_format, "service")
    failpoints = find_failpoints(os.environ.get(VARIABLE))
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)  # of a service that was killed
    listeners = parts.bind_listeners(settings, chosen)
    if chosen & parts.NEED_DATABASE:
        parts.preload(settings, chosen)
        bring_up_to_date(settings, failpoints)
    told = _addresses(settings, chosen)
    made = parts.make_parts(settings, chosen, listeners, failpoints)

    def on_ready() -> None:
        click.echo(f"ready {told}")
        if ready_file is not None:
            replace_whole(ready_file, told + "\n")
        _notify("READY=1")

    try:
        Supervisor(made, on_ready).run()
    finally:
        _notify("STOPPING=1")
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
        for sock in listeners.values():
            sock.close()


def bring_up_to_date(settings: Settings, failpoints: Failpoints | None) -> None:
    """Upgrade the database in a child: what it opens must not reach the children that serve."""
    from . import parts
    from .supervisor import run_once

    prepare = Part("prepare", lambda _ready: parts.prepare(settings, failpoints))
    code = run_once(prepare, PREPARE_LIMIT_S)
    if code == ConfigError.exit_code:
        raise ConfigError("the database cannot be used", hint="its message is in the log above")
    if code != 0:
        raise Unavailable(
            "the database was not brought up to date",
            found=f"exit code {code}",
            hint="the log above says why; is it reachable, and the disk not full?",
        )


def _addresses(settings: Settings, chosen: frozenset[str]) -> str:
    """Return where the parts answer, as `name=address`, in one line."""
    told = []
    if "api" in chosen:
        told.append(f"api=http://{settings.api.listen}")
    if "boot" in chosen:
        told += [f"boot={settings.boot.url}", f"agent={settings.agent.url}"]
    if "tftp" in chosen:
        told.append(f"tftp={settings.tftp.listen}")
    if "dhcp" in chosen:
        on = f":{settings.dhcp.interface}" if settings.dhcp.interface else ""
        told.append(f"dhcp={settings.dhcp.mode}{on}")
    if "worker" in chosen:
        told.append("worker")
    return " ".join(told)


def _notify(state: str) -> None:
    """Tell systemd, when it started us as a service of Type=notify (sd_notify(3))."""
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place:
        return
    address = "\0" + place[1:] if place.startswith("@") else place
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError as error:
            raise ConfigError(f"systemd's notify socket does not answer: {error}") from error
