"""A second export into a folder loses nothing of the user's, and an interrupted one is put back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from fmm_distill.errors import UserError
from fmm_distill.export.contents import CONTENTS
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.place import in_use, replacing
from fmm_distill.run.marker import MARKER, mark
from fmm_distill.run.publish import pack
from fmm_distill.run.reopen import export_run
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.cli.runs import call, snapshot, training_only, write_recipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory, teacher_folder):
    """A teacher, its student, and a folder that it was exported to."""
    teacher = load_teacher(str(teacher_folder))
    student = Student.from_teacher(teacher)
    folder = export_pipeline(student, teacher, tmp_path_factory.mktemp("exported") / "student", (1,))
    return student, teacher, folder


@pytest.fixture
def again(exported, tmp_path):
    """A copy of the export, and a function that exports into it again."""
    student, teacher, folder = exported
    copy = shutil.copytree(folder, tmp_path / "student")
    return copy, lambda: export_pipeline(student, teacher, copy, (2,))


def edited(folder):
    (folder / "model_index.json").write_text((folder / "model_index.json").read_text() + "\n")
    return "changed model_index.json"


def edited_deeper(folder):
    (folder / "steps-1" / "scheduler" / "scheduler_config.json").write_text("{}")
    return "changed steps-1/scheduler/scheduler_config.json"


def a_card(folder):
    (folder / "README.md").write_text("my own card")
    return "added README.md"


def a_file_among_others(folder):
    (folder / "unet" / "token.txt").write_text("hf_secret")
    return "added unet/token.txt"


def a_folder(folder):
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "1").write_text("1")
    return "added .git/"


def a_link_to_a_file(folder):
    (folder.parent / "diary.md").write_text("years")
    (folder / "diary.md").symlink_to(folder.parent / "diary.md")
    return "added diary.md"


def a_moved_pipeline(folder):
    shutil.move(folder / "steps-1", folder.parent / "elsewhere")
    (folder / "steps-1").symlink_to(folder.parent / "elsewhere")
    return "added steps-1/"


def a_link_to_nothing(folder):
    (folder / "steps-8").symlink_to(folder.parent / "gone")
    return "added steps-8"


def a_name_of_two_lines(folder):
    (folder / "two\nlines").write_text("1")
    return r"added 'two\nlines'"


def a_pipe(folder):
    (folder / "model_index.json").unlink()
    os.mkfifo(folder / "model_index.json")
    return "changed model_index.json"


CHANGES = (edited, edited_deeper, a_card, a_file_among_others, a_folder)
CHANGES += (a_link_to_a_file, a_moved_pipeline, a_link_to_nothing, a_name_of_two_lines, a_pipe)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_exported_is_named_and_stays(again, change):
    folder, export = again
    named = change(folder)
    before = snapshot(folder.parent)
    with pytest.raises(UserError, match=r"move them away, or choose another folder") as caught:
        export()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(folder.parent) == before


def test_files_that_python_leaves_or_that_are_gone_are_in_nobodys_way(again):
    folder, export = again
    (folder / "unet" / "__pycache__").mkdir()
    (folder / "unet" / "__pycache__" / "two_time.pyc").write_text("1")
    (folder / "empty").mkdir()
    shutil.rmtree(folder / "steps-1")
    export()
    assert [path.name for path in folder.glob("steps-*")] == ["steps-2"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["student"]


@pytest.mark.parametrize("name", ["model_index.json", "notes.json"])
def test_a_folder_of_the_users_is_not_an_export(again, name):
    folder, export = again
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / name).write_text('{"_class_name": ["mine", "FlowMapPipeline"]}')
    before = snapshot(folder)
    with pytest.raises(UserError, match="expected an exported student or an empty folder"):
        export()
    assert snapshot(folder) == before


def test_an_empty_folder_and_a_link_to_one_are_filled(again):
    folder, export = again
    shutil.rmtree(folder)
    (folder.parent / "large disk").mkdir()
    folder.symlink_to(folder.parent / "large disk")
    export()
    export()
    assert folder.is_symlink()
    assert (folder.parent / "large disk" / "model_index.json").is_file()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["large disk", "student"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"sha256": {"model_index.json": 1}}', '{"sha256": null}'])
def test_a_damaged_list_is_a_line(again, text):
    folder, export = again
    (folder / CONTENTS).write_text(text)
    with pytest.raises(UserError, match=r"export\.json") as caught:
        export()
    assert "\n" not in str(caught.value)
    assert (folder / "model_index.json").is_file()


def cut(folder):
    """The state after a kill between the two renames of an export."""
    shutil.copytree(folder, folder.with_name(f".{folder.name}.partial"))
    folder.rename(folder.with_name(f".{folder.name}.old"))


@pytest.mark.parametrize("deeper", [False, True], ids=["a folder", "a run"])
def test_a_kill_between_the_renames_leaves_a_student_that_is_found(again, deeper):
    folder, export = again
    mark(folder.parent)
    before = snapshot(folder)
    cut(folder)
    # It is no student that was verified: it is found, and named.
    with pytest.raises(UserError, match=r"expected an exported student|earlier version"):
        pack(folder.parent if deeper else folder, "me/student")
    assert snapshot(folder) == before
    export()
    assert sorted(path.name for path in folder.parent.iterdir()) == [MARKER, "student"]


def test_a_kill_while_the_former_export_is_removed(again):
    folder, export = again
    old = shutil.copytree(folder, folder.with_name(".student.old"))
    (old / "model_index.json").unlink()
    (old / "mine.txt").write_text("years")
    with pytest.raises(UserError, match=r"\.student\.old has files that no export wrote \(mine\.txt\)"):
        export()
    (old / "mine.txt").unlink()
    export()
    assert not old.exists()
    old.mkdir()
    (old / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"\.student\.old is in the way of an export, which did not write it"):
        export()
    assert (old / "thesis.txt").is_file()


def test_an_empty_folder_in_the_place_of_an_interrupted_export(again):
    folder, export = again
    before = snapshot(folder)
    cut(folder)
    folder.mkdir()
    with in_use(folder, "an export"), pytest.raises(UserError, match="in use"):
        export()
    with pytest.raises(ZeroDivisionError), replacing(folder):
        raise ZeroDivisionError
    assert snapshot(folder) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space left")])
def test_an_error_between_the_renames_puts_the_former_export_back(again, monkeypatch, error):
    folder, export = again
    before = snapshot(folder)
    rename = Path.rename

    def failing(self, target):
        if self.name == ".student.partial":
            raise error
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises((KeyboardInterrupt, UserError)):
            export()
    assert snapshot(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["student"]


@pytest.mark.parametrize("purpose", ["an export", "a publication"])
def test_one_at_a_time(again, purpose):
    folder, export = again
    before = snapshot(folder)
    with in_use(folder, purpose), pytest.raises(UserError, match=rf"in use by {purpose}: process {os.getpid()}"):
        export()
    assert snapshot(folder) == before
    export()


def test_the_list_has_every_file(exported):
    folder = exported[2]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert json.loads((folder / CONTENTS).read_text())["sha256"].keys() == there - {CONTENTS}


@pytest.mark.parametrize("name", ["README.md", "notes/diary.md"])
def test_a_run_names_edited_files_before_it_trains_again(tmp_path, teacher_folder, name):
    recipe, run = write_recipe(tmp_path / "tiny.yaml", teacher_folder), tmp_path / "run"
    with training_only():
        assert call("--recipe", recipe, "--output", run, "--set", "training.steps=3")[0] == 0
    with replacing(run / "student") as new:
        (new / "README.md").write_text("the card")
    (run / "student" / name).parent.mkdir(exist_ok=True)
    (run / "student" / name).write_text("mine")
    before = snapshot(run)
    with training_only():
        status, _, err = call("--recipe", recipe, "--output", run)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{name.split('/')[0]}" in err
    assert snapshot(run) == before
    with pytest.raises(UserError, match="move them away"):
        export_run(run, run / "student")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["steps"] == 3


@pytest.mark.parametrize("left", [(), (".fmm_distill.lock",), ("notes.txt",)])
def test_the_folder_of_a_lock_that_a_kill_left_is_removed(tmp_path, left):
    lock = tmp_path / ".student.lock"
    lock.mkdir()
    for name in left:
        (lock / name).touch()
    with in_use(tmp_path / "student", "an export"):
        assert (lock / ".fmm_distill.lock").is_file()
    assert lock.exists() == ("notes.txt" in left)
