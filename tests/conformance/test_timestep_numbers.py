"""Schedulers with another number of training timesteps than 1000: read, sampled and exported as stock pipelines do."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
)

from fmm_distill.core.schedules import FlowMatching, VarianceExploding, VariancePreserving
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify_all
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.probe import PipelineProbe
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.recording import record, tensor_of
from fmm_distill.teachers.scheduler import read_scheduler
from tests.conformance.test_prompted import FAMILIES, PROMPTS
from tests.conformance.test_prompted_export import moved
from tests.conftest import tiny_unet

PROMPTED = [
    ("sd3", 500),
    ("flux", 2000),
    ("lumina2", 2000),
    ("z-image", 500),
    ("sana-dpm", 500),
    ("mochi", 500),
    ("sd2", 100),
    ("sdxl", 4000),
    ("stable-audio", 500),
]
SCHEDULERS = {
    "flow of 500": FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=2.0),
    "flow of 2000": FlowMatchHeunDiscreteScheduler(num_train_timesteps=2000, shift=3.0),
    "discrete of 100": DDPMScheduler(num_train_timesteps=100, clip_sample=False, beta_end=0.15),
    "discrete of 4000": DDPMScheduler(num_train_timesteps=4000, clip_sample=False, beta_end=0.005),
    "Karras of 500": EDMEulerScheduler(num_train_timesteps=500),
    "exploding of 2000": ScoreSdeVeScheduler(num_train_timesteps=2000, sigma_max=50.0),
}


def saved(name, timesteps, folder):
    tiny = FAMILIES[name]
    tiny.build().save_pretrained(folder, safe_serialization=True)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": timesteps}))
    return load_teacher(str(folder), prompts=PROMPTS, call=dict(tiny.call))


def of_unet(scheduler, folder):
    kind = ScoreSdeVePipeline if isinstance(scheduler, ScoreSdeVeScheduler) else DDPMPipeline
    # The Fourier embedding takes the logarithm of sigma.
    fourier = {"time_embedding_type": "fourier"} if kind is ScoreSdeVePipeline else {}
    pipeline = kind(unet=tiny_unet(**fourier), scheduler=scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return load_teacher(str(folder))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    made = {case: saved(*case, tmp_path_factory.mktemp(case[0])) for case in PROMPTED}
    return made | {
        name: of_unet(scheduler, tmp_path_factory.mktemp("unet") / "teacher") for name, scheduler in SCHEDULERS.items()
    }


@pytest.mark.parametrize("case", PROMPTED, ids=str)
@torch.no_grad()
def test_times_between_the_recorded_ones_are_the_stock_pipelines_own(teachers, case):
    teacher, call = teachers[case], dict(FAMILIES[case[0]].call)
    schedule, ask = teacher.schedule, teacher.parametrization.call
    assert schedule.num_timesteps == case[1]
    pipeline = DiffusionPipeline.from_pretrained(teacher.pipeline.folder)
    off = {"guidance_scale": 0.0 if case[0] == "z-image" else 1.0, "output_type": "latent"}
    given = call | off | {"prompt": list(PROMPTS), "num_inference_steps": 7, "generator": torch.manual_seed(0)}
    seen = record(pipeline, teacher.pipeline.component, given)
    whole = [float(step.timestep).is_integer() for step in seen.steps]
    for i, (asked, step) in enumerate(zip(seen.calls, seen.steps, strict=True)):
        if isinstance(schedule, VariancePreserving):
            t = schedule.time(torch.tensor([int(step.timestep)]))
        else:
            sigma = torch.tensor([seen.sigmas[i]], dtype=torch.float64)
            inverted = teacher.scheduler_config.get("invert_sigmas")
            t = (1 - sigma if inverted else sigma) if isinstance(schedule, FlowMatching) else sigma / (1 + sigma)
        time = schedule.network_time(t)
        told = torch.as_tensor(asked.arguments[ask.time]).flatten()[:1].double()
        # Some schedulers round their timesteps.
        allowed = 1.0 * abs(ask.slope) if all(whole) else 1e-4 * float(told.abs().max().clamp_min(1e-3))
        assert (ask.slope * time + ask.offset - told).abs().max() <= allowed
        x = tensor_of(asked.arguments[ask.sample])
        own = ((told - ask.offset) / ask.slope).float().expand(len(x))
        output = ask(teacher.network, x, own, teacher.conditions.prompts, None)
        wanted = asked.output[:, : x.shape[1]]
        assert (output.abs() - wanted.abs()).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_a_velocity_is_a_stock_step(teachers, name):
    """Of the schedulers that walk the ODE by Euler's method, at seven steps."""
    teacher, scheduler = teachers[name], SCHEDULERS[name]
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=2000, shift=3.0)
    assert teacher.schedule.num_timesteps == scheduler.config.num_train_timesteps
    if isinstance(scheduler, DDPMScheduler | ScoreSdeVeScheduler):
        return
    scheduler.set_timesteps(7)
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0)) * scheduler.sigmas[0]
    for i, timestep in enumerate(scheduler.timesteps):
        told = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        after = scheduler.step(teacher.network(told, timestep.expand(2)).sample, timestep, x).prev_sample
        levels = scheduler.sigmas[i : i + 2].double()
        exploding = isinstance(teacher.schedule, VarianceExploding)
        t, r = ((level / (1 + level) if exploding else level).expand(2) for level in levels)
        on_axis = x / expand(teacher.schedule.scale(t), x)
        moved_on = on_axis - expand(t - r, x) * teacher.velocity(on_axis, t)
        ours = moved_on * expand(teacher.schedule.scale(r), x)
        assert (ours - after).abs().max() <= 1e-4 * after.abs().max()
        x = after


def test_exports_are_verified(teachers, tmp_path):
    chosen = [case for case in PROMPTED if case[0] in ("sd3", "lumina2", "sdxl")]
    names = [*chosen, "flow of 500", "discrete of 100", "exploding of 2000"]
    exports = []
    for i, name in enumerate(names):
        student = moved(Student.from_teacher(teachers[name]))
        folder = export_pipeline(student, teachers[name], tmp_path / str(i), (1, 4))
        exports.append(Exported(student, exporter_of(teachers[name]), folder, (1, 4)))
    found = dict(zip(names, verify_all(exports), strict=True))
    assert all(one.passed for agreements in found.values() for one in agreements.values()), found


@pytest.mark.parametrize("name", ["sd3", "lumina2"])
def test_a_schedule_with_other_levels_is_refused_at_times_that_were_not_recorded(teachers, name):
    case = next(case for case in PROMPTED if case[0] == name)
    teacher, call = teachers[case], dict(FAMILIES[name].call)
    pipeline = DiffusionPipeline.from_pretrained(teacher.pipeline.folder)
    probe = PipelineProbe.of(pipeline, teacher.pipeline.component, call, 1.0, "here", Prompts(("",)))
    probe.check()
    wrong = read_scheduler(pipeline.scheduler, "here", uses_unshifted_time=True)
    with pytest.raises(UserError, match=r"the schedule that was read from the scheduler has"):
        dataclasses.replace(probe, spec=wrong).check()


@pytest.mark.parametrize("first", [True, False])
def test_a_scheduler_that_needs_four_steps_is_checked_too(tmp_path, first):
    """PNDM begins with Runge-Kutta steps unless they are skipped; its class default is not to."""
    pipeline = FAMILIES["sd1"].build()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, skip_prk_steps=not first)
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    assert load_teacher(str(tmp_path), prompts=PROMPTS).schedule.num_timesteps == 1000
