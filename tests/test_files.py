"""Files and folders that are there whole or not at all, whatever happens; tests/faults.py has the faults."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxmse.outputs.files import check_apart, check_place, replace_file, replace_folder
from fxmse.outputs.workplaces import make_workplace


@pytest.mark.parametrize(
    ("kind", "outcomes"),
    [
        ("folder", {"old", "new"}),
        ("folder, first", {"None", "new"}),
        ("folder, moved", {"old", "new", "put back"}),
        ("file", {"old", "new"}),
    ],
)
def test_nothing_is_lost_whichever_line_is_the_last(tmp_path, kind, outcomes):
    script = Path(__file__).with_name("faults.py")
    command = [sys.executable, "-I", "-S", script, kind, tmp_path / "saves"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {outcome.partition(": ")[2]: number for outcome, number in json.loads(done.stdout).items()}
    assert found.keys() == outcomes
    assert min(found[outcome] for outcome in outcomes - {"put back"}) >= 10


def fill(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    fill(tmp_path / "out", a="1", b="2")
    with replace_folder(tmp_path / "out") as new:
        fill(new, a="3")
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("a", "3")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_new_files_have_the_rights_that_files_have(tmp_path):
    (tmp_path / "plain").write_text("")
    with replace_file(tmp_path / "out.pt2") as new:
        new.write_text("x")
    assert (tmp_path / "out.pt2").stat().st_mode == (tmp_path / "plain").stat().st_mode


def leave(folder, name, **texts):
    """What a killed run left."""
    folder.mkdir(exist_ok=True)
    fill(folder / name, **texts)
    return folder


def test_what_killed_runs_left_is_cleared(tmp_path):
    leave(tmp_path / ".out.fxmse-aaaaaaaa", "new", half="")
    leave(tmp_path / ".out.fxmse-bbbbbbbb", "old", whole="")
    fill(tmp_path / "out", a="1")
    check_place(tmp_path / "out", is_folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_what_a_killed_run_moved_aside_goes_back(tmp_path):
    leave(leave(tmp_path / ".out.fxmse-aaaaaaaa", "old", a="1"), "new", a="2")
    with pytest.warns(UserWarning, match=r"out is back as it was before a run that was killed"):
        check_place(tmp_path / "out", is_folder=True)
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_belongs_to_others_stays(tmp_path):
    with make_workplace(tmp_path / "out") as alive:
        kept = {
            alive,
            leave(tmp_path / ".out.fxmse-aaaaaaaa", "mine"),  # which no run puts there
            leave(tmp_path / ".out.fxmse-aaa", "new"),
            leave(tmp_path / ".other.fxmse-aaaaaaaa", "new"),
            leave(tmp_path / ".out.fxmse-x.fxmse-aaaaaaaa", "old"),
        }
        (tmp_path / ".out.fxmse-cccccccc").symlink_to(alive)
        with replace_folder(tmp_path / "out") as new:
            fill(new, a="1")
        assert set(tmp_path.iterdir()) == kept | {tmp_path / "out", tmp_path / ".out.fxmse-cccccccc"}
    assert not alive.exists()


def test_without_locks_what_may_have_been_left_is_named(tmp_path, monkeypatch):
    left = leave(tmp_path / ".out.fxmse-aaaaaaaa", "old", a="1")

    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"fxmse-aaaaaaaa is of another run: remove it if that has ended; .*/old, if"):
        check_place(tmp_path / "out", is_folder=True)
    assert left.exists()


def test_a_folder_that_cannot_be_flushed_is_said_to_be_there(tmp_path, monkeypatch):
    flush = os.fsync

    def fail(handle):
        if os.path.samestat(os.fstat(handle), tmp_path.stat()):
            raise OSError(5, "Input/output error")
        flush(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.warns(UserWarning, match="out is complete, but may not outlast a power cut"),
        replace_folder(tmp_path / "out") as new,
    ):
        fill(new, a="1")
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("is_folder", [False, True])
def test_places_that_cannot_be_taken_are_refused(tmp_path, monkeypatch, is_folder):
    (tmp_path / "file").write_text("")
    fill(tmp_path / "folder")
    (tmp_path / "link").symlink_to("folder" if is_folder else "file")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    refused = {
        "link": "is a symbolic link to",
        "dangling": "is a symbolic link to nowhere",
        "none/out": "is no folder that can be written: No such file",
        "file/out": "is no folder that can be written: Not a directory",
        f"{'x' * 240}": "is no folder that can be written: File name too long",
        "pipe": "is a file: expected a folder" if is_folder else "is no file: expected a file",
        **({"file": "is a file: expected a folder"} if is_folder else {"folder": "is a folder: expected a file"}),
    }
    before = sorted(tmp_path.rglob("*"))
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            check_place(tmp_path / name, is_folder=is_folder)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.chdir(tmp_path / "folder")
    if is_folder:
        for name in (".", "..", "../folder"):
            with pytest.raises(ValueError, match="has the current folder in it"):
                check_place(Path(name), is_folder=True)
        monkeypatch.setattr(Path, "is_mount", lambda path: True)
        with pytest.raises(ValueError, match="a file system is mounted"):
            check_place(tmp_path / "folder", is_folder=True)


def test_what_is_read_is_recognised_however_it_is_spelt(tmp_path, monkeypatch):
    fill(tmp_path / "model", weights="")
    (tmp_path / "link").symlink_to("model")
    os.link(tmp_path / "model" / "weights", tmp_path / "hard")
    monkeypatch.chdir(tmp_path / "model")
    model = tmp_path / "model"
    for path in (model, tmp_path / "link", Path("../model"), Path(".")):
        with pytest.raises(ValueError, match=r"is the same as .*, which is read: choose a path beside it"):
            check_apart(path, model)
    for path in (model / "out", tmp_path / "link" / "out", Path("out")):
        with pytest.raises(ValueError, match="is in "):
            check_apart(path, model)
    with pytest.raises(ValueError, match="is around "):
        check_apart(tmp_path, model)
    with pytest.raises(ValueError, match="is the same as"):
        check_apart(tmp_path / "hard", model / "weights")
    check_apart(tmp_path / "model-w4a16", model)
