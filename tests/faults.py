"""Saves that end at any line: run as a script, which needs no torch and forks a child for each.

``python faults.py KIND FOLDER`` prints how many faults there were and what came of them, or fails. KIND has "file" or
"folder", and may have "first" (nothing is there yet) and "moved" (a file system that cannot exchange two names).
"""

import collections
import errno
import importlib.util
import itertools
import json
import os
import shutil
import sys
import types
import warnings
from pathlib import Path

ROOM = Path(__file__).parents[1] / "fxmse" / "outputs"
SAVED, FAILED, KILLED, INTERRUPTED = 0, 1, 9, 130
# What a save calls that can fail.
CALLS = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "scandir", "stat", "unlink")


def load(name):
    """A module of fxmse.outputs, without what importing fxmse brings along."""
    for package in ("fxmse", "fxmse.outputs"):
        sys.modules.setdefault(package, types.ModuleType(package))
    spec = importlib.util.spec_from_file_location(f"fxmse.outputs.{name}", ROOM / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load("workplaces")
files = load("files")


def save(kind, folder, text):
    if "file" in kind:
        with files.replace_file(folder / "out.pt2") as new:
            new.write_text(text * 2)
    else:
        with files.replace_folder(folder / "out") as new:
            for name in ("a", "b"):
                (new / name).write_text(text)


def read(folder):
    """What is there, whole; None where nothing is."""
    file, out = folder / "out.pt2", folder / "out"
    if not file.exists() and not out.exists():
        return None
    text = file.read_text() if file.exists() else "".join((out / name).read_text() for name in ("a", "b"))
    half = text[: len(text) // 2]
    assert text == half * 2, f"{text!r} is torn"
    return half


def fault_at_line(number, fault):
    """Has the line of that number, of all that a save runs in fxmse and shutil, not be run."""
    lines = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (files.__file__, files.make_workplace.__code__.co_filename):
            return None
        if event == "line" and next(lines) == number:
            sys.settrace(None)
            fault()
        return trace

    sys.settrace(trace)


def fault_at_call(number, fault):
    """Has the call of that number, of all to the system, not be done."""
    calls = itertools.count()

    def wrap(function):
        def call(*arguments, **options):
            if next(calls) == number:
                fault()
            return function(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def interrupt():
    raise KeyboardInterrupt


def kill():
    os._exit(KILLED)


def fail():
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS = {"interrupt": (fault_at_line, interrupt), "kill": (fault_at_line, kill), "full disk": (fault_at_call, fail)}


def run_child(kind, folder, number, fault):
    """Saves in a process of its own; returns how that ended, and whether the fault was reached."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        inject, strike = FAULTS[fault]

        def strike_once():
            os.write(writing, b"x")
            strike()

        code = SAVED
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                inject(number, strike_once)
                save(kind, folder, "new")
        except KeyboardInterrupt:
            code = INTERRUPTED
        except (OSError, ValueError):
            code = FAILED
        finally:
            sys.settrace(None)
            os._exit(code)
    os.close(writing)
    was_reached = bool(os.read(reading, 1))
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), was_reached


def check(kind, folder, code, fault):
    """Raises AssertionError where something was lost; returns what there is."""
    before = None if "first" in kind else "old"
    found = read(folder)
    if "moved" in kind and fault == "kill" and before and found is None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            files.check_place(folder / "out", is_folder=True)
        assert "back as it was before a run that was killed" in str(caught[0].message)
        assert read(folder) == before
        found = "put back"
    else:
        assert found in (before, "new"), found
    assert code != SAVED or found == "new"
    assert code != FAILED or found == before
    save(kind, folder, "last")
    assert read(folder) == "last"
    assert [path.name for path in folder.iterdir()] == ["out.pt2" if "file" in kind else "out"]
    return found


def main(kind, folder):
    folder = Path(folder)
    if "moved" in kind:
        files._exchange = lambda *_: False
    os.fsync = lambda handle: None  # no power is cut here
    outcomes = collections.Counter()
    for fault in FAULTS:
        for number in itertools.count():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if "first" not in kind:
                save(kind, folder, "old")
            code, was_reached = run_child(kind, folder, number, fault)
            if not was_reached:
                assert code == SAVED
                break
            outcomes[f"{fault}: {check(kind, folder, code, fault)}"] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
