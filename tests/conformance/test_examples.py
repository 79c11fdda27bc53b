"""The scripts and the notebook of examples/, run with tiny settings."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from tests.tiny.diffusion import stable_diffusion

FOLDER = Path(__file__).parents[2] / "examples"
# Those that train a teacher by plain diffusers are not distillations.
TEACHERS = {"train_digits_teacher.py", "train_teacher.py"}
ARGUMENTS = {
    "own_loss.py": ["--steps", "2"],
    "pixel_teacher.py": ["--steps", "2", "--teacher-steps", "2"],
    "text_lora.py": ["--steps", "1", "--batch-size", "2", "--size", "16"],
    "velocity_field.py": ["--steps", "2"],
}


def test_every_example_is_run():
    scripts = {path.name for path in FOLDER.glob("*.py")}
    assert scripts == ARGUMENTS.keys() | TEACHERS
    assert [path.name for path in FOLDER.glob("*.ipynb")] == ["digits.ipynb"]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_script_distills_and_saves(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module(name.removesuffix(".py"))
    arguments = [*ARGUMENTS[name], "--output", str(tmp_path / "run")]
    if name == "text_lora.py":
        stable_diffusion(
            DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
        ).save_pretrained(tmp_path / "teacher", safe_serialization=True)
        arguments += ["--teacher", str(tmp_path / "teacher")]
    assert module.main(arguments) is not None
    assert list((tmp_path / "run" / "student").rglob("*.safetensors"))


def test_the_notebook_runs(tmp_path, monkeypatch):
    cells = json.loads((FOLDER / "digits.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert "STEPS = 300" in code[0]
    code[0] = code[0].replace("STEPS = 300", "STEPS = 2")
    # Fewer samples than the notebook measures: the evaluation is most of its time.
    assert "evaluation.samples=256" in code[1]
    small = 'evaluation.samples=8", "evaluation.endpoint_samples=4", "evaluation.endpoint_solver_steps=4'
    code[1] = code[1].replace("evaluation.samples=256", small)
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, cell in enumerate(code):
        exec(compile(cell, f"digits.ipynb, code cell {number}", "exec"), names)
    assert [tuple(images.shape) for images in names["images"].values()] == [(10, 1, 8, 8)] * 3
    assert (tmp_path / "runs" / "digits-notebook" / "student" / "model_index.json").is_file()
