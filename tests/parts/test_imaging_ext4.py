"""A file system synced to a tree holds the tree, whatever it held before, and moves little."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provisioner.errors import RequestError
from provisioner.imaging.ext4 import Ext4
from provisioner.imaging.ext4_plan import COMMAND_BYTES_MAX, plan
from provisioner.imaging.ext4_sync import prove
from provisioner.imaging.file_manifest import FileEntry
from provisioner.imaging.tools import ToolFailed
from provisioner.imaging.tree import read_tree
from tests.parts.ext4_trees import (
    EPOCH_S,
    MIB,
    Builder,
    Dir,
    File,
    Link,
    Node,
    Same,
    Tree,
    blocks_of,
    entries_of,
    make_tree,
    moved_bytes,
)

BLOCK = 4096
BIG = os.urandom(40 * BLOCK)
NOTE = {"user.note": b"\0\xffvalue"}
# ACL_USER_OBJ rwx, ACL_GROUP_OBJ r-x, ACL_GROUP 4 r-x, ACL_MASK r-x, ACL_OTHER r-x.
ACL = bytes.fromhex(
    "0200000001000700ffffffff04000500ffffffff080005000400000010000500ffffffff20000500ffffffff"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices need root")


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("ext4"))


CHANGES: dict[str, tuple[Tree, Tree]] = {
    "nothing": ({"a": File(b"x")}, {"a": File(b"x")}),
    "added": ({}, {"d/e/f": File(b"x"), "d/empty": Dir(), "l": Link("d/e")}),
    "removed": ({"d/e/f": File(b"x"), "d/empty": Dir(), "l": Link("d/e")}, {}),
    "replaced": ({"a": File(b"old")}, {"a": File(b"new")}),
    "emptied": ({"a": File(BIG)}, {"a": File()}),
    "filled": ({"a": File()}, {"a": File(BIG)}),
    "grown": ({"a": File(BIG[:5000])}, {"a": File(BIG)}),
    "shrunk": ({"a": File(BIG)}, {"a": File(BIG[:5000])}),
    "grown within its block": ({"a": File(b"x")}, {"a": File(b"xy" * 100)}),
    "file to folder": ({"a": File(b"x")}, {"a/b": File(b"y")}),
    "folder to file": ({"a/b/c": File(b"y")}, {"a": File(b"x")}),
    "file to link": ({"a": File(b"x")}, {"a": Link("b")}),
    "link to folder": ({"a": Link("b"), "b": Dir()}, {"a": Dir(), "b": Dir()}),
    "link to another": ({"a": Link("b")}, {"a": Link("c" * 100)}),
    "long link": ({"a": Link("x/" * 2000 + "y")}, {"a": Link("x/" * 1900 + "y")}),
    "pipe to file": ({"a": Node()}, {"a": File(b"x")}),
    "mode only": ({"a": File(BIG, 0o644)}, {"a": File(BIG, 0o4755)}),
    "folder's mode": ({"a": Dir(0o700)}, {"a": Dir(0o1777)}),
    "attribute added": ({"a": File(b"x")}, {"a": File(b"x", xattrs=NOTE)}),
    "attribute changed": (
        {"a": File(b"x", xattrs=NOTE)},
        {"a": File(b"x", xattrs={"user.note": b"", "user.more": b"1"})},
    ),
    "attributes too large for the inode": (
        {"a": File(b"x")},
        {"a": File(b"x", xattrs={"user.note": b"n" * 2000})},
    ),
    "access list": ({"a": Dir()}, {"a": Dir(xattrs={"system.posix_acl_default": ACL})}),
    "hard link added": ({"a": File(BIG)}, {"a": File(BIG), "d/b": Same("a")}),
    "hard link removed": ({"a": File(BIG), "d/b": Same("a")}, {"a": File(BIG)}),
    "first of hard links removed": ({"a": File(BIG), "b": Same("a")}, {"b": File(BIG)}),
    "hard links changed": (
        {"a": File(BIG), "b": Same("a"), "c": Same("a")},
        {"a": File(BIG[:9000]), "b": Same("a"), "c": Same("a")},
    ),
    "hard links parted": ({"a": File(BIG), "b": Same("a")}, {"a": File(BIG), "b": File(BIG)}),
    "many links in one folder": (
        {},
        {"a": File(b"x"), **{f"d/{n:03}{'n' * 200}": Same("a") for n in range(60)}},
    ),
    "many files in one folder": (
        {f"d/{n:03}{'n' * 200}": File(b"%d" % n) for n in range(60)},
        {f"d/{n:03}{'n' * 200}": File(b"%d" % n) for n in range(30, 90)},
    ),
    "odd names": (
        {},
        {
            "a b": File(b"1"),
            'q"uo"te': File(b"2"),
            '"': Dir(),
            "back\\slash\\x2d": File(b"3"),
            "Tanúsítvány": File(b"4"),
            "<12>": File(b"5"),
            "#x": Link('to "there"'),
            " ": File(b"6"),
            "-f": File(b"7"),
            "n" * 255: File(b"8"),
            "\u0085": File(b"9"),
        },
    ),
    "deep": ({}, {"/".join(["d" * 100] * 20) + "/f": File(b"x")}),
    "sparse file": (
        {"a": File(bytes(10 * BLOCK) + b"x")},
        {"a": File(bytes(20 * BLOCK) + b"xy"), "b": File(bytes(3 * BLOCK))},
    ),
    "zeros in a file that had none": (
        {"a": File(BIG)},
        {"a": File(BIG[:BLOCK] + bytes(30 * BLOCK) + BIG[:100])},
    ),
    "large file": ({}, {"a": File(os.urandom(8 * MIB))}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_ends_where_a_build_from_nothing_does(name: str, builder: Builder) -> None:
    before, after = CHANGES[name]
    on_parent = builder.build(after, builder.build(before))
    from_nothing = builder.build(after)
    assert entries_of(on_parent) == entries_of(from_nothing)


@needs_root
def test_owners_devices_and_capabilities(builder: Builder) -> None:
    capability = {"security.capability": bytes.fromhex("0100000200200000" + 12 * "00")}
    before: Tree = {"a": File(b"x", uid=70_000), "null": Node(stat.S_IFCHR, (1, 3))}
    after: Tree = {
        "a": File(b"x", uid=3),
        "null": Node(stat.S_IFBLK, (259, 300)),
        "ping": File(b"p", 0o755, capability, uid=100_000),
    }
    found = entries_of(builder.build(after, builder.build(before)))
    assert (found["/a"].uid, found["/ping"].gid) == (3, 100_000)
    assert found["/null"].device == (259, 300)
    assert found["/ping"].xattrs == {"security.capability": "0100000200200000" + 12 * "00"}


def test_a_block_of_attributes_stays_or_is_refused(builder: Builder) -> None:
    """A build on a parent then starts from nothing: debugfs would leave the block behind."""
    large: Tree = {"a": File(b"x", xattrs={"user.note": b"n" * 2000})}
    parent = builder.build(large)
    builder.build({**large, "b": File(b"y")}, parent)
    for other in ({}, {"a": File(b"y")}, {**large, "b": Same("a")}):
        with pytest.raises(RequestError, match="in place"):
            builder.build(other, parent)


def test_building_again_gives_the_same_bytes(builder: Builder) -> None:
    before: Tree = {"a": File(BIG), "b/c": File(b"x")}
    after: Tree = {"a": File(BIG[:99]), "d": Link("b")}
    first, second = builder.build(before), builder.build(before)
    assert first.read_bytes() == second.read_bytes()
    assert builder.build(after, first).read_bytes() == builder.build(after, second).read_bytes()


def test_building_the_same_on_itself_moves_no_block(builder: Builder) -> None:
    tree: Tree = {"a": File(BIG), "d/b": Same("a"), "l": Link("x" * 100), "e": Dir(xattrs=NOTE)}
    first = builder.build(tree)
    again = builder.build(tree, first, mtime=EPOCH_S)
    assert again.read_bytes() == first.read_bytes()


def test_a_changed_file_stays_in_its_blocks(builder: Builder) -> None:
    """So that a library that was built anew moves what differs in it, and nothing else."""
    others: Tree = {f"f{n}": File(os.urandom(3 * BLOCK)) for n in range(30)}
    changed = bytearray(BIG)
    changed[10 * BLOCK] ^= 1
    first = builder.build({**others, "lib": File(BIG), "z": File(BIG)})
    second = builder.build({**others, "lib": File(bytes(changed)), "z": File(BIG)}, first)
    assert blocks_of(second, "/lib") == blocks_of(first, "/lib")
    # One block of content, and the inode's.
    assert moved_bytes(first, second) <= 2 * BLOCK
    longer = builder.build({**others, "lib": File(BIG + b"more"), "z": File(BIG)}, first)
    assert blocks_of(longer, "/lib")[:40] == blocks_of(first, "/lib")


def test_what_is_removed_leaves_nothing_behind(builder: Builder) -> None:
    secret = b"a removed file's content " * 1000
    first = builder.build({"a": File(secret), "b": File(secret * 2)})
    second = builder.build({"b": File(secret[:10])}, first)
    assert second.read_bytes().count(b"removed file's content") == 0
    assert first.read_bytes().count(b"removed file's content") > 1000


def test_ten_in_a_row_stay_sound(builder: Builder) -> None:
    image = None
    for version in range(10):
        tree: Tree = {
            f"d{n % 3}/f{n}": File(b"%d" % n * (700 * ((n + version * (n % 4)) % 9)))
            for n in range(version * 3, version * 3 + 40)
        }
        image = builder.build(tree, image)


def test_files_that_do_not_fit_are_refused_with_the_next_step(builder: Builder) -> None:
    with pytest.raises(RequestError, match="do not fit") as caught:
        builder.build({"a": File(os.urandom(40 * MIB))})
    assert caught.value.hint


@pytest.mark.parametrize("name", [b"new\nline", b"tab\t", b"return\r", b"\xff"])
def test_names_that_no_list_can_show_are_refused(name: bytes, tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "tree", {})
    (folder / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(RequestError, match="a name in the image"):
        read_tree(folder)


def test_a_socket_is_refused(tmp_path: Path) -> None:
    folder = make_tree(tmp_path / "tree", {})
    os.mknod(folder / "s", stat.S_IFSOCK | 0o600)
    with pytest.raises(RequestError, match="socket"):
        read_tree(folder)


def test_a_command_longer_than_the_tools_buffer_is_refused(tmp_path: Path) -> None:
    path = "/d" * (COMMAND_BYTES_MAX // 4)
    entry = FileEntry(path, "file", 0o644, 0, 0, 1, size=0, sha256="0" * 64)
    with pytest.raises(RequestError, match="too long"):
        plan([], [entry], tmp_path / ("x" * 100), tmp_path, lambda _: None)


def test_an_attribute_larger_than_a_block_is_refused(tmp_path: Path) -> None:
    entry = FileEntry("/a", "dir", 0o755, 0, 0, 1, xattrs={"user.a": "00" * 5000})
    with pytest.raises(RequestError, match=r"user\.a of /a is too large"):
        plan([], [entry], tmp_path, tmp_path, lambda _: None)


@pytest.mark.parametrize("command", ["sif /a mode 0100600", "rm /d/b", "sif /d/b size 3", "cd /d"])
def test_a_difference_is_found_and_named(command: str, builder: Builder) -> None:
    tree: Tree = {"a": File(b"x"), "d/b": File(b"1234")}
    image = builder.build(tree)
    wanted = entries_of(image).values()
    subprocess.run(["debugfs", "-w", "-R", command, str(image)], check=True, capture_output=True)
    if command.startswith("cd"):
        prove(image, wanted)
        return
    with pytest.raises(ToolFailed) as caught:
        prove(image, wanted)
    assert command.split()[1] in str(caught.value.found)


def test_one_changed_byte_of_content_is_found(builder: Builder) -> None:
    image = builder.build({"a": File(BIG)})
    wanted = entries_of(image).values()
    place = blocks_of(image, "/a")[7]
    assert place is not None
    with image.open("r+b") as file:
        file.seek(place * BLOCK + 9)
        file.write(bytes([BIG[7 * BLOCK + 9] ^ 1]))
    with pytest.raises(ToolFailed, match="differs"):
        prove(image, wanted)


def test_a_damaged_structure_is_found(builder: Builder) -> None:
    image = builder.build({"a": File(BIG)})
    wanted = entries_of(image).values()
    place = blocks_of(image, "/a")[3]
    with image.open("rb") as file:
        system = Ext4(file)
        assert any(first <= (place or 0) < first + count for first, count in system.used_ranges())
    command = ["debugfs", "-w", "-R", f"freeb {place}", str(image)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ToolFailed, match="e2fsck"):
        prove(image, wanted)


@pytest.mark.parametrize("data", [b"", bytes(MIB), os.urandom(MIB)])
def test_what_is_no_file_system_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(RequestError):
        Ext4(file)


CONTENTS = st.builds(
    lambda size, letter: (letter * size)[:size],
    st.sampled_from([0, 1, 59, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, 20 * BLOCK]),
    st.sampled_from([b"a", b"bc", b"\0"]),
)
FILES = st.builds(
    File, CONTENTS, st.sampled_from([0o644, 0o755, 0o4711]), st.sampled_from([{}, NOTE])
)
THINGS = st.one_of(
    FILES,
    st.builds(Dir, st.sampled_from([0o755, 0o700])),
    st.builds(Link, st.sampled_from(["x", "../y", "z" * 80])),
    st.just(Node()),
)
PATHS = st.lists(st.sampled_from(["a", "b", "c-1", "ä ö"]), min_size=1, max_size=3).map("/".join)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Trees where nothing lies below what is no folder, with some hard links."""
    tree: dict[str, File | Dir | Link | Same | Node] = {}
    for path, thing in draw(st.dictionaries(PATHS, THINGS, max_size=12)).items():
        above = {str(parent) for parent in Path(path).parents}
        below = {known for known in tree if path in {str(one) for one in Path(known).parents}}
        if not below and all(isinstance(tree.get(one, Dir()), Dir) for one in above):
            tree[path] = thing
    files = [path for path, thing in tree.items() if isinstance(thing, File)]
    for number in range(draw(st.integers(0, 2))):
        if files:
            tree[f"same-{number}"] = Same(draw(st.sampled_from(files)))
    return tree


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees(), trees())
def test_any_tree_becomes_any_other(builder: Builder, before: Tree, after: Tree) -> None:
    """The builder proves each against its tree; what is unused must be zero as well."""
    parent = builder.build(before)
    image = builder.build(after, parent)
    with image.open("rb") as file:
        used = list(Ext4(file).used_ranges())
    data = image.read_bytes()
    end = 0
    for first, count in [*used, (len(data) // BLOCK, 0)]:
        assert not data[end * BLOCK : first * BLOCK].strip(b"\0")
        end = first + count
    parent.unlink()
    image.unlink()
