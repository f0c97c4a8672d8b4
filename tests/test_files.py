"""Sets of files: all or none, and nothing that somebody else made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

import vlmscope
from vlmscope import files
from vlmscope.errors import StoreError

ABOUT = {"format": "set-1", "of": "one"}
ONE = {"a.csv": pd.DataFrame({"x": [1]}), "b/c.txt": "text", "b/d.png": b"picture"}
TWO = {"a.csv": pd.DataFrame({"x": [2]}), "e.parquet": pd.DataFrame({"x": [2]})}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def listed(folder: Path) -> list[str]:
    return [*json.loads((folder / "set.json").read_text())["files"]]


@contextmanager
def failing(at: int, problem: int = errno.ENOSPC) -> Iterator[list[str]]:
    """The operation of this number on files fails, and all that would write behind it."""
    done: list[str] = []

    def counted(name: str, before: Callable[..., object]) -> Callable[..., object]:
        def once(*given: object, **more: object) -> object:
            done.append(name)
            if len(done) > at:
                raise OSError(problem, os.strerror(problem))
            return before(*given, **more)

        return once

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "open"), (Path, "mkdir")):
            patch.setattr(owner, name, counted(name, getattr(owner, name)))
        yield done


def test_a_set_is_replaced_by_the_next_of_its_kind(tmp_path: Path) -> None:
    files.save(tmp_path / "new" / "set", "set.json", ABOUT, ONE)
    folder = tmp_path / "new" / "set"
    assert contents(folder).keys() == {"a.csv", "b/c.txt", "b/d.png", "set.json"}
    (folder / "mine.txt").write_text("mine")
    files.save(folder, "set.json", ABOUT, TWO)
    assert contents(folder).keys() == {"a.csv", "e.parquet", "mine.txt", "set.json"}
    assert listed(folder) == ["a.csv", "e.parquet"]
    assert pd.read_parquet(folder / "e.parquet")["x"].item() == 2


def test_a_manifest_may_lie_in_a_folder_below(tmp_path: Path) -> None:
    given = {"page.html": "page", "page-figures/one.png": b"one"}
    (tmp_path / "mine").touch()
    for content in (given, given | {"page.html": "other"}):
        files.save(tmp_path, "page-figures/set.json", ABOUT, content)
    assert contents(tmp_path).keys() == {"mine", "page-figures/set.json", *given}
    assert (tmp_path / "page.html").read_text() == "other"


@pytest.mark.parametrize("name", ["a.csv", "b/c.txt"])
def test_what_the_manifest_does_not_list_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError, match="is there, and no result of this command; choose another --out"):
            files.save(tmp_path, "set.json", ABOUT, ONE)
        assert contents(tmp_path) == before
        files.save(tmp_path / "else", "set.json", ABOUT, TWO)
        before = contents(tmp_path)
    files.save(tmp_path, "set.json", ABOUT, {"f.txt": "other names"})
    with pytest.raises(StoreError, match="is there, and no result of this command"):
        files.claim(tmp_path, "set.json", "set-1", [name])


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    files.save(tmp_path, "set.json", ABOUT, ONE)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"holds 'set-1', where set-2 is to be written; choose another"):
        files.save(tmp_path, "set.json", {"format": "set-2"}, TWO)
    (tmp_path / "set.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        files.save(tmp_path, "set.json", ABOUT, TWO)
    assert contents(tmp_path) == before | {"set.json": b"{"}


def test_a_manifest_that_lists_what_is_elsewhere_removes_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "set"
    files.save(folder, "set.json", ABOUT, ONE)
    odd = ["../mine.txt", str(tmp_path / "mine.txt"), "b/../../mine.txt", "", "3", "b"]
    named = dict.fromkeys([*listed(folder), *odd], "")
    (folder / "set.json").write_text(json.dumps(ABOUT | {"files": named}))
    files.save(folder, "set.json", ABOUT, TWO)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "c.txt").write_text("mine")
    folder = tmp_path / "set"
    files.save(folder, "set.json", ABOUT, ONE)
    shutil.rmtree(folder / "b")
    (folder / "b").symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match=r"c\.txt: is there, and no result"):
        files.save(folder, "set.json", ABOUT, ONE)
    files.save(folder, "set.json", ABOUT, TWO)
    assert contents(tmp_path / "mine") == {"c.txt": b"mine"}


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("before", [{}, ONE])
def test_a_failure_before_the_names_change_changes_nothing(
    tmp_path: Path, before: Mapping[str, pd.DataFrame | str | bytes], problem: int
) -> None:
    folder = tmp_path / "set"
    for like in (folder, tmp_path / "other") if before else ():
        files.save(like, "set.json", ABOUT, before)
    with failing(10**9) as done:
        files.save(tmp_path / "other", "set.json", ABOUT, TWO)
    first, there = done.index("replace"), contents(tmp_path)
    for at in range(first + 1):
        with failing(at, problem), pytest.raises(StoreError, match=r"disk is full|cannot be written"):
            files.save(folder, "set.json", ABOUT, TWO)
        assert contents(tmp_path) == there
        assert folder.exists() == bool(before)


def test_a_set_that_was_not_finished_is_mended_by_the_next(tmp_path: Path) -> None:
    files.save(tmp_path, "set.json", ABOUT, ONE)
    with failing(10**9) as done:
        files.save(tmp_path, "set.json", ABOUT, TWO)
    files.save(tmp_path, "set.json", ABOUT, ONE)
    for at in range(done.index("replace") + 1, len(done)):
        if done[at] != "replace":
            continue
        with failing(at), pytest.raises(StoreError):
            files.save(tmp_path, "set.json", ABOUT, TWO)
        assert json.loads((tmp_path / "set.json").read_text())["unfinished"]
        assert not [name for name in contents(tmp_path) if name.endswith(".tmp")]
        files.save(tmp_path, "set.json", ABOUT, TWO)
        assert listed(tmp_path) == ["a.csv", "e.parquet"]
        files.save(tmp_path, "set.json", ABOUT, ONE)


def test_writers_of_one_folder_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [
        threading.Thread(target=files.save, args=(tmp_path, "set.json", ABOUT, given))
        for given in [ONE, TWO] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(contents(tmp_path)) - {"set.json"} == set(listed(tmp_path))
    monkeypatch.setattr(files, "_WAIT", 0.0)
    with files.locked(tmp_path), pytest.raises(StoreError, match="another process is writing there; wait"):
        files.write(tmp_path / "one", b"")


@pytest.mark.parametrize("name", ["pipe", "folder", "link"])
def test_only_files_are_replaced(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    mode = (tmp_path / name).lstat().st_mode
    with pytest.raises(StoreError, match="name a file"):
        files.claim_file(tmp_path / name)
    with pytest.raises(StoreError, match="choose another --out"):
        files.write(tmp_path / name, b"x")
    assert (tmp_path / name).lstat().st_mode == mode
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    files.try_place(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file: cannot be written \(Not a directory\)"):
        files.try_place(tmp_path / "file" / "new")


def test_a_checkpoint_is_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vlmscope.load("toy-blip")
    model.save(tmp_path / "model")
    there = contents(tmp_path)
    model.save(tmp_path / "model")
    assert contents(tmp_path) == there
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    with pytest.raises(StoreError, match=r"config\.json: is there, and no result of this command"):
        model.save(tmp_path / "mine")
    assert contents(tmp_path) == there | {"mine/config.json": b"mine"}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.processor, "save_pretrained", full)
    with pytest.raises(StoreError, match="the disk is full"):
        model.save(tmp_path / "model")
    assert contents(tmp_path) == there | {"mine/config.json": b"mine"}
