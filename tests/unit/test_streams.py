"""What is printed may be lost; a run, and what it holds, may not."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.export import verify
from fmm_distill.io.streams import Lossy, lossy_streams
from fmm_distill.run.distill import distill
from fmm_distill.run.plan import plan
from tests.cli.runs import TINY, losses, training_only

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")


def program(*arguments: object, **changes: object) -> subprocess.CompletedProcess:
    """The command line of a verb that loads no torch."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | changes.pop("env", {})
    command = [sys.executable, "-m", "fmm_distill", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | changes
    return subprocess.run(command, env=environment, check=False, **streams)


@needs_full
@pytest.mark.parametrize("arguments", [("recipes",), ("recipes", "show", "digits"), ("--help",)])
def test_lost_output_of_a_command_is_one_line(arguments):
    with FULL.open("wb") as full:
        found = program(*arguments, stdout=full)
    assert found.returncode == 2
    assert found.stderr.decode().splitlines() == [
        "standard output could not be written (No space left on device); some lines are lost"
    ]


@needs_full
def test_a_full_standard_error_changes_no_status():
    with FULL.open("wb") as full:
        assert program("recipes", "show", "nowhere", stderr=full).returncode == 2
        assert program("recipes", stderr=full).returncode == 0


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        found = program("losses", stdout=write)
    finally:
        os.close(write)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_an_encoding_does_not_have(encoding):
    found = program("--recipe", "M\u00f6bius \u2713", env={"PYTHONIOENCODING": encoding})
    assert found.returncode == 2
    line = found.stderr.decode(encoding)
    assert line.count("\n") == 1
    assert line.startswith("error: recipe 'M")


@pytest.mark.parametrize("arguments", [("--recipe", "digits", "--output"), ("status",), ("sample", "--output")])
def test_names_that_are_no_utf8(arguments):
    found = program(*arguments, os.fsdecode(b"r\xff"))
    assert found.returncode == 2
    assert found.stderr.decode().splitlines() == [
        "error: r\\udcff: expected a name in UTF-8; rename it, or start with PYTHONUTF8=1 in the environment"
    ]


def recipe_of(teacher: Path) -> Recipe:
    settings = {"teacher": str(teacher)} | TINY
    settings["training"] = settings["training"] | {"steps": 2}
    return parse(settings, "here")


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


class Narrow(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


@pytest.mark.parametrize("stream", [Closed, Narrow, pytest.param(lambda: FULL.open("w"), marks=needs_full)])
def test_a_training_outlives_its_streams(tmp_path, teacher_folder, stream):
    redirect = contextlib.redirect_stdout, contextlib.redirect_stderr
    out, err = stream(), stream()
    with training_only(), redirect[0](out), redirect[1](err):
        distill(recipe_of(teacher_folder), tmp_path / "M\u00f6bius")
        assert (sys.stdout, sys.stderr) == (out, err)
    for each in (out, err):
        # What a full device holds fails again.
        with contextlib.suppress(OSError):
            each.close()
    assert len(losses(tmp_path / "M\u00f6bius")) == 2


def test_what_is_lost_is_kept_in_mind_and_nothing_is_written_past_it():
    with contextlib.redirect_stdout(Closed()), lossy_streams() as (out, _):
        print("x", flush=True)
        assert not hasattr(sys.stdout, "buffer")
    assert isinstance(out.lost, BrokenPipeError)
    narrow = Narrow()
    Lossy(narrow).write("\u00e9\udcff")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"\\xe9\\udcff"


def test_no_place_for_temporary_files_is_said_before_a_run(monkeypatch, teacher_folder):
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(UserError, match="set TMPDIR"):
        plan(recipe_of(teacher_folder))


@pytest.mark.parametrize("fault", ["missing", "full"])
def test_no_room_for_temporary_files_at_the_end_is_one_line(monkeypatch, tmp_path, fault):
    if fault == "missing":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    else:
        # The other process runs out of room.
        full = f"import sys; sys.exit('OSError: [Errno 28] {os.strerror(28)}')"
        monkeypatch.setattr(verify, "files", lambda _: tmp_path)
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "reload.py").write_text(full)
    with pytest.raises(UserError, match="the export can't be verified: no temporary files") as caught:
        verify._reload([])
    assert "\n" not in str(caught.value)
