"""The end of a publication: the database knows the release, and then something goes wrong."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from provisioner import wiring
from provisioner.cli.termination import ended_by_sigterm
from provisioner.core.manifest import Manifest
from provisioner.errors import Unavailable
from provisioner.imaging.bundle import export_release, import_release
from provisioner.imaging.garbage import collect
from provisioner.imaging.publish import Publisher, Register
from provisioner.imaging.signing import load_signing_key
from provisioner.imaging.verify import verify_release
from provisioner.keys import RELEASE_KEY
from provisioner.settings import load
from provisioner.setup import Plan, initialise
from provisioner.wiring import Service
from tests.parts.test_imaging_archive import CHUNK, FACTS, an_archive, files_of, make_disk


def lose_the_answer() -> None:
    raise Unavailable("the database cannot serve now")


BREAKS = {
    "Ctrl-C": lambda: signal.raise_signal(signal.SIGINT),
    "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
    "lost answer": lose_the_answer,
}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    initialise(tmp_path / "site", Plan())
    settings = load(tmp_path / "site" / "provisioner.toml")
    wiring.prepare(settings)
    service = wiring.build(settings)
    try:
        yield service
    finally:
        service.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk.raw", os.urandom(3 * CHUNK))


def published(service: Service, disk: Path, register: Register) -> Manifest:
    signer = load_signing_key(service.settings.keys.folder / RELEASE_KEY)
    return Publisher(service.archive, [signer], register).publish(disk, FACTS)


def and_then(register: Register, breaks: Callable[[], None]) -> Register:
    def both(manifest: Manifest, stored_bytes: int) -> None:
        register(manifest, stored_bytes)
        breaks()

    return both


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS)
def test_what_was_registered_keeps_its_bytes_whatever_comes_next(
    service: Service, disk: Path, breaks: Callable[[], None]
) -> None:
    register = wiring.registrar(service, actor="test")
    with (
        ended_by_sigterm(),
        pytest.raises((KeyboardInterrupt, SystemExit, Unavailable)),
    ):
        published(service, disk, and_then(register, breaks))
    (digest,) = service.releases.kept()
    assert verify_release(service.archive, digest) == []
    assert collect(service.archive, service.releases.kept).freed_bytes == 0
    assert published(service, disk, register).digest == digest


@pytest.mark.parametrize("breaks", BREAKS.values(), ids=BREAKS)
def test_so_does_what_came_in_a_bundle(
    service: Service, disk: Path, tmp_path: Path, breaks: Callable[[], None]
) -> None:
    manifest = published(service, disk, wiring.registrar(service, actor="test"))
    export_release(service.archive, manifest.digest, tmp_path / "bundle")
    signer = load_signing_key(service.settings.keys.folder / RELEASE_KEY)
    elsewhere = an_archive(tmp_path / "elsewhere", signer)
    known: list[str] = []

    def register(manifest: Manifest, _: int) -> None:
        known.append(manifest.digest)

    with (
        ended_by_sigterm(),
        pytest.raises((KeyboardInterrupt, SystemExit, Unavailable)),
    ):
        import_release(elsewhere, tmp_path / "bundle", and_then(register, breaks))
    assert known == [manifest.digest]
    assert verify_release(elsewhere, manifest.digest) == []


def test_what_was_not_registered_is_registered_by_the_next_try_or_collected(
    service: Service, disk: Path
) -> None:
    def never(_: Manifest, __: int) -> None:
        lose_the_answer()

    register = wiring.registrar(service, actor="test")
    with pytest.raises(Unavailable):
        published(service, disk, never)
    assert service.releases.kept() == set()
    assert len(collect(service.archive, service.releases.kept).releases) == 1
    assert not [name for name in files_of(service.archive) if name.startswith("releases/")]
    with pytest.raises(Unavailable):
        published(service, disk, never)
    digest = published(service, disk, register).digest
    assert service.releases.kept() == {digest}
    assert verify_release(service.archive, digest) == []
