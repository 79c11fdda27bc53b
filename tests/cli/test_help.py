"""The help of every command at 80 columns, and what commands answer to typing errors."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from fmm_distill.cli import command
from tests.cli.runs import call, snapshot


def commands(group: click.Command, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    found = {path: group}
    for name, verb in getattr(group, "commands", {}).items():
        found |= commands(verb, (*path, name))
    return found


EVERY = commands(command)


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_help_fits_and_is_complete(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = call(*path, "--help")
    assert status == 0
    assert call(*path, "-h")[1] == out
    assert "\b" not in out
    assert "\\b" not in out
    assert "..." not in re.sub(r"N,\.\.\.|\[ARGS\]\.\.\.", "", out), "a summary that is cut"
    assert max(map(len, out.splitlines())) <= 80
    for option in EVERY[path].params:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_examples_are_on_lines_of_their_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in call("--help")[1].splitlines()]
    for example in re.findall(r"^ +((?:fmm-distill|accelerate) .*)$", command.callback.__doc__, re.MULTILINE):
        assert example in lines


def test_the_sections_of_a_help_list_every_option_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = call("evaluate", "--help")[1]
    titles = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert titles == [*EVERY["evaluate",].sections, "Options"]
    listed = re.findall(r"^  (--[a-z-]+|-h), ?|^  (--[a-z-]+)", out, re.MULTILINE)
    names = sorted(one or other for one, other in listed)
    expected = [param.opts[0] for param in EVERY["evaluate",].params if isinstance(param, click.Option)]
    assert names == sorted([*expected, "-h"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("exprot", "a", "b"), "Did you mean 'export'?"),
        (("digits",), "`fmm-distill --recipe digits` distills by that recipe."),
        (("--recipe", "digits", "--outptu", "x"), "Did you mean '--output'?"),
        (("recipes", "shw"), "Did you mean 'show'?"),
        (("recipes", "show", "digts"), "did you mean digits?"),
        (("sample", "a", "--steps", "4,4"), "'4,4': expected each number once"),
        (("export", "a", "b", "--steps", "1,99999999"), "expected numbers of at most 100,000"),
        (("evaluate", "a", "--also-steps", "2,1,2"), "expected each number once"),
        (("sample", "a", "--seed", str(2**64)), "is not in the range"),
        (("inspect", "builtin:digits", "--set", "teacher=x"), "expected one change of teacher"),
        (("inspect", "builtin:digits", "--set", "pipeline={a: 1, a: 2}"), "a is there twice"),
        (("inspect", "builtin:digits", "--set", "pipline.height=3"), "did you mean pipeline?"),
        (("status",), "Missing argument 'RUN'"),
        (("env", "now"), "unexpected extra argument"),
        (("losses", "--al"), "No such option"),
    ],
)
def test_a_typing_error_is_one_line(arguments, says):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sample", "RUN", "--output", "grid.foo"), "--output grid.foo: expected a name that ends in .png, "),
        (("sample", "RUN", "--output", "folder"), "--output folder: expected a name that ends in .png, "),
        (("sample", "RUN", "--output", "pictures.png"), "pictures.png could not be written (it is a folder"),
        (
            ("sample", "RUN", "--output", "nowhere/a.png"),
            "--output nowhere/a.png: expected a path in an existing folder, got nowhere, which is not one",
        ),
        (("status", "RUN", "--output", "curves.pdf"), "--output curves.pdf: expected a name that ends in .png"),
        (("status", "RUN", "--output", "nowhere/a.png"), "got nowhere, which is not one"),
        (("status", "RUN", "--output", "pictures.png"), "it is a folder"),
        (("evaluate", "RUN", "--output", "folder"), "it is a folder"),
        (("evaluate", "RUN", "--output", "file/a.json"), "got file, which is not one"),
        (("evaluate", "RUN", "--report", "file"), "expected a folder, got the file file"),
        (("evaluate", "RUN", "--report", "file/report"), "expected a folder, got the file "),
        # Nothing is made before the run is found.
        (("evaluate", "RUN", "--report", "new/report"), "expected a run folder"),
        (("sample", "RUN", "--output", "new.png"), "expected a run folder"),
    ],
)
def test_outputs_are_checked_before_anything_is_opened(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "pictures.png"):
        Path(name).mkdir()
    Path("file").write_text("x")
    before = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    status, _, err = call(*("./nowhere" if part == "RUN" else part for part in arguments))
    assert status == 2
    assert err.count("\n") == 1
    assert says in err
    assert (snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == before
