"""A file is the old or the new one, whatever fails; a link is never written through."""

import os
from pathlib import Path

import pytest

from ddk_cache.util import durable


def test_write_replaces_a_link_and_not_the_file_behind_it(tmp_path: Path) -> None:
    diary, link = tmp_path / "diary", tmp_path / "report.html"
    diary.write_text("private")
    link.symlink_to(diary)
    durable.write(link, "page")
    assert (diary.read_text(), link.read_text(), link.is_symlink()) == ("private", "page", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary", "report.html"]


def test_append_refuses_a_link_a_folder_and_a_pipe(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    diary.write_text("private")
    (tmp_path / "link").symlink_to(diary)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        with pytest.raises(OSError, match=r"link|director|regular|device"):
            durable.append(tmp_path / name, b"more")
    durable.append(tmp_path / "log", "one\n")
    durable.append(tmp_path / "log", b"two\n")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert diary.read_text() == "private"


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "state.json"
    durable.write(path, "old")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="Input/output"):
        durable.write(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    assert path.read_text() == "old"


def test_content_folder_and_new_parents_are_flushed_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(durable, "sync", lambda path: synced.append(str(path.relative_to(tmp_path))))
    durable.make_folder(tmp_path / "a" / "b")
    durable.write(tmp_path / "a" / "b" / "file", b"")
    assert synced[:2] == ["a", "."]
    assert durable.is_staged(synced[2])
    assert synced[3] == "a/b"
    durable.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 4


def test_an_error_names_the_file_and_not_the_staged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        durable.write(tmp_path / "missing" / "file", b"")
    assert caught.value.filename == str(tmp_path / "missing" / "file")


def test_what_a_killed_writer_left_is_removed_and_a_live_one_is_not_disturbed(tmp_path: Path) -> None:
    page, left, other = (tmp_path / name for name in ("page", "page#0123456789ab", "page.2#0123456789ab"))
    left.touch()
    other.touch()
    with durable.replacing(page) as staged:
        durable.remove_staged(tmp_path.glob("page#*"))
        assert sorted(tmp_path.iterdir()) == sorted([staged, other])
    assert sorted(tmp_path.iterdir()) == [page, other]
