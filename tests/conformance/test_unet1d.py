"""``UNet1DModel`` teachers as Dance Diffusion saves them: against stock steps, closed form, training and export."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import diffusers
import pytest
import torch

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.config.settings import EvaluationSettings
from fmm_distill.core.derivatives.engines import choose_engine, derivative_in_r
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import Angular
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import UserError
from fmm_distill.evaluation.evaluator import evaluate
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.remote.stock_pipeline import flow_map_pipeline
from fmm_distill.losses import Jump
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.run.distill import distill
from fmm_distill.run.inspect import describe_teacher
from fmm_distill.run.plan import plan
from fmm_distill.run.reopen import draw_run
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.closed_form import Gaussian
from fmm_distill.teachers.load import load_teacher
from tests.cli.runs import TINY
from tests.conformance.test_prompted import InDouble
from tests.conformance.test_prompted_export import moved
from tests.logs import logged
from tests.tiny.diffusion import PIPELINES, redraw

# As planners in reinforcement learning have it (Diffuser, arXiv 2205.09991).
PLANNER = {
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "extra_in_channels": 0,
    "down_block_types": ("DownResnetBlock1D",) * 2,
    "mid_block_type": "MidResTemporalBlock1D",
    "up_block_types": ("UpResnetBlock1D",),
    "out_block_type": "OutConv1DBlock",
    "act_fn": "mish",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("dance") / "teacher"
    PIPELINES["unet1d"].build().save_pretrained(target, safe_serialization=True)
    return target


def changed(target, scheduler=None, **changes):
    pipeline = PIPELINES["unet1d"].build()
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    pipeline.unet = redraw(diffusers.UNet1DModel(**(config | changes)))
    pipeline.save_pretrained(target, safe_serialization=True)
    if scheduler is not None:
        scheduler.save_pretrained(target / "scheduler")
        index = target / "model_index.json"
        index.write_text(index.read_text().replace("IPNDMScheduler", type(scheduler).__name__))
    return str(target)


@pytest.fixture
def teacher(folder):
    return load_teacher(str(folder))


def some(teacher, count=2):
    return torch.randn(count, *teacher.event_shape, generator=torch.Generator().manual_seed(0))


def jumps(teacher):
    t = teacher.schedule.time_at(torch.tensor([0.6, 1.0], dtype=torch.float64))
    return some(teacher), t, teacher.schedule.time_at(torch.tensor([0.2, 0.5], dtype=torch.float64))


def our_step(teacher, x, t, r):
    """From the teacher's coordinates at t to those at r, by one Euler step on the axis."""
    start, end = (torch.full((len(x),), float(time), dtype=torch.float64) for time in (t, r))
    on_axis = x / expand(teacher.schedule.scale(start), x)
    moved_on = on_axis - expand(start - end, x) * teacher.velocity(on_axis, start)
    return moved_on * expand(teacher.schedule.scale(end), x)


def test_the_levels_are_those_of_the_stock_scheduler(teacher):
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(10)
    times = teacher.schedule.grid(10)
    alpha, sigma = teacher.schedule.alpha_sigma(times)
    torch.testing.assert_close(alpha, scheduler.alphas.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sigma, scheduler.betas.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(teacher.schedule.network_time(times[:-1]), scheduler.timesteps.double())
    assert teacher.event_shape == (2, 16)
    assert teacher.prediction == "v_prediction"


def first_step(scheduler, output, i, x):
    """One step of a stock scheduler that starts at its level i: of first order, it has nothing to look back on."""
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(i)
    return scheduler.step(output, scheduler.timesteps[i], x).prev_sample


@torch.no_grad()
def test_one_euler_step_is_the_first_step_of_the_stock_scheduler(teacher):
    scheduler = diffusers.IPNDMScheduler()
    teacher.network.double()
    for i, (t, r) in enumerate(pairwise(teacher.schedule.grid(10))):
        if i == 0:
            continue
        x = some(teacher).double() + i
        scheduler.set_timesteps(10)
        output = teacher.network(x, scheduler.timesteps[i].double().expand(len(x))).sample
        theirs = first_step(scheduler, output, i, x)
        assert (our_step(teacher, x, t, r) - theirs).abs().max() < 1e-5


@torch.no_grad()
def test_from_pure_noise_the_network_is_listened_to(teacher):
    """At alpha = 0 the stock step divides 0 by 1e-8: it takes data for 0 whatever the network says."""
    scheduler, x = diffusers.IPNDMScheduler(), some(teacher)
    t, r = teacher.schedule.grid(10)[:2]
    output = teacher.network(x, torch.ones(len(x))).sample
    ignored = [first_step(scheduler, said, 0, x) for said in (output, output + 1)]
    assert torch.equal(*ignored)
    alpha, sigma = (float(value) for value in teacher.schedule.alpha_sigma(r[None]))
    torch.testing.assert_close(our_step(teacher, x, t, r), sigma * x - alpha * output, rtol=1e-5, atol=1e-6)
    assert (ignored[0] - sigma * x).abs().max() < 1e-5


class ExactNetwork(torch.nn.Module):
    """What a perfect network says of Gaussian data, told an angle as a share of a right one."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def forward(self, x, time):
        alpha, sigma = torch.cos(time * torch.pi / 2), torch.sin(time * torch.pi / 2)
        data = self.truth.denoise(x, alpha, sigma)
        noise = (x - expand(alpha, x) * data) / expand(sigma, x)
        return type("Output", (), {"sample": expand(alpha, x) * noise - expand(sigma, x) * data})()


def test_velocity_is_the_closed_form_over_the_range_of_t():
    truth = Gaussian(torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4), 0.6)
    teacher = Teacher(
        ExactNetwork(truth), Parametrization(Angular(), "v_prediction"), (2, 4), "here", "closed form", {}
    )
    t = torch.linspace(teacher.schedule.t_min, 1, 200, dtype=torch.float64)
    x = torch.randn(200, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher.velocity(x, t), truth.velocity(x, t), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_student_is_its_teacher_at_the_start(teacher):
    student = Student.from_teacher(teacher)
    x, t = some(teacher, 6), teacher.schedule.time_at(torch.linspace(0, 1, 6, dtype=torch.float64))
    v = teacher.velocity(x, t)
    # The same sums, but kernels round by where in memory the weights lie.
    assert (student.mean_velocity(x, t, t) - v).abs().max() <= 1e-6 * v.abs().max()
    assert (student.mean_velocity(x, t, 0 * t) - v).abs().max() < 1e-6 * v.abs().max()
    assert student.network.config["jump_hosts"] == ["time_proj"]
    # Every sample has a jump of its own.
    moved(student)
    alone = student.mean_velocity(x[1:2], t[1:2], 0 * t[1:2])
    torch.testing.assert_close(student.mean_velocity(x, t, 0 * t)[1:2], alone, rtol=1e-4, atol=1e-5)
    assert (alone - v[1:2]).abs().max() > 1e-3


def test_the_derivative_in_r(teacher):
    student = moved(Student.from_teacher(teacher))
    x, t, r = jumps(teacher)
    engine, reason = choose_engine(student, x, t, r)
    assert engine == "exact", reason
    with torch.no_grad():
        single, differences = (derivative_in_r(student, x, t, r, engine=kind) for kind in ("exact", "central"))
    student.double()
    with InDouble(), torch.no_grad():
        exact = derivative_in_r(student, x.double(), t, r)
        h = student.clock.warp(t) - student.clock.warp(r)
        ends = [student.mean_velocity_of_jump(x.double(), t, h + step) for step in (1e-5, -1e-5)]
        central = (ends[0] - ends[1]) / 2e-5 * -expand(student.clock.dwarp_dt(r), x.double())
    assert (exact - central).norm() < 1e-5 * exact.norm()
    assert (single - exact).norm() < 1e-4 * exact.norm()
    assert (differences - exact).norm() < 1e-3 * exact.norm()


def test_a_step_makes_the_map_depend_on_r(teacher):
    student = Student.from_teacher(teacher)
    x, t, r = jumps(teacher)
    optimizer = torch.optim.SGD(student.network.jump_embedding.parameters(), lr=1e-2)
    Lagrangian()(student, teacher.velocity, Jump(x, t, r, None, t)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        change = student.mean_velocity(x, t, r) - student.mean_velocity(x, t, t)
    assert 0 < change.norm() < torch.inf


def test_more_steps_of_the_teacher_come_closer_to_its_ode(teacher):
    settings = EvaluationSettings(
        steps=(2,), ddim_steps=(2, 20), dpmsolver_steps=(4,), samples=2, endpoint_samples=2, endpoint_solver_steps=30
    )
    evaluation = evaluate({"student": Student.from_teacher(teacher)}, teacher, settings, None, torch.device("cpu"))
    assert [row.sampler for row in evaluation.rows] == ["student", "teacher-euler", "teacher-euler"]
    few, many = (row.endpoint_error for row in evaluation.rows[1:])
    assert many < few / 2
    assert "waves" in evaluation.protocol["endpoint_error"]


def test_what_is_said_of_it(teacher):
    said = describe_teacher(teacher, Recipe())
    assert re.search(
        r"memory +\d\.\d MiB at peak: weights 1\.\d, gradients 0\.9, .*; 0\.\d MiB per further sample", said
    )
    for part in (
        "2 x 16 (channels x length)",
        "conditioned on an angle",
        "time_proj",
        "any-step pipeline alone; no stock pipelines",
    ):
        assert part in said


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run, its pipeline reloaded by stock diffusers in a process without this package.

    16 / 49 * 49 is a little below 16: the stock pipeline fills up and cuts.
    """
    target, lines = tmp_path_factory.mktemp("run"), []
    source = changed(target / "teacher", sample_rate=49)
    with logged(lines):
        distill(parse({"teacher": source} | TINY, "here"), target / "run")
    return target / "run", "\n".join(lines)


def test_a_whole_run(run, teacher):
    target, said = run
    assert f"only the any-step pipeline is written ({exporter_of(teacher).not_fixed})" in said
    verified = json.loads((target / "student" / "verification.json").read_text())
    assert sorted(verified["pipelines"]) == ["any-1", "any-2"]
    assert verified["passed"]
    card = (target / "student" / "README.md").read_text()
    assert exporter_of(teacher).not_fixed in card
    assert "audios = pipeline(batch_size=4, num_inference_steps=3).audios" in card
    assert "pipeline_tag" not in card
    draw_run(target, (1, 3), 2, 0, target / "more.png")
    assert (target / "more.png").stat().st_size > 0


def test_the_any_step_pipeline_is_the_stock_one(teacher):
    student = moved(Student.from_teacher(teacher))
    stock = diffusers.IPNDMScheduler()
    student.network.register_to_config(flow_map=exporter_of(teacher).settings(stock))
    pipeline = flow_map_pipeline(diffusers.DanceDiffusionPipeline)(unet=student.network, scheduler=stock)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 3, 7):
        made = pipeline(3, steps, torch.Generator().manual_seed(4)).audios
        noise = torch.randn(3, *teacher.event_shape, generator=torch.Generator().manual_seed(4))
        own = sample(student, noise, steps).clamp(-1, 1)
        assert (torch.as_tensor(made) - own).abs().max() < 1e-4
    # 14 of 16: a length that the blocks do not halve evenly.
    assert pipeline(audio_length_in_s=14 / 16, num_inference_steps=2, return_dict=False)[0].shape == (1, 2, 14)
    assert pipeline.scheduler is stock


def test_images_are_no_data_of_it(folder):
    with pytest.raises(UserError, match=r"builtin:digits: expected none, because data are images and .* makes sounds"):
        plan(parse({"teacher": str(folder)} | TINY | {"data": "builtin:digits"}, "here"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (PLANNER, "time_embedding_type 'positional'; expected 'fourier'"),
        ({"use_timestep_embedding": True, "act_fn": "silu"}, "use_timestep_embedding True; expected False"),
        ({"out_block_type": "OutConv1DBlock", "act_fn": "silu"}, "out_block_type 'OutConv1DBlock'; expected None"),
        ({"extra_in_channels": 3}, "DownBlock1DNoSkip and 3 extra_in_channels; expected DownBlock1DNoSkip and 16"),
        ({"down_block_types": ("DownBlock1D",) * 2}, "first block DownBlock1D and 16"),
        ({"out_channels": 1}, "2 channels in, 1 out"),
        ({"sample_size": 18}, "sample_size 18 .* expected a multiple of 4 of at least 12"),
        ({"sample_size": 8}, "sample_size 8 .* expected a multiple of 4 of at least 12"),
        ({"sample_rate": None}, "sample_rate None"),
        (
            {"down_block_types": ("DownBlock1DNoSkip",) * 2},
            "does not run on a sample of 2 x 16",
        ),
        ({"scheduler": diffusers.DDIMScheduler()}, "UNet1DModel with DDIMScheduler; expected IPNDMScheduler"),
        ({"scheduler": diffusers.IPNDMScheduler(trained_betas=[0.5, 0.2])}, "IPNDMScheduler with trained_betas"),
        ({"scheduler": diffusers.IPNDMScheduler(num_train_timesteps=1)}, "num_train_timesteps is 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(tmp_path, changes, match):
    with pytest.raises(UserError, match=match) as caught:
        load_teacher(changed(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_value_function_beside_it_is_refused(tmp_path):
    source = changed(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"value_function": ["diffusers", "UNet1DModel"]}))
    with pytest.raises(UserError, match=r"expected UNet1DModel and a scheduler, .* got also value_function"):
        load_teacher(source)


def test_a_configuration_without_the_width_of_its_time_embedding(tmp_path, teacher):
    """As the published ones are; diffusers' default is twice the first block's channels now."""
    changed(tmp_path)
    PIPELINES["unet1d"].build().save_pretrained(tmp_path, safe_serialization=True)
    file = tmp_path / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["time_embedding_dim"]
    file.write_text(json.dumps(config))
    old = load_teacher(str(tmp_path))
    x, t, _ = jumps(teacher)
    with torch.no_grad():
        assert torch.equal(old.velocity(x, t), teacher.velocity(x, t))
    assert Student.from_teacher(old).network.config["time_embedding_dim"] == 16
    file.write_text("{")
    with pytest.raises(UserError, match=r"unet/config\.json can't be read"):
        load_teacher(str(tmp_path))
