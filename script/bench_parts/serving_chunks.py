"""Measures chunks from our boot listener beside nginx: in batches, as hosts fetch them, and one
by one, as from a mirror.

nginx knows no batches: it serves files that hold the very bytes of our answers.
"""

import random
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from provisioner.agent.regions import regions_of
from provisioner.core.batches import pack, spec_of
from provisioner.core.manifest import Manifest
from provisioner.errors import Unavailable
from provisioner.imaging.chunks import chunk_name
from provisioner.lab.model import BRIDGE_ADDRESS
from provisioner.lab.site import Site
from script.bench_parts.figures import Options, Result, Row
from script.bench_parts.servers import nginx
from script.bench_parts.wrk import Load, run_wrk

CLIENTS: Final = (1, 8, 40)
LOAD_SECONDS: Final = 4
NGINX_PORT: Final = 8091
SEED: Final = 7
CURL_LIMIT_S: Final = 30


@dataclass(frozen=True)
class Kind:
    """What is asked for: `ours` and `theirs` are paths to the same bytes, in one order.

    body_bytes is what all of them hold; key is what the figures are called by.
    """

    key: str
    text: str
    ours: Sequence[str]
    theirs: Sequence[str]
    body_bytes: int


def add_chunks(result: Result, site: Site, manifest: Manifest, options: Options) -> None:
    """Add both kinds to the result. The boot listener of the site runs."""
    root = options.folder / "nginx-root"
    kinds = [_batches(root, site, manifest), _singles(root, site)]
    with nginx(site.lab, options.folder, root, NGINX_PORT):
        for kind in kinds:
            _check_equal(site, kind)
            _add_kind(result, site, kind, options)


def _batches(root: Path, site: Site, manifest: Manifest) -> Kind:
    """Return the batches that a host with an empty disk asks for, in a shuffled order."""
    folder = root / "batches"
    folder.mkdir(parents=True)
    ours, theirs, total = [], [], 0
    for indexes in _requests(manifest):
        digests = [manifest.chunks[index] or "" for index in indexes]
        data = site.settings.data_dir
        body = pack((data / chunk_name(digest)).read_bytes() for digest in digests)
        (folder / str(indexes[0])).write_bytes(body)
        ours.append(f"/releases/{manifest.digest}/chunks/{spec_of(indexes)}")
        theirs.append(f"/batches/{indexes[0]}")
        total += len(body)
    return _shuffled("batches", "batches of 4 MiB", ours, theirs, total)


def _requests(manifest: Manifest) -> Iterator[list[int]]:
    for region in regions_of(manifest):
        stored = [index for index in region.indexes if manifest.chunks[index]]
        if stored:
            yield stored


def _singles(root: Path, site: Site) -> Kind:
    data = site.settings.data_dir
    (root / "chunks").symlink_to(data / "chunks")
    files = sorted(data.glob("chunks/??/*"))
    paths = [f"/{path.relative_to(data)}" for path in files]
    total = sum(path.stat().st_size for path in files)
    return _shuffled("chunks", "single chunks", paths, paths, total)


def _shuffled(key: str, text: str, ours: list[str], theirs: list[str], total: int) -> Kind:
    order = list(range(len(ours)))
    random.Random(SEED).shuffle(order)
    return Kind(key, text, [ours[at] for at in order], [theirs[at] for at in order], total)


def _urls(site: Site) -> dict[str, str]:
    return {"ours": site.settings.boot.url, "nginx": f"http://{BRIDGE_ADDRESS}:{NGINX_PORT}"}


def _check_equal(site: Site, kind: Kind) -> None:
    """Raise Unavailable unless both answer a first request with the same bytes."""
    urls = _urls(site)
    found = [
        subprocess.run(
            [*site.lab.nsenter_argv(), "curl", "-sSf", f"{url}{path}"],
            capture_output=True,
            check=True,
            timeout=CURL_LIMIT_S,
        ).stdout
        for url, path in zip(urls.values(), (kind.ours[0], kind.theirs[0]), strict=True)
    ]
    if found[0] != found[1] or not found[0]:
        raise Unavailable(f"{kind.text}: the two servers answer differently", found=kind.ours[0])


def _add_kind(result: Result, site: Site, kind: Kind, options: Options) -> None:
    """Ask both servers for the same bytes in the same order with the same client, in turn."""
    paths = {"ours": kind.ours, "nginx": kind.theirs}
    loads: dict[tuple[str, int], list[Load]] = {}
    for number in range(options.runs):
        options.say(f"{kind.text} beside nginx, run {number + 1}")
        for clients in CLIENTS:
            for name, url in _urls(site).items():
                load = run_wrk(
                    site.lab, url, paths[name], connections=clients, seconds=LOAD_SECONDS
                )
                loads.setdefault((name, clients), []).append(load)
    rates = {key: [_gb_s(load) for load in found] for key, found in loads.items()}
    median = {key: statistics.median(found) for key, found in rates.items()}
    ratios = {
        str(clients): round(median["ours", clients] / median["nginx", clients], 3)
        for clients in CLIENTS
    }
    for clients in CLIENTS:
        what = f"{kind.text} to {clients} (reference: nginx)"
        result.rows.append(Row(what, "GB/s", rates["ours", clients], rates["nginx", clients]))
    failures = {
        name: sum(load.failures for key, some in loads.items() for load in some if key[0] == name)
        for name in paths
    }
    result.figures |= {
        f"{kind.key}_ratio_to_nginx": min(ratios.values()),
        f"{kind.key}_ratio_by_clients": ratios,
        f"{kind.key}_gb_s": {
            name: {str(clients): round(median[name, clients], 2) for clients in CLIENTS}
            for name in paths
        },
        f"{kind.key}_failures": failures,
    }
    mean = kind.body_bytes / len(kind.ours) / 1024
    result.notes.append(
        f"{kind.text}: {len(kind.ours):,} answers of {mean:,.0f} KiB on average, wrk with one "
        f"thread; {kind.key}_ratio_to_nginx is the lowest of the three; failures {failures}"
    )


def _gb_s(load: Load) -> float:
    return load.bytes / load.seconds / 1e9
