"""Optimizers by name: their settings, their state in checkpoints, and its size."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import OptimizerSettings
from fmm_distill.errors import UserError
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training import checkpoint
from fmm_distill.training.memory import forecast_memory
from fmm_distill.training.optimizer import (
    build_optimizer,
    check_optimizer,
    optimizer_factory,
    state_bytes,
    stores_factors,
)
from fmm_distill.training.trainer import Trainer

SOME = [
    {"name": "AdamW"},
    {"name": "Adam", "options": {"amsgrad": True}},
    {"name": "NAdam"},
    {"name": "SGD", "options": {"momentum": 0.9, "nesterov": True}},
    {"name": "SGD"},
    {"name": "RMSprop", "options": {"momentum": 0.5, "centered": True}},
    {"name": "Adafactor"},
]
NAMES = ["AdamW", "amsgrad", "NAdam", "momentum", "SGD", "RMSprop", "Adafactor"]


def trainer_of(teacher_folder, folder, factory=None, **settings):
    training = {"steps": 6, "batch_size": 4, "checkpoint_every": 3, "lr_schedule": "cosine", "warmup_steps": 2}
    loss = {"name": "lagrangian", "stop_gradient": "target"}
    recipe = Recipe.model_validate({"teacher": str(teacher_folder), "loss": loss, "training": training} | settings)
    teacher = load_teacher(recipe.teacher)
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    student = Student.from_teacher(teacher)
    return Trainer(student, teacher, recipe, None, folder, accelerator, optimizer=factory)


def records(folder):
    lines = (folder / "steps.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in ("images_per_second", "peak_memory_gib")}
        for line in lines
    ]


def assert_equal_tensors(left, right):
    assert left.keys() == right.keys()
    for stem in left:
        assert left[stem].keys() == right[stem].keys()
        assert all(torch.equal(left[stem][key], right[stem][key]) for key in left[stem])


def assert_resumes_exactly(teacher_folder, folder, factory=None, **settings):
    through = trainer_of(teacher_folder, folder, factory, **settings)
    through.run()
    expected, lines = checkpoint.load(checkpoint.newest(folder / "checkpoints")), records(folder)
    assert len(lines) == 6
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    resumed = trainer_of(teacher_folder, folder, factory, **settings)
    resumed.run()
    found = checkpoint.load(checkpoint.newest(folder / "checkpoints"))
    assert_equal_tensors(found.tensors, expected.tensors)
    assert found.state == expected.state
    assert records(folder) == lines
    return found


@pytest.mark.parametrize("settings", SOME, ids=NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(teacher_folder, tmp_path, settings):
    found = assert_resumes_exactly(teacher_folder, tmp_path / "run", optimizer=settings)
    # Plain SGD has no state.
    assert bool(found.tensors["optimizer"]) == (settings != {"name": "SGD"})


class Counting(torch.optim.Optimizer):
    """An optimizer whose step depends on plain numbers in its state and in its parameter groups."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "calls": 0, "window": (1.0, 2.0)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            group["window"] = (group["window"][1], group["window"][0])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["seen"] = state.get("seen", 0) + 1
                    size = group["lr"] * group["window"][0] / (state["seen"] + group["calls"])
                    parameter -= size * parameter.grad


def two_groups(parameters):
    """Two groups with learning rates of their own, in another order than the parameters'."""
    small = [p for p in parameters if p.dim() == 1]
    large = [p for p in parameters if p.dim() != 1]
    return torch.optim.SGD([{"params": small, "lr": 1e-2}, {"params": large}], lr=1e-3, momentum=0.9)


@pytest.mark.parametrize("factory", [Counting, two_groups])
def test_an_optimizer_of_ones_own_resumes_exactly(teacher_folder, tmp_path, factory):
    assert_resumes_exactly(teacher_folder, tmp_path / "run", factory)


def test_each_group_follows_the_schedule_from_its_own_rate(teacher_folder, tmp_path):
    trainer = trainer_of(teacher_folder, tmp_path / "run", two_groups)
    rates = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (rates.append([g["lr"] for g in trainer.optimizer.param_groups]), step())
    trainer.run()
    assert [record["learning_rate"] for record in records(tmp_path / "run")] == [small for small, _ in rates]
    assert all(small == pytest.approx(10 * large) for small, large in rates)
    assert rates[2][0] > rates[0][0]


def test_a_state_that_a_checkpoint_can_not_hold(teacher_folder, tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                self.state[group["params"][0]]["odd"] = {1, 2}

    trainer = trainer_of(teacher_folder, tmp_path / "run", lambda parameters: Odd(parameters, lr=0.1))
    with pytest.raises(TypeError, match=r"Odd: expected a state of tensors and plain values, got 0.odd of type set"):
        trainer.run()


@pytest.mark.parametrize("settings", SOME, ids=NAMES)
def test_the_size_of_the_state(teacher_folder, settings):
    recipe = Recipe.model_validate({"teacher": str(teacher_folder), "optimizer": settings})
    teacher = load_teacher(recipe.teacher)
    student = Student.from_teacher(teacher)
    memory = forecast_memory(student, teacher, recipe)
    parameters = list(student.parameters())
    optimizer = build_optimizer(parameters, recipe.optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert memory.optimizer == sum(v.numel() * v.element_size() for v in state if v is not None and v.dim())


def test_factors_are_counted_as_they_are():
    large = nn.Parameter(torch.empty(300, 500, device="meta"))
    assert state_bytes(optimizer_factory(OptimizerSettings(name="Adafactor")), [large]) == 4 * (300 + 500)
    assert state_bytes(optimizer_factory(OptimizerSettings()), [large]) == 2 * 4 * 300 * 500
    assert stores_factors(optimizer_factory(OptimizerSettings(name="Adafactor")))
    assert not stores_factors(optimizer_factory(OptimizerSettings(name="RMSprop")))


def test_the_default_is_adamw_in_one_kernel():
    (group,) = build_optimizer([nn.Parameter(torch.zeros(2))], OptimizerSettings()).param_groups
    assert {key: group[key] for key in ("lr", "betas", "weight_decay", "fused", "foreach")} == {
        "lr": 1e-3,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "fused": True,
        "foreach": None,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Adamw"}, r"optimizer.name: expected one of .*, got Adamw; did you mean AdamW\?"),
        ({"name": "Optimizer"}, "optimizer.name: expected one of"),
        ({"name": "LBFGS"}, "optimizer.name: expected an optimizer that steps on dense gradients alone, got LBFGS"),
        ({"name": "SparseAdam"}, "got SparseAdam"),
        ({"name": "SGD", "betas": (0.8, 0.9)}, "optimizer.betas: SGD has no betas; leave it out"),
        ({"name": "Rprop", "weight_decay": 0.1}, "optimizer.weight_decay: Rprop has no weight_decay"),
        ({"options": {"momentum": 0.9}}, "optimizer.options: expected some of eps, .* for AdamW, got momentum"),
        ({"name": "SGD", "options": {"momentum": -1}}, "optimizer: expected settings that SGD takes.*momentum"),
        ({"name": "Adafactor", "options": {"eps": 3}}, "optimizer: expected settings that Adafactor takes"),
    ],
)
def test_settings_that_an_optimizer_does_not_take(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        check_optimizer(OptimizerSettings.model_validate(settings))
    assert "\n" not in str(caught.value)


def test_parameters_that_an_optimizer_does_not_take():
    settings = OptimizerSettings(name="Muon")
    check_optimizer(settings)
    with pytest.raises(UserError, match=r"got an error from it \(Muon only supports 2D parameters.*; try AdamW"):
        build_optimizer([nn.Parameter(torch.zeros(2, 2, 3, 3))], settings)


def test_numbers_of_options_as_people_write_them():
    settings = OptimizerSettings.model_validate({"options": {"eps": "1e-6"}})
    assert settings.options == {"eps": 1e-6}
    with pytest.raises(ValueError, match="expected keyword arguments other than lr"):
        OptimizerSettings.model_validate({"options": {"lr": 1}})
