"""Only what a run wrote is a run's."""

from __future__ import annotations

import pytest

from fmm_distill.errors import UserError
from fmm_distill.export.place import in_use
from fmm_distill.run.marker import MARKER, check_vacant, clear, foreign, is_run, mark, require_run

WRITTEN = (
    "recipe.yaml",
    "recipe-until-6.yaml",
    "recipe-until-123456789.yaml",
    "environment.json",
    "teacher.json",
    "inputs.json",
    "prompts.json",
    "tracker.json",
    "steps.jsonl",
    "evaluations.jsonl",
    "evaluation.json",
    "samples.png",
    "steps.png",
    "curves.png",
    "checkpoints/step-00000006/student.safetensors",
    "checkpoints/step-100000000/state.json",
    "checkpoints/.step-00000009.partial/state.json",
    "checkpoints/.step-00000009.replaced/state.json",
    "checkpoints/.step-00000003.removed.partial/state.json",
    "checkpoints/.step-00000004.replaced.removed.partial/state.json",
    "trajectories/part-00000.safetensors",
    "trajectories/.part-00001.safetensors.4711.partial",
    "pictures/samples-500.png",
    "student/model_index.json",
    "student/steps-1/unet/config.json",
    ".student.partial/steps-1/unet/config.json",
    ".student.0.partial/unet/config.json",
    ".student.old/model_index.json",
    ".student.lock/.fmm_distill.lock",
    "tensorboard/fmm_distill/events.out.tfevents.1",
    "wandb/run-1/files/config.yaml",
    ".steps.jsonl.partial",
    ".recipe.yaml.partial",
    ".fmm_distill.lock",
)
FOREIGN = (
    "notes.txt",
    "my-recipe.yaml",
    "recipe-until-friday.yaml",
    "recipe.yaml.orig",
    "samples (1).png",
    "data/0.png",
    "student.zip",
    "checkpoints/step-00000006-copy/student.safetensors",
    "checkpoints/step-abc/student.safetensors",
    "checkpoints/step-6/student.safetensors",
    "checkpoints/README",
    "pictures/holiday.png",
    "trajectories/part-1.safetensors",
    ".student.lock/notes.txt",
    "checkpoints/step-00000006.replaced/state.json",
    ".git/config",
    ".env",
)


def put(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_all_that_a_run_writes_is_removed_and_the_folder_stays(tmp_path):
    mark(tmp_path)
    put(tmp_path, WRITTEN)
    clear(tmp_path)
    assert files(tmp_path) == [MARKER, ".fmm_distill.lock", "recipe.yaml"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_student_that_is_in_use_is_not_removed(tmp_path):
    mark(tmp_path)
    put(tmp_path, WRITTEN)
    with in_use(tmp_path / "student", "a publication"):
        before = files(tmp_path)
        with pytest.raises(UserError, match="in use by a publication"):
            clear(tmp_path)
        assert files(tmp_path) == before
    assert not (tmp_path / ".student.lock").exists()


@pytest.mark.parametrize("name", FOREIGN)
def test_nothing_is_removed_where_anything_else_is(tmp_path, name):
    mark(tmp_path)
    put(tmp_path, (*WRITTEN, name))
    before = files(tmp_path)
    with pytest.raises(UserError, match="expected only files of a run") as caught:
        clear(tmp_path)
    assert name.split("/")[0] in str(caught.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoints", "student", "evaluation.json"])
def test_what_a_link_names_is_not_removed(tmp_path, name):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    mark(run)
    put(elsewhere, ("step-00000006/state.json",))
    (run / name).symlink_to(elsewhere, target_is_directory=True)
    assert foreign(run) == [run / name]
    with pytest.raises(UserError, match=name):
        clear(run)
    assert files(elsewhere) == ["step-00000006/state.json"]


@pytest.mark.parametrize(
    "names", [("recipe.yaml",), ("recipe.yaml", "environment.json", "steps.jsonl"), ("checkpoints/step-00000006/a",)]
)
def test_names_make_no_run(tmp_path, names):
    put(tmp_path, names)
    assert not is_run(tmp_path)
    with pytest.raises(UserError, match="expected a run folder or an empty one") as caught:
        check_vacant(tmp_path)
    assert "fresh" not in str(caught.value)
    assert ("earlier version" in str(caught.value)) == ("recipe.yaml" in names)
    with pytest.raises(UserError, match="expected a run folder"):
        require_run(tmp_path)
    # What the message says to do.
    (tmp_path / MARKER).write_text('{"format": 1}', encoding="utf-8")
    require_run(tmp_path)


def test_a_kill_before_the_marker_leaves_a_vacant_folder(tmp_path):
    put(tmp_path, (f".{MARKER}.partial", ".fmm_distill.lock", ".fmm_distill.claim"))
    put(tmp_path, (".student.0.partial/unet/config.json", ".student.4711.partial/config.json"))
    check_vacant(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("", "is empty"), ("[]", "expected a mapping"), ("{}", "format is missing"), ('{"format": 2}', "later version")],
)
def test_a_broken_marker_is_one_line(tmp_path, text, fault):
    (tmp_path / MARKER).write_text(text, encoding="utf-8")
    put(tmp_path, ("recipe.yaml",))
    for refuse in (require_run, clear):
        with pytest.raises(UserError, match=fault):
            refuse(tmp_path)
    assert files(tmp_path) == [MARKER, "recipe.yaml"]
