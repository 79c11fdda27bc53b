"""Measuring on the way leaves everything else as it was."""

from __future__ import annotations

import json

import torch
from accelerate import Accelerator

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import load_images
from fmm_distill.evaluation.monitor import Monitor
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.load import load_teacher

EVALUATION = {
    "every": 2,
    "steps": [1],
    "ddim_steps": [1],
    "dpmsolver_steps": [1],
    "samples": 64,
    "endpoint_samples": 2,
    "endpoint_solver_steps": 2,
    "features": "digits",
}


class Drawing(Teacher):
    """A teacher that draws from the global generator whenever it is asked."""

    def velocity(self, x, t, cond=None):
        torch.rand(())
        return super().velocity(x, t, cond)


def test_generator_modes_and_weights_are_untouched(tmp_path, teacher_folder):
    recipe = Recipe.model_validate({"teacher": str(teacher_folder), "training": {"steps": 9}, "evaluation": EVALUATION})
    teacher = Drawing(**vars(load_teacher(recipe.teacher)))
    student = Student.from_teacher(teacher)
    # Modes that nobody has on purpose, so that a change shows.
    student.train()
    teacher.network.train()
    state = {name: value.clone() for name, value in student.state_dict().items()}
    modes = [module.training for network in (student, teacher.network) for module in network.modules()]
    generator = torch.get_rng_state()
    reference = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    monitor = Monitor(lambda: student, teacher, recipe, reference, tmp_path, Accelerator(cpu=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        for step in range(10):
            monitor.reached(step)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()
    assert [module.training for network in (student, teacher.network) for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert all(not network._forward_hooks for network in (student.network, teacher.network))
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    # The last of 9 steps is the end's, the first is before any.
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert all(row["frechet"] > 0 for line in lines for row in line["rows"])
    assert all(0 <= row[key] <= 1 for line in lines for row in line["rows"] for key in ("precision", "recall"))
    assert {line["protocol"]["precision_recall"] for line in lines} == {"neighbor 3, 64 samples and as many images"}
    pictures = {(tmp_path / "pictures" / f"samples-{step}.png").read_bytes() for step in (2, 4, 6, 8)}
    assert len(pictures) == 1, "the same weights and noises make the same picture"
    monitor.reached(4)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_a_second_stage_is_evaluated_from_the_values_of_the_map(tmp_path, teacher):
    matching = {"steps": 4, "critic": {"warmup_steps": 3}, "evaluate_every": 2, "stop": {"metric": "endpoint_error"}}
    settings = {"training": {"steps": 2}, "evaluation": EVALUATION | {"every": 0}, "matching": matching}
    recipe = Recipe.model_validate(settings)
    student = Student.from_teacher(teacher)
    reference = load_images(DataSettings(source="builtin:digits"), (1, 8, 8))
    monitor = Monitor(lambda: student, teacher, recipe, reference, tmp_path, Accelerator(cpu=True))
    for step in range(recipe.total_steps + 1):
        monitor.reached(step)
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 7, 9]
    assert len({line["rows"][0]["endpoint_error"] for line in lines}) == 1
