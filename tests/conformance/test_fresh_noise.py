"""Any-step pipelines with fresh noise in their steps: the samples of the student itself, from one generator."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.load import LoadedStudent
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.remote.fresh_noise import discrete_position
from fmm_distill.export.remote.stock_pipeline import flow_map_pipeline
from fmm_distill.export.schedulers import make_scheduler
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES, PROMPTS
from tests.conformance.test_prompted_export import moved
from tests.conftest import save_teacher, tiny_unet
from tests.tiny.diffusion import PIPELINES

SEED, STEPS, STRENGTH = 5, 3, 0.7
EDM = "sdxl-edm"
# Discrete, exploding with two network times, and flow levels: static, dynamic, shifted, flipped and inverted.
STOCK = ("sd1", "cogvideox", EDM, "stable-audio", "unet1d", "sd3", "flux", "cogview4", "lumina2", "mochi")
SCHEDULERS = {
    "epsilon": diffusers.DDPMScheduler(clip_sample=False),
    "discrete": diffusers.DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "zero-snr": diffusers.DDIMScheduler(prediction_type="sample", rescale_betas_zero_snr=True),
    "karras": diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    "exponential": diffusers.EDMEulerScheduler(sigma_schedule="exponential"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
# Opens folders without the package.
STRANGER = """
import json, sys
sys.modules["fmm_distill"] = None
import torch
from diffusers import DiffusionPipeline

found = []
for folder, call in json.loads(sys.argv[1]):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(**call, return_dict=False, generator=torch.Generator().manual_seed(5))[0]
    found.append(torch.as_tensor(made).tolist())
print(json.dumps(found))
"""


def seeded(seed=SEED):
    return torch.Generator().manual_seed(seed)


def after(noise):
    """The generator of a pipeline that has drawn its first noise."""
    generator = seeded()
    torch.randn(noise.numel(), generator=generator)
    return generator


def differ(one, other):
    return float((one.reshape(other.shape) - other).abs().max() / other.abs().max())


@pytest.fixture(scope="module")
def any_step(tmp_path_factory):
    """Of a family by its name: student, pipeline, keywords of the call, and what the call starts from."""

    @functools.cache
    def open_family(name):
        folder = tmp_path_factory.mktemp(name)
        tiny = PIPELINES[name] if name == "unet1d" else FAMILIES[name.removesuffix("-edm")]
        built = tiny.build()
        if name == EDM:
            built.scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=80.0)
        built.save_pretrained(folder, safe_serialization=True)
        options = {} if name == "unet1d" else {"prompts": PROMPTS, "call": dict(tiny.call)}
        teacher = load_teacher(str(folder), **options)
        student = moved(Student.from_teacher(teacher))
        exporter, scheduler = exporter_of(teacher), make_scheduler(teacher, student.prediction)
        student.network.register_to_config(flow_map=exporter.settings(scheduler))
        stock = diffusers.DiffusionPipeline.from_pretrained(folder)
        ours = {exporter.component: student.network, "scheduler": scheduler}
        pipeline = flow_map_pipeline(type(stock))(**stock.components | ours)
        pipeline.set_progress_bar_config(disable=True)
        call = exporter.verification_call(2) | {"return_dict": False, "num_inference_steps": STEPS}
        noise, cond = exporter.start(dict(call), 2, SEED)
        grid = exporter.grid(STEPS)
        found = {"student": student, "teacher": teacher, "pipeline": pipeline, "call": call}
        return SimpleNamespace(**found, noise=noise, cond=cond, grid=grid)

    return open_family


def made_by(family, **given):
    # Some stock pipelines change the list of prompts.
    call = copy.deepcopy(family.call) | {"generator": seeded()} | given
    return torch.as_tensor(family.pipeline(**call)[0])


@pytest.mark.parametrize("name", STOCK)
def test_stock_classes(any_step, name):
    family = any_step(name)
    plain, made = made_by(family), made_by(family, stochasticity=STRENGTH)
    start = family.noise, family.grid, family.cond
    own = sample(family.student, *start, stochasticity=STRENGTH, generator=after(family.noise))
    if name == "unet1d":
        own, made, plain = (x.clamp(-1, 1) for x in (own, made, plain))
    assert differ(own, made) < 1e-4
    assert differ(plain, made) > 1e-2
    assert torch.equal(made_by(family, stochasticity=0.0), plain)


def test_the_signature_has_it_and_leaves_the_stock_one_alone(any_step):
    call = type(any_step("sd1").pipeline).__call__
    own, stock = (inspect.signature(one).parameters for one in (call, diffusers.StableDiffusionPipeline.__call__))
    assert set(own) - set(stock) == {"stochasticity"}
    assert own["stochasticity"].default == 0.0
    assert list(own)[-1] == next(reversed(stock))


@pytest.mark.parametrize("name", ["sd1", "sd3", EDM])
def test_chosen_starts(any_step, name):
    family, flow = any_step(name), name == "sd3"
    given = (
        {"timesteps": [999, 400, 100]} if name == "sd1" else {"sigmas": [1.0, 0.6, 0.2] if flow else [80.0, 2.0, 0.3]}
    )
    made = made_by(family, stochasticity=STRENGTH, **given)
    schedule, values = family.student.schedule, torch.tensor(next(iter(given.values())), dtype=torch.float64)
    if name == "sd1":
        times = schedule.time(values.long())
    else:
        times = schedule.shift * values / (1 + (schedule.shift - 1) * values) if flow else values / (1 + values)
    times = torch.cat([times, torch.zeros(1)])
    own = sample(
        family.student, family.noise, times, family.cond, stochasticity=STRENGTH, generator=after(family.noise)
    )
    assert differ(own, made) < 1e-4


def test_one_generator_per_sample(any_step):
    family = any_step("sd1")
    both = made_by(family, stochasticity=STRENGTH, generator=[seeded(1), seeded(2)])
    one = copy.deepcopy(family.call) | {"prompt": family.call["prompt"][1:], "generator": [seeded(2)]}
    alone = torch.as_tensor(family.pipeline(**one, stochasticity=STRENGTH)[0])
    assert differ(both[1:], alone) < 1e-4


def test_frames_are_drawn_from_the_generator_of_their_sample(any_step):
    """This pipeline passes its frames as rows to the scheduler."""
    family = any_step("text-to-video")
    both = made_by(family, stochasticity=STRENGTH, generator=[seeded(1), seeded(2)])
    one = copy.deepcopy(family.call) | {"prompt": family.call["prompt"][1:], "generator": [seeded(2)]}
    alone = torch.as_tensor(family.pipeline(**one, stochasticity=STRENGTH)[0])
    assert differ(both[1:], alone) < 1e-4
    assert differ(both[1:], made_by(family, generator=[seeded(1), seeded(2)])[1:]) > 1e-2


@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan])
@pytest.mark.parametrize("name", ["sd1", "pixels"])
def test_what_is_no_strength(any_step, pixels, name, value):
    pipeline = any_step("sd1").pipeline if name == "sd1" else pixels("discrete").pipeline
    call = {"prompt": PROMPTS[:1]} if name == "sd1" else {}
    with pytest.raises(ValueError, match="stochasticity must be a finite number of at least 0, got"):
        pipeline(**call, num_inference_steps=2, stochasticity=value)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Of a scheduler by its name: the student of a UNet2DModel with classes, and its exported pipeline."""

    @functools.cache
    def open_kind(kind):
        folder = tmp_path_factory.mktemp(kind)
        source = save_teacher(folder / "teacher", tiny_unet(num_class_embeds=4), SCHEDULERS[kind])
        teacher = load_teacher(str(source))
        student = moved(Student.from_teacher(teacher))
        exported = export_pipeline(student, teacher, folder / "student", ())
        pipeline = diffusers.DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(2, *teacher.event_shape, generator=seeded())
        return SimpleNamespace(student=student, teacher=teacher, folder=exported, pipeline=pipeline, noise=noise)

    return open_kind


def images(x):
    return (x / 2 + 0.5).clamp(0, 1)


def own_images(pixels, strength=STRENGTH):
    noise, cond = pixels.noise, pixels.teacher.first_conditions(2)
    return images(sample(pixels.student, noise, STEPS, cond, stochasticity=strength, generator=after(noise)))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_pipelines_of_pixels(pixels, kind):
    found = pixels(kind)
    call = {"batch_size": 2, "class_labels": [0, 1], "num_inference_steps": STEPS, "output_type": "pt"}
    plain, made, none = (
        found.pipeline(**call, **given, generator=seeded()).images
        for given in ({}, {"stochasticity": STRENGTH}, {"stochasticity": 0.0})
    )
    torch.testing.assert_close(made, own_images(found), rtol=0, atol=1e-4)
    assert (made - plain).abs().max() > 1e-2
    assert torch.equal(none, plain)
    torch.testing.assert_close(plain, own_images(found, 0.0), rtol=0, atol=1e-4)


def test_exports_in_a_process_without_the_package(any_step, pixels, tmp_path):
    call = {"num_inference_steps": STEPS, "stochasticity": STRENGTH}
    jobs, expected = [], []
    for kind in ("discrete", "karras", "flow"):
        jobs.append([str(pixels(kind).folder), call | {"batch_size": 2, "class_labels": [0, 1], "output_type": "pt"}])
        expected.append(own_images(pixels(kind)))
    for name in ("sd1", "sd3"):
        family, folder = any_step(name), tmp_path / name
        family.pipeline.save_pretrained(folder)
        jobs.append([str(folder), {key: value for key, value in family.call.items() if key != "return_dict"} | call])
        start = family.noise, family.grid, family.cond
        expected.append(sample(family.student, *start, stochasticity=STRENGTH, generator=after(family.noise)))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-P", "-c", STRANGER, json.dumps(jobs)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = [torch.tensor(one) for one in json.loads(done.stdout.splitlines()[-1])]
    assert len(made) == len(expected)
    for one, own in zip(made, expected, strict=True):
        assert differ(one, own) < 1e-4


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
def test_the_position_of_a_level_is_that_of_the_schedule(betas):
    products = diffusers.DDPMScheduler(beta_schedule=betas).alphas_cumprod
    schedule = VariancePreserving(products)
    times = torch.cat(
        [torch.linspace(0, schedule.t_max, 401, dtype=torch.float64), schedule.time(torch.arange(-1, 1000))]
    )
    found = [discrete_position(products, (1 - t, t), 1000) for t in times.tolist()]
    # The position counts from data, timestep -1.
    expected = (schedule.timestep(times) + 1) / 1000
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-12)


def test_a_loaded_student(any_step):
    """Its sampling is that of the student; how one is opened, other tests have."""
    family = any_step("sd1")
    manifest: Any = None
    loaded, noise = LoadedStudent(family.student, manifest, family.teacher), family.noise
    start = {"stochasticity": STRENGTH, "generator": seeded(7)}
    made = loaded.generate(noise, STEPS, [0, 1], **start)
    again = {"stochasticity": STRENGTH, "generator": seeded(7)}
    assert torch.equal(made, sample(family.student, noise, STEPS, loaded.conditioned_on(2, [0, 1]), **again))
    assert differ(made, loaded.generate(noise, STEPS, [0, 1])) > 1e-2
    with pytest.raises(UserError, match=r"stochasticity: expected a finite number of at least 0, got -1; try 0\.5"):
        loaded.generate(noise, STEPS, stochasticity=-1.0)
