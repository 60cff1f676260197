"""Recipes are read strictly: a mistake is named, with what was probably meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from provisioner.errors import ConfigError, NotFound, RequestError
from provisioner.imaging.mirrors import state_of
from provisioner.imaging.recipe import find_recipe, load_recipe, parse_recipe

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


def test_the_shipped_recipe_is_found_by_name_and_valid() -> None:
    recipe = load_recipe(find_recipe("debian-12"))
    assert recipe.image == "debian-12"
    assert set(recipe.firmware) == {"bios", "uefi"}


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
