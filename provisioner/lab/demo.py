"""The demo: a rack of two hosts, two releases, two reimages, by the commands one would type.

Sets up a site in a fresh directory, shows each command, and ends with the evidence. It
leaves nothing behind unless it is told to keep everything running.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import click

from provisioner.client import Client
from provisioner.core.model import Json
from provisioner.errors import ProvisionerError
from provisioner.lab.lab import Lab
from provisioner.lab.model import LabHost
from provisioner.lab.site import PROFILE, Site, host_document

VERSIONS: Final = ("2026.11.1", "2026.11.2")
CONSOLE_TAIL_LINES: Final = 15
WIDTH_WITHOUT_TERMINAL: Final = 120


@click.command()
@click.option("--keep", is_flag=True, help="Leave the rack and the service running.")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Where to put it all (new folder)."
)
def main(keep: bool, directory: Path | None) -> None:
    """Reimage two QEMU hosts, one BIOS and one UEFI, to one release and then to the next."""
    # SIGTERM must not leave a rack behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = directory or Path(tempfile.mkdtemp(prefix="provisioner-demo-"))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    demo = Demo(folder.resolve())
    try:
        code = demo.run()
        if keep and code == 0:
            demo.show_way_in()
            demo.keeps = True
    except ProvisionerError as error:
        _complain(error)
        code = error.exit_code
    finally:
        demo.close(remove=directory is None)
    sys.exit(code)


class Demo:
    """One run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lab: Lab | None = None
        self._site: Site | None = None
        self._began = time.monotonic()
        self.keeps = False

    def run(self) -> int:
        """Do all of it and return the exit code: 0 when every host proved itself."""
        site = self._prepare()
        first, second = (f"debian-12@{version}" for version in VERSIONS)
        for release in (first, second):
            self._say(f"reimage both hosts to {release}")
            code = self._cli("reimage", *self._names(), "--release", release, "--wait")
            if code != 0:
                self._show_failures(site)
                return code
        with site.client() as client:
            _show_evidence(client, self._names())
            rows = client.verify_audit()
        self._say(f"done; the audit log's chain of {rows} rows holds")
        return 0

    def show_way_in(self) -> None:
        """Print how to reach what was left running."""
        assert self._site is not None
        assert self._lab is not None
        site = self._site
        with site.client() as client:
            rows = [_last_deployment(client, name) for name in self._names()]
        lines = [
            f"service    {site.api_url} (context {site.directory / 'client.toml'})",
            f"status     provisioner --config {site.config} host list",
        ]
        for name, row in zip(self._names(), rows, strict=True):
            lines.append(f"{name:<10} {shlex.join(site.ssh_argv(row['evidence']['address']))}")
        pids = " ".join(str(process.pid) for process in site.processes)
        down = f"kill {pids}; provisioner lab down --dir {self._lab.directory}"
        lines.append(f"take down  {down}; rm -r {self._folder}")
        click.echo("\n" + "\n".join(lines))

    def close(self, *, remove: bool) -> None:
        """Take everything down, unless it is kept."""
        if self.keeps:
            return
        if self._site is not None:
            self._site.stop()
        if self._lab is not None:
            self._lab.down()
        if remove:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _prepare(self) -> Site:
        self._say("a rack of two hosts comes up: lab-1 (BIOS), lab-2 (UEFI), each with a BMC")
        self._lab = Lab.up(self._folder / "lab", [LabHost("bios"), LabHost("uefi")])
        self._say(f"QEMU runs on {self._lab.accel}")
        self._site = site = Site.create(self._folder / "site", self._lab, say=self._say)
        older = site.publish(VERSIONS[0])
        site.publish(VERSIONS[1], parent=older)
        site.start()
        site.save_profile()
        for host in self._lab.hosts:
            document: dict[str, Any] = host_document(host)
            self._say(f"enrol {host.name}: {host.mac}, BMC {host.bmc.address}, profile {PROFILE}")
            with site.client() as client:
                client.add_host(document)
        return site

    def _names(self) -> list[str]:
        return [host.name for host in self._lab.hosts] if self._lab else []

    def _cli(self, *arguments: str) -> int:
        """Run a command of ours as a person would, and return its exit code."""
        assert self._site is not None
        click.secho("$ " + shlex.join(["provisioner", *arguments]), bold=True)
        command = [sys.executable, "-m", "provisioner", *arguments]
        context = {
            "PROVISIONER_URL": self._site.api_url,
            "PROVISIONER_TOKEN": self._site.settings.keys.admin_token.reveal(),
        }
        return subprocess.run(command, env={**os.environ, **context}, check=False).returncode

    def _say(self, line: str) -> None:
        click.echo(f"[{time.monotonic() - self._began:6.1f} s] {line}")

    def _show_failures(self, site: Site) -> None:
        assert self._lab is not None
        with site.client() as client:
            for name in self._names():
                row = _last_deployment(client, name)
                if row["phase"] == "succeeded":
                    continue
                click.secho(f"\n{name} stopped: {row['phase']}", fg="red", err=True)
                for key, value in (row.get("error") or {}).items():
                    click.echo(f"  {key}: {value}", err=True)
                tail = self._lab.console(name).splitlines()[-CONSOLE_TAIL_LINES:]
                click.echo("  its console ends with:\n    " + "\n    ".join(tail), err=True)
        click.echo(f"logs: {site.directory}/serve-*.log", err=True)


def _last_deployment(client: Client, name: str) -> Json:
    rows = [row for row in client.operations(host=name) if row["kind"] == "deployment"]
    newest: Json = client.operation(rows[0]["id"])
    return newest


def _show_evidence(client: Client, names: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What each host proved", show_lines=True, title_justify="left")
    for column in ("host", "release", "seconds", "bytes", "evidence"):
        table.add_column(column, overflow="fold")
    for name in names:
        host, row = client.host(name), _last_deployment(client, name)
        evidence = row["evidence"]
        spent = row["phase_seconds"].items()
        seconds = "\n".join(f"{phase:<10} {seconds:>6.1f}" for phase, seconds in spent)
        seconds += f"\n{'total':<10} {sum(each for _, each in spent):>6.1f}"
        moved = (
            f"written {evidence['written_bytes'] / 1e6:,.0f} MB\n"
            f"fetched {evidence['fetched_bytes'] / 1e6:,.0f} MB"
        )
        checks = "\n".join(f"{check}: {one['found']}" for check, one in evidence["checks"].items())
        proof = (
            f"nonce of {row['id']}\nrelease id {evidence['release_id']}\n"
            f"root on disk {evidence['root_disk'].get('serial')}\n{checks}"
        )
        release = f"{row['pins']['release_name']}\n{row['release'][:12]}"
        table.add_row(f"{name}\n{host['firmware']}", release, seconds, moved, proof)
    # A pipe has no width of its own, and rich would take 80 columns and fold everything.
    Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL).print(table)


def _complain(error: ProvisionerError) -> None:
    click.secho(f"error: {error.message}", fg="red", err=True)
    for key in ("host", "expected", "found", "hint"):
        value = getattr(error, key)
        if value is not None:
            click.echo(f"  {key}: {value}", err=True)


if __name__ == "__main__":
    main()
