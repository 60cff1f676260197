"""What cannot be done is refused in words a person can act on, and nothing is harmed by it.

The hosts here carry a system of one boot sector, so that "untouched" can mean every byte,
and the releases are small, so that a boot takes seconds.
"""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from provisioner.core.model import Json
from provisioner.errors import Conflict, NotFound, ProvisionerError
from provisioner.lab import LabHost
from provisioner.lab.site import PROFILE, Site, host_document
from tests.lab.sites import (
    MIB,
    OLD_SYSTEM,
    TABLE_BYTES,
    TINY_SYSTEM,
    a_site,
    agent_says,
    chunk_path,
    deploy,
    disk_digest,
    disk_path,
    host_of,
    is_actionable,
    publish_tiny,
    put_old_system,
    reached,
    says,
    ticket_offered_to,
    timeline,
    tiny_profile,
)

pytestmark = pytest.mark.lab

DISK_MIB: Final = 64
FAILED_LIMIT: Final = timedelta(minutes=5)
LIMITS: Final[dict[str, object]] = {
    "netbooting_s": 180,
    "booting_s": 15,
    "soft_shutdown_s": 1,
    "bmc_exchange_s": 4,
}
ONE, TWO = "lab-1", "lab-2"


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two BIOS hosts with a service whose limits are short, and the release tiny@1."""
    directory = tmp_path_factory.mktemp("refusals")
    hosts = [LabHost("bios", disks_mib=(DISK_MIB,)), LabHost("bios", disks_mib=(DISK_MIB,))]
    with a_site(directory, hosts, {"limits": LIMITS}) as site:
        tiny_profile(site, bus="virtio", size_min_bytes=DISK_MIB * MIB)
        publish_tiny(site, directory, "1")
        for host in site.lab.hosts:
            site.enrol(host)
        yield site


@pytest.fixture
def site(rack: Site) -> Site:
    """The rack with both hosts off, sound, and with their old systems."""
    for name in (ONE, TWO):
        rack.lab.clear(name)
        rack.lab.power(name, "off")
        put_old_system(disk_path(rack, name))
        with rack.client() as client:
            client.change_host(name, {"profile": PROFILE, "bmc": _bmc(rack, name)})
    return rack


def _bmc(site: Site, name: str, **changes: object) -> Json:
    return {**host_document(site.lab.host(name))["bmc"], **changes}


def failed(site: Site, operation: str) -> Json:
    return reached(site, operation, "failed", limit=FAILED_LIMIT)


def runs_its_old_system_untouched(site: Site, name: str, before: str, start: int) -> None:
    """The host went back to its disk by itself, and every byte there is as it was."""
    start += max(site.lab.console(name)[start:].rfind("vmlinuz"), 0)
    says(site, name, OLD_SYSTEM, start=start)
    site.lab.power(name, "off")
    assert disk_digest(disk_path(site, name)) == before
    host = host_of(site, name)
    assert host["release"] is None
    assert host["operation"] is None
    assert not [line for line in timeline(site, name) if "may write" in line]


def test_requests_that_are_refused_at_once_change_nothing(site: Site) -> None:
    """Release unknown, host protected: no operation, no exchange with a BMC, no audit row."""
    with site.client() as client:
        sessions = _sessions(site, ONE)
        client.set_flags(ONE, is_protected=True)
        operations, audit = len(client.operations()), client.verify_audit()
        with pytest.raises(NotFound) as unknown:
            client.deploy([TWO], "tiny@9")
        with pytest.raises(Conflict, match="protected") as protected:
            client.deploy([TWO, ONE], "tiny@1")
        assert (len(client.operations()), client.verify_audit()) == (operations, audit)
        client.set_flags(ONE, is_protected=False)
    assert "tiny@9" in str(unknown.value.as_dict())
    assert unknown.value.hint
    is_actionable(protected.value, ONE)
    assert _sessions(site, ONE) == sessions
    assert [site.lab.status_of(name).boots for name in (ONE, TWO)] == [0, 0]


def test_field_21_wrong_bmc_password_is_tried_once_and_stays_out_of_sight(site: Site) -> None:
    wrong = "not-the-password"
    with site.client() as client:
        client.change_host(ONE, {"bmc": _bmc(site, ONE, password=wrong)})
    state, before = host_of(site, ONE)["state"], disk_digest(disk_path(site, ONE))
    sessions, boots = _sessions(site, ONE), site.lab.status_of(ONE).boots
    ended = failed(site, deploy(site, [ONE], "tiny@1")[ONE])
    assert ended["error"]["code"] == "bmc_auth_failed"
    is_actionable(ended["error"], ONE)
    # Effects that would still come had nothing else to do within this time.
    time.sleep(3)
    assert _sessions(site, ONE) == sessions + 1
    assert (site.lab.status_of(ONE).power, site.lab.status_of(ONE).boots) == ("off", boots)
    assert host_of(site, ONE)["state"] == state
    assert disk_digest(disk_path(site, ONE)) == before
    logs = [path.read_text() for path in site.directory.glob("serve-*.log")]
    assert not any(wrong in text or _bmc(site, ONE)["password"] in text for text in logs)


def test_no_disk_that_fits_and_two_that_fit(site: Site) -> None:
    tiny_profile(site, "elsewhere", serial="NOT-IN-THIS-RACK")
    with site.client() as client:
        client.change_host(ONE, {"profile": "elsewhere"})
    site.lab.fault(TWO, "second-disk", DISK_MIB)
    errors = _refused_by_the_agent(site, {ONE: "tiny@1", TWO: "tiny@1"})
    assert errors[ONE]["code"] == "no_disk_matches"
    assert "LAB-lab-1-0" in str(errors[ONE]["found"])
    assert errors[TWO]["code"] == "several_disks_match"
    assert "LAB-lab-2-0" in str(errors[TWO]["found"])
    assert "LAB-lab-2-1" in str(errors[TWO]["found"])


def test_a_disk_too_small_and_a_manifest_with_a_wrong_signature(site: Site, tmp_path: Path) -> None:
    release = publish_tiny(site, tmp_path, "forged")
    signature = site.settings.data_dir / "releases" / release.digest / "manifest.sig"
    _flip_a_bit(signature, 20)
    tiny_profile(site, "any-size", serial="LAB-lab-1-0")
    with site.client() as client:
        client.change_host(ONE, {"profile": "any-size"})
    site.lab.fault(ONE, "small-disk", 10)
    small = Path(site.lab.host(ONE).directory) / "disk-small.raw"
    with site.client() as client, pytest.raises(ProvisionerError, match="sign"):
        client.deploy([TWO], "tiny@forged")
    _flip_a_bit(signature, 20)
    errors = _refused_by_the_agent(site, {ONE: "tiny@1"}, boots=())
    assert errors[ONE]["code"] == "disk_too_small"
    assert str(10 * MIB) in str(errors[ONE]["found"])
    assert not small.read_bytes().strip(b"\0"), "nothing was written"


def _refused_by_the_agent(
    site: Site, releases: dict[str, str], boots: tuple[str, ...] = (ONE, TWO)
) -> dict[str, Json]:
    """Deploy to the hosts, see both refuse before the first write, and return the errors.

    The hosts in `boots` must be seen to go back to their old systems.
    """
    before = {name: disk_digest(disk_path(site, name)) for name in (ONE, TWO)}
    starts = {name: len(site.lab.console(name)) for name in (ONE, TWO)}
    operations = {name: deploy(site, [name], wish)[name] for name, wish in releases.items()}
    ended = {name: failed(site, operation) for name, operation in operations.items()}
    for name, operation in ended.items():
        is_actionable(operation["error"], name)
        assert operation["phase_seconds"].keys() == {"queued", "netbooting", "preparing"}
        assert host_of(site, name)["state"] == "dirty", "inspected, and nobody's"
    for name in boots:
        runs_its_old_system_untouched(site, name, before[name], starts[name])
    return {name: operation["error"] for name, operation in ended.items()}


def test_a_flipped_bit_a_used_ticket_a_busy_host_and_no_word_from_the_new_system(
    site: Site, tmp_path: Path
) -> None:
    damaged = publish_tiny(site, tmp_path, "damaged")
    stored = [digest for digest in damaged.chunks if digest]
    _flip_a_bit(chunk_path(site.settings.data_dir, stored[3]), 1000)
    bad = deploy(site, [ONE], "tiny@damaged")[ONE]
    silent = deploy(site, [TWO], "tiny@1")[TWO]
    start = len(site.lab.console(TWO))

    reached(site, silent, "netbooting")
    with site.client() as client, pytest.raises(Conflict) as busy:
        client.deploy([TWO], "tiny@1")
    is_actionable(busy.value, TWO)

    ticket = ticket_offered_to(site, TWO)
    status, problem = agent_says(site, "hello", _hello(site, TWO, "bt_" + "0" * 43))
    assert (status, problem["code"]) == (403, "ticket_refused")
    assert problem["expected"]
    assert problem["found"]
    reached(site, silent, "preparing", "writing", "verifying", "booting")
    homeless = failed(site, silent)
    assert homeless["error"]["code"] == "booting_timed_out"
    is_actionable(homeless["error"], TWO)
    says(site, TWO, TINY_SYSTEM, start=start)
    host = host_of(site, TWO)
    assert (host["state"], host["release"]) == ("dirty", None)

    # Its deployment has ended: earlier, the second who comes with the ticket would end it.
    status, problem = agent_says(site, "hello", _hello(site, TWO, ticket))
    assert (status, problem["code"]) == (403, "ticket_contested")
    assert "used" in problem["detail"]
    is_actionable({**problem, "message": problem["detail"]}, TWO)
    with site.client() as client:
        alarms = [row for row in client.audit(limit=1000) if row["action"] == "ticket_contested"]
    assert [row["subject"] for row in alarms] == [TWO]

    corrupt = failed(site, bad)
    error = is_actionable(corrupt["error"], ONE)
    assert error["code"] == "chunk_corrupt"
    assert error["expected"] == stored[3]
    host = host_of(site, ONE)
    assert (host["state"], host["release"]) == ("dirty", None)
    with disk_path(site, ONE).open("rb") as disk:
        assert disk.read(TABLE_BYTES) == bytes(TABLE_BYTES), "a half-written disk cannot boot"
    with site.client() as client:
        assert client.verify_audit() > 0


def _hello(site: Site, name: str, ticket: str) -> Json:
    inventory = {
        "cpu": {"model": "x", "count": 1},
        "memory_bytes": 1,
        "firmware": "bios",
        "uuid": site.lab.host(name).uuid,
        "serial": site.lab.host(name).serial,
        "vendor": None,
        "model": None,
        "disks": [],
        "nics": [{"name": "eth0", "mac": site.lab.host(name).mac, "link": True}],
        "bmc_address": None,
    }
    return {"ticket": ticket, "inventory": inventory, "agent_version": "test"}


def _flip_a_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def _sessions(site: Site, name: str) -> int:
    """Return how often somebody tried to log in to the host's BMC, as the BMC tells."""
    log = Path(site.lab.host(name).directory) / "bmc" / "bmc.log"
    return log.read_text(errors="replace").count("Activate session:") if log.exists() else 0
