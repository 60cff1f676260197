"""Recipes are read strictly: a mistake is named, with what was probably meant."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from provisioner.errors import ConfigError, NotFound, RequestError, Unavailable
from provisioner.imaging.firewall import RULES_FILE
from provisioner.imaging.hardening import SSH_FILE, SYSCTL_FILE
from provisioner.imaging.mirrors import MirrorState, state_of
from provisioner.imaging.recipe import find_recipe, load_recipe, parse_recipe
from provisioner.imaging.recipe_parts import SCRIPTS_MAX, Mirror

GOOD: dict[str, Any] = {
    "format": 1,
    "image": "tiny",
    "architecture": "amd64",
    "size": "1GiB",
    "firmware": ["bios", "uefi"],
    "kernel": "linux-image-amd64",
    "kernel_arguments": ["console=ttyS0,115200"],
    "mirrors": [{"uri": "http://mirror.test/debian", "suite": "bookworm", "components": ["main"]}],
    "packages": ["openssh-server"],
    "files": [{"path": "/etc/motd", "content": "hello\n"}],
    "services": {"enable": ["ssh.service"], "mask": ["apt-daily.timer"]},
}


def parsed(**changes: Any) -> Any:
    return parse_recipe(yaml.safe_dump(GOOD | changes))


def test_a_recipe_is_read() -> None:
    recipe = parsed()
    assert recipe.size_bytes == 1024**3
    assert recipe.files[0].mode == "0644"
    assert recipe.services.mask == ("apt-daily.timer",)


@pytest.mark.parametrize("name", ["debian-12", "debian-12-web"])
def test_the_shipped_recipes_are_found_by_name_and_boot_everywhere(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    assert recipe.image == name
    assert set(recipe.firmware) == {"bios", "uefi", "secure-boot"}


def test_the_shipped_recipes_are_hardened() -> None:
    """No passwords, keys only, a firewall, and no upgrades but by a new release."""
    base, web = (load_recipe(find_recipe(name)) for name in ("debian-12", "debian-12-web"))
    for recipe, ports in ((base, "{ 22 }"), (web, "{ 22, 80, 443 }")):
        files = {file.path: file.content for file in recipe.files}
        assert "PasswordAuthentication no" in files[SSH_FILE]
        assert "policy drop" in files[RULES_FILE]
        assert f"tcp dport {ports} accept" in files[RULES_FILE]
        assert "kernel.kptr_restrict = 2" in files[SYSCTL_FILE]
        assert "nftables.service" in recipe.services.enable
        assert {"apt-daily.timer", "unattended-upgrades.service"} <= set(recipe.services.mask)
        assert [script.name for script in recipe.scripts] == ["no-passwords"]
    assert set(base.packages) < set(web.packages)


def test_digest_counts_content_and_not_spelling() -> None:
    """The digest is the key of the cache: the same content must not build twice."""
    text = yaml.safe_dump(GOOD)
    reordered = yaml.safe_dump(dict(reversed(GOOD.items())), sort_keys=False)
    assert parse_recipe("# a comment\n" + reordered).digest == parse_recipe(text).digest
    assert parsed(kernel="linux-image-cloud-amd64").digest != parse_recipe(text).digest
    with_other_kernel = parse_recipe(text).with_kernel("linux-image-cloud-amd64")
    assert with_other_kernel.digest == parsed(kernel="linux-image-cloud-amd64").digest


def test_arguments_for_one_kernel_come_after_those_for_all() -> None:
    recipe = parsed(kernel_arguments_for={"linux-image-cloud-amd64": ["a=b", "c"]})
    assert recipe.arguments == ("console=ttyS0,115200",)
    cloud = recipe.with_kernel("linux-image-cloud-amd64")
    assert cloud.arguments == ("console=ttyS0,115200", "a=b", "c")


def test_disk_size_and_kernel_arguments_do_not_need_a_new_tree() -> None:
    one, other = parsed(), parsed(size="2GiB", kernel_arguments=["quiet"])
    assert one.digest != other.digest
    assert one.tree_digest == other.tree_digest
    assert one.tree_digest != parsed(packages=["less"]).tree_digest


def test_a_package_may_be_of_one_version_or_suite() -> None:
    recipe = parsed(packages=["openssh-server=1:9.2p1-2+deb12u5", "less/bookworm", "g++"])
    assert recipe.packages == ("openssh-server=1:9.2p1-2+deb12u5", "less/bookworm", "g++")
    other = recipe.with_packages("less=590-2", "curl")
    assert other.packages == ("openssh-server=1:9.2p1-2+deb12u5", "less=590-2", "g++", "curl")
    assert other.digest != recipe.digest
    with pytest.raises(RequestError):
        recipe.with_packages("curl;reboot")


def test_what_hardening_writes_is_not_written_over() -> None:
    """A file of the recipe's own would quietly take the place of the firewall's rules."""
    with pytest.raises(RequestError, match="hardening writes a file") as caught:
        parsed(
            hardening={"firewall": {"policy": "drop"}},
            files=[{"path": RULES_FILE, "content": "flush ruleset\n"}],
        )
    assert caught.value.found == RULES_FILE
    assert caught.value.hint


def test_the_digest_counts_what_hardening_comes_to() -> None:
    one = parsed(hardening={"firewall": {"policy": "drop", "accept_tcp": [22]}})
    other = parsed(hardening={"firewall": {"policy": "drop", "accept_tcp": [23]}})
    assert one.tree_digest != other.tree_digest
    assert one.packages[-1] == "nftables"
    assert "nftables.service" in one.services.enable


def test_misspelt_key_gets_a_suggestion() -> None:
    with pytest.raises(RequestError, match="'packagez'") as caught:
        parsed(packagez=[])
    assert caught.value.hint == "did you mean 'packages'?"


@pytest.mark.parametrize("key", sorted(GOOD.keys() - {"files", "services"}))
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(RequestError, match=key):
        parse_recipe(yaml.safe_dump({name: GOOD[name] for name in GOOD if name != key}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("format", True),
        ("image", "../x"),
        ("architecture", "pdp11"),
        ("size", "2GB"),
        ("size", 2147483648),
        ("size", "100MiB"),
        ("size", "999GiB"),
        ("firmware", []),
        ("firmware", ["coreboot"]),
        ("firmware", ["uefi", "uefi"]),
        ("firmware", ["bios", "secure-boot"]),
        ("kernel", "linux image"),
        ("kernel", None),
        ("kernel_arguments", ["quiet; halt"]),
        ("kernel_arguments", ["a\nb"]),
        ("kernel_arguments", ["${root}"]),
        ("kernel_arguments_for", {"linux image": []}),
        ("kernel_arguments_for", {"linux-image-amd64": ["a b"]}),
        ("mirrors", []),
        ("mirrors", [{"uri": "http://x.test", "components": ["main"]}]),
        ("mirrors", [GOOD["mirrors"][0] | {"uri": "http://x.test/ [trusted=yes]"}]),
        ("mirrors", [GOOD["mirrors"][0] | {"suite": "bookworm main"}]),
        ("packages", "bash"),
        ("packages", ["$(reboot)"]),
        ("packages", ["-oDebug=1"]),
        ("packages", ["bash-"]),
        ("packages", ["bash="]),
        ("packages", ["bash=1 2"]),
        ("packages", ["bash=1,2"]),
        ("packages", ["bash/../x"]),
        ("packages", ["bash", "bash=5.2-1"]),
        ("exclude", ["usr/share"]),
        ("exclude", ["/usr;x"]),
        ("files", [{"path": "etc/motd", "content": ""}]),
        ("files", [{"path": "/etc/../motd", "content": ""}]),
        ("files", [{"path": "/etc/motd", "content": 5}]),
        ("files", [{"path": "/etc/motd", "content": "", "mode": 644}]),
        ("files", [{"path": "/etc/motd", "content": "", "mode": "4755"}]),
        ("files", GOOD["files"] * 2),
        ("services", {"enable": ["ssh"]}),
        ("services", {"enable": ["ssh.service; rm"]}),
        ("services", {"start": ["ssh.service"]}),
        ("services", {"enable": ["ssh.service"], "mask": ["ssh.service"]}),
        ("scripts", "setup"),
        ("scripts", ["../setup"]),
        ("scripts", ["/setup"]),
        ("scripts", [".."]),
        ("scripts", [".hidden"]),
        ("scripts", ["a b"]),
        ("scripts", ["setup", "setup"]),
        ("scripts", [f"s{number}" for number in range(SCRIPTS_MAX + 1)]),
        ("hardening", ["ssh"]),
        ("extends", ["debian-12"]),
    ],
)
def test_wrong_value_is_refused(key: str, value: object) -> None:
    with pytest.raises(RequestError):
        parsed(**{key: value})


@pytest.mark.parametrize(
    "text", ["", "- a", "a: [", "!!python/object:os.system {}", "format: 1\nformat: 1\n", "? [a]\n"]
)
def test_what_is_not_a_recipe_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse_recipe(text)


def test_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"size": "huge"}))
    with pytest.raises(RequestError, match=str(path)) as caught:
        load_recipe(path)
    assert caught.value.found == "'huge'"


def test_recipe_is_found_by_path_folder_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text("")
    assert find_recipe(str(path)) == path
    assert find_recipe(str(folder)) == path
    assert find_recipe("mine", (tmp_path,)) == path


def test_unknown_name_gets_the_known_ones() -> None:
    with pytest.raises(NotFound) as caught:
        find_recipe("debain-12")
    assert "debian-12" in str(caught.value.expected)
    assert caught.value.hint == "did you mean 'debian-12'?"


def test_a_mirror_without_uri_is_the_one_of_this_machines_apt() -> None:
    bare = GOOD | {"mirrors": [{"suite": "no-such-suite", "components": ["main"]}]}
    recipe = parse_recipe(yaml.safe_dump(bare))
    assert recipe.mirrors[0].uri is None
    with pytest.raises(ConfigError, match="no mirror for no-such-suite") as caught:
        state_of(recipe.mirrors)
    assert caught.value.hint


def test_a_mirrors_state_is_what_it_serves_and_where(tmp_path: Path) -> None:
    """The address stands in the image, so another one makes another image."""

    def state(place: str, content: str) -> MirrorState:
        suite = tmp_path / place / "dists" / "bookworm"
        suite.mkdir(parents=True, exist_ok=True)
        (suite / "InRelease").write_text(content)
        uri = f"file://{tmp_path / place}"
        return state_of([Mirror(uri, "bookworm", ("main",))])

    served = "Suite: oldstable\nDate: Sat, 21 Nov 2026 10:00:00 UTC\n"
    one = state("one", served)
    assert one.newest_at == datetime(2026, 11, 21, 10, tzinfo=UTC)
    assert one.sources[0].endswith(f"file://{tmp_path}/one bookworm main")
    assert state("one", served) == one
    assert state("two", served).digest != one.digest
    assert state("one", served + "\n").digest != one.digest
    with pytest.raises(Unavailable, match="does not serve"):
        state("one", "nothing of the kind")
