"""A profile's cloud_config is shown to a real cloud-init before it is saved."""

import stat
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import yaml
from structlog.testing import capture_logs

from provisioner.cloud_init import check_cloud_config
from provisioner.core.model import Json
from provisioner.lab.site import lab_profile
from provisioner.service.profiles import Profiles
from tests.parts.command_line import Cli, commands_of
from tests.parts.service_site import Site, profile_document

README: Final = Path(__file__).parents[2] / "README.md"
SECRET: Final = "canary-hunter2"
# cloud-init as Debian has it, with what its schema needs. Unpacked and not installed: it
# would take this machine in hand at its next start.
PACKAGES: Final = (
    "cloud-init",
    *(f"python3-{name}" for name in ("jsonschema", "attr", "pyrsistent", "yaml", "jinja2")),
    *(f"python3-{name}" for name in ("markupsafe", "configobj", "six", "oauthlib", "requests")),
    *(f"python3-{name}" for name in ("urllib3", "chardet", "certifi", "idna", "jsonpatch")),
    *("python3-json-pointer", "python3-netifaces", "python3-serial"),
)


@pytest.fixture(scope="module")
def cloud_init(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a cloud-init to call."""
    folder = tmp_path_factory.mktemp("cloud-init")
    # With lists of its own: this machine may have none, or old ones.
    (folder / "lists" / "partial").mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={folder}/lists", "-o", "Dir::Cache="]
    for words in (["update"], ["download", *PACKAGES]):
        subprocess.run([*apt, *words], cwd=folder, check=True, capture_output=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, folder / "root"], check=True)
    library = folder / "root/usr/lib/python3/dist-packages"
    return program(
        folder / "cloud-init",
        f'PYTHONPATH={library} exec /usr/bin/python3 {folder}/root/usr/bin/cloud-init "$@"',
    )


@pytest.fixture
def cli(site: Site, cloud_init: str) -> Iterator[Cli]:
    """The command line of a service that has a cloud-init."""
    with commands_with(site, cloud_init) as cli:
        yield cli


def commands_with(site: Site, path: str) -> AbstractContextManager[Cli]:
    site.profiles = Profiles(site.store, site.clock, partial(check_cloud_config, program=path))
    return commands_of(site)


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def text_of(**cloud_config: object) -> str:
    return "#cloud-config\n" + yaml.safe_dump(cloud_config)


def test_what_fits_is_told_apart_from_what_does_not(cloud_init: str) -> None:
    fits = check_cloud_config(text_of(package_update=True), cloud_init)
    assert (fits.errors, fits.note) == (None, None)
    assert fits.checked_by is not None
    assert fits.checked_by.startswith("cloud-init 2")
    assert check_cloud_config("#cloud-config\n{}\n", cloud_init) == fits

    unfit = check_cloud_config(text_of(package_update="yes", runcmd=7), cloud_init)
    assert unfit.checked_by == fits.checked_by
    assert unfit.errors is not None
    assert "package_update: 'yes' is not of type 'boolean'" in unfit.errors
    assert "runcmd" in unfit.errors

    old = check_cloud_config(text_of(ssh_pwauth="maybe"), cloud_init)
    assert (old.checked_by, old.errors) == (fits.checked_by, None)
    assert old.note is not None
    assert "ssh_pwauth" in old.note


def test_what_is_deprecated_does_not_hide_what_is_wrong(cloud_init: str) -> None:
    both = check_cloud_config(text_of(ssh_pwauth="maybe", package_update="yes"), cloud_init)
    assert both.errors == "package_update: 'yes' is not of type 'boolean'"


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo traceback; exit 1", "could not look"),
        ("echo /bin/cloud-init 23.1; echo 'jsonschema is not there'", "could not look"),
        ("sleep 60", "could not look"),
        ("", "could not look"),
    ],
)
def test_one_that_cannot_look_stops_nobody(tmp_path: Path, script: str, note: str) -> None:
    broken = program(tmp_path / "cloud-init", script)
    with capture_logs() as logs:
        found = check_cloud_config(text_of(a=SECRET), broken, limit=timedelta(seconds=1))
    assert (found.checked_by, found.errors) == (None, None)
    assert found.note is not None
    assert note in found.note
    assert [one["event"] for one in logs] == ["cloud-init could not check a profile"]
    assert SECRET not in str(logs)
    assert SECRET not in found.note


def test_our_own_profiles_fit(cloud_init: str, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text("ssh-ed25519 AAAA you\n")
    example = README.read_text().split("# web.yaml", 1)[1].split("```", 1)[0]
    documents: list[Json] = [yaml.safe_load(example), lab_profile(tmp_path / "key")]
    for document in documents:
        assert document["cloud_config"]
        found = check_cloud_config(text_of(**document["cloud_config"]), cloud_init)
        assert (found.errors, found.note) == (None, None)


def test_what_does_not_fit_is_not_saved(cli: Cli, site: Site, tmp_path: Path) -> None:
    before = site.profiles.show("web")
    file = tmp_path / "web.yaml"
    users = [{"name": "ops", "passwd": SECRET, "shel": "/bin/sh"}]
    # What stands for a text of the host is filled in as it will be.
    typo = {**profile_document(), "cloud_config": {"users": users, "fqdn": "${host.name}.site"}}
    file.write_text(yaml.safe_dump(typo))

    with capture_logs() as logs:
        refused = cli("profile", "save", str(file), exit_code=2)
    for part in ("profile web", "cloud-init 2", "users.0", "--no-schema"):
        assert part in refused.stderr
    assert SECRET not in str(logs)
    assert site.profiles.show("web") == before

    cli("profile", "save", str(file), "--no-schema")
    assert site.profiles.show("web").document == typo


def test_the_caller_hears_who_looked(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    for cloud_config, told in (
        ({"package_update": True}, "was checked by cloud-init 2"),
        ({"ssh_pwauth": "maybe"}, "takes this cloud_config, and warns: ssh_pwauth"),
    ):
        file.write_text(yaml.safe_dump({**profile_document(), "cloud_config": cloud_config}))
        assert told in cli("profile", "save", str(file)).stderr
    saved = cli.json("profile", "save", str(file))
    assert saved["name"] == "web"
    assert saved["schema_check"]["checked_by"].startswith("cloud-init 2")


def test_without_a_cloud_init_that_is_said(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(yaml.safe_dump({**profile_document(), "cloud_config": {"runcmd": 7}}))
    with commands_with(site, str(tmp_path / "cloud-init")) as cli:
        done = cli("profile", "save", str(file))
    assert "was not checked: there is no cloud-init where the service runs" in done.stderr
    assert site.profiles.show("web").document["cloud_config"] == {"runcmd": 7}
