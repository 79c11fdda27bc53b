"""One process per folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fmm_distill.errors import UserError
from fmm_distill.io.lock import LockedError, is_lock_file, locked
from tests.logs import logged

HOLD = """
import signal, sys, time
from pathlib import Path
# A process of a shell in the background starts with the interrupt ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from fmm_distill.io.lock import locked
with locked(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder."""
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that has no locks."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def debris(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_a_second_process_is_refused_and_the_first_named(holder):
    folder, process = holder
    with pytest.raises(UserError) as caught, locked(folder, "another"):
        pass
    text = str(caught.value)
    assert f"{folder} is in use by a test: process {process.pid} on {socket.gethostname()}" in text
    assert f"kill {process.pid}" in text


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_of_a_process_that_ended_is_free(holder, end):
    folder, process = holder
    process.send_signal(end)
    process.wait()
    with locked(folder, "another"):
        pass
    assert not debris(folder)


def test_two_of_one_process_exclude_each_other(tmp_path):
    with locked(tmp_path, "one"), pytest.raises(LockedError, match=f"process {os.getpid()}"), locked(tmp_path, "two"):
        pass
    with locked(tmp_path, "three"):
        pass


@pytest.mark.parametrize("name", ["run", "some/deeper/run"])
def test_nothing_is_left_of_a_folder_in_which_nothing_was_put(tmp_path, name):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / name, "one"):
        1 / 0  # noqa: B018
    assert not debris(tmp_path)
    with locked(tmp_path / name, "one"):
        assert all(is_lock_file(path.name) for path in (tmp_path / name).iterdir())
        (tmp_path / name / "kept.txt").touch()
    assert debris(tmp_path / name) == ["kept.txt"]


def test_an_empty_folder_that_was_there_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine", "one"):
        pass
    assert debris(tmp_path) == ["mine"]


def test_one_can_wait_for_the_other(tmp_path):
    first, waits, lines = threading.Event(), threading.Event(), []

    def hold() -> None:
        with locked(tmp_path / "run", "one"):
            first.set()
            waits.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    first.wait()
    with logged(lines, lambda _: waits.set()), locked(tmp_path / "run", "two", wait=True):
        pass
    thread.join()
    assert len(lines) == 1
    assert lines[0].endswith("waiting for that process to end")


def test_of_launched_processes_the_first_holds_it(tmp_path, monkeypatch):
    with locked(tmp_path / "run", "one"):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / "run", "two"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(LockedError), locked(tmp_path / "run", "three"):
            pass


def test_a_forked_child_does_not_hold_it(tmp_path):
    with locked(tmp_path, "one"):
        ready, go = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with locked(tmp_path, "two"):
            pass
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)


def test_without_locks_a_file_is_the_lock(tmp_path, no_locks):
    lines: list[str] = []
    with logged(lines), locked(tmp_path / "run", "one"):
        assert "has no locks" in lines[0]
        gone = r"if that process is gone, remove .*\.fmm_distill\.claim"
        with pytest.raises(LockedError, match=gone), locked(tmp_path / "run", "two"):
            pass
    assert not debris(tmp_path)


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"pid": 2**22 + 1}, True),  # above the largest number of a process
        ({"process": "of a process that had the number before"}, True),
        ({}, False),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),
    ],
)
def test_a_stale_file_is_taken_over(tmp_path, no_locks, change, free):
    with locked(tmp_path, "one"):
        claim = next(path for path in tmp_path.iterdir())
        text = claim.read_text(encoding="utf-8")
    claim.write_text(json.dumps(json.loads(text) | change), encoding="utf-8")
    if free:
        with locked(tmp_path, "two"):
            assert debris(tmp_path) == [claim.name]
        assert not debris(tmp_path)
    else:
        with pytest.raises(LockedError), locked(tmp_path, "two"):
            pass
        assert debris(tmp_path) == [claim.name]


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_lock_whose_text_is_not_written_yet_is_one(tmp_path, no_locks, text):
    (tmp_path / ".fmm_distill.claim").write_text(text, encoding="utf-8")
    with pytest.raises(LockedError, match="in use by another process"), locked(tmp_path, "two"):
        pass


def test_a_folder_that_can_not_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"), locked(tmp_path / "file" / "run", "one"):
        pass
