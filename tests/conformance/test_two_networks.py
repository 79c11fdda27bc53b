"""Teachers with a network for high noise levels and another one for low ones, and their students."""

from __future__ import annotations

import json
from itertools import pairwise

import diffusers
import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from fmm_distill import distill
from fmm_distill.config.recipe import parse
from fmm_distill.core.derivatives.engines import derivative_in_r
from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.core.staged import StagedNetwork
from fmm_distill.core.time_axis import LinearClock, expand
from fmm_distill.errors import UserError
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.verify import verify
from fmm_distill.export.write import write_student
from fmm_distill.losses import Jump
from fmm_distill.losses.eulerian import Eulerian
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.losses.progressive import Progressive
from fmm_distill.run.plan import plan
from fmm_distill.student.lora import add_lora, lora_layers
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.closed_form import Gaussian
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.call import RecordedCall
from fmm_distill.teachers.prompts import Prompts
from tests import processes
from tests.conformance.test_prompted import PROMPTS
from tests.conformance.test_prompted_export import moved
from tests.conformance.test_scaled_lora import code_of, exported, run
from tests.scaled import one_by_one, points, relative, scaled_student, train
from tests.tiny import image_conditions, video
from tests.unit.test_scaled_runs import SPLIT

# On the time axis, where the timestep is 1000 t.
BOUNDARY = 0.6
HIGH = Gaussian(torch.tensor([0.7, -1.3], dtype=torch.float64), 0.4)
LOW = Gaussian(torch.tensor([-0.2, 0.5], dtype=torch.float64), 1.5)


class Composed(FlowMap):
    """The flow map of the field that is ``HIGH`` from the boundary on and ``LOW`` below it."""

    clock = LinearClock()
    t_max = 1.0

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        r = t - h
        middle = torch.full_like(t, BOUNDARY)
        # A jump across the boundary is one of each field.
        across = LOW(HIGH(x, t, middle), middle, r)
        u = (x - across) / expand(h, x)
        within = torch.where((t < BOUNDARY)[:, None], LOW.mean_velocity(x, t, r), HIGH.mean_velocity(x, t, r))
        return torch.where(((t >= BOUNDARY) & (r < BOUNDARY))[:, None], u, within)


def velocity(x, t, cond=None):
    return torch.where((t < BOUNDARY)[:, None], LOW.velocity(x, t), HIGH.velocity(x, t))


class Jumps(nn.Module):
    """A network with the mean velocity of a map, and with one weight."""

    def __init__(self, flow_map):
        super().__init__()
        self.flow_map, self.scale = flow_map, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, h):
        return (self.scale * self.flow_map.mean_velocity_of_jump(x, t, h),)


def composed_student(high=None):
    network = StagedNetwork(Jumps(high or Composed()), Jumps(LOW), ("transformer", "transformer_2"))
    call = RecordedCall("x", "t", 1e-3, 0.0, 1.0, boundary=1000 * BOUNDARY)
    return Student(network, Parametrization(FlowMatching(), "flow_prediction", call))


def jumps(count=12):
    """Points and jumps on both sides, and across the boundary, in turn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    part = torch.rand(2, count, generator=generator, dtype=torch.float64)
    t, r = 0.1 + 0.4 * part[0], 0.02 + 0.05 * part[1]
    t[1::3], r[1::3] = t[1::3] + 0.5, r[1::3] + BOUNDARY
    t[2::3] = t[2::3] + 0.5
    assert ((t >= BOUNDARY) & (r < BOUNDARY)).sum() == (t < BOUNDARY).sum() == (r >= BOUNDARY).sum() == count // 3
    return x, t, r


def test_the_map_of_two_fields_solves_their_ode():
    x, t, r = jumps()
    found = []
    for start, begin, end in zip(x, t, r, strict=True):
        grid = torch.tensor([begin, BOUNDARY, end] if end < BOUNDARY <= begin else [begin, end], dtype=torch.float64)
        for one, other in pairwise(grid):
            # A point of the boundary belongs to the side on which the segment is.
            field = HIGH if one > BOUNDARY else LOW
            start = odeint(
                lambda s, y, field=field: field.velocity(y, s.reshape(1)),
                start[None],
                torch.stack([one, other]),
                method="dopri5",
                rtol=1e-10,
                atol=1e-12,
            )[-1][0]
        found.append(start)
    torch.testing.assert_close(Composed()(x, t, r), torch.stack(found), rtol=1e-7, atol=1e-8)


def test_a_student_of_two_networks_is_the_map_of_both_in_one_batch():
    student, truth, (x, t, r) = composed_student(), Composed(), jumps()
    torch.testing.assert_close(student(x, t, r), truth(x, t, r), rtol=1e-12, atol=1e-12)
    # On the diagonal it is the field, on both sides and at the boundary itself.
    t[0] = BOUNDARY
    torch.testing.assert_close(student.mean_velocity(x, t, t), velocity(x, t), rtol=1e-12, atol=1e-12)
    slope = derivative_in_r(student, x, t, r)
    ends = [truth.mean_velocity_of_jump(x, t, t - r + step) for step in (1e-6, -1e-6)]
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        Lagrangian(stop_gradient="nowhere", derivative="exact"),
        Eulerian(stop_gradient="nowhere", derivative="exact"),
        Progressive(middle="uniform"),
    ],
    ids=["lagrangian", "eulerian", "progressive"],
)
def test_losses_vanish_at_the_map_of_two_fields_alone(loss):
    x, t, r = jumps()
    u = torch.linspace(0.1, 0.9, len(x), dtype=torch.float64)
    student = composed_student()
    assert loss(student, velocity, Jump(x, t, r, None, u)).max() < 1e-20
    # A map that goes on with the field of its start fails where a jump crosses the boundary.
    crossing = (t >= BOUNDARY) & (r < BOUNDARY)
    wrong = loss(composed_student(HIGH), velocity, Jump(x, t, r, None, u))
    if not isinstance(loss, Eulerian):
        # Its derivative in the start of a jump does not contain the field of its end.
        assert wrong[crossing].max() > 1e-3
    assert wrong[~crossing].max() < 1e-20


@pytest.mark.parametrize(("time", "unused"), [(0.9, "transformer_2"), (0.3, "transformer")])
def test_a_network_without_samples_has_a_gradient_of_zero(time, unused):
    student, (x, _, _) = composed_student(), jumps()
    t = torch.full((len(x),), time, dtype=torch.float64)
    student.mean_velocity(x, t, t / 2).square().sum().backward()
    gradients = {name.split(".")[1]: p.grad for name, p in student.named_parameters()}
    assert len(gradients) == 2
    assert gradients.pop(unused) == 0
    assert all(gradient.abs() > 0 for gradient in gradients.values())


def saved(folder, changed=None, **settings):
    """A tiny Wan 2.2 A14B with other settings of the pipeline."""
    pipeline = video.PIPELINES["wan-two"].build()
    pipeline.register_to_config(**settings)
    if changed is not None:
        pipeline.register_modules(**changed)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return str(folder), dict(video.PIPELINES["wan-two"].call)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(source):
    folder, call = source
    return load_teacher(folder, prompts=PROMPTS, call=call)


@torch.no_grad()
def test_the_time_of_a_sample_selects_its_network(teacher):
    call, parts = teacher.parametrization.call, teacher.network.parts
    assert (list(parts), call.boundary, teacher.pipeline.second) == (
        ["transformer", "transformer_2"],
        875.0,
        "transformer_2",
    )
    x = torch.randn(4, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    # The sides in turn, the boundary itself among them.
    t = torch.tensor([0.9, 0.5, 0.875, 0.8749], dtype=torch.float64)
    cond = teacher.conditions.prompts.rows(torch.tensor([0, 1, 1, 0]))
    v = teacher.velocity(x, t, cond)
    alone = Parametrization(teacher.schedule, teacher.prediction, call.of_stage())
    for i, name in enumerate(("transformer", "transformer_2", "transformer", "transformer_2")):
        own = alone.velocity(parts[name], x[i : i + 1], t[i : i + 1], cond.part(i, i + 1))
        assert relative(v[i : i + 1], own) < 1e-5


@pytest.mark.parametrize(
    ("settings", "changed", "match"),
    [
        ({}, {"transformer_2": None}, r"expected a transformer_2 for the times below boundary_ratio 0\.875, got none"),
        (
            {"boundary_ratio": 1.0},
            None,
            r"expected a boundary_ratio between 0 and 1, .* got 1; try boundary_ratio",
        ),
        ({}, {"transformer": None}, r"no adapter for .*transformer_2: WanTransformer3DModel"),
    ],
)
def test_what_is_refused(tmp_path, settings, changed, match):
    folder, call = saved(tmp_path, changed, **settings)
    with pytest.raises(UserError, match=match):
        load_teacher(folder, call=call)


def test_a_second_network_without_a_boundary_in_the_index(tmp_path):
    folder, call = saved(tmp_path)
    index = tmp_path / "model_index.json"
    settings = json.loads(index.read_text())
    del settings["boundary_ratio"]
    index.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"or two with a boundary_ratio, got a second WanTransformer3DModel"):
        load_teacher(folder, call=call)


def test_a_pipeline_that_changes_its_network_elsewhere(source, monkeypatch):
    folder, call = source
    monkeypatch.setattr("fmm_distill.teachers.prompted.probe.boundary_of", lambda pipeline: 600.0)
    with pytest.raises(UserError, match=r"expected transformer from timestep 600 on and .*, got transformer_2 at"):
        load_teacher(folder, call=call)
    monkeypatch.setattr("fmm_distill.teachers.prompted.probe._MORE_STEPS", (6,))
    monkeypatch.setattr("fmm_distill.teachers.prompted.probe.networks_of", lambda *_: {"transformer": None, "other": 1})
    with pytest.raises(UserError, match=r"calls of transformer and other within 6 steps"):
        load_teacher(folder, call=call)


def test_a_boundary_that_few_steps_do_not_reach(tmp_path):
    folder, call = saved(tmp_path, boundary_ratio=0.1)
    assert load_teacher(folder, call=call).boundary == 100


def test_without_a_boundary_the_first_network_is_called_at_all_times(tmp_path, teacher):
    folder, call = saved(tmp_path, boundary_ratio=None)
    one = load_teacher(folder, prompts=PROMPTS, call=call)
    assert one.pipeline.second is None
    assert one.boundary is None
    x, t, _, cond = points(one)
    alone = Parametrization(one.schedule, one.prediction, teacher.parametrization.call.of_stage())
    with torch.no_grad():
        own = alone.velocity(teacher.network.parts["transformer"], x, t - 0.5, cond)
        assert relative(one.velocity(x, t - 0.5, cond), own) < 1e-6


@torch.no_grad()
def test_adapters_that_change_with_the_length_of_the_jump(teacher):
    student = scaled_student(teacher, 2)
    x, t, r, cond = points(teacher, 4)
    assert (t < 0.875).any()
    assert (t >= 0.875).any()
    assert relative(student.mean_velocity(x, t, t, cond), teacher.velocity(x, t, cond)) < 1e-6
    u = student.mean_velocity(x, t, r, cond)
    assert relative(u, one_by_one(student, x, t, r, cond)) < 1e-5
    assert relative(u, teacher.velocity(x, t, cond)) > 1e-2


def test_adapters_are_in_both_networks(source):
    folder, call = source
    teacher = load_teacher(folder, prompts=PROMPTS, call=call)
    student = Student.from_teacher(teacher)
    x, t, _, cond = points(teacher)
    v = teacher.velocity(x, t, cond)
    shared = add_lora(student, teacher, 2)
    layers = {name.partition(".")[0] for name in lora_layers(student.network)}
    assert layers == {"transformer", "transformer_2"}
    trained = {name.split(".")[1] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == layers
    with torch.no_grad():
        for name, value in student.named_parameters():
            if ".lora_B." in name:
                value.normal_(generator=torch.Generator().manual_seed(0))
        assert relative(shared.velocity(x, t, cond), v) < 1e-6
        assert relative(student.mean_velocity(x, t, t, cond), v) > 1e-2


def recipe_of(folder, texts, kind, **more):
    student = {"kind": kind, "lora": {"rank": 2}} if kind == "scaled" else {"kind": kind}
    velocity = {"extra_losses": [{"loss": {"name": "flow_matching"}, "fraction": 0.25}]}
    training = {"steps": 3, "batch_size": 2, "checkpoint_every": 100, "lr_schedule": "constant", "ema": [0.9]}
    return {
        "teacher": folder,
        "prompts": {"file": str(texts)},
        "pipeline": dict(video.PIPELINES["wan-two"].call),
        "loss": {"name": "lagrangian", "stop_gradient": "target"},
        "student": student,
        "training": training,
        **({} if kind == "scaled" else velocity),
        **more,
    }


MATCHED = {"matching": {"steps": 2, "critic": {"warmup_steps": 2}, "rollout": {"steps": [2]}}}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, source):
    """Each process has one sample in a step, and so the times of one of the two networks alone."""
    (tmp_path / "prompts.txt").write_text("a cat\ntwo dogs\n")
    recipes = {kind: recipe_of(source[0], tmp_path / "prompts.txt", kind) for kind in ("embedded", "scaled")}
    recipes["matched"] = recipe_of(source[0], tmp_path / "prompts.txt", "scaled", **MATCHED)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "recipes.json").write_text(json.dumps(recipes))
    made = processes.on_two_processes(SPLIT, tmp_path / "two" / "recipes.json", tmp_path / "two")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1])["processes"] == 2
    for name, settings in recipes.items():
        train(settings, tmp_path / name)
        mine, other = (
            [json.loads(line) for line in (folder / name / "steps.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "two", tmp_path)
        )
        assert len(mine) == len(other) > 2
        for one, same in zip(mine, other, strict=True):
            for key in ("loss", "gradient_norm"):
                assert one[key] == pytest.approx(same[key], rel=5e-3), (name, one["step"], key)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_image_to_video(tmp_path, guided):
    tiny = image_conditions.SLOW["wan-image-two"]
    tiny.build().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    prompts = Prompts(PROMPTS, image_conditions.images_for(tiny, 2))
    guidance = Guidance(3.0) if guided else None
    teacher = load_teacher(str(tmp_path / "teacher"), prompts=prompts, call=dict(tiny.call), guidance=guidance)
    assert teacher.boundary == 900
    assert teacher.parametrization.call.joined is not None
    student = moved(Student.from_teacher(teacher))
    (tmp_path / "student").mkdir()
    export = write_student(student, teacher, tmp_path / "student", (1, 2, 4))
    found = verify(export)
    assert sorted(found) == sorted(f"{kind}-{n}" for kind in ("any", "folded") for n in (1, 2, 4))
    recipe = parse({"teacher": "builtin:digits"}, "here")
    write_manifest(export.folder, make_manifest(student, teacher, recipe, export.steps))
    loaded = load_student(export.folder, prompts=prompts)
    noise = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    own = sample(student, noise, 3, teacher.first_conditions(2))
    assert relative(loaded.generate(noise, 3), own) < 1e-5


@pytest.mark.slow
def test_the_adapters_of_both_networks_in_the_stock_pipeline(tmp_path):
    """By the code of the model card."""
    export = exported("wan-two", tmp_path)
    call, code = export.exporter.verification_call(2), code_of(export)
    assert 'pipeline.transformer_2.set_adapters("student"' in code
    for steps in (2, 4):
        samples = run(code, call, steps)[1]
        folded = diffusers.DiffusionPipeline.from_pretrained(export.folder / f"steps-{steps}")
        folded.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        own = folded(**call, num_inference_steps=steps, generator=generator, return_dict=False)[0]
        assert relative(samples, torch.as_tensor(own)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", "scaled"])
def test_a_student_starts_from_an_exported_one(tmp_path, source, kind):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    evaluation = {"steps": [1], "samples": 2, "endpoint_samples": 2, "endpoint_solver_steps": 2, "features": "none"}
    evaluation |= {"ddim_steps": [], "dpmsolver_steps": []}
    settings = recipe_of(source[0], tmp_path / "prompts.txt", kind, evaluation=evaluation, export={"steps": [1]})
    distill(parse(settings, "here"), tmp_path / "run")
    average = load_student(tmp_path / "run" / "student").flow_map
    for start in ("run", "run/student"):
        student = settings["student"] | {"init": str(tmp_path / start)}
        continued = plan(parse(settings | {"student": student}, "here")).student
        x, t, r, cond = points(load_teacher(source[0], call=source[1]))
        with torch.no_grad():
            ours, theirs = (one.mean_velocity(x, t, r, cond) for one in (continued, average))
        assert relative(ours, theirs) < 1e-5
