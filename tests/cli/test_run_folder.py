"""The folder of a run: whose it is, who writes in it, and what happens when a file of it is broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fmm_distill.io.lock import locked
from fmm_distill.run.marker import MARKER
from tests.cli.runs import TINY, assert_same_run, call, checkpoints, snapshot, training_only


@pytest.fixture
def run(tmp_path, stopped) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def refused(*arguments: object) -> str:
    """The one line of a command that is refused."""
    status, _, err = call(*arguments)
    assert status == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def project(tmp_path, tiny, monkeypatch) -> Path:
    """A folder of a user's own, with a recipe of the name that a run's has."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "thesis.tex").write_text("all of it", encoding="utf-8")
    shutil.copy(tiny, folder / "recipe.yaml")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
@pytest.mark.parametrize("output", [".", "../project", "../link", "{}"])
def test_a_project_with_a_recipe_is_no_run(project, output, fresh):
    before = snapshot(project.parent)
    line = refused("--recipe", "recipe.yaml", "--output", output.format(project), *fresh)
    assert "expected a run folder or an empty one, got other files" in line
    assert "fresh" not in line
    assert snapshot(project.parent) == before


@pytest.mark.parametrize(
    "arguments", [("status",), ("sample",), ("evaluate",), ("export", "{out}"), ("publish", "{name}", "--dry-run")]
)
def test_no_verb_takes_a_project_for_a_run(project, arguments):
    before = snapshot(project.parent)
    verb, *rest = (text.format(out=project.parent / "out", name="me/student") for text in arguments)
    line = refused(verb, ".", *rest)
    assert "expected a run folder" in line or verb == "publish"
    assert snapshot(project.parent) == before


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/step-00000006-copy/state.json", "data/0.png"])
def test_fresh_removes_nothing_where_something_else_is(run, tiny, name):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).touch()
    before = snapshot(run)
    line = refused("--recipe", tiny, "--output", run, "--fresh")
    assert "expected only files of a run in" in line
    assert snapshot(run) == before
    with training_only():
        assert call("--recipe", tiny, "--output", run)[0] == 0


def test_a_run_without_marker_is_left_alone_until_it_is_marked(run, tiny, finished):
    (run / MARKER).unlink()
    before = snapshot(run)
    for fresh in ((), ("--fresh",)):
        line = refused("--recipe", tiny, "--output", run, *fresh)
        assert f'If it is a run of an earlier version, write {{"format": 1}} into {run / MARKER}' in line
    assert snapshot(run) == before
    (run / MARKER).write_text('{"format": 1}', encoding="utf-8")
    with training_only():
        assert call("--recipe", tiny, "--output", run)[0] == 0
    assert_same_run(run, finished[0])


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_a_second_start_is_refused_while_the_first_is_at_work(run, tiny, fresh):
    partial = run / "checkpoints" / ".step-00000009.partial"
    partial.mkdir()
    with locked(run, "a run"):
        before = snapshot(run)
        line = refused("--recipe", tiny, "--output", run, *fresh)
        assert snapshot(run) == before
        assert partial.is_dir()
    assert f"{run} is in use by a run: process " in line
    assert "fresh" not in line
    assert not (run / ".fmm_distill.lock").exists()


def test_a_finished_run_is_shown_while_it_is_locked(tiny, finished):
    with locked(finished[0], "a run"):
        assert call("--recipe", tiny, "--output", finished[0])[0] == 0


def test_the_lock_of_a_run_is_free_when_it_ends(run, tiny):
    with training_only(stop_before=8):
        assert call("--recipe", tiny, "--output", run)[0] == 130
    assert not (run / ".fmm_distill.lock").exists()


def test_paths_that_were_typed_from_elsewhere(tmp_path, teacher_folder, monkeypatch):
    """A run is the same from another folder, and its verbs find its teacher."""
    place = tmp_path / "place"
    shutil.copytree(teacher_folder, place / "t")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    monkeypatch.chdir(place)
    command = ("--recipe", tmp_path / "tiny.yaml", "--output", tmp_path / "run")
    with training_only(stop_before=4):
        assert call(*command, "--teacher", "t")[0] == 130
    monkeypatch.chdir(tmp_path)
    with training_only(stop_before=8):
        for teacher in ("./place/t", "place/t/", place / "t"):
            status, out, err = call(*command, "--teacher", teacher)
            assert status == 130, err
            assert "changed" not in out
    status, _, err = call("sample", "run", "--steps", "1", "--count", "1")
    assert status == 0, err
    weights = place / "t" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    before = snapshot(tmp_path / "run")
    for arguments in ((*command, "--teacher", place / "t"), ("sample", "run"), ("export", "run", "out")):
        line = refused(*arguments)
        assert "teacher: expected the files that the run in" in line
        assert "unet/diffusion_pytorch_model.safetensors has changed" in line
    assert snapshot(tmp_path / "run") == before
    # A teacher that was moved, not changed, is the same.
    shutil.copytree(teacher_folder, tmp_path / "moved")
    with training_only():
        status, out, err = call(*command, "--teacher", tmp_path / "moved")
    assert status == 0, err
    assert f"changed  teacher: {place / 't'} until step 6, {tmp_path / 'moved'} from there" in out
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["teacher"] == str(tmp_path / "moved")


def test_images_that_are_gone_are_noticed(tmp_path, tiny):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8), 50 * i, dtype=np.uint8)).save(images / f"{i}.png")
    command = ("--recipe", tiny, "--data", images, "--output", tmp_path / "run")
    with training_only(stop_before=4):
        status, _, err = call(*command)
        assert status == 130, err
    (images / "3.png").unlink()
    for arguments in (command, ("sample", tmp_path / "run")):
        assert "data.source: expected the files that the run" in refused(*arguments)
    (tmp_path / "run" / "inputs.json").unlink()
    with training_only():
        status, _, err = call(*command)
    assert status == 0, err


BROKEN = {
    "empty": "",
    "torn": '{"rows": [',
    "a list": "[1, 2]",
    "a word": "word",
    "null": "null",
    "other keys": '{"a": 1}\n',
    "other values": '{"format": [], "teacher": 3, "rows": 3, "revision": 3, "sha256": 3, "step": "x"}\n',
}
FILES = (MARKER, "recipe.yaml", "teacher.json", "inputs.json", "prompts.json", "evaluation.json", "manifests", "states")
VERBS = {
    "status": ("status", "{run}"),
    "sample": ("sample", "{run}", "--output", "{out}.png"),
    "evaluate": ("evaluate", "{run}"),
    "export": ("export", "{run}", "{out}"),
    "distill": ("--recipe", "{recipe}", "--output", "{run}"),
}
# Those that a verb does not read, or that say nothing about it.
UNREAD = {
    ("status", "teacher.json"),
    ("status", "inputs.json"),
    ("status", "prompts.json"),
    ("status", "manifests"),
    ("status", "states"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory, finished) -> Path:
    return shutil.copytree(finished[0], tmp_path_factory.mktemp("broken") / "run")


def replaced(run: Path, name: str) -> list[Path]:
    names = {"manifests": "manifest.json", "states": "state.json"}
    return sorted((run / "checkpoints").glob(f"*/{names[name]}")) if name in names else [run / name]


# Each takes five commands: what one check refuses like another is in the long tests.
LONG = ("a list", "a word", "null")


@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.slow] * (how in LONG)) for how in BROKEN])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_one_line_from_every_verb(tmp_path, tiny, broken, name, how):
    paths = replaced(broken, name)
    contents = [path.read_bytes() if path.exists() else None for path in paths]
    # A finished run that is distilled again reads no checkpoints, nor its teacher's commits and prompts.
    shown = broken / "evaluation.json"
    evaluation = shown.read_bytes()
    if name != "evaluation.json":
        shown.unlink()
    try:
        for path in paths:
            path.write_text(BROKEN[how], encoding="utf-8")
        for verb, arguments in VERBS.items():
            line = [text.format(run=broken, out=tmp_path / "out", recipe=tiny) for text in arguments]
            if (verb, name) in UNREAD or (name, how) in (("inputs.json", "other keys"), ("prompts.json", "a list")):
                continue
            text = refused(*line)
            assert any(str(path) in text or f"{path.parent}: {path.name}" in text for path in paths), (verb, text)
        assert call("status", broken)[0] == (0 if ("status", name) in UNREAD else 2)
    finally:
        shown.write_bytes(evaluation)
        for path, content in zip(paths, contents, strict=True):
            path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("name", ["steps.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("line", ["7", "{}", "[]", "word", "", '{"step": "x"}'])
def test_a_log_with_a_foreign_line(run, name, line):
    log = run / name
    before = log.read_text(encoding="utf-8") if log.exists() else ""
    log.write_text(before + line + "\n", encoding="utf-8")
    text = refused("status", run)
    assert f"{log}: line {len(before.splitlines()) + 1}" in text
    assert checkpoints(run) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("more", [(), ("--fresh",), ("--dry-run",)])
@pytest.mark.parametrize("inside", ["recipe.yaml", "mine/other.yaml"])
def test_the_record_of_a_run_is_no_recipe_for_it(run, more, inside):
    file = run / inside
    file.parent.mkdir(exist_ok=True)
    file.write_text((run / "recipe.yaml").read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    before = file.read_bytes()
    line = refused("--recipe", str(file), "--output", str(run), *more)
    assert "which holds the record of a run; copy it to another folder and pass the copy" in line
    assert file.read_bytes() == before


@pytest.mark.parametrize("typed", ["./gone", "/no/teacher"])
def test_a_missing_teacher_is_not_another_recipe(run, tiny, typed):
    line = refused("--recipe", tiny, "--teacher", typed, "--output", str(run))
    assert f"{typed}: expected a pipeline folder" in line
    assert "--fresh" not in line
