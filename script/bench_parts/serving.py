"""Measures what the service hands out: TFTP beside dnsmasq, chunks beside nginx, boot scripts."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from provisioner.lab.lab import Lab
from provisioner.lab.model import LabHost
from script.bench_parts import boot_scripts, serving_tftp
from script.bench_parts.boot_service import boot_listener, make_site, queue_hosts
from script.bench_parts.figures import Options, Result, Row
from script.bench_parts.serving_chunks import add_chunks


def measure(options: Options) -> Result:
    """Return all figures; the three parts run one after another."""
    folder = Path(tempfile.mkdtemp(prefix="serving-", dir=options.folder))
    folder.chmod(0o755)
    result = Result("reference")
    options.say("TFTP beside dnsmasq")
    _add_tftp(result, options.runs)
    version = boot_scripts.VERSION
    with Lab.up(folder / "lab", [LabHost("bios")]) as lab:
        site = make_site(folder / "site", lab, options.say)
        manifest = site.publish(version)
        queue_hosts(site, manifest.name)
        with boot_listener(site):
            add_chunks(result, site, manifest, replace(options, folder=folder))
            scripts = boot_scripts.measure_site(site, options)
    result.rows += scripts.rows
    result.figures |= scripts.figures
    result.notes += scripts.notes
    return result


def _add_tftp(result: Result, runs: int) -> None:
    figures = serving_tftp.measure(runs)
    rates: Any = figures["tftp_mib_s"]
    spread: Any = figures["tftp_spread_mib_s"]
    for clients in serving_tftp.CLIENTS:
        ours, reference = (
            [
                spread[name][str(clients)][0],
                rates[name][str(clients)],
                spread[name][str(clients)][1],
            ]
            for name in ("ours", "dnsmasq")
        )
        result.rows.append(
            Row(f"TFTP, 1 MiB to {clients} (reference: dnsmasq)", "MiB/s", ours, reference)
        )
    result.figures |= figures
    result.notes.append(f"TFTP failures: {figures['tftp_failures']}")
