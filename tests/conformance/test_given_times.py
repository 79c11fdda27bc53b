"""Any-step pipelines of a stock class whose jumps start at the user's own timesteps or sigmas."""

from __future__ import annotations

import functools
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import pytest
import torch

from fmm_distill.core.time_axis import expand
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.remote.stock_pipeline import flow_map_pipeline
from fmm_distill.export.schedulers import make_scheduler
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES, PROMPTS
from tests.conformance.test_prompted_export import moved

EDM = "sdxl-edm"  # As Playground 2.5 is.
SEED = 5


@pytest.fixture(scope="module")
def any_step(tmp_path_factory):
    """Of a family by its name: student, teacher, pipeline, keywords of the call, and what the call starts from."""

    @functools.cache
    def open_family(name):
        folder, tiny = tmp_path_factory.mktemp(name), FAMILIES[name.removesuffix("-edm")]
        built = tiny.build()
        if name == EDM:
            built.scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=80.0)
        built.save_pretrained(folder, safe_serialization=True)
        teacher = load_teacher(str(folder), prompts=PROMPTS, call=dict(tiny.call))
        student = moved(Student.from_teacher(teacher))
        exporter, scheduler = exporter_of(teacher), make_scheduler(teacher, student.prediction)
        student.network.register_to_config(flow_map=exporter.settings(scheduler))
        stock = diffusers.DiffusionPipeline.from_pretrained(folder)
        ours = {exporter.component: student.network, "scheduler": scheduler}
        pipeline = flow_map_pipeline(type(stock))(**stock.components | ours)
        pipeline.set_progress_bar_config(disable=True)
        call = exporter.verification_call(2) | {"return_dict": False}
        noise, cond = exporter.start(dict(call), 2, SEED)
        return SimpleNamespace(student=student, teacher=teacher, pipeline=pipeline, call=call, noise=noise, cond=cond)

    return open_family


def made_by(family, **given):
    return family.pipeline(**family.call | given, generator=torch.Generator().manual_seed(SEED))[0]


def times_of(schedule, name, given):
    """On the axis, data last."""
    given = torch.tensor(given, dtype=torch.float64)
    if hasattr(schedule, "shift"):
        level = given / schedule.num_timesteps if name == "timesteps" else given
        if name == "sigmas" or schedule.uses_unshifted_time:
            level = schedule.shift * level / (1 + (schedule.shift - 1) * level)
    else:
        level = schedule.time(given.long()) if name == "timesteps" else given / (1 + given)
    return torch.cat([level, torch.zeros(1)])


TRIED = [
    ("sd1", "timesteps", [999, 499]),
    ("sd2", "timesteps", [999, 998, 3, 0]),
    ("pixart-alpha", "timesteps", [999, 700, 200]),
    ("cogvideox", "timesteps", [999, 700, 200]),
    ("allegro", "timesteps", [999, 700, 200]),  # The stock pipeline sets its scheduler's timesteps twice.
    (EDM, "sigmas", [80.0, 3.0, 0.5]),
    ("sd3", "sigmas", [1.0, 0.7, 0.2]),
    ("flux", "sigmas", [1.0]),
    ("z-image", "sigmas", [1.0, 0.7, 0.2]),
    ("cogview4", "sigmas", [1.0, 0.7, 0.2]),
    ("cogview4", "timesteps", [1000, 700, 200]),
    ("sana", "sigmas", [1.0, 0.7, 0.2]),
    ("sana", "timesteps", [1000, 700, 200]),
    ("ltx", "timesteps", [1000, 700, 200]),
    ("mochi", "timesteps", [1000, 700, 200]),
]


@pytest.mark.parametrize(("name", "keyword", "given"), TRIED)
def test_jumps_start_where_they_are_told_to(any_step, name, keyword, given):
    family = any_step(name)
    made = made_by(family, **{keyword: given})
    own = sample(family.student, family.noise, times_of(family.teacher.schedule, keyword, given), family.cond)
    assert (own.reshape(made.shape) - made).abs().max() < 1e-4 * own.abs().max().clamp_min(1)


@torch.no_grad()
def test_latents_of_a_level_go_on_from_it(any_step):
    family = any_step("sd1")
    made = made_by(family, timesteps=[499, 99], latents=family.noise)
    times = times_of(family.teacher.schedule, "timesteps", [499, 99])
    x = family.noise / expand(family.teacher.schedule.scale(times[:1]), family.noise)
    for t, r in pairwise(times):
        x = family.student(x, t.expand(2), r.expand(2), family.cond)
    assert (x - made).abs().max() < 1e-4


def test_neighbors_that_half_precision_does_not_tell_apart(any_step):
    family, lengths = any_step("flux"), []
    network = family.student.network
    hook = network.jump_embedding[0].register_forward_pre_hook(lambda _, inputs: lengths.append(float(inputs[0])))
    family.pipeline.to(torch.bfloat16)
    try:
        made_by(family, sigmas=[1.0, 0.999, 0.998, 0.5])
    finally:
        hook.remove()
        family.pipeline.to(torch.float32)
    assert lengths == pytest.approx([0.001, 0.001, 0.498, 0.5], abs=1e-4)


def test_the_scheduler_is_left_as_it_was(any_step):
    family = any_step("sd3")
    scheduler, before = family.pipeline.scheduler, made_by(family, num_inference_steps=3)
    assert (made_by(family, sigmas=[1.0, 0.5]) - before).abs().max() > 1e-2
    assert family.pipeline.scheduler is scheduler
    assert torch.equal(made_by(family, num_inference_steps=3), before)


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("sd1", {"timesteps": [499, 999]}, "expected integers that decrease, from at most 999 to at least 0"),
        ("sd1", {"timesteps": [999, 999]}, "expected integers that decrease"),
        ("sd1", {"timesteps": [1000, 500]}, "from at most 999"),
        ("sd1", {"timesteps": [999, -1]}, "to at least 0"),
        ("sd1", {"timesteps": [999, 499.5]}, "expected integers"),
        ("sd1", {"timesteps": []}, "expected integers"),
        ("sd1", {"sigmas": [1.0, 0.5]}, "schedule is discrete; expected timesteps"),
        ("sana", {"sigmas": [1.0, 0.5], "timesteps": [1000, 500]}, "expected one of them"),
        ("sana", {"timesteps": [1000, 2]}, "to at least 2.99"),
        ("sd3", {"sigmas": [1.0, 0.0]}, "to at least 0.001"),
        ("sd3", {"sigmas": [1.5, 0.5]}, "from at most 1 to"),
        (EDM, {"sigmas": [40.0, 1.0]}, "the first of them 80"),
        (EDM, {"timesteps": [999, 499]}, "schedule is continuous; expected sigmas"),
    ],
)
def test_what_no_jump_can_start_from(any_step, name, given, match):
    with pytest.raises(ValueError, match=match):
        made_by(any_step(name), **given)
