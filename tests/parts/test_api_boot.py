"""The boot and agent listeners by real HTTP: scripts, immutable files, the agent's calls."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from provisioner.core.model import LocalBoot, Phase
from provisioner.imaging.archive import Archive
from provisioner.imaging.blobs import FileBlobs
from provisioner.service.agents import AgentSessions
from provisioner.service.boot import BootService
from provisioner.service.sightings import Sightings
from provisioner.settings import Settings
from provisioner.setup import Plan, initialise
from provisioner.store.engine import LOCK_WAIT_MAX
from provisioner.web.agent import BODY_BYTES_MAX
from provisioner.web.agent import create_app as create_agent_app
from provisioner.web.boot import DECISION_LIMIT_S
from provisioner.web.boot import create_app as create_boot_app
from provisioner.web.files import ACCEL_PREFIX
from tests.parts.http_listener import listening
from tests.parts.service_site import ACTOR, Agent, Site, inventory, mac

LOCAL_DISK = """#!ipxe
iseq ${platform} efi && goto efi ||
exit 1
:efi
chain tftp://10.77.0.1/disk.efi ||
exit 1
"""


@dataclass(frozen=True)
class Parts:
    """What the two listeners need of a service."""

    boot: BootService
    agents: AgentSessions
    sightings: Sightings
    settings: Settings


def root_of(archive: Archive) -> Path:
    """Return the folder that an archive of files lies in."""
    assert isinstance(archive.blobs, FileBlobs)
    return archive.blobs.root


@pytest.fixture
def settings(tmp_path: Path, archive_of_two: Archive) -> Settings:
    """Settings whose data folder is the archive's."""
    made = initialise(tmp_path / "installation", Plan(listen_address="10.77.0.1"))
    folder = root_of(archive_of_two)
    return replace(made, service=replace(made.service, data_dir=folder))


@pytest.fixture
def parts(site: Site, settings: Settings) -> Parts:
    return Parts(site.boot, site.agents, site.sightings, settings)


@pytest.fixture
def boot_url(parts: Parts) -> Iterator[str]:
    with listening(create_boot_app(parts)) as url:
        yield url


@pytest.fixture
def agent_url(parts: Parts) -> Iterator[str]:
    with listening(create_agent_app(parts)) as url:
        yield url


GRUB_DISK = """\
if search --no-floppy --set=root --file /EFI/BOOT/BOOTX64.EFI; then
  if chainloader /EFI/BOOT/BOOTX64.EFI; then
    boot
  fi
fi
exit
"""


def grub_config(url: str, **query: str) -> httpx.Response:
    return httpx.get(f"{url}/boot/grub", params=query, timeout=30)


def script(url: str, **query: str) -> httpx.Response:
    return httpx.get(f"{url}/boot/ipxe", params=query, timeout=30)


# --- boot scripts -------------------------------------------------------------------------


def test_an_unknown_host_boots_its_own_disk(boot_url: str) -> None:
    answer = script(boot_url, mac="52-54-00-99-99-99", uuid="x", serial="y", platform="efi")
    assert (answer.status_code, answer.text) == (200, LOCAL_DISK)
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert answer.headers["Cache-Control"] == "no-store"


def test_field_03_each_host_boots_its_disk_in_its_own_way(boot_url: str, site: Site) -> None:
    wanted = {
        LocalBoot.EXIT: (200, "exit 1"),
        LocalBoot.SANBOOT: (200, "sanboot --no-describe --drive 0x80"),
        LocalBoot.NOT_FOUND: (404, ""),
    }
    for number, (way, (status, text)) in enumerate(wanted.items(), 1):
        site.add_host(number, local_boot=way)
        answer = script(boot_url, mac=mac(number))
        assert answer.status_code == status
        assert text in answer.text


def test_a_host_with_a_ticket_gets_the_ramdisk_until_it_is_used(boot_url: str, site: Site) -> None:
    site.add_host()
    site.deploy("r1n1")
    first, again = script(boot_url, mac=mac(1)), script(boot_url, mac=mac(1))
    assert "provisioner.ticket=bt_" in first.text
    assert first.text == again.text
    Agent(site).until(Phase.PREPARING)
    assert script(boot_url, mac=mac(1)).text == LOCAL_DISK


def test_grub_is_answered_as_ipxe_is(boot_url: str, site: Site) -> None:
    """The ramdisk for the holder of the ticket, until it is used; else the host's own disk."""
    site.add_host()
    assert grub_config(boot_url, mac=mac(1)).text == GRUB_DISK
    site.deploy("r1n1")
    first, again = grub_config(boot_url, mac=mac(1)), grub_config(boot_url, mac=mac(1), uuid="")
    assert "'provisioner.ticket=bt_" in first.text
    assert first.text == again.text
    assert first.headers["Cache-Control"] == "no-store"
    assert grub_config(boot_url, mac=mac(2)).text == GRUB_DISK
    ticket = script(boot_url, mac=mac(1)).text.partition("provisioner.ticket=")[2].split()[0]
    assert f"'provisioner.ticket={ticket}'" in first.text
    Agent(site).until(Phase.PREPARING)
    assert grub_config(boot_url, mac=mac(1)).text == GRUB_DISK


@pytest.mark.parametrize(
    ("address", "shown"),
    [("10.77.0.100", "10.77.0.100"), ("", "127.0.0.1"), ("10.77.0.100\nx", "127.0.0.1")],
)
def test_the_timeline_says_that_grub_asked_and_for_whom(
    boot_url: str, site: Site, address: str, shown: str
) -> None:
    site.add_host()
    grub_config(boot_url, mac=mac(1), address=address)
    (event,) = (event for _, event in site.hosts.timeline("r1n1") if event.source == "http")
    assert (event.text, event.detail) == (
        "grub.cfg: auto, no boot ticket",
        {"address": shown, "answer": "disk", "loader": "GRUB"},
    )


@pytest.mark.parametrize("way", LocalBoot)
def test_grub_always_gets_a_configuration_that_ends(
    boot_url: str, site: Site, way: LocalBoot
) -> None:
    """A 404 would be no file to TFTP, and the host would not do as it was set to."""
    site.add_host(1, local_boot=way)
    answer = grub_config(boot_url, mac=mac(1))
    chains = way in (LocalBoot.AUTO, LocalBoot.SANBOOT)
    assert (answer.status_code, answer.text) == (200, GRUB_DISK if chains else "exit\n")


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"mac": "nonsense"},
        {"mac": "52:54:00:77:00:01\n#!ipxe"},
        {"mac": "x" * 1500},
        {"mac": mac(1), "serial": "${x}\n&& shell", "uuid": "\x00"},
    ],
)
def test_nonsense_boots_its_own_disk(boot_url: str, site: Site, query: dict[str, str]) -> None:
    site.add_host()
    answer = script(boot_url, **query)
    assert (answer.status_code, answer.text) == (200, LOCAL_DISK)
    answer = grub_config(boot_url, **query)
    assert (answer.status_code, answer.text) == (200, GRUB_DISK)


def test_without_its_database_every_host_boots_its_own_disk(boot_url: str, site: Site) -> None:
    site.add_host()
    site.deploy("r1n1")
    database = Path(str(site.store._engine.url.database))
    site.store._engine.dispose()
    for file in database.parent.glob("state.db*"):
        file.unlink()
    database.write_bytes(b"not a database any more" * 1000)
    answer = script(boot_url, mac=mac(1))
    assert (answer.status_code, answer.text) == (200, LOCAL_DISK)
    answer = grub_config(boot_url, mac=mac(1))
    assert (answer.status_code, answer.text) == (200, GRUB_DISK)


def test_field_18_a_locked_database_does_not_keep_a_host_waiting(boot_url: str, site: Site) -> None:
    """A boot ROM gives up after ten seconds; the database would wait for longer."""
    site.add_host()
    site.deploy("r1n1")
    began_at = time.monotonic()
    with site.store.begin():
        answer = script(boot_url, mac=mac(1))
    assert (answer.status_code, answer.text) == (200, LOCAL_DISK)
    assert time.monotonic() - began_at < LOCK_WAIT_MAX.total_seconds()
    assert DECISION_LIMIT_S < 10


# --- files --------------------------------------------------------------------------------


def test_a_release_is_served_as_it_lies_in_the_archive(
    boot_url: str, archive_of_two: Archive
) -> None:
    manifest = archive_of_two.releases()[0]
    folder = root_of(archive_of_two) / "releases" / manifest.digest
    for name in ("manifest.json", "manifest.json.zst", "manifest.sig"):
        answer = httpx.get(f"{boot_url}/releases/{manifest.digest}/{name}", timeout=60)
        assert answer.content == (folder / name).read_bytes()
        # A signature may be added later on.
        is_kept = "immutable" in answer.headers["Cache-Control"]
        assert is_kept == (name != "manifest.sig")
    chunk = next(digest for digest in manifest.chunks if digest)
    answer = httpx.get(f"{boot_url}/chunks/{chunk[:2]}/{chunk}", timeout=60)
    assert answer.is_success
    assert answer.headers["ETag"] == f'"{chunk}"'
    part = httpx.get(
        f"{boot_url}/chunks/{chunk[:2]}/{chunk}", headers={"Range": "bytes=2-5"}, timeout=60
    )
    assert (part.status_code, part.content) == (206, answer.content[2:6])
    kept = {"If-None-Match": answer.headers["ETag"]}
    assert (
        httpx.get(f"{boot_url}/chunks/{chunk[:2]}/{chunk}", headers=kept, timeout=60).status_code
        == 304
    )


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/keys/master.key",
        "/state.db",
        "/releases/..%2f..%2fkeys/manifest.json",
        "/releases/" + "a" * 63 + "/manifest.json",
        "/releases/" + "A" * 64 + "/manifest.json",
        "/releases/" + "a" * 64 + "/manifest.json",
        "/releases/" + "a" * 64 + "/other",
        "/chunks/ab/" + "a" * 64,
        "/chunks/aa/" + "a" * 64 + "/..",
        "/ramdisks/" + "a" * 64 + "/ramdisk.json",
        "/cloud-init/token/user-data",
    ],
)
def test_nothing_else_is_served(boot_url: str, path: str) -> None:
    assert httpx.get(boot_url + path, timeout=60).status_code == 404


def test_an_nginx_in_front_may_send_the_files(parts: Parts, archive_of_two: Archive) -> None:
    boot = replace(parts.settings.boot, accel=True)
    behind = replace(parts, settings=replace(parts.settings, boot=boot))
    digest = archive_of_two.releases()[0].digest
    with listening(create_boot_app(behind)) as url:
        answer = httpx.get(f"{url}/releases/{digest}/manifest.json", timeout=60)
        assert answer.headers["X-Accel-Redirect"] == (
            f"{ACCEL_PREFIX}/releases/{digest}/manifest.json"
        )
        assert httpx.get(f"{url}/releases/{'a' * 64}/manifest.json", timeout=60).status_code == 404


# --- agents -------------------------------------------------------------------------------


def test_an_agent_goes_the_whole_way_by_http(agent_url: str, site: Site) -> None:
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform()
    ticket = Agent(site).boots().ticket
    body = {"ticket": ticket, "inventory": inventory(), "agent_version": "1"}
    told = httpx.post(f"{agent_url}/agent/v1/hello", json=body, timeout=60).json()
    assert told["host"] == "r1n1"
    headers = {"Authorization": f"Bearer {told['token']}"}

    def say(call: str, **more: object) -> httpx.Response:
        said = {"generation": told["generation"], **more}
        return httpx.post(f"{agent_url}/agent/v1/{call}", json=said, headers=headers, timeout=60)

    disk = {"name": "vda", "serial": "LAB-r1n1-0", "wwn": None, "size_bytes": 8 * 1024**3}
    assert say("authorise", release=told["release"], disk=disk).json()["permitted"] is True
    assert say("progress", phase="writing", done_bytes=1, total_bytes=2).json()["go_on"] is True
    assert set(say("seed").json()) >= {"meta-data", "user-data", "vendor-data"}
    assert say("seed").status_code == 410
    done = {"written_bytes": 1, "fetched_bytes": 1, "seconds": {}}
    assert say("done", release=told["release"], **done).json() == {"restart": "reboot"}
    assert say("done", release=told["release"], **done).status_code == 200
    assert site.phase(operation) is Phase.BOOTING
    evidence = site.at(operation).evidence
    assert evidence["agent_address"] == "127.0.0.1", "the socket's own address"


def test_public_the_peer_is_the_socket_whatever_a_header_says(agent_url: str, site: Site) -> None:
    """Forwarding headers were trusted in public, and are anyone's to write."""
    site.add_host()
    operation = site.deploy("r1n1")
    site.perform()
    body = {"ticket": Agent(site).boots().ticket, "inventory": inventory()}
    lies = {"X-Forwarded-For": "10.9.9.9", "Forwarded": "for=10.9.9.9", "X-Real-IP": "10.9.9.9"}
    assert httpx.post(f"{agent_url}/agent/v1/hello", json=body, headers=lies, timeout=60).is_success
    assert site.at(operation).evidence["agent_address"] == "127.0.0.1"


def test_a_used_ticket_is_a_problem_that_names_the_host(agent_url: str, site: Site) -> None:
    site.add_host()
    site.deploy("r1n1")
    site.perform()
    ticket = Agent(site).boots().ticket
    body = {"ticket": ticket, "inventory": inventory()}
    assert httpx.post(f"{agent_url}/agent/v1/hello", json=body, timeout=60).is_success
    again = httpx.post(f"{agent_url}/agent/v1/hello", json=body, timeout=60)
    assert again.status_code == 403
    assert again.headers["Content-Type"] == "application/problem+json"
    problem = again.json()
    assert (problem["code"], problem["host"]) == ("ticket_contested", "r1n1")
    assert ticket not in again.text
    third = httpx.post(f"{agent_url}/agent/v1/hello", json=body, timeout=60)
    assert (third.status_code, third.json()["code"]) == (403, "ticket_refused")


def test_a_comparison_ends_by_http(agent_url: str, site: Site) -> None:
    site.add_host()
    (operation,) = site.operations.request_verification(["r1n1"], "tiny@1", actor=ACTOR)
    site.worker.start_queued()
    site.perform()
    body = {"ticket": Agent(site).boots().ticket, "inventory": inventory()}
    told = httpx.post(f"{agent_url}/agent/v1/hello", json=body, timeout=60).json()
    assert told["mode"] == "verify"
    counts = {"compared_chunks": 9, "differing_chunks": 2, "differing_bytes": 131072}
    found = {"generation": told["generation"], **counts, "seconds": {"compare": 1.5}}
    headers = {"Authorization": f"Bearer {told['token']}"}
    for _ in ("once", "its answer was lost"):
        answer = httpx.post(
            f"{agent_url}/agent/v1/compared", json=found, headers=headers, timeout=60
        )
        assert (answer.status_code, answer.json()) == (200, {"restart": "reboot"})
    assert site.phase(operation) is Phase.SUCCEEDED
    assert site.at(operation).evidence["differing_chunks"] == 2


@pytest.mark.parametrize("call", ["authorise", "progress", "seed", "failed", "done", "compared"])
def test_without_its_token_an_agent_is_told_nothing(agent_url: str, call: str) -> None:
    for headers, status in (({}, 401), ({"Authorization": "Bearer at_guessed"}, 403)):
        body = {
            "generation": 1,
            "release": "a",
            "written_bytes": 1,
            "fetched_bytes": 1,
            "compared_chunks": 1,
            "differing_chunks": 0,
            "differing_bytes": 0,
            "seconds": {},
            "disk": {"name": "vda", "serial": "s", "wwn": None, "size_bytes": 1},
        }
        answer = httpx.post(f"{agent_url}/agent/v1/{call}", json=body, headers=headers, timeout=60)
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b"{}", 400),
        (b'{"ticket": "' + b"x" * BODY_BYTES_MAX + b'"}', 413),
    ],
)
def test_a_malformed_body_is_refused(agent_url: str, content: bytes, status: int) -> None:
    answer = httpx.post(f"{agent_url}/agent/v1/hello", content=content, timeout=60)
    assert answer.status_code == status


def test_a_digest_is_what_its_name_says(archive_of_two: Archive) -> None:
    """What is served under a digest for ever must be that digest's content."""
    for manifest in archive_of_two.releases():
        folder = root_of(archive_of_two) / "releases" / manifest.digest
        text = (folder / "manifest.json").read_bytes()
        assert hashlib.sha256(text).hexdigest() == manifest.digest
