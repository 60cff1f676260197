"""Small files are replaced whole, or not at all."""

import os
import stat
from pathlib import Path

import pytest

from provisioner.errors import Conflict
from provisioner.whole_files import FOR_ITS_OWNER, alone_in, replace_whole, write_secret


def test_a_file_is_replaced_with_its_mode_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    umask = os.umask(0o022)
    try:
        replace_whole(path, "first")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        replace_whole(path, "zweitens: ü", FOR_ITS_OWNER)
    finally:
        os.umask(umask)
    assert path.read_text(encoding="utf-8") == "zweitens: ü"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_whole(path, "as it was")
    with pytest.raises(UnicodeEncodeError):
        replace_whole(path, "half\ud800")
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_file_cannot_take_the_place_of_stays(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        replace_whole(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_secret_is_for_its_owner_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, "one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_secret(path, "another")
    assert path.read_text() == "one"


def test_who_comes_second_into_a_folder_is_told_so(tmp_path: Path) -> None:
    why = "somebody is here"
    with (
        alone_in(tmp_path, why),
        pytest.raises(Conflict, match=why),
        alone_in(tmp_path, why),
    ):
        raise AssertionError("nobody comes in")
    with alone_in(tmp_path, "gone again"):
        pass


def test_a_new_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_secret(tmp_path / "secret", "half\ud800")
    assert list(tmp_path.iterdir()) == []
