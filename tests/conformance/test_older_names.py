"""Pipelines under the class names of the day of their publication."""

from __future__ import annotations

import json

import diffusers
import pytest

from fmm_distill.export.load import load_student
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.run.distill import distill
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import find_index, load_teacher
from tests.conformance.test_prompted_edges import recipe_of
from tests.tiny.diffusion import PIPELINES

# The entry of the configuration by which stock diffusers maps them.
NORMS = {"dit": "ada_norm_zero", "pixart-alpha": "ada_norm_single", "pixart-sigma": "ada_norm_single"}
OLD = "Transformer2DModel"


def published(name, folder):
    """As the repository of its day has it."""
    pipeline = PIPELINES[name].build()
    pipeline.save_pretrained(folder, safe_serialization=True)
    now = type(pipeline.transformer).__name__
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        file.write_text(file.read_text().replace(now, OLD))
    config = json.loads(file.read_text())
    config |= {"norm_type": NORMS[name], "_diffusers_version": "0.12.0.dev0", "use_linear_projection": False}
    file.write_text(json.dumps(config))
    return now


@pytest.mark.parametrize("name", NORMS)
def test_they_open_as_stock_diffusers_opens_them(tmp_path, name):
    now = published(name, tmp_path)
    assert find_index(str(tmp_path)).components["transformer"] == ("diffusers", now)
    call = {} if name == "dit" else {"prompts": ("a cat",), "call": dict(PIPELINES[name].call)}
    teacher = load_teacher(str(tmp_path), **call)
    assert type(teacher.network).__name__ == now
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert all(value.equal(stock[key]) for key, value in teacher.network.state_dict().items())


def test_a_run_from_the_older_names_to_a_verified_export(tmp_path):
    now = published("dit", tmp_path / "teacher")
    recipe = recipe_of(str(tmp_path / "teacher"), "none")
    # Its teacher takes classes.
    recipe = recipe.model_copy(update={"prompts": type(recipe.prompts)()})
    distill(recipe, tmp_path / "run")
    student = tmp_path / "run" / "student"
    assert (student / "verification.json").is_file()
    assert json.loads((student / "steps-1" / "model_index.json").read_text())["transformer"] == ["diffusers", now]
    assert type(load_student(student).teacher.network).__name__ == now


def test_an_export_of_prompts_has_the_current_name(tmp_path):
    now = published("pixart-sigma", tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"), prompts=("a cat",), call=dict(PIPELINES["pixart-sigma"].call))
    folder = export_pipeline(Student.from_teacher(teacher), teacher, tmp_path / "student", (2,))
    assert json.loads((folder / "steps-2" / "model_index.json").read_text())["transformer"] == ["diffusers", now]
    assert type(diffusers.DiffusionPipeline.from_pretrained(folder / "steps-2").transformer).__name__ == now
