"""The agent's whole deployment, in this process, against real listeners and a file as disk."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from provisioner.agent.client import ServiceClient
from provisioner.agent.http import Origin
from provisioner.agent.problems import (
    DiskTooSmall,
    HostUnfit,
    ImageUnfit,
    ManifestDigest,
    ManifestSignature,
    PermissionRefused,
    SeedGone,
    SeedUnfit,
    ServiceRefused,
    ServiceUnreachable,
)
from provisioner.agent.session import say_hello
from provisioner.core.disks import NoDiskMatches
from provisioner.errors import ProvisionerError
from tests.parts.agent_rig import DISK_MIB, OLD, Rig, rig_with
from tests.parts.agent_service import (
    CHUNK,
    MIB,
    SEED,
    Service,
    chunk_path,
    deployment,
    is_batch,
    make_image,
    make_release,
    running,
    signed,
)

IMAGE_MIB = 24


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_image(tmp_path_factory.mktemp("image") / "image", size_mib=IMAGE_MIB)


@pytest.fixture
def rig(tmp_path: Path, image: bytes) -> Iterator[Rig]:
    with rig_with(tmp_path, make_release(image)) as rig:
        yield rig


def test_a_dirty_disk_becomes_the_release_and_its_seed(rig: Rig) -> None:
    """Every chunk but the first is the release's; zeros replace the old bytes, too."""
    rig.run()
    found = rig.disk.read_bytes()
    assert found[CHUNK : IMAGE_MIB * MIB] == rig.release.raw[CHUNK:]
    assert found[:440] == rig.release.raw[:440], "the boot code"
    assert len(found) == DISK_MIB * MIB
    assert len(rig.service.told("seed")) == 1
    phases = [body["phase"] for body in rig.service.told("progress")]
    assert {"writing", "verifying"} <= set(phases), "each phase is told when it begins"
    [asked] = rig.service.told("authorise")[:1]
    assert asked == {
        "generation": 3,
        "release": rig.release.manifest.digest,
        "disk": {"name": "vda", "serial": "LAB-1-0", "wwn": None, "size_bytes": DISK_MIB * MIB},
    }
    assert set(rig.progress.seconds) == {"manifest", "prepare", "write", "read_back", "finish"}
    files = rig.release.files()
    folder = rig.release.folder
    manifest = len(files[f"{folder}/manifest.json.zst"]) + len(files[f"{folder}/manifest.sig"])
    stored = [digest for _, digest in rig.release.manifest.stored_chunks()]
    chunks = sum(len(files[chunk_path(digest)]) + 4 for digest in stored)
    assert rig.progress.fetched_bytes == manifest + chunks
    assert len(rig.service.fetched) < 20, "requests are few"


def test_the_same_release_again_fetches_only_its_first_chunk(rig: Rig) -> None:
    """What is on the disk already is neither fetched nor written."""
    rig.run()
    rig.forget()
    rig.run()
    assert rig.service.asked_for() == [0]
    assert rig.progress.written_bytes < 5 * MIB, "the seed and the tables"


def test_the_next_release_fetches_only_what_differs(rig: Rig) -> None:
    """A release that shares chunks with what is on the disk costs its difference."""
    rig.run()
    raw = bytearray(rig.release.raw)
    raw[7 * MIB : 7 * MIB + 5] = b"fixed"
    raw[13 * MIB : 13 * MIB + CHUNK] = bytes(CHUNK)
    rig.serve(make_release(bytes(raw), rig.release.key))
    rig.forget()
    rig.run()
    assert rig.service.asked_for() == [0, 7 * MIB // CHUNK]
    assert rig.disk.read_bytes()[CHUNK : IMAGE_MIB * MIB] == bytes(raw[CHUNK:])


def test_full_fetches_and_writes_everything(rig: Rig) -> None:
    """Whatever is on the disk: nothing is compared, and nothing assumed."""
    rig.run()
    rig.forget()
    rig.service.hello["mode"] = "full"
    rig.run()
    stored = [index for index, _ in rig.release.manifest.stored_chunks()]
    assert sorted(rig.service.asked_for()) == stored
    assert rig.progress.written_bytes > rig.release.manifest.used_bytes - CHUNK


@pytest.mark.parametrize("chunk_bytes", [64 * 1024, 256 * 1024, 4 * MIB, 16 * MIB])
def test_every_chunk_size_is_moved_and_compared(rig: Rig, chunk_bytes: int) -> None:
    rig.serve(make_release(rig.release.raw, rig.release.key, chunk_bytes=chunk_bytes))
    rig.run()
    assert rig.disk.read_bytes()[chunk_bytes : IMAGE_MIB * MIB] == rig.release.raw[chunk_bytes:]
    rig.forget()
    rig.run()
    assert rig.service.asked_for() == [0]


def sig_path(rig: Rig) -> str:
    return f"{rig.release.folder}/manifest.sig"


def sign_with_another_key(rig: Rig) -> None:
    data = rig.release.manifest.to_bytes()
    rig.service.files[sig_path(rig)] = signed(data, Ed25519PrivateKey.generate())


def serve_another_release(rig: Rig) -> None:
    """A validly signed manifest of another version, under the name of the one asked for."""
    other = make_release(rig.release.raw, rig.release.key, version="0.9")
    for name in ("manifest.json", "manifest.json.zst", "manifest.sig"):
        path = f"{rig.release.folder}/{name}"
        rig.service.files[path] = other.files()[f"{other.folder}/{name}"]


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (sign_with_another_key, ManifestSignature),
        (lambda rig: rig.service.files.update({sig_path(rig): b""}), ManifestSignature),
        (serve_another_release, ManifestDigest),
        (lambda rig: rig.serve(make_release(rig.release.raw, architecture="arm64")), HostUnfit),
        (lambda rig: rig.serve(make_release(rig.release.raw, firmware=("uefi",))), HostUnfit),
        (lambda rig: rig.serve(make_release(bytes(1000) + rig.release.raw[1000:])), ImageUnfit),
        (lambda rig: rig.serve(make_release(rig.release.raw + bytes(60 * MIB))), DiskTooSmall),
        (lambda rig: rig.service.hello.update(disk_rule={"serial": "other"}), NoDiskMatches),
    ],
    ids=[
        "signed by another key",
        "no signature",
        "another release",
        "another architecture",
        "another firmware",
        "no GPT",
        "disk too small",
        "no such disk",
    ],
)
def test_what_is_wrong_is_found_before_anything_is_asked_or_written(
    rig: Rig, break_it: Callable[[Rig], None], error: type[ProvisionerError]
) -> None:
    """The host stays as it is, byte for byte."""
    break_it(rig)
    with pytest.raises(error) as caught:
        rig.run()
    assert type(caught.value) is error
    rig.assert_untouched()


def test_a_disk_is_called_what_is_printed_on_it(rig: Rig) -> None:
    """Its name in /dev says nothing to whoever stands before the host."""
    rig.serve(make_release(rig.release.raw + bytes(60 * MIB)))
    with pytest.raises(DiskTooSmall, match=r"^disk vda \(LAB-1-0\) is too small"):
        rig.run()


def test_without_permission_nothing_is_written(rig: Rig) -> None:
    """The service says no; the disk keeps its old bytes."""
    rig.service.permits = False
    with pytest.raises(PermissionRefused):
        rig.run()
    assert rig.disk.read_bytes().count(OLD) == DISK_MIB * MIB


def test_a_refused_heartbeat_stops_the_writing(rig: Rig) -> None:
    """Once refused, not one more chunk is written, and no seed is asked for."""
    refused = threading.Event()

    def refuse(name: str, _: dict[str, Any]) -> int | None:
        if name == "progress":
            refused.set()
            return 409
        return None

    def hold_until_refused(path: str) -> None:
        if is_batch(path) and rig.service.told("authorise"):
            refused.wait(60)

    rig.service.on_call = refuse
    rig.service.on_file = hold_until_refused
    with pytest.raises(PermissionRefused):
        rig.run()
    assert refused.is_set()
    assert not rig.service.told("seed")
    assert rig.disk.read_bytes()[:CHUNK] == bytes(CHUNK)


def test_the_permission_is_renewed_while_it_is_needed(rig: Rig) -> None:
    """A permission shorter than the writing is asked for again, not overrun."""
    rig.service.expires_in_s = 1.2
    renewed = threading.Event()

    def watch(name: str, _: dict[str, Any]) -> int | None:
        if name == "authorise" and len(rig.service.told("authorise")) > 1:
            renewed.set()
        return None

    rig.service.on_call = watch
    rig.service.on_file = lambda path: _hold(rig, path, renewed)
    rig.run()
    assert renewed.is_set()


def _hold(rig: Rig, path: str, until: threading.Event) -> None:
    if is_batch(path) and rig.service.told("authorise"):
        until.wait(60)


@pytest.mark.parametrize("kind", ["deployment", "verification"])
def test_the_host_is_heard_of_while_its_manifest_does_not_come(rig: Rig, kind: str) -> None:
    """The service takes a host that says nothing for a few minutes for dead."""
    rig.service.hello["kind"] = kind
    heard = threading.Event()

    def hear(name: str, _: dict[str, Any]) -> None:
        if name == "progress":
            heard.set()

    def hold(path: str) -> None:
        if path == sig_path(rig):
            assert heard.wait(60)

    rig.service.on_call = hear
    rig.service.on_file = hold
    run = rig.run if kind == "deployment" else rig.compare
    run()
    assert heard.is_set()
    assert rig.service.told("progress")[0]["phase"] == "preparing"


@pytest.mark.parametrize("kind", ["deployment", "verification"])
def test_who_is_told_to_stop_waits_for_no_manifest(rig: Rig, kind: str) -> None:
    """The refusal is what it ends with, not the manifest that did not come."""
    rig.service.hello["kind"] = kind
    rig.service.on_call = lambda name, _: 409 if name == "progress" else None

    def away(path: str) -> None:
        raise ConnectionError(path)

    rig.service.on_file = away
    run = rig.run if kind == "deployment" else rig.compare
    with pytest.raises(PermissionRefused):
        run()
    rig.assert_untouched()


def test_a_service_that_is_busy_is_asked_again(rig: Rig) -> None:
    """Every call is answered 503 once, as by a service that restarts."""
    seen: set[str] = set()

    def busy_once(name: str, _: dict[str, Any]) -> int | None:
        first = name not in seen
        seen.add(name)
        return 503 if first else None

    rig.service.on_call = busy_once
    # The test's service hands the seed out at the first call, which it did not answer.
    rig.service.on_call = lambda name, body: None if name == "seed" else busy_once(name, body)
    rig.run()
    assert {"hello", "authorise"} <= seen


def test_a_seed_that_lacks_a_document_leaves_no_bootable_disk(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partition table goes last, so what fails before it does not boot."""
    monkeypatch.delitem(SEED, "user-data")
    with pytest.raises(SeedUnfit):
        rig.run()
    assert rig.disk.read_bytes()[:CHUNK] == bytes(CHUNK)


def first_only(lost: str) -> Callable[[str], bool]:
    """Lose the first answer to that call."""
    seen: list[str] = []

    def loses(name: str) -> bool:
        seen.append(name)
        return name == lost and seen.count(name) == 1

    return loses


def test_a_lost_answer_to_hello_does_not_cost_the_deployment(rig: Rig) -> None:
    """The ticket is used up; the agent proves that it was the one who used it."""
    rig.service.loses = first_only("hello")
    rig.run()
    lost, heard = rig.service.told("hello")
    assert lost["session"] == heard["session"]
    assert len(bytes.fromhex(lost["session"])) == 32
    assert (lost["attempt"], heard["attempt"]) == (1, 2)


def test_each_start_of_the_ramdisk_is_a_session_of_its_own(rig: Rig) -> None:
    rig.run()
    [first] = rig.service.told("hello")
    rig.service.calls.clear()
    rig.run()
    [second] = rig.service.told("hello")
    assert first["session"] != second["session"]


def test_a_lost_seed_leaves_no_bootable_disk_and_says_what_to_do(rig: Rig) -> None:
    """It leaves the service once. Both tables are missing, and the next try fetches nothing."""
    rig.service.loses = first_only("seed")
    with pytest.raises(SeedGone) as caught:
        rig.run()
    assert (caught.value.host, caught.value.code) == ("lab-1", "seed_gone")
    assert "reimage" in str(caught.value.hint)
    found = rig.disk.read_bytes()
    assert found[: 34 * 512] == bytes(34 * 512)
    assert found[-MIB:] == bytes(MIB)
    rig.forget()
    rig.run()
    assert rig.service.asked_for() == [0]


def test_a_wrong_ticket_is_refused_at_once(rig: Rig) -> None:
    """A refusal is final: it is not tried again."""
    rig.service.hello = deployment(rig.release)
    (rig.folder / "ca.pem").write_bytes(rig.service.ca_pem)
    client = ServiceClient(Origin.parse(rig.service.agent_url), str(rig.folder / "ca.pem"))
    with pytest.raises(ServiceRefused):
        say_hello(client, "another", {}, patience_s=60)
    assert len(rig.service.told("hello")) == 1


def test_another_certificate_is_not_spoken_to(rig: Rig) -> None:
    """The pinned certificate is the only one; the ticket is not even sent."""
    with running(Service(files={}, hello={})) as other:
        (rig.folder / "ca.pem").write_bytes(other.ca_pem)
    client = ServiceClient(Origin.parse(rig.service.agent_url), str(rig.folder / "ca.pem"))
    with pytest.raises(ProvisionerError) as caught:
        say_hello(client, rig.service.ticket, {}, patience_s=0.1)
    assert caught.value.code == "service_unreachable"
    assert not rig.service.calls


@pytest.mark.parametrize("call", ["authorise", "progress", "seed", "failed", "done"])
def test_a_false_certificate_gets_no_token_and_no_seed_is_asked_of_it(rig: Rig, call: str) -> None:
    """The listener's address was taken over after the hello: nothing is said to whoever has
    another key, and nothing that it says is taken for a permission."""
    with running(Service(files={}, hello={})) as impostor:
        (rig.folder / "ca.pem").write_bytes(rig.service.ca_pem)
        client = ServiceClient(Origin.parse(impostor.agent_url), str(rig.folder / "ca.pem"))
        client.use_token("at_canary")
        with pytest.raises(ServiceUnreachable) as caught:
            client.post(f"/agent/v1/{call}", {"generation": 1}, patience_s=0.1)
        assert "certificate" in str(caught.value.found)
        assert not impostor.calls
