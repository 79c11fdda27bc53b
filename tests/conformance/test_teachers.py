"""One Euler step of ours is one step of the stock DDIM and Euler schedulers, for every scheduler a teacher may have."""

from __future__ import annotations

import json
from itertools import pairwise

import diffusers
import pytest
import torch

from fmm_distill.config.settings import EvaluationSettings
from fmm_distill.core.time_axis import expand
from fmm_distill.evaluation.evaluator import evaluate
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.scheduler import DISCRETE as SCHEDULERS
from tests.conftest import save_teacher
from tests.slow import with_slow, with_slow_product

# The evaluation of these runs by default: those that clip, keep older outputs, work in sigmas, and have other betas.
SOLVED = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def saved(folder, name, **settings):
    save_teacher(folder)
    getattr(diffusers, name)(**settings).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDPMScheduler", name))
    return str(folder)


def ddim_step(teacher, x, k):
    """x at timestep k to the next of ten, both in the network's coordinates."""
    scheduler = diffusers.DDIMScheduler.from_config(
        teacher.scheduler_config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(10)
    return scheduler.step(teacher.network(x, k).sample, k, x).prev_sample


def euler_step(teacher, x, k):
    """The same by way of x / alpha, where the stock Euler scheduler walks."""
    scheduler = diffusers.EulerDiscreteScheduler.from_config(
        teacher.scheduler_config, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(10)
    place = int((scheduler.timesteps == k).nonzero())
    here, there = (1 / (1 + sigma**2).sqrt() for sigma in scheduler.sigmas[place : place + 2])
    inside = scheduler.scale_model_input(x / here, scheduler.timesteps[place])
    torch.testing.assert_close(inside, x)
    output = teacher.network(inside, scheduler.timesteps[place]).sample
    return scheduler.step(output, scheduler.timesteps[place], x / here).prev_sample * there


def our_step(teacher, x, k, after):
    t, r = (teacher.schedule.time(torch.tensor([m] * len(x))) for m in (k, after))
    on_axis = x / expand(teacher.schedule.scale(t), x)
    moved = on_axis - expand(t - r, x) * teacher.velocity(on_axis, t)
    return moved * expand(teacher.schedule.scale(r), x)


@torch.no_grad()
def worst_difference(teacher, stock):
    """Over the ten steps of a grid, beside the size of what comes out."""
    worst = 0.0
    for k, after in pairwise([*range(999, -1, -100), -1]):
        x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(k))
        ours, theirs = our_step(teacher, x, k, after), stock(teacher, x, torch.tensor(k))
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)))
    return worst


# Two stock schedulers use what numpy has deprecated.
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize(("name", "prediction", "betas"), with_slow_product(SCHEDULERS, PREDICTIONS, BETAS))
def test_one_euler_step_is_one_stock_step(tmp_path, name, prediction, betas):
    teacher = load_teacher(saved(tmp_path, name, beta_schedule=betas, prediction_type=prediction))
    assert teacher.prediction == prediction
    assert worst_difference(teacher, ddim_step) < 1e-5
    # The stock Euler scheduler has no rule for prediction_type: sample, and its float32 sigmas fall from 20 000 to
    # 6 in the first step of the cosine schedule: it is itself off by 2e-4 there.
    if prediction != "sample" and betas != "squaredcos_cap_v2":
        assert worst_difference(teacher, euler_step) < 1e-5


def test_defaults_that_a_file_leaves_out_are_those_of_its_own_class(tmp_path):
    folder = saved(tmp_path, "HeunDiscreteScheduler", prediction_type="v_prediction")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    kept = json.loads(file.read_text())
    # 0.00085 to 0.012 here, 0.0001 to 0.02 in other classes.
    file.write_text(json.dumps({key: kept[key] for key in kept if key not in ("beta_start", "beta_end")}))
    teacher = load_teacher(folder)
    assert teacher.scheduler_config["beta_end"] == 0.012
    assert worst_difference(teacher, ddim_step) < 1e-5


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr(tmp_path, name, prediction):
    settings = {"rescale_betas_zero_snr": True, "prediction_type": prediction}
    teacher = load_teacher(saved(tmp_path, name, **settings))
    assert teacher.schedule.t_max == 1
    assert worst_difference(teacher, ddim_step) < 1e-5


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("name", with_slow(SCHEDULERS, SOLVED))
def test_solvers_of_the_evaluation_take_every_configuration(tmp_path, name):
    """They converge to the teacher's own ODE; with other betas, or clipped where it does not clip, they would not."""
    teacher = load_teacher(saved(tmp_path, name, prediction_type="v_prediction"))
    settings = EvaluationSettings(
        steps=(1,), ddim_steps=(3, 20), dpmsolver_steps=(10,), samples=2, endpoint_samples=2, endpoint_solver_steps=20
    )
    evaluation = evaluate({"student": Student.from_teacher(teacher)}, teacher, settings, None, torch.device("cpu"))
    clips = teacher.scheduler_config.get("clip_sample", False)
    assert f"clip_sample={clips}" in evaluation.protocol["solvers"]
    errors = {(row.sampler, row.steps): row.endpoint_error for row in evaluation.rows}
    few = errors["teacher-ddim", 3]
    assert errors["teacher-dpmsolver++", 10] < few / 5
    if not clips:
        assert errors["teacher-ddim", 20] < few / 5
