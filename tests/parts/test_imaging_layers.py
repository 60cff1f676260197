"""Recipes on top of others: what adds up, what replaces, and what leads nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from provisioner.errors import NotFound, RequestError
from provisioner.imaging.firewall import RULES_FILE
from provisioner.imaging.recipe import LAYERS_MAX, Recipe, load_recipe, parse_recipe
from provisioner.imaging.recipe_parts import SCRIPT_BYTES_MAX, Mirror, Script

BASE: dict[str, Any] = {
    "format": 1,
    "image": "base",
    "architecture": "amd64",
    "size": "1GiB",
    "firmware": ["bios"],
    "kernel": "linux-image-amd64",
    "kernel_arguments": ["quiet", "console=ttyS0"],
    "kernel_arguments_for": {"linux-image-cloud-amd64": ["a"]},
    "mirrors": [{"suite": "bookworm", "components": ["main"]}],
    "packages": ["less", "openssh-server"],
    "exclude": ["/usr/share/man/*"],
    "files": [
        {"path": "/etc/motd", "content": "base\n"},
        {"path": "/etc/issue", "content": "base\n"},
    ],
    "services": {"enable": ["ssh.service"], "mask": ["apt-daily.timer", "fstrim.timer"]},
    "hardening": {"firewall": {"policy": "drop", "accept_tcp": [22]}},
}
UPPER: dict[str, Any] = {"format": 1, "image": "upper", "extends": "base"}


def put(folder: Path, name: str, value: dict[str, Any], **scripts: str) -> Path:
    """Write a recipe and its scripts, and return its file."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for script, content in scripts.items():
        (place / script).write_text(content)
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def loaded(folder: Path, **upper: Any) -> Recipe:
    put(folder, "base", BASE)
    return load_recipe(put(folder, "upper", UPPER | upper))


def test_a_recipe_that_adds_nothing_differs_by_its_name_alone(tmp_path: Path) -> None:
    upper = loaded(tmp_path)
    below = load_recipe(tmp_path / "base" / "recipe.yaml")
    assert upper.image == "upper"
    assert {**vars(upper), "image": "base"} == vars(below)
    assert upper.digest != below.digest


def test_lists_grow_and_the_upper_recipe_has_the_last_word(tmp_path: Path) -> None:
    recipe = loaded(
        tmp_path,
        packages=["nginx", "less=590-2"],
        exclude=["/usr/share/info/*"],
        files=[
            {"path": "/etc/issue", "content": "upper\n", "mode": "0600"},
            {"path": "/etc/new", "content": ""},
        ],
        kernel_arguments=["nosmt", "quiet"],
        kernel_arguments_for={"linux-image-cloud-amd64": ["b"], "linux-image-rt-amd64": ["c"]},
        services={"enable": ["nginx.service", "fstrim.timer"], "disable": ["ssh.service"]},
        hardening={"firewall": {"policy": "drop", "accept_tcp": [80]}},
    )
    assert recipe.packages == ("less=590-2", "openssh-server", "nginx", "nftables")
    assert recipe.exclude == ("/usr/share/man/*", "/usr/share/info/*")
    own = [(file.path, file.content, file.mode) for file in recipe.files[:3]]
    assert own == [
        ("/etc/motd", "base\n", "0644"),
        ("/etc/issue", "upper\n", "0600"),
        ("/etc/new", "", "0644"),
    ]
    assert recipe.files[3].path == RULES_FILE
    assert "{ 22, 80 }" in recipe.files[3].content
    assert recipe.kernel_arguments == ("quiet", "console=ttyS0", "nosmt")
    assert recipe.with_kernel("linux-image-cloud-amd64").arguments[-2:] == ("a", "b")
    assert recipe.services.enable == ("nftables.service", "nginx.service", "fstrim.timer")
    assert recipe.services.disable == ("ssh.service",)
    assert recipe.services.mask == ("apt-daily.timer",)


def test_what_is_one_thing_is_replaced(tmp_path: Path) -> None:
    recipe = loaded(
        tmp_path,
        size="2GiB",
        kernel="linux-image-cloud-amd64",
        firmware=["uefi", "secure-boot"],
        mirrors=[{"suite": "trixie", "components": ["main"], "uri": "http://mirror.test/debian"}],
    )
    assert recipe.size_bytes == 2 * 1024**3
    assert recipe.kernel == "linux-image-cloud-amd64"
    assert recipe.firmware == ("uefi", "secure-boot")
    assert recipe.mirrors == (Mirror("http://mirror.test/debian", "trixie", ("main",)),)


def test_the_parts_may_stand_in_different_recipes_but_all_must_be_there(tmp_path: Path) -> None:
    put(tmp_path, "base", {key: BASE[key] for key in BASE if key not in ("kernel", "packages")})
    path = put(tmp_path, "upper", UPPER)
    with pytest.raises(RequestError, match="the recipe lacks kernel, packages"):
        load_recipe(path)
    whole = put(tmp_path, "upper", UPPER | {"kernel": "linux-image-amd64", "packages": []})
    assert load_recipe(whole).packages == ("nftables",)


def test_the_recipe_below_is_beside_this_one_or_comes_with_the_program(tmp_path: Path) -> None:
    own = load_recipe(put(tmp_path, "mine", UPPER | {"extends": "debian-12"}))
    assert own.packages
    assert "/etc/cloud/cloud.cfg" in {file.path for file in own.files}
    put(tmp_path, "debian-12", BASE)
    assert "/etc/cloud/cloud.cfg" not in {
        file.path for file in load_recipe(tmp_path / "mine" / "recipe.yaml").files
    }


def test_a_path_to_the_recipe_below_starts_at_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "site", "base", BASE)
    put(tmp_path / "other", "upper", UPPER | {"extends": "../../site/base"})
    monkeypatch.chdir(tmp_path / "other" / "upper")
    assert load_recipe(Path("recipe.yaml")).kernel == "linux-image-amd64"


def test_an_unknown_recipe_below_is_named_with_what_there_is(tmp_path: Path) -> None:
    put(tmp_path, "base", BASE)
    path = put(tmp_path, "upper", UPPER | {"extends": "bass"})
    with pytest.raises(NotFound, match="no recipe named bass") as caught:
        load_recipe(path)
    assert str(path) in caught.value.message
    assert caught.value.hint == "did you mean 'base'?"


@pytest.mark.parametrize("others", [[], ["one"], ["one", "two"]])
def test_a_circle_is_refused(tmp_path: Path, others: list[str]) -> None:
    names = ["upper", *others]
    for name, below in zip(names, [*names[1:], "upper"], strict=True):
        put(tmp_path, name, UPPER | {"image": name, "extends": below})
    with pytest.raises(RequestError, match="extends itself") as caught:
        load_recipe(tmp_path / "upper" / "recipe.yaml")
    assert str(caught.value.found).count("recipe.yaml") == len(names) + 1


def test_only_so_many_recipes_stand_on_each_other(tmp_path: Path) -> None:
    put(tmp_path, "level-1", BASE)
    for level in range(2, LAYERS_MAX + 2):
        put(tmp_path, f"level-{level}", UPPER | {"extends": f"level-{level - 1}"})
    assert load_recipe(tmp_path / f"level-{LAYERS_MAX}" / "recipe.yaml").packages
    with pytest.raises(RequestError, match="too many"):
        load_recipe(tmp_path / f"level-{LAYERS_MAX + 1}" / "recipe.yaml")


def test_an_error_below_names_the_file_below(tmp_path: Path) -> None:
    below = put(tmp_path, "base", BASE | {"size": "huge"})
    with pytest.raises(RequestError, match=str(below)):
        load_recipe(put(tmp_path, "upper", UPPER))


def test_scripts_run_from_the_lowest_up_each_from_its_own_folder(tmp_path: Path) -> None:
    put(tmp_path, "base", BASE | {"scripts": ["b", "a"]}, a="#!/bin/sh\n1\n", b="#!/bin/sh\n2\n")
    path = put(tmp_path, "upper", UPPER | {"scripts": ["c", "a"]}, a="#!/x\n", c="#!/bin/sh\n3\n")
    assert load_recipe(path).scripts == (
        Script("b", "#!/bin/sh\n2\n"),
        Script("a", "#!/x\n"),
        Script("c", "#!/bin/sh\n3\n"),
    )


def test_a_scripts_content_counts_in_the_digest(tmp_path: Path) -> None:
    value = BASE | {"scripts": ["tune"]}
    one = load_recipe(put(tmp_path, "base", value, tune="#!/bin/sh\ntrue\n"))
    other = load_recipe(put(tmp_path, "base", value, tune="#!/bin/sh\nfalse\n"))
    assert one.digest != other.digest
    assert one.tree_digest != other.tree_digest


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("echo no first line\n", "the script tune is wrong"),
        ("#!/bin/sh\n" + "#" * SCRIPT_BYTES_MAX, "the script tune is wrong"),
        (None, "there is no script tune"),
    ],
)
def test_a_script_that_cannot_be_run_is_refused(
    tmp_path: Path, content: str | None, match: str
) -> None:
    scripts = {} if content is None else {"tune": content}
    path = put(tmp_path, "base", BASE | {"scripts": ["tune"]}, **scripts)
    with pytest.raises(RequestError, match=match) as caught:
        load_recipe(path)
    assert str(path) in caught.value.message


def test_a_script_is_no_link_and_is_text(tmp_path: Path) -> None:
    path = put(tmp_path, "base", BASE | {"scripts": ["tune"]})
    (path.parent / "tune").symlink_to("/bin/sh")
    with pytest.raises(RequestError, match="there is no script tune"):
        load_recipe(path)
    (path.parent / "tune").unlink()
    (path.parent / "tune").write_bytes(b"#!/bin/sh\n\xff\n")
    with pytest.raises(RequestError, match="the script tune is wrong") as caught:
        load_recipe(path)
    assert caught.value.expected == "UTF-8 text"


@pytest.mark.parametrize("more", [{"extends": "base"}, {"scripts": ["tune"]}])
def test_text_without_a_folder_has_nothing_beside_it(more: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="stands alone"):
        parse_recipe(yaml.safe_dump(BASE | more))
