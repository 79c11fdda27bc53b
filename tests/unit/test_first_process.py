"""The first process works for all, and a run's prompts are the same wherever their file is."""

from __future__ import annotations

import json

import pytest

from fmm_distill.config.recipe import Recipe
from fmm_distill.errors import UserError
from fmm_distill.run import distill as run
from fmm_distill.run import inputs
from fmm_distill.run.folder import PROMPTS, check_folder, make_folder
from fmm_distill.run.inputs import with_paths
from tests.cli.runs import TINY


def test_what_one_process_writes_or_checks_ends_all_where_it_fails(teacher_folder, tmp_path, monkeypatch):
    """Each of these calls is inside on_first, which tells the other processes of an error."""
    active, called = [], []

    def watched_first(accelerator, work, real=run.on_first):
        active.append(True)
        real(accelerator, work)
        active.pop()

    def watch(name):
        real = getattr(run, name)

        def watched(*args, **kwargs):
            assert active, name
            called.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(run, name, watched)

    def stop(*args):
        raise UserError("far enough")

    names = ("locked", "check_replaceable", "make_folder", "store_commits", "store_inputs", "keep_trial")
    for name in names:
        watch(name)
    monkeypatch.setattr(run, "on_first", watched_first)
    monkeypatch.setattr(run, "try_export", lambda *_, **__: "a digest")
    monkeypatch.setattr(run, "prepare_samples", stop)
    with pytest.raises(UserError, match="far enough"):
        run.distill(Recipe.model_validate({"teacher": str(teacher_folder)} | TINY), tmp_path / "run")
    assert set(called) == set(names)


def prompted(place, key, name):
    (place / name).write_text("a cat\na dog\n", encoding="utf-8")
    return with_paths(Recipe.model_validate({"prompts": {key: str(place / name)}}))


@pytest.mark.parametrize(("key", "name"), [("file", "b.txt"), ("dataset", "b.csv")])
def test_prompts_that_were_moved_are_left_to_their_own_check(tmp_path, key, name):
    folder = tmp_path / "run"
    make_folder(folder, prompted(tmp_path, "file", "a.txt"), fresh=False)
    moved = prompted(tmp_path, key, name)
    with pytest.raises(UserError, match=r"a run of another recipe \(prompts\."):
        check_folder(folder, moved, fresh=False, seen={})
    (folder / PROMPTS).write_text(json.dumps(["a cat", "a dog"]), encoding="utf-8")
    changes = check_folder(folder, moved, fresh=False, seen={})
    assert any(str(tmp_path / name) in change for change in changes)
    # Nothing would compare the prompts of a recipe that has none.
    with pytest.raises(UserError, match=r"a run of another recipe \(prompts\.file"):
        check_folder(folder, Recipe(), fresh=False, seen={})


def test_a_second_look_at_the_folder_digests_nothing(tmp_path, teacher_folder, monkeypatch):
    recipe, seen = with_paths(Recipe(teacher=str(teacher_folder))), {}
    make_folder(tmp_path / "run", recipe, fresh=False)
    check_folder(tmp_path / "run", recipe, fresh=False, seen=seen)
    assert seen.keys() == {"teacher"}
    monkeypatch.delattr(inputs, "contents")
    assert check_folder(tmp_path / "run", recipe, fresh=False, seen=seen) == []
