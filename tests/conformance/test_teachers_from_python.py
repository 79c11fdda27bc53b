"""Teachers and students that Python passes to ``distill``: trained, evaluated, saved, resumed and reloaded."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from torch import nn

from fmm_distill import LearnedFlowMap, Recipe, Student, Teacher, distill, evaluate, load_student, load_teacher, sample
from fmm_distill.config.settings import OptimizerSettings
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.time_axis import LinearClock, expand
from fmm_distill.errors import UserError
from fmm_distill.evaluation.gallery import Gallery
from fmm_distill.evaluation.points import point_images
from fmm_distill.losses import Loss, squared_norm
from fmm_distill.run.given import Given
from fmm_distill.run.reopen import open_run
from fmm_distill.teachers.closed_form import Gaussian
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.scheduler import read_scheduler
from fmm_distill.teachers.velocity_field import as_teacher
from fmm_distill.training import checkpoint
from fmm_distill.training.callbacks import Callback
from fmm_distill.training.train_state import OptimizerState
from tests.cli.runs import STEPS, TINY, losses
from tests.conftest import tiny_unet


class Blob:
    """Data N(mean, std^2) on the plane: ten lines, no network."""

    event_shape = (2,)
    mean, std = 0.5, 0.2

    def velocity(self, x, t, cond=None):
        s = expand(t, x)
        spread = (1 - s).square() * self.std**2 + s.square()
        return (s - (1 - s) * self.std**2) / spread * (x - (1 - s) * self.mean) - self.mean


class PlaneMap(LearnedFlowMap):
    """``u(x, t, h)`` by one hidden layer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 2))

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        return self.layers(torch.cat([x, t.to(x)[:, None], h.to(x)[:, None]], 1))


class Mine(nn.Module):
    """No network of diffusers: its time comes first, it has no configuration and returns a tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))
        self.mix = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, time, x):
        return self.mix(x) + self.embed(time[:, None].float() / 1000)[:, :, None, None]


def call(network, x, time, cond, h):
    return network(time, x) if h is None else network(time, x, h=h)


def own_teacher(**changes):
    spec = read_scheduler(DDPMScheduler(), "mine")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = {
            "network": Mine(),
            "parametrization": Parametrization(spec.schedule, spec.prediction, call),
            "event_shape": (1, 8, 8),
            "source": "mine",
            "adapter": "my own",
            "scheduler_config": spec.config,
        }
    return Teacher(**(given | changes))


def pixel_dit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            sample_size=8, in_channels=1, out_channels=1, patch_size=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, norm_num_groups=1, num_embeds_ada_norm=4,
        )  # fmt: skip


def recipe(**changes):
    return Recipe.model_validate(TINY | changes)


def velocity_of(student, shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((3,), 0.9, dtype=torch.float64)
    with torch.no_grad():
        return student.mean_velocity(x, t, t / 3)


def opened_by_card(folder, **objects):
    """Run the code of a model card, and return its names."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names = dict(objects)
    exec(code.replace("<this folder>", str(folder)), names)
    return names


def test_a_closed_form_and_a_map_of_ones_own(tmp_path):
    found = distill(recipe(), tmp_path / "run", teacher=Blob(), student=PlaneMap())
    rows = {(row.sampler, row.steps) for row in found.rows}
    assert ("student", 1) in rows or any(name.startswith("student") for name, _ in rows)
    job = open_run(tmp_path / "run", given=Given(Blob(), PlaneMap(seed=7)))
    again = load_student(tmp_path / "run" / "student", teacher=Blob(), network=PlaneMap(seed=9)).flow_map
    torch.testing.assert_close(velocity_of(again, (2,)), velocity_of(job.student, (2,)))
    assert sample(again, torch.randn(5, 2), 2).shape == (5, 2)
    measured = evaluate(tmp_path / "run", teacher=Blob(), student=PlaneMap(), settings={"steps": [1]})
    assert measured.rows
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "a `PlaneMap` as the student was started from" in card
    shown = opened_by_card(tmp_path / "run" / "student", teacher=Blob(), network=PlaneMap(seed=9))
    assert shown["samples"].shape == (4, 2)
    torch.testing.assert_close(velocity_of(shown["student"].flow_map, (2,)), velocity_of(again, (2,)))
    # A sample is no image.
    assert "and coordinates of the distance" in found.protocol["consistency"]
    for word in ("pixels", "image"):
        assert word not in card.replace("seconds_per_image", "")


def test_points_are_drawn_where_they_are():
    gallery = Gallery(as_teacher(Blob()), 4, 3, 0, torch.device("cpu"))
    rows = gallery.rows(Student.from_teacher(as_teacher(Blob()), network=PlaneMap()), (1,))
    assert {images.shape for images in rows.values()} == {(3, 1, 33, 33)}
    spots = point_images(torch.tensor([[0.0, 0.0], [1.1, 0.0], [0.0, 1.1], [9.0, -9.0]]), torch.ones(1, 2)) > 0
    assert spots.flatten(1).sum(1).tolist() == [9, 9, 9, 9]
    # Row and column of the middle of each.
    middles = [spots[i, 0].nonzero().float().mean(0).tolist() for i in range(4)]
    assert middles == [[16, 16], [16, 31], [1, 16], [31, 31]]
    # A line has one coordinate.
    assert (point_images(torch.tensor([[1.1]]), torch.ones(1, 1)) > 0)[0, 0, 16, 31]
    assert not (point_images(torch.tensor([[float("nan"), 0.0]]), torch.ones(1, 2)) > 0).any()


def test_a_closed_form_and_a_stock_network(tmp_path):
    field = Gaussian(torch.zeros(1, 8, 8), 0.3)
    field.event_shape = (1, 8, 8)
    distill(recipe(), tmp_path / "run", teacher=field, student=tiny_unet())
    student = Student.from_teacher(as_teacher(field), network=tiny_unet())
    assert student.prediction == "flow_prediction"
    again = load_student(tmp_path / "run" / "student", teacher=field, network=tiny_unet()).flow_map
    assert (velocity_of(student, (1, 8, 8)) - velocity_of(again, (1, 8, 8))).abs().max() > 0
    shown = opened_by_card(tmp_path / "run" / "student", teacher=field, network=tiny_unet())
    assert shown["samples"].shape == (4, 1, 8, 8)


def test_a_network_of_ones_own(tmp_path):
    distill(recipe(), tmp_path / "run", teacher=own_teacher())
    start = Student.from_teacher(own_teacher())
    again = load_student(tmp_path / "run" / "student", teacher=own_teacher()).flow_map
    assert (velocity_of(again, (1, 8, 8)) - velocity_of(start, (1, 8, 8))).abs().max() > 0
    job = open_run(tmp_path / "run", given=Given(own_teacher()))
    assert torch.equal(velocity_of(job.student, (1, 8, 8)), velocity_of(again, (1, 8, 8)))
    assert "network=" not in (tmp_path / "run" / "student" / "README.md").read_text()
    assert opened_by_card(tmp_path / "run" / "student", teacher=own_teacher())["samples"].shape == (4, 1, 8, 8)


def test_a_dit_in_pixels(tmp_path):
    spec = read_scheduler(DDPMScheduler(), "dit")
    teacher = Teacher(
        network=pixel_dit(),
        parametrization=Parametrization(spec.schedule, spec.prediction),
        event_shape=(1, 8, 8),
        source="pixels",
        adapter="DiT in pixels",
        scheduler_config=spec.config,
        conditions=Classes(tuple("0123"), null_label=4),
    )
    distill(recipe(guidance={"scale": 2.0}), tmp_path / "run", teacher=teacher)
    assert (tmp_path / "run" / "student" / "network" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_folder_of_a_dit_in_pixels_is_loaded(tmp_path):
    network, folder = pixel_dit(), tmp_path / "dit"
    network.save_pretrained(folder / "transformer")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    classes = {"transformer": "DiTTransformer2DModel", "scheduler": "DDPMScheduler"}
    index = {"_class_name": "DiTPipeline", "vae": [None, None]}
    index |= {name: ["diffusers", kind] for name, kind in classes.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    teacher = load_teacher(str(folder))
    assert teacher.adapter == "DiTTransformer2DModel, pixels, class-conditional"
    assert (teacher.event_shape, teacher.conditions.names, teacher.pipeline) == ((1, 8, 8), tuple("0123"), None)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = teacher.schedule.time_at(torch.tensor([0.4, 0.9], dtype=torch.float64))
    labels = teacher.first_conditions(2)
    own = Parametrization(teacher.schedule, teacher.prediction).velocity(network.eval(), x, t, labels)
    assert torch.equal(teacher.velocity(x, t, labels), own.detach())
    assert teacher.codec.decode(x) is x
    with pytest.raises(UserError, match="cond: expected one, got none"):
        teacher.velocity(x, t)
    distill(recipe(teacher=str(folder)), tmp_path / "run")
    again = load_student(tmp_path / "run" / "student")
    assert again.generate(x, steps=2).shape == x.shape


class Doubled(Loss):
    summary: ClassVar[str] = "a loss of the test"
    paper: ClassVar[str] = "none"

    name: Literal["doubled"] = "doubled"
    factor: float = 2.0

    def __call__(self, flow_map, velocity, jump):
        u = flow_map.mean_velocity(jump.x, jump.t, jump.r, jump.cond)
        return self.factor * squared_norm(u - velocity(jump.x, jump.t, jump.cond))


def test_a_loss_is_passed_in_place_of_the_recipes(tmp_path):
    objects = {"teacher": Blob(), "student": PlaneMap()}
    distill(recipe(), tmp_path / "one", loss=Doubled(factor=1), **objects)
    distill(recipe(), tmp_path / "two", loss=Doubled(factor=2), teacher=Blob(), student=PlaneMap())
    stored = yaml.safe_load((tmp_path / "two" / "recipe.yaml").read_text())
    assert (stored["loss"]["name"], stored["loss"]["factor"]) == ("doubled", 2.0)
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert two[0][1] == 2 * one[0][1]
    assert recipe().loss.name == "lagrangian"


def test_a_stopped_run_resumes_with_its_own_teacher_alone(tmp_path):
    distill(recipe(), tmp_path / "run", teacher=Blob(), student=PlaneMap())
    first = losses(tmp_path / "run")
    more = TINY["training"] | {"steps": len(first) + 2}
    other = Blob()
    other.mean = 0.9
    with pytest.raises(UserError, match=r"expected the one that the run in .* began with, got one of another velocity"):
        distill(recipe(training=more), tmp_path / "run", teacher=other, student=PlaneMap())
    distill(recipe(training=more), tmp_path / "run", teacher=Blob(), student=PlaneMap())
    assert losses(tmp_path / "run")[: len(first)] == first
    assert len(losses(tmp_path / "run")) == len(first) + 2
    with pytest.raises(UserError, match="expected the teacher itself, which this run was given in Python"):
        open_run(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "python.json").read_text())["velocity"]
    distill(recipe(), tmp_path / "run", teacher=Blob(), student=PlaneMap(), fresh=True)


class Count(Callback):
    def __init__(self):
        self.steps, self.ended = [], 0

    def on_step(self, step, metrics):
        self.steps.append(step)

    def on_end(self):
        self.ended += 1


def test_an_optimizer_and_callbacks_of_ones_own(tmp_path):
    counted, made = Count(), []

    def factory(parameters):
        made.append(torch.optim.SGD(parameters, lr=1e-3, momentum=0.5))
        return made[-1]

    given = {"teacher": Blob(), "callbacks": [counted]}
    distill(recipe(), tmp_path / "sgd", student=PlaneMap(), optimizer=factory, **given)
    # Once to check that it takes these parameters, before anything long starts, and once to train.
    assert len(made) == 2
    assert not made[0].state
    assert made[1].state
    assert counted.steps == list(range(1, STEPS + 1))
    assert counted.ended == 1
    # Settings are those of the recipe, and recorded in it.
    settings = OptimizerSettings(name="SGD", lr=1e-3, options={"momentum": 0.5})
    distill(recipe(), tmp_path / "settings", student=PlaneMap(), optimizer=settings, **given)
    assert "name: SGD" in (tmp_path / "settings" / "recipe.yaml").read_text()
    assert losses(tmp_path / "settings") == losses(tmp_path / "sgd")
    distill(recipe(), tmp_path / "adam", student=PlaneMap(), teacher=Blob())
    assert losses(tmp_path / "adam")[2:] != losses(tmp_path / "sgd")[2:]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-3)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.5)


@pytest.mark.parametrize("factory", [pytest.param(sgd, marks=pytest.mark.slow), momentum])
def test_a_run_is_not_continued_by_another_optimizer(tmp_path, teacher_folder, factory):
    plain = TINY | {"teacher": str(teacher_folder)}
    first, more = (Recipe.model_validate(plain | {"training": TINY["training"] | {"steps": n}}) for n in (4, 6))
    folder = tmp_path / "run"
    distill(first, folder, optimizer=factory)
    assert json.loads((folder / "python.json").read_text()) == {"optimizer": "SGD"}
    state = json.loads((checkpoint.newest(folder / "checkpoints") / "state.json").read_text())
    assert state["optimizer"]["name"] == "SGD"
    before = losses(folder)
    message = r"^optimizer: expected SGD, which the run began with, got AdamW; pass that one again .*[^\n]*$"
    with pytest.raises(UserError, match=message):
        distill(more, folder)
    # The checkpoint alone has it too, for a trainer without the run's folder.
    (folder / "python.json").unlink()
    with pytest.raises(UserError, match=message):
        distill(more, folder)
    assert losses(folder) == before
    distill(more, folder, optimizer=factory)
    assert losses(folder)[: len(before)] == before
    assert len(losses(folder)) == len(before) + 2
    # Evaluation builds no optimizer of its own. The teacher's own pipeline would have 1000 steps.
    assert evaluate(folder, settings={"steps": [1]}, against_teacher=False).rows
    # So is a run that was stopped before its first checkpoint.
    shutil.rmtree(folder / "checkpoints")
    (folder / "evaluation.json").unlink()
    with pytest.raises(UserError, match=message):
        distill(more, folder)


def test_a_checkpoint_of_another_optimizer_is_refused_by_its_state():
    layer = nn.Linear(2, 2)
    states = [
        OptimizerState(kind(layer.parameters(), lr=0.1), list(layer.parameters()), [{}])
        for kind in (torch.optim.SGD, torch.optim.AdamW)
    ]
    with pytest.raises(UserError, match="expected SGD, which the run began with, got AdamW"):
        states[1].load({}, states[0].plain())


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (SimpleNamespace(), "expected a Teacher, or an object with velocity"),
        (SimpleNamespace(event_shape=(2,), velocity=lambda x, t: x[:, :1]), "expected a velocity of shape"),
        (SimpleNamespace(event_shape=(2,), velocity=lambda x, t: x / 0), "is not finite"),
        (
            SimpleNamespace(event_shape=(2,), velocity=lambda x, t: x, schedule=SimpleNamespace(t_min=0)),
            "expected a schedule with t_min, t_max, warp and dwarp_dt, .* without t_max, warp, dwarp_dt",
        ),
        (
            SimpleNamespace(event_shape=(2,), velocity=lambda x, t: x),
            r"expected network=\.\.\. \(student=\.\.\. in distill\)",
        ),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, field, message):
    with pytest.raises(UserError, match=message) as caught:
        distill(recipe(), tmp_path / "run", teacher=field)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_call_that_leaves_out_h_is_refused():
    spec = read_scheduler(DDPMScheduler(), "mine")
    deaf = Parametrization(spec.schedule, spec.prediction, lambda network, x, time, cond, h: network(time, x))
    with pytest.raises(UserError, match=r"expected the call of its Parametrization to pass h on"):
        Student.from_teacher(own_teacher(parametrization=deaf))


def test_a_network_without_scheduler_is_not_measured_with_another_ones_levels(tmp_path):
    evaluation = TINY["evaluation"] | {"ddim_steps": [2]}
    with pytest.raises(UserError, match="expected the configuration of its diffusers scheduler"):
        distill(recipe(evaluation=evaluation), tmp_path / "run", teacher=own_teacher(scheduler_config={}))


class Squared(LinearClock):
    """Jumps are measured by t + t^2; no ``time_at`` of its own."""

    time_at = property()

    def warp(self, t):
        return (t + t.square()) / 2

    def dwarp_dt(self, t):
        return (1 + 2 * t) / 2


def test_an_axis_of_ones_own():
    field = Blob()
    field.schedule = Squared(0.01, 1.0)
    schedule = as_teacher(field).schedule
    times = schedule.grid(4)
    assert times[0] == 1
    assert times[-1] == 0
    torch.testing.assert_close(schedule.warp(times).diff(), torch.full((4,), -0.25, dtype=torch.float64))
    t = schedule.time_at(torch.linspace(0, 1, 5, dtype=torch.float64))
    assert t[0] == 0.01
    torch.testing.assert_close(schedule.warp(t).diff().diff(), torch.zeros(3, dtype=torch.float64))
    wrong = PlaneMap()
    wrong.clock = LinearClock()
    with pytest.raises(UserError, match="whose clock is the teacher's time axis"):
        Student.from_teacher(as_teacher(field), network=wrong)


def test_a_teacher_of_python_exports_where_a_pipeline_is_known(tmp_path, teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    distill(recipe(), tmp_path / "run", teacher=teacher)
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()
    assert isinstance(teacher.network, UNet2DModel)
