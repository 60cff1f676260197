"""The seed: the cloud-init documents of one deployment, rendered from its pinned profile.

Pure over its inputs. The user's text is data: it is parsed, filled in and written anew,
never handed to a template engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import yaml

from provisioner.core.model import (
    Host,
    HostId,
    Json,
    Operation,
    Profile,
    new_host,
)
from provisioner.core.profile import filled
from provisioner.errors import RequestError

# Where an operation pins the labels that its host had when it was requested.
LABELS: Final = "labels"


def labels_of(operation: Operation, host: Host) -> Mapping[str, str]:
    """Return the labels that an operation was requested with, which its seed is made of.

    One that an earlier version made pins none, and takes what the host has now.
    """
    pinned: Mapping[str, str] = operation.pins.get(LABELS, host.labels)
    return pinned


def render_seed(
    operation: Operation, host: Host, profile: Profile, *, vendor_data: str
) -> dict[str, str]:
    """Return the four NoCloud documents by their file name.

    The instance id is new for each deployment, so cloud-init runs everything anew. Labels are
    those of the request: one that is changed while the disk is written changes nothing.
    Raises RequestError for a `${name}` that stands for nothing.
    """
    document = profile.document
    host = replace(host, labels=labels_of(operation, host))
    lookup = _lookup(host, profile.name, document)
    network = document.get("network") or _default_network(host)
    return {
        "meta-data": _yaml(
            {"instance-id": f"{operation.id}-{operation.generation}", "local-hostname": host.name}
        ),
        "user-data": _user_data(document, lookup),
        "vendor-data": vendor_data,
        "network-config": _yaml(filled(network, lookup)),
    }


def example_user_data(profile: Profile) -> str:
    """Return the user-data that a host of this profile gets, with an example's values.

    Raises RequestError for a `${name}` that could never be filled in.
    """
    document = profile.document
    return _user_data(document, _lookup(_example_host(profile.name), profile.name, document))


def check_renders(profile: Profile) -> None:
    """Raise RequestError now for a `${name}` that could never be filled in."""
    check_renders_for(_example_host(profile.name), profile)


def check_renders_for(host: Host, profile: Profile) -> None:
    """Raise RequestError now for a `${name}` that this host has no value for.

    Found out later, when the seed is handed out, the old system would be gone already.
    """
    document = profile.document
    lookup = _lookup(host, profile.name, document)
    filled(document.get("cloud_config", {}), lookup)
    filled(document.get("network", {}), lookup)


def _user_data(document: Json, lookup: Callable[[str], str]) -> str:
    return "#cloud-config\n" + _yaml(filled(document.get("cloud_config", {}), lookup))


def _default_network(host: Host) -> Json:
    # Matched by MAC: the kernel's names differ between the ramdisk and the image.
    nics = {
        f"nic{number}": {"match": {"macaddress": mac}, "dhcp4": True, "optional": number > 0}
        for number, mac in enumerate(host.macs)
    }
    return {"version": 2, "ethernets": nics}


def _lookup(host: Host, profile: str, document: Json) -> Callable[[str], str]:
    values: dict[str, Any] = {
        "host.name": host.name,
        "host.mac": host.macs[0],
        "host.serial": host.serial or "",
        "host.uuid": host.uuid or "",
    }
    values |= {f"label.{key}": value for key, value in host.labels.items()}
    values |= {f"vars.{key}": value for key, value in document.get("variables", {}).items()}

    def look_up(name: str) -> str:
        if name in values:
            return str(values[name])
        if name.startswith("label.") and host.name.startswith(_EXAMPLE):
            return "example"
        raise RequestError(
            f"profile {profile} uses ${{{name}}}, which stands for nothing",
            host=None if host.name.startswith(_EXAMPLE) else host.name,
            expected=sorted(values),
            found=name,
            hint="write $${…} for a literal ${…}",
        )

    return look_up


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=4096)


_EXAMPLE = "example-of-"


def _example_host(profile: str) -> Host:
    return new_host(
        HostId("host_example"),
        f"{_EXAMPLE}{profile}",
        ("02:00:00:00:00:01",),
        datetime(2000, 1, 1, tzinfo=UTC),
        uuid="00000000-0000-4000-8000-000000000001",
        serial="EXAMPLE",
        profile=profile,
    )
