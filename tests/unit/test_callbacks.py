"""The hooks of the training loop, and the log that uses them."""

from __future__ import annotations

import json

import pytest
from accelerate import Accelerator

from fmm_distill.config.recipe import Recipe
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.callbacks import Callback, StepLog
from fmm_distill.training.trainer import Trainer


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, step):
        self.calls.append(("start", step))

    def on_step(self, step, metrics):
        self.calls.append(("step", step, metrics["step"]))

    def on_checkpoint(self, step, path):
        assert (path / "manifest.json").is_file()
        self.calls.append(("checkpoint", step, path.name))

    def on_evaluate(self, step, rows):
        self.calls.append(("evaluate", step, rows))

    def on_end(self):
        self.calls.append(("end",))


class Sick(Teacher):
    """A teacher whose answers are infinite for some of its calls."""

    calls = 0

    def velocity(self, x, t, cond=None):
        self.calls += 1
        v = super().velocity(x, t, cond)
        return v * float("inf") if self.calls in (3, 4) else v


def run(teacher_folder, folder, callbacks, evaluate=None, kind=None, **training):
    loss = {"name": "lagrangian", "derivative": "central"}
    training = {"steps": 3, "batch_size": 4, "checkpoint_every": 2} | training
    recipe = Recipe.model_validate({"teacher": str(teacher_folder), "loss": loss, "training": training})
    teacher = load_teacher(recipe.teacher)
    teacher = teacher if kind is None else kind(**vars(teacher))
    folder.mkdir(exist_ok=True)
    student = Student.from_teacher(teacher)
    Trainer(student, teacher, recipe, None, folder, Accelerator(cpu=True)).run(callbacks, evaluate)


def test_hooks_in_their_order(teacher_folder, tmp_path):
    recorder, rows = Recorder(), [{"sampler": "student"}]
    run(teacher_folder, tmp_path / "run", [recorder], lambda step: rows if step == 2 else None)
    assert recorder.calls == [
        ("start", 0),
        ("step", 1, 0),
        ("step", 2, 1),
        ("checkpoint", 2, "step-00000002"),
        ("evaluate", 2, rows),
        ("step", 3, 2),
        ("checkpoint", 3, "step-00000003"),
        ("end",),
    ]
    again = Recorder()
    run(teacher_folder, tmp_path / "run", [again])
    assert again.calls == [("start", 3), ("end",)]


def test_a_return_to_a_checkpoint_starts_again(teacher_folder, tmp_path):
    recorder = Recorder()
    run(teacher_folder, tmp_path / "run", [recorder], kind=Sick, max_non_finite_steps=2, steps=4)
    assert [call[:2] for call in recorder.calls if call[0] in ("start", "step")] == [
        ("start", 0),
        *(("step", step) for step in (1, 2, 3, 4)),
        ("start", 2),
        *(("step", step) for step in (3, 4)),
    ]
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert lines == [0, 1, 2, 3]


def test_an_exception_of_a_hook_ends_the_run_and_every_callback(teacher_folder, tmp_path):
    class Stop(Callback):
        def on_step(self, step, metrics):
            if step == 2:
                raise KeyError("enough")

    recorder = Recorder()
    with pytest.raises(KeyError, match="enough"):
        run(teacher_folder, tmp_path / "run", [recorder, Stop()])
    assert recorder.calls[-1] == ("end",)
    assert len((tmp_path / "run" / "steps.jsonl").read_text().splitlines()) == 2


def test_the_log_has_no_later_lines(tmp_path):
    log = StepLog(tmp_path)
    for step in range(3):
        log.on_step(step + 1, {"step": step})
    log.on_start(1)
    assert (tmp_path / "steps.jsonl").read_text() == '{"step": 0}\n'
