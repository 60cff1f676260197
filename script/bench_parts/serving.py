"""Measures what the service hands out: TFTP beside dnsmasq, chunks beside nginx, boot scripts."""

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

from provisioner.lab.lab import Lab
from provisioner.lab.model import BRIDGE_ADDRESS, LabHost
from provisioner.lab.site import Site
from script.bench_parts import boot_scripts, serving_tftp
from script.bench_parts.boot_service import boot_listener, make_site, queue_hosts
from script.bench_parts.figures import Options, Result, Row
from script.bench_parts.servers import nginx
from script.bench_parts.wrk import Load, run_wrk

CLIENTS: Final = (1, 8, 40)
LOAD_SECONDS: Final = 4
NGINX_PORT: Final = 8091
SEED: Final = 7


def measure(options: Options) -> Result:
    """Return all figures; the three parts run one after another."""
    folder = Path(tempfile.mkdtemp(prefix="serving-", dir=options.folder))
    folder.chmod(0o755)
    result = Result("reference")
    options.say("TFTP beside dnsmasq")
    _add_tftp(result, options.runs)
    version = boot_scripts.VERSION
    with Lab.up(folder / "lab", [LabHost("bios")]) as lab:
        site = make_site(folder / "site", lab, version, options.say)
        queue_hosts(site, f"debian-12@{version}")
        with boot_listener(site), nginx(lab, folder, site.settings.data_dir, NGINX_PORT):
            _add_chunks(result, site, options)
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


def _add_chunks(result: Result, site: Site, options: Options) -> None:
    """Ask both servers for the same chunks in the same order with the same client, in turn."""
    data = site.settings.data_dir
    paths = [f"/{path.relative_to(data)}" for path in sorted(data.glob("chunks/??/*"))]
    random.Random(SEED).shuffle(paths)
    urls = {"ours": site.settings.boot.url, "nginx": f"http://{BRIDGE_ADDRESS}:{NGINX_PORT}"}
    loads: dict[tuple[str, int], list[Load]] = {}
    for number in range(options.runs):
        options.say(f"chunks beside nginx, run {number + 1}")
        for clients in CLIENTS:
            for name, url in urls.items():
                load = run_wrk(site.lab, url, paths, connections=clients, seconds=LOAD_SECONDS)
                loads.setdefault((name, clients), []).append(load)
    rates = {key: [_gb_s(load) for load in found] for key, found in loads.items()}
    ratios = {}
    for clients in CLIENTS:
        mine, base = rates["ours", clients], rates["nginx", clients]
        ratios[str(clients)] = round(statistics.median(mine) / statistics.median(base), 3)
        result.rows.append(Row(f"chunks to {clients} (reference: nginx)", "GB/s", mine, base))
    failures = {
        name: sum(
            load.failures for (whose, _), some in loads.items() for load in some if whose == name
        )
        for name in urls
    }
    result.figures |= {
        "chunks_ratio_to_nginx": min(ratios.values()),
        "chunks_ratio_by_clients": ratios,
        "chunks_gb_s": {
            name: {
                str(clients): round(statistics.median(rates[name, clients]), 2)
                for clients in CLIENTS
            }
            for name in urls
        },
        "chunks_failures": failures,
    }
    mean = sum((data / path[1:]).stat().st_size for path in paths) / len(paths)
    result.notes.append(
        f"chunks: {len(paths)} files of {mean / 1024:.0f} KiB on average, wrk with one thread; "
        f"chunks_ratio_to_nginx is the lowest of the three; failures {failures}"
    )


def _gb_s(load: Load) -> float:
    return load.bytes / load.seconds / 1e9
