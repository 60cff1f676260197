"""A base tree is really installed, from a recipe as small as can be, and kept in a cache."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import pytest

from provisioner.imaging.base import BaseTree, MirrorsChanged, base_tree, current_tree
from provisioner.imaging.mirrors import MirrorState, state_of
from provisioner.imaging.recipe import Recipe
from provisioner.imaging.recipe_parts import Mirror, RecipeFile, Script, Services
from provisioner.imaging.tools import ToolFailed

SUITES: Final = ("bookworm", "bookworm-updates", "bookworm-security")
PINNED: Final = "libexpat1"
BOOT_PACKAGE: Final = "grub-pc-bin"
LOOK: Final = """\
#!/usr/bin/env -S sh -eu
{
    echo "$LC_ALL $TZ $SOURCE_DATE_EPOCH $HOME $(pwd) $(id -u)"
    cat /etc/of-the-recipe
    tail -n +3 /proc/net/dev | cut -d : -f 1
} > /etc/seen-by-a-script
"""
BREAK: Final = "#!/bin/sh\necho the reason >&2\nexit 7\n"


def versions(package: str) -> list[str]:
    """Return the versions of a package that this machine's apt knows, from new to old."""
    listed = subprocess.run(
        ["apt-cache", "madison", package], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    return list(dict.fromkeys(line.split("|")[1].strip() for line in listed.splitlines()))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Little more than apt and its dependencies, without a kernel that could boot."""
    return Recipe(
        image="tiny",
        architecture="amd64",
        mirrors=tuple(Mirror(None, suite, ("main",)) for suite in SUITES),
        size_bytes=1024**3,
        kernel="hello",
        kernel_arguments=(),
        firmware=("bios",),
        packages=(f"{PINNED}={versions(PINNED)[-1]}", "hello"),
        exclude=("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*"),
        files=(RecipeFile("/etc/of-the-recipe", "held\n", "0600"),),
        services=Services(),
        scripts=(Script("look", LOOK), Script("look-again", "#!/bin/sh\ntest -s /etc/seen*\n")),
    )


@dataclass(frozen=True)
class Built:
    tree: BaseTree
    recipe: Recipe
    mirrors: MirrorState
    cache: Path
    said: list[str]


@pytest.fixture(scope="module")
def built(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Built:
    cache = tmp_path_factory.mktemp("cache")
    packages = cache / "packages"
    packages.mkdir()
    # As after a build of some time ago: an older version, which a suite still lists.
    older = f"{BOOT_PACKAGE}={versions(BOOT_PACKAGE)[-1]}"
    fetch = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", older]
    subprocess.run(fetch, cwd=packages, check=True, timeout=300)
    mirrors = state_of(recipe.mirrors)
    said: list[str] = []
    return Built(base_tree(recipe, mirrors, cache, said.append), recipe, mirrors, cache, said)


@contextmanager
def opened(archive: Path) -> Iterator[tarfile.TarFile]:
    done = subprocess.run(["zstd", "-dc", archive], capture_output=True, check=True, timeout=300)
    unpacked = archive.parent.parent / "tree.tar"
    unpacked.write_bytes(done.stdout)
    with tarfile.open(unpacked) as tar:
        yield tar
    unpacked.unlink()


def content_of(tar: tarfile.TarFile, name: str) -> str:
    file = tar.extractfile(name)
    assert file is not None
    return file.read().decode()


def left_in(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*")}


def test_a_tree_holds_what_the_recipe_says_and_nothing_of_the_build(built: Built) -> None:
    epoch_s = int(built.mirrors.newest_at.timestamp())
    with opened(built.tree.archive) as tar:
        held = tar.getmember("./etc/of-the-recipe")
        assert (held.mode, held.uid, held.gid, held.mtime) == (0o600, 0, 0, epoch_s)
        seen = content_of(tar, "./etc/seen-by-a-script").split("\n")
        names = tar.getnames()
        status = content_of(tar, "./var/lib/dpkg/status")
        late = [member.name for member in tar if member.mtime > epoch_s]
    # The script's environment; the recipe's file; and the only network there was.
    assert seen == [f"C.UTF-8 UTC {epoch_s} /root / 0", "held", "    lo", ""]
    pinned = next(part for part in status.split("\n\n") if part.startswith(f"Package: {PINNED}\n"))
    assert f"Version: {built.recipe.packages[0].partition('=')[2]}\n" in pinned
    of_the_build = [name for name in names if name.startswith("./provisioner-build/")]
    assert {name.split("/")[2] for name in of_the_build} == {"boot"}
    assert not [
        name for name in names if name.endswith(("-old", ".dpkg-dist")) or "ssh_host" in name
    ]
    assert late == []


def test_the_boot_loaders_are_the_newest_whatever_the_cache_holds(built: Built) -> None:
    cached = sorted((built.cache / "packages").glob(f"{BOOT_PACKAGE}_*.deb"))
    assert len(cached) == len(versions(BOOT_PACKAGE))
    newest = next(path for path in cached if f"_{versions(BOOT_PACKAGE)[0]}_" in path.name)
    unpack = ["dpkg-deb", "--fsys-tarfile", str(newest)]
    content = subprocess.run(unpack, capture_output=True, check=True, timeout=300).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        wanted = {member.name: (member.size, member.mtime) for member in tar if member.isfile()}
    with opened(built.tree.archive) as tar:
        folder = "./provisioner-build/boot/"
        found = {
            f"./{member.name.removeprefix(folder)}": (member.size, member.mtime)
            for member in tar
            if member.isfile() and member.name.startswith(folder)
        }
    assert found == wanted


def test_a_person_heard_how_far_it_was_and_the_log_tells_all(built: Built) -> None:
    assert built.said[0] == "installing packages into a new base tree"
    assert built.said.index("running the script look") > built.said.index(
        "setting up the essential packages"
    )
    assert built.said[-1] == "packing the base tree"
    assert "Setting up hello" in built.tree.log


def test_the_next_build_takes_tree_and_log_from_the_cache(built: Built) -> None:
    said: list[str] = []
    again = base_tree(built.recipe, built.mirrors, built.cache, said.append)
    assert again == built.tree
    assert said == ["using the base tree from the cache"]
    left = left_in(built.cache)
    assert {name for name in left if name.startswith("bases/")} == {
        f"bases/{built.tree.archive.name}",
        f"bases/{built.tree.archive.name.removesuffix('.tar.zst')}.log",
    }
    assert any(name.startswith("packages/hello_") for name in left)


def test_a_script_that_fails_ends_the_build_with_its_last_words_and_leaves_nothing(
    built: Built,
) -> None:
    before = left_in(built.cache)
    broken = replace(built.recipe, scripts=(Script("breaks", BREAK),))
    with pytest.raises(ToolFailed, match="mmdebstrap ended with code") as caught:
        base_tree(broken, built.mirrors, built.cache, lambda _: None)
    found = str(caught.value.found)
    assert "the reason\nthe script breaks ended with code 7\n" in found
    assert left_in(built.cache) == before
    trees = set(re.findall(r"/\S*/mmdebstrap\.\w+", found))
    assert trees
    assert not [tree for tree in trees if Path(tree).exists()]


@contextmanager
def mirror_that_changes(real: str) -> Iterator[str]:
    """Yield the address of a mirror whose Release files are others whenever apt asks for them
    than just before; all else it has from the real one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_apt = "APT" in self.headers["User-Agent"]
            if is_apt or not self.path.endswith("/InRelease"):
                self.send_response(302)
                self.send_header("Location", real + self.path)
                self.end_headers()
                return
            with urllib.request.urlopen(real + self.path, timeout=300) as answer:
                data = answer.read() + b"\n"
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_tree_of_another_state_than_was_asked_for_is_not_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = tmp_path / "trees"
    trees.mkdir()
    monkeypatch.setenv("TMPDIR", str(trees))
    real = state_of(recipe.mirrors[:1]).sources[0].split()[2]
    said: list[str] = []
    with mirror_that_changes(real) as uri:
        moving = replace(recipe, mirrors=(Mirror(uri, SUITES[0], ("main",)),), packages=())
        with pytest.raises(MirrorsChanged, match="changed while the packages were fetched"):
            current_tree(moving, tmp_path, said.append)
    assert said.count("asking the package mirrors") == 2
    assert said.count("the package mirrors changed meanwhile: once more") == 1
    # It was stopped before a package was unpacked for good, and nothing is taken for a tree.
    assert "running the script look" not in said
    assert not list((tmp_path / "bases").iterdir())
    assert not list(tmp_path.glob("*work-*"))
    assert not list(trees.iterdir())
    assert str(trees) not in Path("/proc/mounts").read_text()
