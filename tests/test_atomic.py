"""Files and folders are whole or absent: after an error, an interrupt, a full disk and a kill."""

import errno
import os

import pytest

from utils.atomic import atomic_file, atomic_folder, scratch_folder


def test_a_file_appears_whole_with_its_parents(tmp_path):
    path = tmp_path / "new" / "deep" / "bank.pt"
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["bank.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "bank.pt"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_file(path) as temporary:
        temporary.write_bytes(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["bank.pt"]


def test_a_disk_that_fills_up_when_data_reach_it_leaves_the_old_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "bank.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_file(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["bank.pt"]


def test_a_folder_appears_whole_also_over_an_empty_one(tmp_path):
    (tmp_path / "set").mkdir()
    with atomic_folder(tmp_path / "set") as temporary:
        (temporary / "image").touch()
        assert not os.listdir(tmp_path / "set")
    assert os.listdir(tmp_path / "set") == ["image"]
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_that_is_not_empty_is_kept(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "set"):
        pass
    assert os.listdir(tmp_path / "set") == ["mine"]
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("context", [atomic_folder, scratch_folder])
def test_an_interrupted_folder_leaves_nothing(tmp_path, context):
    with pytest.raises(KeyboardInterrupt), context(tmp_path / "set") as temporary:
        (temporary / "image").touch()
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_what_a_killed_program_left_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / ".b[1].pt.0a1b2c3d.tmp").touch()
    (tmp_path / ".b[1].pt.4e5f6071.tmp").mkdir()
    (tmp_path / ".other.pt.0a1b2c3d.tmp").touch()
    with atomic_file(tmp_path / "b[1].pt"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".other.pt.0a1b2c3d.tmp", "b[1].pt"]


def test_files_are_as_readable_as_the_user_s_others(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
