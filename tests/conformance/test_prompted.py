"""Every family of pipelines that starts from prompts: found by running it, then asked as the pipeline asks."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.derivatives.engines import choose_engine, derivative_in_r
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError
from fmm_distill.losses import Jump
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.student.stages import jump_embeddings
from fmm_distill.student.student import Student
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.recording import record
from tests.conformance.stock_steps import InDouble, check_steps, euler_of
from tests.tiny import audio, diffusion, flow, layouts, video

ROOT = Path(__file__).parents[2]
# They have adapters of their own, are refused, or are there for one test.
OTHERS = {"dit", "ldm", "unet1d", "sdxl-refiner", "hunyuan-image"}
OTHERS |= {"lumina-next"}
FAMILIES = {
    name: tiny
    for module in (audio, diffusion, flow, video)
    for name, tiny in module.PIPELINES.items()
    if name not in OTHERS
}
# Opened in the same way, and slower.
SLOW = layouts.PIPELINES
# Their pipelines project the guided output at any setting, or have no guidance by two outputs.
UNGUIDED = {"flux2", "ace-step"}
# Their guided tokens have the norms of the unguided ones.
NORMALIZED = {"qwen-image"}
# Differences of their outputs in float32 jump: positions in bfloat16, and experts that are chosen by rank.
STEEP = {"kandinsky5", "hidream"}
PROMPTS = ("a cat", "two dogs in the snow")


def saved(name, folder):
    tiny = (FAMILIES | SLOW)[name]
    tiny.build().save_pretrained(folder, safe_serialization=True)
    return str(folder), dict(tiny.call)


@pytest.fixture(scope="module", params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def opened(request, tmp_path_factory):
    source, call = saved(request.param, tmp_path_factory.mktemp("teacher"))
    return request.param, call, load_teacher(source, prompts=PROMPTS, call=call)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs/decisions.md"])
def test_the_documentation_counts_them(page):
    counted = re.findall(r"(\d+) families (?:with text|of pipelines|in one)", (ROOT / page).read_text(encoding="utf-8"))
    assert counted == [str(len(FAMILIES))]


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@torch.no_grad()
def test_one_euler_step_is_one_stock_step(opened):
    name, call, teacher = opened
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teacher.pipeline.folder)
    pipeline.scheduler = euler_of(pipeline, teacher)
    off = {"guidance_scale": 0.0 if name == "z-image" else 1.0, "output_type": "latent"}
    seen = record(
        pipeline,
        teacher.pipeline.component,
        call | off | {"prompt": list(PROMPTS), "num_inference_steps": 10, "generator": torch.manual_seed(0)},
    )
    assert len(seen.steps) == 10
    check_steps(seen, teacher, pipeline.scheduler, teacher.conditions.prompts)


@torch.no_grad()
def test_the_student_is_its_teacher_and_every_prompt_is_itself(opened):
    _, _, teacher = opened
    student, cond = Student.from_teacher(teacher), teacher.conditions.prompts
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.4, 0.9], dtype=torch.float64))
    v = teacher.velocity(x, t, cond)
    at_start = student.mean_velocity(x, t, t, cond)
    # The same sums, but kernels round by where in memory the weights lie.
    assert (at_start - v).abs().max() <= 1e-6 * v.abs().max()
    assert (student.mean_velocity(x, t, 0 * t, cond) - v).abs().max() <= 1e-6 * v.abs().max()
    # A prompt moves the answer, and a sample does not see its neighbor's.
    other = teacher.velocity(x, t, cond.rows(torch.tensor([1, 0])))
    assert ((other - v).flatten(1).norm(dim=1) > 1e-4 * v.flatten(1).norm(dim=1)).all()
    alone = teacher.velocity(x[1:], t[1:], cond.rows(torch.tensor([1])))
    assert (alone - v[1:]).abs().max() < 1e-4 * v.abs().max()


def test_the_derivative_in_r_and_its_gradient(opened):
    """Exact forward mode is what central differences say in float64, and a step through it makes the map see r."""
    name, _, teacher = opened
    student = Student.from_teacher(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for embedding in jump_embeddings(student.network):
            torch.nn.init.normal_(embedding.linear_2.weight, std=0.3)
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.6, 0.9], dtype=torch.float64))
    r = teacher.schedule.time_at(torch.tensor([0.2, 0.5], dtype=torch.float64))
    cond = teacher.conditions.prompts
    engine, reason = choose_engine(student, x, t, r, cond)
    assert engine == "exact", reason
    single = derivative_in_r(student, x, t, r, cond=cond)
    with torch.no_grad():
        differences = derivative_in_r(student, x, t, r, cond=cond, engine="central")
    student.double()
    wide = Conditioning({k: v.double() if v.is_floating_point() else v for k, v in cond.inputs.items()}, cond.shared)
    with InDouble(), torch.no_grad():
        exact = derivative_in_r(student, x.double(), t, r, cond=wide)
        h = student.clock.warp(t) - student.clock.warp(r)
        ends = [student.mean_velocity_of_jump(x.double(), t, h + step, wide) for step in (1e-5, -1e-5)]
    central = (ends[0] - ends[1]) / 2e-5 * -expand(student.clock.dwarp_dt(r), x.double())
    assert (exact - central).norm() < 1e-5 * exact.norm()
    assert (single - exact).norm() < (1e-2 if name in STEEP else 1e-4) * exact.norm()
    if name not in STEEP:
        assert (differences - exact).norm() < 1e-3 * exact.norm()


def test_a_step_makes_the_map_depend_on_r(opened):
    _, _, teacher = opened
    student, cond = Student.from_teacher(teacher), teacher.conditions.prompts
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.6, 0.9], dtype=torch.float64))
    r = teacher.schedule.time_at(torch.tensor([0.2, 0.5], dtype=torch.float64))
    jumps = [p for embedding in jump_embeddings(student.network) for p in embedding.parameters()]
    optimizer = torch.optim.SGD(jumps, lr=1e-2)
    Lagrangian()(student, teacher.velocity, Jump(x, t, r, cond, t)).sum().backward()
    torch.nn.utils.clip_grad_norm_(jumps, 1.0)
    optimizer.step()
    with torch.no_grad():
        moved = student.mean_velocity(x, t, r, cond) - student.mean_velocity(x, t, t, cond)
    assert 0 < moved.norm() < torch.inf


@torch.no_grad()
def test_guidance_is_the_pipelines_own(opened):
    """With the pipeline's own guidance on, what it hands its scheduler is our guided prediction."""
    name, _, teacher = opened
    if name in UNGUIDED:
        with pytest.raises(UserError, match=r"guidance: .* try guidance\.scale 1"):
            teacher.conditions.check_null()
        return
    null = teacher.conditions.null(teacher.conditions.prompts)
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.5, 0.8], dtype=torch.float64))
    v, nothing = (
        teacher.parametrization.velocity(teacher.network, x, t, c) for c in (teacher.conditions.prompts, null)
    )
    axis = teacher.conditions.empty.norm_axis
    assert axis == (2 if name in NORMALIZED else 0)
    teacher.guidance = Guidance(3.0, (teacher.schedule.t_min, float(t[0])), norm_axis=axis)
    guided = teacher.velocity(x, t, teacher.conditions.prompts)
    teacher.guidance = None
    expected = nothing + 3 * (v - nothing)
    if axis:
        expected *= v.norm(dim=axis, keepdim=True) / expected.norm(dim=axis, keepdim=True)
    torch.testing.assert_close(guided[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(guided[1], v[1])
    assert (guided[0] - v[0]).abs().max() > 0


@torch.no_grad()
def test_samples_are_decoded_as_the_pipeline_decodes(opened):
    name, _, teacher = opened
    if name == "allegro":
        pytest.skip("the stock autoencoder decodes tiles of a size that a tiny one has not")
    images = teacher.codec.decode(torch.zeros(2, *teacher.event_shape))
    assert len(images) == 2
    assert images.isfinite().all()
    if images.ndim == 3:
        assert images.shape[1] == (2 if name in ("stable-audio", "ace-step") else 1)
    else:
        assert images.shape[1] == 3
        assert images.abs().max() <= 1
    other = teacher.codec.decode(torch.ones(1, *teacher.event_shape))
    # A vocoder with random weights is almost silent.
    assert (other - images[:1]).abs().max() > 1e-4 * images.abs().max()
