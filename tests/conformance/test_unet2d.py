"""``UNet2DModel`` teachers beyond discrete noise levels and pixels: against stock steps, closed form and export."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import diffusers
import pytest
import torch

from fmm_distill.config.settings import EvaluationSettings
from fmm_distill.core.draws import draw
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.time_axis import expand
from fmm_distill.data.latents import Latents, encode_images, latent_layout
from fmm_distill.data.samples import Images
from fmm_distill.evaluation.evaluator import evaluate
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify, verify_all
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.closed_form import Gaussian
from fmm_distill.teachers.codec import encoder_of
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.scheduler import read_scheduler
from tests.conformance.test_export import moved_student
from tests.conformance.test_teachers import saved
from tests.conftest import save_teacher, tiny_unet
from tests.slow import with_slow
from tests.tiny.diffusion import PIPELINES

EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
# Name of the row: scheduler, its settings, changes of the network.
ROWS = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, {}),
    "flow shifted": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "flow heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}, {}),
    "flow unipc": (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        {},
    ),
    "edm": ("EDMEulerScheduler", EDM, {}),
    "edm exponential": ("EDMEulerScheduler", EDM | {"sigma_schedule": "exponential"}, {}),
    "edm v": ("EDMEulerScheduler", EDM | {"prediction_type": "v_prediction"}, {}),
    "edm dpm": ("EDMDPMSolverMultistepScheduler", EDM, {}),
    "score": ("ScoreSdeVeScheduler", {"sigma_max": 50.0}, {"time_embedding_type": "fourier"}),
    "classes": ("DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False}, {"num_class_embeds": 5}),
    "learned variance": (
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "clip_sample": False},
        {"out_channels": 2},
    ),
}
# The evaluation of one row of each axis of time, and of one with classes, by default.
MEASURED = ("flow shifted", "edm", "score", "classes")
FOLDED = {"flow", "flow shifted", "flow heun", "flow unipc"}


def row(name, tmp_path):
    scheduler, settings, changes = ROWS[name]
    folder = tmp_path / "teacher"
    saved(folder, scheduler, **settings)
    save_teacher(tmp_path / "network", tiny_unet(**changes))
    for file in (tmp_path / "network" / "unet").iterdir():
        file.replace(folder / "unet" / file.name)
    return load_teacher(str(folder))


def told(teacher, count):
    return None if teacher.conditions is None else teacher.conditions.pick(torch.linspace(0, 0.99, count))


def our_step(teacher, x, t, r, cond):
    """From the teacher's coordinates at t to those at r, by one Euler step on the axis."""
    t, r = (torch.full((len(x),), time, dtype=torch.float64) for time in (t, r))
    on_axis = x / expand(teacher.schedule.scale(t), x)
    moved = on_axis - expand(t - r, x) * teacher.velocity(on_axis, t, cond)
    return moved * expand(teacher.schedule.scale(r), x)


def stock_flow(teacher, scheduler, i, x, cond):
    output = teacher.network(x, scheduler.timesteps[i].expand(len(x))).sample
    return scheduler.step(output, scheduler.timesteps[i], x).prev_sample


def stock_edm(teacher, scheduler, i, x, cond):
    inside = scheduler.scale_model_input(x, scheduler.timesteps[i])
    output = teacher.network(inside, scheduler.timesteps[i].expand(len(x))).sample
    return scheduler.step(output, scheduler.timesteps[i], x).prev_sample


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith(("flow", "edm"))])
def test_one_euler_step_is_one_stock_step(tmp_path, name):
    teacher = row(name, tmp_path)
    if name.startswith("flow"):
        shift = teacher.schedule.shift
        assert shift == ROWS[name][1].get("shift", ROWS[name][1].get("flow_shift", 1.0))
        scheduler, stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), stock_flow
        scheduler.set_timesteps(10)
        times = scheduler.sigmas.double().tolist()
    else:
        scheduler, stock = diffusers.EDMEulerScheduler.from_config(teacher.scheduler_config), stock_edm
        scheduler.set_timesteps(10)
        times = [sigma / (1 + sigma) for sigma in scheduler.sigmas.double().tolist()]
    assert times[-1] == 0
    for i, (t, r) in enumerate(pairwise(times)):
        scale = 1 / (1 - t) if name.startswith("edm") else 1.0
        x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(i)) * scale
        theirs = stock(teacher, scheduler, i, x, None)
        assert (our_step(teacher, x, t, r, None) - theirs).abs().max() < 1e-5 * theirs.abs().max().clamp_min(1)


@torch.no_grad()
def test_the_score_is_read_as_song_defines_it(tmp_path):
    """``dx = -sigma score d sigma`` (arXiv 2011.13456, eq. 13, with g^2 = d sigma^2 / dt)."""
    teacher = row("score", tmp_path)
    sigmas = torch.logspace(math.log10(50), -2, 10, dtype=torch.float64)
    assert teacher.schedule.t_max == pytest.approx(50 / 51)
    for i, (here, there) in enumerate(pairwise([*sigmas.tolist(), 0.0])):
        x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(i)) * (1 + here)
        score = teacher.network(x, torch.full((2,), here)).sample
        theirs = x - (there - here) * here * score
        ours = our_step(teacher, x, here / (1 + here), there / (1 + there), None)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


class ExactNetwork(torch.nn.Module):
    """What a perfect network of a continuous schedule says of Gaussian data, in the class's own interface."""

    def __init__(self, truth, kind, sigma_data):
        super().__init__()
        self.truth, self.kind, self.sigma_data = truth, kind, sigma_data

    def forward(self, x, time):
        if self.kind == "flow":
            t = time / 1000
            return self.say((x - self.truth.denoise(x, 1 - t, t)) / expand(t, x))
        sigma = time if self.kind == "score" else (4 * time).exp()
        s = expand(sigma, x)
        if self.kind == "score":
            return self.say((self.truth.denoise(x, torch.ones_like(sigma), sigma) - x) / s**2)
        spread = (s**2 + self.sigma_data**2).sqrt()
        data = self.truth.denoise(x * spread, torch.ones_like(sigma), sigma)
        rest = data - (self.sigma_data / spread) ** 2 * x * spread
        return self.say(rest / (s * self.sigma_data / spread) * (-1 if self.kind == "v" else 1))

    def say(self, output):
        return type("Output", (), {"sample": output})()


@pytest.mark.parametrize("kind", ["flow", "score", "epsilon", "v"])
def test_velocity_is_the_closed_form_over_the_range_of_t(kind):
    truth = Gaussian(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 2, 2), 0.6)
    prediction = {"v": "v_prediction"}.get(kind, kind)
    scheduler = {
        "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "score": lambda: diffusers.ScoreSdeVeScheduler(),
    }.get(kind, lambda: diffusers.EDMEulerScheduler(**EDM, prediction_type=prediction))()
    levels = read_scheduler(scheduler, "here")
    network = ExactNetwork(truth, kind, 0.5)
    parametrization = Parametrization(levels.schedule, levels.prediction, sigma_data=levels.sigma_data)
    teacher = Teacher(network, parametrization, (3, 2, 2), "here", "closed form", {})
    t = torch.linspace(teacher.schedule.t_min, teacher.schedule.t_max, 200, dtype=torch.float64)
    x = torch.randn(200, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher.velocity(x, t), truth.velocity(x, t), rtol=1e-9, atol=1e-9)


def test_students_in_stock_diffusers(tmp_path):
    """All rows in one process: opening diffusers is what takes long."""
    exports = []
    for name in ROWS:
        teacher = row(name, tmp_path / name)
        student = moved_student(teacher)
        folder = export_pipeline(student, teacher, tmp_path / name / "student", (1, 2, 4))
        exports.append(Exported(student, exporter_of(teacher), folder, (1, 2, 4)))
    for name, differences in zip(ROWS, verify_all(exports), strict=True):
        kinds = ("any", "folded") if name in FOLDED else ("any",)
        assert sorted(differences) == sorted(f"{kind}-{n}" for kind in kinds for n in (1, 2, 4))


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_the_student_is_its_teacher_at_the_start(tmp_path, name):
    teacher = row(name, tmp_path)
    student, cond = Student.from_teacher(teacher), told(teacher, 6)
    x = torch.randn(6, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.linspace(0, 1, 6, dtype=torch.float64))
    assert torch.equal(student.mean_velocity(x, t, t, cond), teacher.velocity(x, t, cond))
    assert torch.equal(student.mean_velocity(x, t, 0 * t, cond), teacher.velocity(x, t, cond))


@pytest.mark.parametrize("name", with_slow(ROWS, MEASURED))
def test_the_evaluation_solves_the_teachers_equation(tmp_path, name):
    teacher = row(name, tmp_path)
    student = Student.from_teacher(teacher)
    settings = EvaluationSettings(
        steps=(2,), ddim_steps=(4, 50), dpmsolver_steps=(), samples=2, endpoint_samples=2, endpoint_solver_steps=50
    )
    rows = evaluate({"student": student}, teacher, settings, None, torch.device("cpu")).rows
    few, many = (row.endpoint_error for row in rows if row.sampler.startswith("teacher"))
    # A random network turns by a radian a timestep: neither the solver nor 50 steps resolve it.
    assert many < few / 2


def test_a_condition_reaches_the_network(tmp_path):
    teacher = row("classes", tmp_path)
    x = torch.zeros(2, *teacher.event_shape)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    one, other = teacher.velocity(x, t, teacher.conditions.pick(torch.tensor([0.1, 0.9])))
    assert (one - other).abs().max() > 1e-4


def test_latents_of_a_vq_model(tmp_path):
    PIPELINES["ldm"].build().save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"))
    assert "VQModel" in teacher.adapter
    images = teacher.codec.decode(torch.randn(2, *teacher.event_shape))
    assert images.shape[:2] == (2, 3)
    assert teacher.codec.encode(images).shape == (2, *teacher.event_shape)
    pixels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, event = Images(pixels, "here"), teacher.event_shape
    encoder = encoder_of(teacher.codec, images.shape)
    layout = latent_layout(images, encoder, event)
    encode_images(images, encoder, layout)
    draws = replace(draw(0, 0, 2, event), image=torch.tensor([0.99, 0.0]))
    expected = teacher.codec.encode(pixels[[4, 0]].float() / 255 * 2 - 1)
    torch.testing.assert_close(Latents(images, layout).pick(draws).images, expected)
    student = moved_student(teacher)
    folder = export_pipeline(student, teacher, tmp_path / "student", (1, 4))
    differences = verify(Exported(student, exporter_of(teacher), folder, (1, 4)))
    assert sorted(differences) == ["any-1", "any-4", "folded-1", "folded-4"]
