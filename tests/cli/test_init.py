"""The command that starts from an earlier student, and what its run and its export record of that."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from fmm_distill.config.matching import MatchingSettings
from fmm_distill.export.card import card
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import read_manifest
from fmm_distill.export.public import known_paths, public_manifest, public_recipe
from fmm_distill.training.checkpoint import newest
from tests.cli.runs import call, training_only


@pytest.fixture(scope="module")
def continued(finished, tiny, tmp_path_factory):
    """The folder of a run of two steps that starts from a finished one, and its log."""
    folder = tmp_path_factory.mktemp("continued") / "run"
    command = ("--recipe", tiny, "--output", folder, "--set", "training.steps=2")
    status, out, err = call(*command, "--set", f"student.init={finished[0]}")
    assert status == 0, err
    return folder, out, command


def test_the_run_starts_from_the_student(continued, finished):
    folder, out, _ = continued
    assert f"start:   the student {finished[0]} (average 0.999 at step 12)\n" in out
    start = load_file(newest(finished[0] / "checkpoints") / "ema-0.999.safetensors")
    last = load_file(newest(folder / "checkpoints") / "student.safetensors")
    changed = [name for name in last if name.endswith("jump_weight")]
    # Two steps with a learning rate of 1e-3 move no weight far.
    assert changed
    assert all((last[name] - start[name]).abs().max() < 5e-3 for name in changed)
    assert any(start[name].abs().max() > 6e-3 for name in changed)
    inputs = json.loads((folder / "inputs.json").read_text())
    assert len(inputs["student.init"]) == 1


def test_the_export_names_the_student(continued, finished):
    folder = continued[0]
    exported = folder / "student"
    manifest = read_manifest(exported)
    assert (manifest.init, manifest.init_revision) == (str(finished[0]), None)
    assert load_student(exported).manifest == manifest
    text = (exported / "README.md").read_text()
    assert f"- started from the student local:{finished[0].name}\n" in text
    assert str(finished[0].parent) not in text + card(exported, "me/student")
    known = known_paths(exported, manifest)
    assert public_manifest(manifest, known).init == f"local:{finished[0].name}"
    assert yaml.safe_load(public_recipe(exported, manifest, known))["student"]["init"] == f"local:{finished[0].name}"


def test_the_earlier_student_is_an_input_of_the_run(continued, finished, tiny, tmp_path):
    """The same command finds the finished run; another student is refused, and so is a changed one."""
    _, _, command = continued
    status, out, _ = call(*command, "--set", f"student.init={finished[0]}")
    assert (status, "is finished; --fresh starts again" in out) == (0, True)
    status, _, err = call(*command, "--set", f"student.init={finished[0] / 'student'}")
    assert status == 2
    assert "is a run of another recipe (student.init: expected " in err
    init = shutil.copytree(finished[0], tmp_path / "init")
    command = ("--recipe", tiny, "--output", tmp_path / "run", "--set", f"student.init={init}")
    with training_only(stop_before=4):
        assert call(*command)[0] == 130
    with training_only():
        assert call(*command, "--set", "training.steps=5")[0] == 0
        shutil.rmtree(init / "checkpoints")
        status, _, err = call(*command)
    assert status == 2
    assert "error: student.init: expected the files that the run in" in err
    for verb in (("sample",), ("export", tmp_path / "out")):
        status, _, err = call(verb[0], tmp_path / "run", *verb[1:])
        assert status == 2
        assert "error: student.init: expected the files that the run in" in err
    shutil.rmtree(init)
    status, _, err = call("sample", tmp_path / "run")
    assert (status, err.splitlines()[-1].startswith(f"error: student.init {init}: expected a run folder")) == (2, True)


def test_a_dry_run_names_the_student(finished, tiny):
    status, out, err = call("--recipe", tiny, "--set", f"student.init={finished[0] / 'student'}", "--dry-run")
    assert status == 0, err
    assert f"start:   the student {finished[0] / 'student'}\n" in out


def test_status_counts_the_steps_of_the_second_stage(finished, tmp_path):
    """A run without steps of its own is not divided by them."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["training"]["steps"] = 0
    matching = MatchingSettings.model_validate({"steps": 10, "critic": {"warmup_steps": 2}})
    recipe["matching"] = matching.model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, out, err = call("status", folder)
    assert status == 0, err
    assert "12 of 12 (100.0 %" in out
