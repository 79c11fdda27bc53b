"""The loop: the same numbers for every split of the batch."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.config.settings import TrainingSettings
from fmm_distill.core.draws import draw
from fmm_distill.data.samples import Images
from fmm_distill.data.starting_points import StartingPoints
from fmm_distill.errors import UserError
from fmm_distill.losses import Jump, registered_losses
from fmm_distill.losses.time_sampling import sample_times
from fmm_distill.losses.weighting import Weight
from fmm_distill.student.fold import stock_part
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training import checkpoint
from fmm_distill.training.nonfinite import NonFiniteSteps
from fmm_distill.training.objective import Objective
from fmm_distill.training.optimizer import learning_rate
from fmm_distill.training.process import make_accelerator
from fmm_distill.training.trainer import Trainer, TrainingDivergedError
from tests.conftest import save_teacher, tiny_unet
from tests.logs import logged

LOSSES = [
    {"name": "lagrangian", "stop_gradient": "teacher_input"},
    {"name": "lagrangian", "stop_gradient": "target"},
    {"name": "eulerian", "stop_gradient": "nowhere"},
]
BESIDE = ({"loss": {"name": "flow_matching"}, "fraction": 0.5},)
# A loss, its pairs, and what stands beside it.
EVERY_LOSS = [
    ({"name": "lagrangian", "velocity": "self"}, {}, BESIDE),
    ({"name": "eulerian", "velocity": "self", "stop_gradient": "teacher_input"}, {}, BESIDE),
    ({"name": "progressive", "target": "average", "middle": "uniform"}, {"band_steps": 4}, BESIDE),
    ({"name": "progressive", "target": "ode"}, {}, ()),
    ({"name": "progressive", "target": "frozen", "pieces": 4}, {}, ()),
    ({"name": "flow_matching", "velocity": "data"}, {}, ()),
    ({"name": "flow_map_matching"}, {}, ()),
    ({"name": "mean_flow", "improved": True}, {}, ()),
    ({"name": "consistency", "step": 0.05, "target": "average"}, {"prior": 0, "data": 1}, ()),
    ({"name": "consistency_trajectory"}, {}, ()),
    ({"name": "progressive_distillation"}, {"prior": 0, "dyadic": 3}, BESIDE),
    ({"name": "operator_regression"}, {"prior": 1}, ()),
    ({"name": "terminal_velocity"}, {}, ()),
]

# What is independent of the loss.
OTHER_PARTS = {"distance": {"kind": "pseudo_huber"}, "weight": {"kind": "learned"}}


def recipe_of(folder: Path, loss: dict, **training: object) -> Recipe:
    settings = {"steps": 3, "batch_size": 8, "checkpoint_every": 100, "lr_schedule": "constant"} | training
    optimizer = settings.pop("optimizer", {})
    return Recipe.model_validate({"teacher": str(folder), "loss": loss, "training": settings, "optimizer": optimizer})


def train(recipe: Recipe, folder: Path) -> Trainer:
    teacher = load_teacher(recipe.teacher)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=recipe.training.gradient_accumulation_steps)
    trainer = Trainer(Student.from_teacher(teacher), teacher, recipe, None, folder, accelerator)
    trainer.run()
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.newest(folder / "checkpoints") / "student.safetensors")


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parts", [{}, OTHER_PARTS], ids=["plain", "other-parts"])
@pytest.mark.parametrize(("loss", "pairs", "also"), EVERY_LOSS, ids=[row[0]["name"] for row in EVERY_LOSS])
def test_every_loss_trains_from_its_recipe(tmp_path, teacher_folder, loss, pairs, also, parts):
    from_data = registered_losses()[loss["name"]].model_validate(loss).velocity == "data"
    plain = recipe_of(teacher_folder, LOSSES[0], steps=2).model_dump()
    data = "a folder" if from_data else "none"
    if parts and "dyadic" not in pairs:
        pairs = pairs | {"distribution": "logit_normal", "grid": 8}
    recipe = Recipe.model_validate(
        plain | parts | {"loss": loss, "time_sampling": pairs, "extra_losses": also, "data": data}
    )
    folder = tmp_path / "run"
    folder.mkdir()
    teacher = load_teacher(recipe.teacher)
    pixels = torch.randint(0, 256, (10, *teacher.event_shape), dtype=torch.uint8)
    images = Images(pixels, "noise") if from_data else None
    student = Student.from_teacher(teacher)
    before = flat(student.network.state_dict()).clone()
    Trainer(student, teacher, recipe, images, folder, Accelerator(cpu=True)).run()
    assert (flat(student.network.state_dict()) - before).norm() > 1e-3
    assert len(losses(folder)) == 2
    assert all(math.isfinite(value) for value in losses(folder))


def test_a_term_has_its_own_pairs_and_its_factor(teacher_folder):
    plain = recipe_of(teacher_folder, LOSSES[0], batch_size=64).model_dump()
    also = {
        "loss": {"name": "flow_matching"},
        "fraction": 0.5,
        "weight": 3.0,
        "time_sampling": {"prior": 0, "diagonal": 1},
    }
    main = {"loss": {"name": "operator_regression", "solver_steps": 1}, "time_sampling": {"prior": 1}}
    recipe = Recipe.model_validate(plain | main | {"extra_losses": [also], "weight": {"kind": "none"}})
    teacher = load_teacher(recipe.teacher)
    asked = []

    class Watched(Student):
        def mean_velocity(self, x, t, r, cond=None):
            asked.append((t, r))
            return super().mean_velocity(x, t, r, cond)

    student = Student.from_teacher(teacher)
    # Away from its teacher, so that no loss is zero.
    with torch.no_grad():
        student.network.conv_out.bias += 0.3
    watched = Watched(student.network, student.parametrization)
    draws = draw(0, 0, 64, teacher.event_shape)
    losses, weighted, _ = Objective(watched, teacher, recipe, recipe.losses)(draws, None, 0)
    (from_noise, _), diagonal = asked[0], asked[-1]
    assert (from_noise == teacher.schedule.t_max).all()
    assert torch.equal(*diagonal)
    assert (diagonal[0] < teacher.schedule.t_max).all()
    beside = draws.position >= 0.5
    assert len(diagonal[0]) == beside.sum()
    assert (losses > 0).all()
    torch.testing.assert_close(weighted, torch.where(beside, 3.0, 1.0) * losses)


def test_the_metric_comes_before_the_weight(teacher_folder):
    plain = recipe_of(teacher_folder, LOSSES[0]).model_dump()
    main = {"loss": {"name": "operator_regression", "solver_steps": 1}, "time_sampling": {"prior": 1}}
    metric = {"kind": "pseudo_huber", "constant": 0.1}
    recipe = Recipe.model_validate(plain | main | {"distance": metric, "weight": {"power": 1.0}})
    teacher = load_teacher(recipe.teacher)
    losses, weighted, _ = Objective(Student.from_teacher(teacher), teacher, recipe, recipe.losses)(
        draw(0, 0, 8, teacher.event_shape), None, 0
    )
    huber = (losses + 0.01).sqrt() - 0.1
    assert losses.min() > 0
    torch.testing.assert_close(weighted, huber / (huber + 1e-3))


@pytest.mark.parametrize(("name", "on_the_diagonal"), [("flow_matching", True), ("lagrangian", False)])
def test_the_learned_weight_is_asked_at_the_jump_that_is_trained(teacher_folder, name, on_the_diagonal):
    plain = recipe_of(teacher_folder, {"name": name}).model_copy(update={"weight": Weight(kind="learned")})
    teacher = load_teacher(plain.teacher)
    objective = Objective(Student.from_teacher(teacher), teacher, plain, plain.losses)
    torch.nn.init.normal_(objective.weight.linear.weight, generator=torch.Generator().manual_seed(0))
    draws = draw(0, 0, 8, teacher.event_shape)
    losses, weighted, _ = objective(draws, None, 0)
    t, r = sample_times(plain.time_sampling, teacher.schedule, draws, 0)
    start, end = (teacher.schedule.warp(time) for time in (t, t if on_the_diagonal else r))
    torch.testing.assert_close(weighted, objective.weight(losses, start, end))


def test_a_learned_weight_learns_and_survives_an_interruption(tmp_path, teacher_folder):
    plain = recipe_of(teacher_folder, {"name": "lagrangian", "stop_gradient": "target"}, steps=4, checkpoint_every=2)
    recipe = plain.model_copy(update={"weight": Weight(kind="learned")})
    whole = train(recipe, tmp_path / "whole")
    assert whole.weight.linear.weight.abs().max() > 1e-4
    train(recipe, tmp_path / "halved")
    shutil.rmtree(checkpoint.newest(tmp_path / "halved" / "checkpoints"))
    resumed = train(recipe, tmp_path / "halved")
    assert torch.equal(resumed.weight.linear.weight, whole.weight.linear.weight)
    assert torch.equal(flat(weights(tmp_path / "halved")), flat(weights(tmp_path / "whole")))


def test_the_frozen_copy_is_the_average_of_the_last_refresh(tmp_path, teacher_folder):
    plain = recipe_of(teacher_folder, LOSSES[0], steps=5, checkpoint_every=3).model_dump()
    plain["training"] |= {"target_update_every": 2}
    recipe = Recipe.model_validate(plain | {"loss": {"name": "progressive", "target": "frozen"}})
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "halved")
    shutil.rmtree(checkpoint.newest(tmp_path / "halved" / "checkpoints"))
    resumed = train(recipe, tmp_path / "halved")
    four = train(
        recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 4})}), tmp_path / "4"
    )
    frozen, average = flat(whole.frozen.state_dict()), flat(four.averaged_student(0.999).state_dict())
    assert torch.equal(frozen, average)
    assert not torch.equal(frozen, flat(four.frozen.state_dict()))
    assert torch.equal(flat(resumed.frozen.state_dict()), frozen)
    assert torch.equal(flat(weights(tmp_path / "halved")), flat(weights(tmp_path / "whole")))


def test_a_frozen_copy_that_is_never_refreshed_is_the_start(tmp_path, teacher_folder):
    trained = train(recipe_of(teacher_folder, {"name": "progressive", "target": "frozen"}), tmp_path)
    start = flat(Student.from_teacher(load_teacher(str(teacher_folder))).state_dict())
    assert torch.equal(flat(trained.frozen.state_dict()), start)
    assert not torch.equal(flat(trained.student.state_dict()), start)


def test_the_regression_phase_comes_first_and_changes_the_prediction(tmp_path, teacher_folder):
    recipe = recipe_of(teacher_folder, {"name": "lagrangian", "stop_gradient": "target"}, steps=2)
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"regression_steps": 2})})
    train(recipe, tmp_path)
    phases = [line.split('"phase": "')[1].split('"')[0] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert phases == ["regression", "regression", "lagrangian", "lagrangian"]
    first = float((tmp_path / "steps.jsonl").read_text().split('"loss": ')[1].split(",")[0])
    # The student starts as the teacher, so there is nothing to regress: the phase measures what it says.
    assert first < 1e-10


@torch.no_grad()
def ddim_samples(network, scheduler, prediction):
    solver = DDIMScheduler.from_config(scheduler.config, prediction_type=prediction, timestep_spacing="trailing")
    solver.set_timesteps(10)
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    for timestep in solver.timesteps:
        x = solver.step(network(x, timestep).sample, timestep, x).prev_sample
    return x


def test_the_regression_brings_another_prediction_to_the_teachers_samples(tmp_path):
    # alpha ends at 0.37: an untrained epsilon is not amplified, and its samples are of order one.
    scheduler = DDPMScheduler(prediction_type="epsilon", clip_sample=False, beta_end=4e-3)
    plain = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    folder = save_teacher(tmp_path / "teacher", tiny_unet(**plain), scheduler)
    training = {"steps": 1, "batch_size": 16, "optimizer": {"lr": 3e-2}, "lr_schedule": "cosine", "ema": 0.9}
    settings = recipe_of(folder, {"name": "lagrangian", "stop_gradient": "target"}, **training).model_dump()
    settings["student"] = {"prediction": "v_prediction", "regression_steps": 40}
    recipe = Recipe.model_validate(settings)
    teacher = load_teacher(str(folder))
    student = Student.from_teacher(teacher, recipe.student.prediction)
    wanted = ddim_samples(teacher.network, scheduler, "epsilon")

    def distance(student):
        found = ddim_samples(stock_part(student.network), scheduler, student.prediction)
        return (found - wanted).square().mean().sqrt().item()

    before = distance(student)
    run = tmp_path / "run"
    run.mkdir()
    trainer = Trainer(student, teacher, recipe, None, run, Accelerator(cpu=True))
    trainer.run()
    assert before > 1
    assert distance(trainer.averaged_student(0.9)) < 0.75 * before


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, teacher_folder):
    changes = {"optimizer": {"lr": 1e30}, "max_grad_norm": 1e30, "max_non_finite_steps": 1}
    recipe = recipe_of(teacher_folder, {"name": "lagrangian", "stop_gradient": "target"}, **changes)
    with pytest.raises(
        TrainingDivergedError, match=r"1 non-finite steps in a row, at half the learning rate too.* --fresh"
    ):
        train(recipe, tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_learning_rate():
    settings = TrainingSettings(warmup_steps=3, lr_schedule="cosine")
    assert learning_rate(2.0, settings, 0, 100) == pytest.approx(0.5)
    assert learning_rate(2.0, settings, 50, 100) == pytest.approx(1.0)
    assert learning_rate(2.0, settings, 99, 100) < 1e-3
    constant = settings.model_copy(update={"lr_schedule": "constant"})
    assert [learning_rate(2.0, constant, step, 100) for step in (1, 3, 99)] == [1.0, 2.0, 2.0]
    assert math.isclose(learning_rate(2.0, constant, 0, 1), 0.5)


class Sick(Teacher):
    """A teacher whose answers are no numbers for some of its calls."""

    def velocity(self, x, t, cond=None):
        self.asked = getattr(self, "asked", 0) + 1
        v = super().velocity(x, t, cond)
        return v * float("nan") if self.asked in self.sick else v


def test_after_too_many_bad_steps_it_goes_back_to_the_checkpoint_at_half_the_rate(tmp_path, teacher_folder):
    changes = {"steps": 8, "checkpoint_every": 3, "max_non_finite_steps": 2}
    recipe = recipe_of(
        teacher_folder, {"name": "lagrangian", "stop_gradient": "target", "derivative": "central"}, **changes
    )
    teacher = Sick(**vars(load_teacher(str(teacher_folder))))
    # The fifth and the sixth step.
    teacher.sick = (5, 6)
    said = []
    with logged(said):
        trainer = Trainer(Student.from_teacher(teacher), teacher, recipe, None, tmp_path, Accelerator(cpu=True))
        trainer.run()
    assert "2 non-finite steps in a row: continuing from step-00000003 with half the learning rate" in said
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(8))
    assert [record["learning_rate"] for record in records] == [1e-3] * 3 + [5e-4] * 5
    assert all(record["loss"] is not None for record in records)
    assert teacher.asked == 6 + 5
    # The half rate and the count survive an interruption.
    shutil.rmtree(checkpoint.newest(tmp_path / "checkpoints"))
    with logged(said):
        resumed = Trainer(Student.from_teacher(teacher), teacher, recipe, None, tmp_path, Accelerator(cpu=True))
        resumed.run()
    assert torch.equal(flat(resumed.student.state_dict()), flat(trainer.student.state_dict()))
    assert resumed.non_finite == trainer.non_finite == NonFiniteSteps(2, 0.5, 2, 0)


def test_several_averages_of_one_run(tmp_path, teacher_folder):
    loss = {"name": "lagrangian", "stop_gradient": "target"}
    trainer = train(recipe_of(teacher_folder, loss, steps=6, ema=[0.9, 0.1]), tmp_path / "both")
    slow, fast = (flat(trainer.averaged_student(rate).state_dict()) for rate in (0.9, 0.1))
    for rate, ours in ((0.9, slow), (0.1, fast)):
        alone = train(recipe_of(teacher_folder, loss, steps=6, ema=rate), tmp_path / str(rate))
        assert torch.equal(flat(alone.averaged_student(rate).state_dict()), ours)
    assert not torch.equal(slow, fast)


def test_losses_one_after_the_other(tmp_path, teacher_folder):
    settings = recipe_of(teacher_folder, {"name": "eulerian", "tangent_warmup_steps": 2}, steps=10).model_dump()
    settings["stages"] = [
        {"loss": {"name": "flow_matching"}, "fraction": 0.2, "time_sampling": {"prior": 0}},
        {
            "loss": {"name": "lagrangian", "stop_gradient": "target"},
            "fraction": 0.5,
            "time_sampling": {"band_steps": 3},
        },
    ]
    recipe = Recipe.model_validate(settings)
    assert recipe.loss_names == "flow_matching, then lagrangian, then eulerian"
    trainer = train(recipe, tmp_path / "whole")
    records = [json.loads(line) for line in (tmp_path / "whole" / "steps.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in records] == ["flow_matching"] * 2 + ["lagrangian"] * 5 + ["eulerian"] * 3
    # Every stage counts its own steps.
    assert [record.get("longest_jump") for record in records[2:7]] == [pytest.approx(x) for x in (0.1, 0.4, 0.7)] + [
        None
    ] * 2
    assert [record.get("tangent_scale") for record in records[7:]] == [0.0, 0.5, None]
    objective = Objective(trainer.student, trainer.teacher, recipe, trainer.objective.losses)
    draws = draw(3, 0, 8, trainer.teacher.event_shape)
    losses, *_ = objective(draws, None, 1)
    t, r = objective.times(draws, 1)
    assert torch.equal(t, r)
    v = trainer.teacher.velocity
    x_t = StartingPoints(trainer.teacher, trainer.student)(draws, t)
    alone = recipe.stages[0].loss(trainer.student, v, Jump(x_t, t, t, None, draws.uniform))
    torch.testing.assert_close(losses, alone)


def test_stages_that_can_not_be(teacher_folder):
    def refused(before):
        with pytest.raises(UserError) as caught:
            parse({"student": {"kind": "embedded"}, "loss": {"name": "lagrangian"}, "stages": before}, "here")
        return str(caught.value)

    assert "stages: expected fractions with a sum below 1, got 1.2" in refused(
        [{"loss": {"name": "eulerian"}, "fraction": 0.6}] * 2
    )
    alone = [{"loss": {"name": "lagrangian", "velocity": "self"}, "fraction": 0.5}]
    assert "stages: loss lagrangian alone learns no velocity" in refused(alone)
    data = [{"loss": {"name": "consistency", "velocity": "teacher"}, "fraction": 0.5}]
    assert "in stages give it time_sampling: {prior: 0, data: 1}" in refused(data)
    assert "loss flow_map_matching learns from data" in refused(
        [{"loss": {"name": "flow_map_matching"}, "fraction": 0.5}]
    )


def test_before_the_first_checkpoint_it_goes_on_from_where_it_is(tmp_path, teacher_folder):
    changes = {"steps": 6, "max_non_finite_steps": 2}
    recipe = recipe_of(
        teacher_folder, {"name": "lagrangian", "stop_gradient": "target", "derivative": "central"}, **changes
    )
    teacher = Sick(**vars(load_teacher(str(teacher_folder))))
    teacher.sick = (2, 3, 5)
    said = []
    with logged(said):
        trainer = Trainer(Student.from_teacher(teacher), teacher, recipe, None, tmp_path, Accelerator(cpu=True))
        trainer.run()
    assert "2 non-finite steps in a row: continuing from step 3 with half the learning rate" in said
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [record["loss"] is None for record in records] == [False, True, True, False, True, False]
    assert [record["learning_rate"] for record in records] == [1e-3] * 3 + [5e-4] * 3
    assert trainer.non_finite == NonFiniteSteps(2, 0.5, 3, 0)


def test_casts_without_gradients_are_not_kept_for_those_with(tmp_path):
    # torch from 2.11 on would pass with kept casts too; the command runs on older ones.
    accelerator = make_accelerator(Recipe(), tmp_path)
    assert accelerator.autocast_handler.cache_enabled is False
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16, **vars(accelerator.autocast_handler)):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("loss", "precise"), [({"name": "lagrangian", "stop_gradient": "nowhere"}, True), (LOSSES[1], False)]
)
def test_the_backward_pass_of_a_difference_is_without_tensor_float(tmp_path, teacher_folder, loss, precise):
    recipe = recipe_of(teacher_folder, loss | {"derivative": "central"}, steps=1)
    teacher = load_teacher(recipe.teacher)
    student = Student.from_teacher(teacher)
    seen = []
    first = next(student.parameters())
    first.register_post_accumulate_grad_hook(lambda _: seen.append(torch.backends.cudnn.conv.fp32_precision))
    before = torch.backends.cudnn.conv.fp32_precision
    Trainer(student, teacher, recipe, None, tmp_path, Accelerator(cpu=True)).run()
    assert set(seen) == {"ieee" if precise else before}
    assert before != "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before
