"""The second stage of a run: resumed at every point, returned to a checkpoint, and left out where it is not finite."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.core.draws import step_generator
from fmm_distill.data.samples import Images
from fmm_distill.errors import UserError
from fmm_distill.losses.distribution_matching import NoisedSamples
from fmm_distill.run.given import Given
from fmm_distill.run.plan import open_student, open_teacher, plan
from fmm_distill.training import checkpoint
from fmm_distill.training.callbacks import Callback, CallbackList
from fmm_distill.training.critic import Critic
from fmm_distill.training.matching import CriticHealth, critic_draws
from fmm_distill.training.trainer import Trainer
from tests.logs import logged
from tests.scaled import train
from tests.tiny.diffusion import PIPELINES
from tests.unit.test_trainer import flat

# Steps of the map, of the critic alone, and of the matching.
MAP, WARMUP, MATCHING = 3, 2, 3
FIRST = MAP + WARMUP
TOTAL = FIRST + MATCHING
STUDENTS = {
    "scaled": {},
    "embedded": {"kind": "embedded"},
    "scaled-lora": {"kind": "scaled", "lora": {"rank": 2}},
    "embedded-lora": {"kind": "embedded", "lora": {"rank": 2}},
}
FILES = ("student", "ema-0.9", "ema-0.99", "optimizer", "critic", "critic_average", "critic_optimizer")


def settings_of(folder, name="scaled", training=None, **matching):
    plain = {"steps": MAP, "batch_size": 4, "checkpoint_every": 1, "lr_schedule": "constant", "ema": [0.9, 0.99]}
    stage = {"steps": MATCHING, "critic": {"warmup_steps": WARMUP}, "rollout": {"steps": [1, 2, 4]}}
    return {
        "teacher": str(folder),
        "loss": {"name": "lagrangian", "stop_gradient": "target"},
        "student": STUDENTS[name],
        "training": plain | (training or {}),
        "matching": stage | matching,
    }


def trainer_of(settings, folder, teacher=None, images=None):
    recipe = Recipe.model_validate(settings)
    student, teacher = open_student(recipe, teacher or open_teacher(recipe), Given())
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(student, teacher, recipe, images, folder, Accelerator(cpu=True))


def tensors(folder, name):
    return load_file(checkpoint.newest(folder / "checkpoints") / f"{name}.safetensors")


def records(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def assert_same_end(ours, theirs):
    for name in FILES:
        mine, other = tensors(ours, name), tensors(theirs, name)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine), name
    timed = ("images_per_second", "peak_memory_gib")
    mine, other = (
        [{k: v for k, v in line.items() if k not in timed} for line in records(run)] for run in (ours, theirs)
    )
    assert mine == other
    assert len(mine) == TOTAL


@pytest.mark.parametrize(
    "name", ["scaled", "embedded-lora", *(pytest.param(n, marks=pytest.mark.slow) for n in ("embedded", "scaled-lora"))]
)
def test_a_run_that_is_stopped_in_each_phase_ends_as_one_that_was_not(tmp_path, teacher_folder, name):
    settings = settings_of(teacher_folder, name, loss={"name": "score_implicit_matching"})
    train(settings, tmp_path / "complete")
    step_of = Trainer.train_step
    # In the map's losses, at the border, in the critic's warm-up, before the first step of the matching and after it.
    for stop in (2, MAP, MAP + 1, FIRST, FIRST + 1):

        def step(self, number, request, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return step_of(self, number, request)

        with patch.object(Trainer, "train_step", step), pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "stopped")
        assert checkpoint.newest(tmp_path / "stopped" / "checkpoints").name == f"step-{stop:08d}"
    train(settings, tmp_path / "stopped")
    assert_same_end(tmp_path / "stopped", tmp_path / "complete")
    phases = [line["phase"] for line in records(tmp_path / "complete")]
    assert phases == ["lagrangian"] * MAP + ["critic"] * WARMUP + ["score_implicit_matching"] * MATCHING


class Breaking(Callback):
    """Makes a teacher's velocity NaN in some steps, until the run returns to a checkpoint."""

    def __init__(self, teacher, steps):
        self.teacher, self.steps, self.starts = teacher, steps, []
        velocity = teacher.velocity
        self.broken = False
        teacher.velocity = lambda *at: velocity(*at) * (float("nan") if self.broken else 1.0)

    def on_start(self, step):
        self.starts.append(step)
        self.broken = False

    def on_step(self, step, metrics):
        self.broken = len(self.starts) == 1 and step in self.steps


def test_a_return_across_the_border_starts_the_second_stage_anew(tmp_path, teacher_folder):
    training = {"checkpoint_every": 100, "max_non_finite_steps": 2}
    settings = settings_of(teacher_folder, training=training, steps=4)
    trainer = trainer_of(settings, tmp_path / "run")
    # The step before the broken ones gives the second optimizer its moments.
    breaking = Breaking(trainer.teacher, (FIRST + 1, FIRST + 2))
    trainer.run([breaking])
    assert breaking.starts == [0, MAP]
    # From a checkpoint of the border alone, at half the rate from there on.
    shutil.copytree(tmp_path / "run", tmp_path / "fresh")
    shutil.rmtree(checkpoint.newest(tmp_path / "fresh" / "checkpoints"))
    fresh = trainer_of(settings, tmp_path / "fresh")
    step = fresh.resume()
    assert step == MAP
    fresh.non_finite = trainer.non_finite
    fresh._loop(step, CallbackList(()), None)
    for name in FILES:
        ours, theirs = tensors(tmp_path / "run", name), tensors(tmp_path / "fresh", name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    halved = [5e-5 * (0.5 + 0.5 * math.cos(math.pi * k / 4)) for k in range(4)]
    rates = [line["learning_rate"] for line in records(tmp_path / "run")[MAP:]]
    assert rates == pytest.approx([1.5e-4] * WARMUP + halved)
    assert trainer.non_finite.skipped == 2


def test_a_return_within_the_second_stage(tmp_path, teacher_folder):
    settings = settings_of(teacher_folder, training={"max_non_finite_steps": 1}, steps=4)
    trainer = trainer_of(settings, tmp_path)
    breaking = Breaking(trainer.teacher, (FIRST + 1,))
    said = []
    with logged(said):
        trainer.run([breaking])
    # The checkpoint after the broken step would be of the same weights: the run continues from the one before.
    assert breaking.starts == [0, FIRST + 1]
    assert f"1 non-finite steps in a row: continuing from step-{FIRST + 1:08d} with half the learning rate" in said
    assert all(line["loss"] is not None for line in records(tmp_path))


@pytest.mark.parametrize("step", [MAP, FIRST])
def test_a_critic_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, teacher_folder, step):
    trainer = trainer_of(settings_of(teacher_folder), tmp_path)
    velocity, broken = Critic.velocity, False

    def sick(self, *at):
        # The loss of the student, which calls the average, is finite.
        trained = next(self.parameters()).requires_grad
        return velocity(self, *at) * (float("nan") if broken and trained else 1.0)

    class Break(Callback):
        def on_step(self, done, metrics):
            nonlocal broken, before
            if done == step:
                broken, before = True, state()
            elif done == step + 1:
                broken = False
                seen.append((metrics, state()))

    def state():
        parts = trainer.states[1].tensors(main=True)
        return {f"{part} {name}": value.clone() for part, named in parts.items() for name, value in named.items()}

    seen, before, said = [], {}, []
    with patch.object(Critic, "velocity", sick), logged(said):
        trainer.run([Break()])
    ((metrics, after),) = seen
    assert metrics["skipped"] == "the critic's loss or gradient is not finite"
    if step == FIRST:
        assert metrics["loss"] > 0
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    else:
        assert metrics["loss"] is None
        # The student takes the average's weights in this step, and the critic those of the teacher.
        assert not any(key.startswith(("critic_optimizer", "optimizer")) for key in after)
    assert trainer.non_finite.skipped == 1
    assert (
        f"step {step}: the critic's loss or gradient is not finite: the step is skipped (further steps are counted)"
        in said
    )
    assert all(line["loss"] is not None for line in records(tmp_path)[step + 1 :])


def test_the_student_starts_as_the_first_average_and_the_critic_as_the_teacher(tmp_path, teacher_folder):
    trainer = trainer_of(settings_of(teacher_folder, training={"ema": [0.1, 0.99]}), tmp_path)
    averages, seen = {}, {}

    class Look(Callback):
        def on_step(self, step, metrics):
            if step == MAP:
                averages.update({rate: flat(trainer.averaged_student(rate).state_dict()) for rate in (0.1, 0.99)})
            seen[step] = [flat(trainer.averaged_student(rate).state_dict()) for rate in (0.1, 0.99)]
            seen[step].append(flat(trainer.student.state_dict()))

    trainer.run([Look()])
    assert not torch.equal(averages[0.1], averages[0.99])
    # The updates of the critic alone leave the averages, which are evaluated, as the map's.
    for step in (MAP + 1, FIRST):
        slow, slower, student = seen[step]
        assert torch.equal(slow, averages[0.1])
        assert torch.equal(slower, averages[0.99])
        assert torch.equal(student, averages[0.1])
    # They restart with the first step of the matching.
    slow, slower, student = seen[FIRST + 1]
    assert torch.equal(slow, student)
    assert torch.equal(slower, student)
    assert not torch.equal(student, averages[0.1])
    line = records(tmp_path)[MAP]
    assert line["loss"] == line["teacher_loss"]
    assert line.keys() >= {"loss", "weighted", "gradient_norm", "learning_rate", "teacher_loss"}
    assert records(tmp_path)[FIRST].keys() >= {"loss", "weighted", "critic_loss", "teacher_loss"}
    assert records(tmp_path)[MAP + 1]["loss"] < records(tmp_path)[MAP + 1]["teacher_loss"]


@pytest.mark.parametrize("name", ["scaled", "scaled-lora", "scaled-regression", "scaled-lora-regression"])
def test_the_second_stage_leaves_the_velocity_of_a_scaled_student(tmp_path, teacher_folder, name):
    """Without a regression it is the teacher's; with one, that which the regression has learned."""
    settings, folder, regressed = settings_of(teacher_folder, name.removesuffix("-regression")), teacher_folder, 0
    if name.endswith("regression"):
        PIPELINES["dit"].build().save_pretrained(tmp_path / "teacher")
        regressed, folder = 2, tmp_path / "teacher"
        settings |= {"teacher": str(folder), "guidance": {"scale": 2.0}}
        settings["student"] = settings["student"] | {"kind": "scaled", "regression_steps": regressed}
    trainer = trainer_of(settings, tmp_path / "run")
    x = torch.randn(2, *trainer.teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = trainer.teacher.schedule.time_at(torch.tensor([0.3, 0.9], dtype=torch.float64))
    cond = trainer.teacher.first_conditions(2)
    found = {}

    class Look(Callback):
        @torch.no_grad()
        def on_step(self, step, metrics):
            u = [trainer.student.mean_velocity(x, t, r, cond) for r in (t, t / 2)]
            found[step] = [*u, trainer.averaged_student(0.9).mean_velocity(x, t, t, cond)]

    with torch.no_grad():
        v = trainer.teacher.velocity(x, t, cond)
    trainer.run([Look()])
    first, last = found[regressed + FIRST], found[regressed + TOTAL]
    assert torch.equal(first[0], last[0])
    assert torch.equal(last[0], last[2])
    assert not torch.equal(first[1], last[1])
    with torch.no_grad():
        assert torch.equal(trainer.teacher.velocity(x, t, cond), v)
    assert torch.equal(last[0], v) == (regressed == 0)


def test_a_critic_is_conditioned_and_not_guided(tmp_path):
    PIPELINES["dit"].build().save_pretrained(tmp_path / "teacher")
    settings = settings_of(tmp_path / "teacher", "embedded") | {"guidance": {"scale": 3.0}}
    trainer = trainer_of(settings, tmp_path / "run")
    teacher = trainer.teacher
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.3, 0.9], dtype=torch.float64))
    cond = teacher.first_conditions(2)
    with torch.no_grad():
        v_critic, v_teacher = trainer.critics[0].velocity(x, t, cond), teacher.velocity(x, t, cond)
        conditional = teacher.parametrization.velocity(teacher.network, x, t, cond)
        other = trainer.critics[0].velocity(x, t, teacher.first_conditions(2).rows(torch.tensor([1, 0])))
    assert torch.equal(v_critic, conditional)
    assert not torch.equal(v_critic, v_teacher)
    assert not torch.equal(v_critic, other)
    trainer.run()
    assert all(line["loss"] is not None for line in records(tmp_path / "run"))


REFUSED = {
    "guidance.range: expected one guidance.scale with matching": {"guidance": {"scale": 2.0, "range": [1.0, 3.0]}},
    "matching.loss.real: expected images": {
        "matching": {"steps": 1, "loss": {"name": "flow_generator_matching", "real": {}}}
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_settings_that_the_stage_does_not_run_with(line):
    with pytest.raises(UserError) as caught:
        parse({"matching": {"steps": 1}} | REFUSED[line], "here")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rollouts_of_more_steps_than_timesteps(teacher_folder):
    with pytest.raises(UserError, match="2000 sampling steps; expected 1 to 1000"):
        plan(Recipe.model_validate(settings_of(teacher_folder, rollout={"steps": [2000]})))


def test_the_plan_names_both_stages(teacher_folder):
    said = str(plan(Recipe.model_validate(settings_of(teacher_folder))))
    assert (
        "steps:   3 of 4 samples, loss lagrangian, then 2 updates of a critic and 3 steps of distribution_matching"
        in said.splitlines()
    )


@pytest.fixture
def half():
    """An accelerator of bf16; a process has one precision otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_half_precision(tmp_path, teacher_folder, half):
    settings = settings_of(teacher_folder, training={"precision": "bf16"}, loss={"name": "score_implicit_matching"})
    recipe = Recipe.model_validate(settings)
    student, teacher = open_student(recipe, open_teacher(recipe), Given())
    trainer = Trainer(student, teacher, recipe, None, tmp_path, half)
    dtypes = set()
    trainer.critics[0].network.conv_in.register_forward_hook(lambda *at: dtypes.add(at[2].dtype))
    trainer.run()
    assert dtypes == {torch.bfloat16}
    assert all(line["loss"] is not None for line in records(tmp_path))
    assert all(value.dtype == torch.float32 for value in tensors(tmp_path, "critic").values())


def test_a_gradient_scaler_serves_all_optimizers(tmp_path, teacher_folder):
    """As fp16 has it: overflows lower the scale and are no failures, and all gradients are unscaled once."""
    settings = settings_of(teacher_folder)
    plain = train(settings, tmp_path / "plain")
    trainer = trainer_of(settings, tmp_path / "scaled")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    trainer.optimizers = [AcceleratedOptimizer(one.optimizer, scaler=scaler) for one in trainer.optimizers]
    trainer.second.optimizer = AcceleratedOptimizer(trainer.second.optimizer.optimizer, scaler=scaler)
    accelerator = trainer.accelerator
    with (
        patch.object(accelerator, "scaler", scaler),
        patch.object(accelerator, "native_amp", True),
        patch.object(type(accelerator), "mixed_precision", "fp16"),
    ):
        trainer.run()
        # Powers of two scale without rounding.
        for name in ("student", "critic"):
            ours, theirs = tensors(tmp_path / "scaled", name), tensors(tmp_path / "plain", name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert scaler.get_scale() == 2.0**16
        # At a scale at which the critic's gradients are infinite, and then its loss is: neither changes it.
        weights = flat(plain.critics[0].state_dict())
        for scale, factor, lowered in ((2.0**126, 1e4, True), (2.0**16, float("nan"), False)):
            scaler.update(scale)
            with patch.object(trainer.second, "objective", partial(_times, trainer.second.distributed, factor)):
                update = trainer.second._update(TOTAL - 1, 0, compare=False)
            assert update.finite == lowered
            assert (scaler.get_scale() < scale) == lowered
            assert torch.equal(flat(trainer.critics[0].state_dict()), weights)
        trainer.second._update(TOTAL - 1, 0, compare=False)
        assert not torch.equal(flat(trainer.critics[0].state_dict()), weights)
    assert trainer.non_finite.skipped == 0


def _times(objective, factor, *at, **named):
    losses, teachers = objective(*at, **named)
    return factor * losses, teachers


def test_a_critic_of_an_absurd_rate_is_reported_once(tmp_path, teacher_folder):
    critic = {"warmup_steps": 55, "optimizer": {"lr": 1.0}}
    said = []
    with logged(said):
        train(settings_of(teacher_folder, training={"batch_size": 2, "checkpoint_every": 100}, critic=critic), tmp_path)
    (line,) = [line for line in said if "the critic has been behind the teacher" in line]
    assert "matching.critic.optimizer.lr" in line


def test_the_health_of_a_critic_is_a_running_mean():
    said = []
    with logged(said):
        health = CriticHealth()
        # Single bad batches, and steps that are left out, are no news.
        for step in range(200):
            health.count(2.0 if step % 3 == 0 else 0.5, float("nan") if step == 7 else 1.1, step)
        assert not said
        for step in range(200, 320):
            health.count(1.2, 1.1, step)
    assert len(said) == 1
    assert said[0].startswith("step 2")


def numbers(count=10):
    return Images(torch.arange(count * 64).reshape(count, 1, 8, 8).remainder(251).byte(), "numbers")


def test_the_critic_learns_from_images_too(tmp_path, teacher_folder):
    loss = {"name": "flow_generator_matching", "real": {"a": 0.7, "b": 0.8}}
    settings = settings_of(teacher_folder, loss=loss) | {"data": "a folder"}
    trainer = trainer_of(settings, tmp_path / "run", images=numbers())
    objective, images = trainer.second.objective, trainer.images
    draws = critic_draws(trainer.recipe, MAP, 0, trainer.teacher.event_shape)
    with torch.no_grad():
        losses, teachers = objective(draws, images.pick(draws), MAP, 0, compare=True)
        generator = step_generator(trainer.recipe.training.seed, MAP, "critic 0 rollout")
        generated = trainer.objective.sample(draws, generator)
        picked = images.take((draws.image * 10).long())[0]
        data = NoisedSamples(picked, draws.renoise, generated.t, None)
        v, v_data = (trainer.teacher.velocity(x.x_t, x.t) for x in (generated, data))
    first = (v - 0.8 / 0.7 * generated.velocity).square().mean((1, 2, 3))
    second = (v_data - 0.2 / 0.3 * data.velocity).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, 0.7 * first + 0.3 * second)
    # The critic is the teacher at first.
    torch.testing.assert_close(teachers, losses)
    trainer.run()
    assert all(line["loss"] is not None for line in records(tmp_path / "run"))
    settings["matching"]["loss"] = {"name": "flow_generator_matching"}
    train(settings, tmp_path / "without", numbers())
    one, other = (tensors(tmp_path / run, "critic") for run in ("run", "without"))
    assert not torch.equal(flat(one), flat(other))
    assert records(tmp_path / "run")[:MAP][-1]["loss"] == records(tmp_path / "without")[:MAP][-1]["loss"]
