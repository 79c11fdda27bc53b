"""What a training step costs, in counts that no clock enters: calls, passes through autograd, bytes.

A count that grows is an optimization that was lost; one that falls is to be recorded here.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter

import pytest
import torch
from accelerate import Accelerator

from benchmarks import steps
from benchmarks.step_cases import CASES, Case, make_teacher, make_trainer
from fmm_distill.config.recipe import Recipe
from fmm_distill.core.derivatives import central, exact, forward_mode
from fmm_distill.core.draws import draw, step_generator
from fmm_distill.data.samples import ImageBatch
from fmm_distill.student.student import Student
from fmm_distill.training.critic import build_critic
from fmm_distill.training.ema import frozen_copy
from fmm_distill.training.matching import CriticObjective
from fmm_distill.training.memory import _Live
from fmm_distill.training.objective import Objective
from fmm_distill.training.signals import StopRequest

# By loss and derivative: calls of the student and its copies, of the teacher; forward passes through the network's
# convolutions, tangents among them, and backward passes, of any number of samples; KiB of the peak beside weights,
# moments and averages.
RECORDED = {
    ("consistency, step 0", "central"): (2, 1, 3.0, 1.0, 586),
    ("consistency, step 0", "exact"): (1, 1, 3.0, 1.0, 672),
    ("consistency, step 0.05", "none"): (2, 1, 3.0, 1.0, 670),
    ("consistency_trajectory", "none"): (4, 4, 8.0, 2.0, 1073),
    ("critic update", "none"): (1, 1, 3.0, 1.0, 580),
    ("distribution_matching", "none"): (4, 1, 8.0, 3.0, 673),
    ("distribution_matching, all jumps", "none"): (5, 1, 9.0, 5.0, 1760),
    ("eulerian, none", "central"): (1, 1, 2.0, 1.0, 1154),
    ("eulerian, none", "exact"): (1, 1, 3.0, 2.0, 1333),
    ("eulerian, target", "central"): (2, 1, 3.0, 1.0, 586),
    ("eulerian, target", "exact"): (1, 1, 3.0, 1.0, 672),
    ("eulerian, teacher", "central"): (2, 1, 3.0, 1.0, 1160),
    ("eulerian, teacher", "exact"): (2, 1, 5.0, 2.0, 1339),
    ("flow_map_matching", "central"): (2, 0, 2.0, 2.0, 1703),
    ("flow_map_matching", "exact"): (2, 0, 2.9, 2.9, 1846),
    ("flow_matching", "none"): (1, 1, 2.0, 1.0, 580),
    ("lagrangian, none", "central"): (1, 1, 2.0, 2.0, 1616),
    ("lagrangian, none", "exact"): (1, 1, 2.9, 2.9, 1773),
    ("lagrangian, target", "central"): (2, 1, 3.0, 1.0, 670),
    ("lagrangian, target", "exact"): (1, 1, 2.9, 1.0, 678),
    ("lagrangian, target, no data", "central"): (3, 1, 4.0, 1.0, 667),
    ("lagrangian, target, no data", "exact"): (2, 1, 3.9, 1.0, 675),
    ("lagrangian, teacher", "central"): (1, 1, 2.0, 1.0, 1213),
    ("lagrangian, teacher", "exact"): (1, 1, 2.9, 1.9, 1370),
    ("mean_flow", "central"): (2, 0, 2.0, 1.0, 586),
    ("mean_flow", "exact"): (1, 0, 2.0, 1.0, 672),
    ("mean_flow, improved", "central"): (3, 0, 3.0, 1.0, 586),
    ("mean_flow, improved", "exact"): (2, 0, 3.0, 1.0, 672),
    ("operator_regression", "none"): (1, 8, 9.0, 1.0, 580),
    ("progressive", "none"): (3, 0, 3.0, 1.0, 586),
    ("progressive_distillation", "none"): (3, 0, 3.0, 1.0, 586),
    ("score_implicit_matching", "none"): (4, 1, 8.0, 5.0, 1562),
    ("score_implicit_matching, all jumps", "none"): (5, 1, 9.0, 7.0, 2649),
    ("terminal_velocity", "central"): (3, 0, 3.0, 2.0, 1673),
    ("terminal_velocity", "exact"): (3, 0, 3.9, 2.9, 1830),
}
WAITING = ("lagrangian, target", "lagrangian, target, no data", "eulerian, none", "progressive", "mean_flow")
ENGINES = [(case, engine) for case in CASES for engine in case.engines()]


class Counted(_Live):
    """Operations by name, too."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture(scope="module")
def teacher():
    return make_teacher("unet", "tiny")


def step_of(case, engine, teacher, folder):
    """Counts of the second step of a trainer, when its optimizer has its moments."""
    trainer = make_trainer(case, engine, teacher, 4, Accelerator(cpu=True), folder)
    trainer.train_step(case.first_step, StopRequest())
    copies = [average.module for average in trainer.averages.values()]
    copies += [] if trainer.frozen is None else [trainer.frozen]
    calls, counted = Counter(), Counted()
    for name, networks in {"student": [trainer.student, *copies], "teacher": [teacher]}.items():
        for owner in networks:
            owner.network.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    with counted:
        trainer.train_step(case.first_step + 1, StopRequest())
    teacher.network._forward_pre_hooks.clear()
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in teacher.network.modules())
    convolutions = [counted.names[name] / layers for name in ("convolution", "convolution_backward")]
    peak = max(moment.live for moment in counted.moments) / 1024
    return calls["student"], calls["teacher"], *convolutions, peak


@pytest.mark.parametrize(("case", "engine"), ENGINES, ids=[f"{case.name}-{engine}" for case, engine in ENGINES])
def test_the_costs_of_a_step(teacher, tmp_path, case, engine):
    found = step_of(case, engine, teacher, tmp_path)
    recorded = RECORDED[case.name, engine]
    assert found[:2] == recorded[:2]
    assert found[2:4] == pytest.approx(recorded[2:4], abs=0.15)
    assert found[4] == pytest.approx(recorded[4], rel=0.1)


@pytest.mark.parametrize("gradient", ["last", "all"])
@pytest.mark.parametrize("loss", ["distribution_matching", "score_implicit_matching"])
def test_the_passes_of_the_matching(teacher, tmp_path, loss, gradient):
    """Against the number by hand: the jumps of each rollout, and what teacher and critic are called for."""
    matching = {"loss": {"name": loss}, "rollout": {"gradient": gradient}, "critic": {"warmup_steps": 0, "updates": 2}}
    case = Case("by hand", {"name": "lagrangian", "stop_gradient": "target"}, None, data=False, matching=matching)
    trainer = make_trainer(case, "none", teacher, 4, Accelerator(cpu=True), tmp_path)
    trainer.train_step(1, StopRequest())
    rollout, seen = trainer.recipe.matching.rollout, set()
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in teacher.network.modules())
    for step in range(2, 10):

        def jumps(stream, step=step):
            steps, k = rollout.draw(step_generator(trainer.recipe.training.seed, step, stream))
            return (k > 0) + 1 + (gradient == "all" and k < steps - 1)

        of_student, of_critic = jumps("rollout"), [jumps(f"critic {update} rollout") for update in range(2)]
        with Counted() as counted:
            trainer.train_step(step, StopRequest())
        inputs = 2 * (loss == "score_implicit_matching")
        # The rollouts; the updates of the critic; teacher and critic at the noised samples.
        forward = of_student + sum(of_critic) + 2 + 2
        backward = (of_student if gradient == "all" else 1) + 2 + inputs
        found = [counted.names[name] / layers for name in ("convolution", "convolution_backward")]
        assert found == pytest.approx([forward, backward], abs=0.15), step
        seen.add(of_student)
    assert seen == ({1, 2, 3} if gradient == "all" else {1, 2})


@pytest.mark.parametrize("loss", ["distribution_matching", "score_implicit_matching"])
def test_the_matching_asks_the_device_for_nothing(teacher, loss):
    settings = {"teacher": "none", "student": {"kind": "embedded"}, "training": {"steps": 1, "batch_size": 8}}
    settings["matching"] = {"steps": 9, "critic": {"warmup_steps": 0}, "loss": {"name": loss}}
    settings["loss"] = {"name": "progressive", "target": "frozen"}
    recipe = Recipe.model_validate(settings)
    student, away = Student.from_teacher(teacher).to("meta"), copy.deepcopy(teacher).to("meta")
    critic = build_critic(student, away, 0, seed=0)
    maps = {"average": student, "frozen": student}
    objective = Objective(student, away, recipe, recipe.losses, maps, critic=frozen_copy(critic))
    draws = draw(0, 1, 8, teacher.event_shape, renoised=True).part(0, 8, "meta")
    objective(draws, None, 1).weighted.mean().backward()
    own = CriticObjective(critic, objective.sample, away, recipe)
    losses, teachers = own(draws, None, 1, 0, compare=True)
    losses.mean().backward()
    assert teachers.device.type == next(critic.parameters()).grad.device.type == "meta"


SEVERAL = {"extra_losses": [{"loss": {"name": "flow_matching", "velocity": "data"}, "fraction": 0.3}]}


@pytest.mark.parametrize("more", [{}, SEVERAL], ids=["alone", "beside"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in WAITING], ids=lambda case: case.name)
def test_a_loss_asks_the_device_for_nothing(teacher, case, more, monkeypatch):
    # A tensor of the device meta has no numbers: whatever would wait for a GPU's raises there.
    # It has no autocast either.
    for module in (central, forward_mode):
        monkeypatch.setattr(module, "full_precision", lambda _: contextlib.nullcontext())
    for engine in (central.Central, exact.Exact):
        monkeypatch.setattr(engine, "needs_value_call", lambda *_: False)
    student = Student.from_teacher(teacher).to("meta")
    away = copy.deepcopy(teacher).to("meta")
    settings = {
        "teacher": "none",
        "loss": case.settings(case.engines()[-1]),
        "time_sampling": case.time_sampling,
        "data": "fixed",
    }
    recipe = Recipe.model_validate(settings | (more if case.data else {"data": "none"}))
    objective = Objective(student, away, recipe, recipe.losses, {"average": student, "frozen": student})
    draws = draw(0, 0, 8, teacher.event_shape).part(0, 8, "meta")
    images = ImageBatch(torch.empty(8, *teacher.event_shape, device="meta")) if case.data else None
    losses, weighted, _ = objective(draws, images, 0)
    weighted.mean().backward()
    assert losses.device.type == next(student.parameters()).grad.device.type == "meta"


def test_the_benchmark_runs(tmp_path, capsys):
    output = tmp_path / "steps.json"
    steps.main(["--quick", "--network", "dit", "--only", "lagrangian, target", "--output", str(output)])
    found = json.loads(output.read_text())
    assert [(row["loss"], row["derivative"]) for row in found["losses"]] == [
        (name, engine)
        for name in ("lagrangian, target", "lagrangian, target, no data")
        for engine in ("exact", "central")
    ]
    assert all(row["by_floor"]["median"] > 0.5 for row in found["losses"])
    assert capsys.readouterr().out.count("\n") == 2 + len(found["losses"])
