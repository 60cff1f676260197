"""Publishes one raw image as a site does: a program of its own, so that the memory it takes is
the publisher's alone.

Reads a wish as JSON on standard input, writes what it took as JSON.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from provisioner import wiring
from provisioner.imaging.archive import ReleaseFacts
from provisioner.settings import load
from script.bench_parts.release_agent import peak_mib


def main() -> None:
    wish: dict[str, Any] = json.load(sys.stdin)
    settings = load(Path(wish["config"]))
    facts = ReleaseFacts(
        image=wish["image"],
        version=wish["version"],
        architecture="amd64",
        firmware=("bios",),
        release_id=hashlib.sha256(f"{wish['image']}@{wish['version']}".encode()).hexdigest()[:32],
        packages={},
        recipe_digest="be" * 32,
        builder="script/bench",
        built_at="2026-01-01T00:00:00Z",
        root_partition=1,
    )
    service = wiring.build(settings)
    try:
        publisher = wiring.publisher(settings, service, actor="bench")
        began = time.monotonic()
        manifest = publisher.publish(Path(wish["raw"]), facts)
        seconds = round(time.monotonic() - began, 2)
    finally:
        service.close()
    print(json.dumps({"name": manifest.name, "seconds": seconds, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main()
