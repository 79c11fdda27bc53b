"""The loop: the same numbers for every split of the batch."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from fmm_distill import checkpoint
from fmm_distill.data import Images
from fmm_distill.losses import SETTINGS
from fmm_distill.objective import Objective
from fmm_distill.recipe import Recipe, TrainingSettings
from fmm_distill.starts import draw, pair_times
from fmm_distill.student import Student, make_student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.trainer import Trainer, TrainingDivergedError, learning_rate
from fmm_distill.weights import Weight

SPLIT = Path(__file__).parent / "split_training.py"
LOSSES = [
    {"name": "lagrangian", "stop": "teacher"},
    {"name": "lagrangian", "stop": "target"},
    {"name": "eulerian", "stop": "none"},
]
BESIDE = ({"loss": {"name": "flow_matching"}, "share": 0.5},)
# A loss, its pairs, and what stands beside it.
EVERY_LOSS = [
    ({"name": "lagrangian", "velocity": "self"}, {}, BESIDE),
    ({"name": "eulerian", "velocity": "self", "stop": "teacher"}, {}, BESIDE),
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
OTHER_PARTS = {"metric": {"kind": "pseudo_huber"}, "weight": {"kind": "learned"}}


def recipe_of(folder: Path, loss: dict, **training: object) -> Recipe:
    settings = {"steps": 3, "batch_size": 8, "checkpoint_every": 100, "decay": "constant"} | training
    return Recipe.model_validate({"teacher": str(folder), "loss": loss, "training": settings})


def train(recipe: Recipe, folder: Path) -> Trainer:
    teacher = load_teacher(recipe.teacher)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=recipe.training.accumulation)
    trainer = Trainer(make_student(teacher), teacher, recipe, None, folder, accelerator, lambda _: None)
    trainer.run()
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.latest(folder / "checkpoints") / "student.safetensors")


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def assert_close(ours: Path, theirs: Path, start: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding, which Adam's first steps blow up where a gradient is next to nothing."""
    a, b = weights(ours), weights(theirs)
    moved = (flat(b) - flat(start)).norm()
    assert moved > 0.05
    assert (flat(a) - flat(b)).norm() < 1e-2 * moved
    for mine, other in zip(losses(ours), losses(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parts", [{}, OTHER_PARTS], ids=["plain", "other-parts"])
@pytest.mark.parametrize(("loss", "pairs", "also"), EVERY_LOSS, ids=[row[0]["name"] for row in EVERY_LOSS])
def test_every_loss_trains_from_its_recipe(tmp_path, teacher_folder, loss, pairs, also, parts):
    from_data = SETTINGS[loss["name"]].model_validate(loss).velocity == "data"
    plain = recipe_of(teacher_folder, LOSSES[0], steps=2).model_dump()
    data = "a folder" if from_data else "none"
    if parts and "dyadic" not in pairs:
        pairs = pairs | {"distribution": "logit_normal", "grid": 8}
    recipe = Recipe.model_validate(plain | parts | {"loss": loss, "pairs": pairs, "also": also, "data": data})
    folder = tmp_path / "run"
    folder.mkdir()
    teacher = load_teacher(recipe.teacher)
    pixels = torch.randint(0, 256, (10, *teacher.event_shape), dtype=torch.uint8)
    images = Images(pixels, "noise") if from_data else None
    student = make_student(teacher)
    before = flat(student.network.state_dict()).clone()
    Trainer(student, teacher, recipe, images, folder, Accelerator(cpu=True), lambda _: None).run()
    assert (flat(student.network.state_dict()) - before).norm() > 1e-3
    assert len(losses(folder)) == 2
    assert all(math.isfinite(value) for value in losses(folder))


def test_a_term_has_its_own_pairs_and_its_factor(teacher_folder):
    plain = recipe_of(teacher_folder, LOSSES[0], batch_size=64).model_dump()
    also = {"loss": {"name": "flow_matching"}, "share": 0.5, "weight": 3.0, "pairs": {"prior": 0, "diagonal": 1}}
    main = {"loss": {"name": "operator_regression", "solver_steps": 1}, "pairs": {"prior": 1}}
    recipe = Recipe.model_validate(plain | main | {"also": [also], "weight": {"kind": "none"}})
    teacher = load_teacher(recipe.teacher)
    asked = []

    class Watched(Student):
        def mean_velocity(self, x, t, r, cond=None):
            asked.append((t, r))
            return super().mean_velocity(x, t, r, cond)

    student = make_student(teacher)
    # Away from its teacher, so that no loss is zero.
    with torch.no_grad():
        student.network.conv_out.bias += 0.3
    watched = Watched(student.network, student.parametrisation)
    draws = draw(0, 0, 64, teacher.event_shape)
    losses, weighted = Objective(watched, teacher, recipe, recipe.losses)(draws, None, 0)
    (from_noise, _), diagonal = asked[0], asked[-1]
    assert (from_noise == teacher.schedule.t_max).all()
    assert torch.equal(*diagonal)
    assert (diagonal[0] < teacher.schedule.t_max).all()
    beside = draws.place >= 0.5
    assert len(diagonal[0]) == beside.sum()
    assert (losses > 0).all()
    torch.testing.assert_close(weighted, torch.where(beside, 3.0, 1.0) * losses)


def test_the_metric_comes_before_the_weight(teacher_folder):
    plain = recipe_of(teacher_folder, LOSSES[0]).model_dump()
    main = {"loss": {"name": "operator_regression", "solver_steps": 1}, "pairs": {"prior": 1}}
    metric = {"kind": "pseudo_huber", "constant": 0.1}
    recipe = Recipe.model_validate(plain | main | {"metric": metric, "weight": {"power": 1.0}})
    teacher = load_teacher(recipe.teacher)
    losses, weighted = Objective(make_student(teacher), teacher, recipe, recipe.losses)(
        draw(0, 0, 8, teacher.event_shape), None, 0
    )
    huber = (losses + 0.01).sqrt() - 0.1
    assert losses.min() > 0
    torch.testing.assert_close(weighted, huber / (huber + 1e-3))


@pytest.mark.parametrize(("name", "on_the_diagonal"), [("flow_matching", True), ("lagrangian", False)])
def test_the_learned_weight_is_asked_at_the_jump_that_is_trained(teacher_folder, name, on_the_diagonal):
    plain = recipe_of(teacher_folder, {"name": name}).model_copy(update={"weight": Weight(kind="learned")})
    teacher = load_teacher(plain.teacher)
    objective = Objective(make_student(teacher), teacher, plain, plain.losses)
    torch.nn.init.normal_(objective.weight.linear.weight, generator=torch.Generator().manual_seed(0))
    draws = draw(0, 0, 8, teacher.event_shape)
    losses, weighted = objective(draws, None, 0)
    t, r = pair_times(plain.pairs, teacher.schedule, draws, 0)
    start, end = (teacher.schedule.position(time) for time in (t, t if on_the_diagonal else r))
    torch.testing.assert_close(weighted, objective.weight(losses, start, end))


def test_a_learned_weight_learns_and_survives_an_interruption(tmp_path, teacher_folder):
    plain = recipe_of(teacher_folder, {"name": "lagrangian", "stop": "target"}, steps=4, checkpoint_every=2)
    recipe = plain.model_copy(update={"weight": Weight(kind="learned")})
    whole = train(recipe, tmp_path / "whole")
    assert whole.weight.linear.weight.abs().max() > 1e-4
    train(recipe, tmp_path / "halved")
    shutil.rmtree(checkpoint.latest(tmp_path / "halved" / "checkpoints"))
    resumed = train(recipe, tmp_path / "halved")
    assert torch.equal(resumed.weight.linear.weight, whole.weight.linear.weight)
    assert torch.equal(flat(weights(tmp_path / "halved")), flat(weights(tmp_path / "whole")))


def test_the_frozen_copy_is_the_average_of_the_last_refresh(tmp_path, teacher_folder):
    plain = recipe_of(teacher_folder, LOSSES[0], steps=5, checkpoint_every=3).model_dump()
    plain["training"] |= {"refresh_steps": 2}
    recipe = Recipe.model_validate(plain | {"loss": {"name": "progressive", "target": "frozen"}})
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "halved")
    shutil.rmtree(checkpoint.latest(tmp_path / "halved" / "checkpoints"))
    resumed = train(recipe, tmp_path / "halved")
    four = train(
        recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 4})}), tmp_path / "4"
    )
    frozen, average = flat(whole.frozen.state_dict()), flat(four.average.module.state_dict())
    assert torch.equal(frozen, average)
    assert not torch.equal(frozen, flat(four.frozen.state_dict()))
    assert torch.equal(flat(resumed.frozen.state_dict()), frozen)
    assert torch.equal(flat(weights(tmp_path / "halved")), flat(weights(tmp_path / "whole")))


def test_a_frozen_copy_that_is_never_refreshed_is_the_start(tmp_path, teacher_folder):
    trained = train(recipe_of(teacher_folder, {"name": "progressive", "target": "frozen"}), tmp_path)
    start = flat(make_student(load_teacher(str(teacher_folder))).state_dict())
    assert torch.equal(flat(trained.frozen.state_dict()), start)
    assert not torch.equal(flat(trained.student.state_dict()), start)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss['name']}-{loss['stop']}")
def test_two_processes_and_accumulation_give_the_numbers_of_one(tmp_path, teacher_folder, loss):
    start = make_student(load_teacher(str(teacher_folder))).network.state_dict()
    train(recipe_of(teacher_folder, loss), tmp_path / "one")
    train(recipe_of(teacher_folder, loss, accumulation=2), tmp_path / "accumulated")
    assert_close(tmp_path / "accumulated", tmp_path / "one", start)

    file = tmp_path / "recipe.json"
    file.write_text(recipe_of(teacher_folder, loss).model_dump_json())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SPLIT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [sys.executable, *command, str(file), str(tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "processes: 2" in run.stdout
    assert_close(tmp_path / "two", tmp_path / "one", start)
    gradients = [load_file(tmp_path / name / "gradients.safetensors") for name in ("two", "two-single")]
    scale = max(value.abs().max() for value in gradients[1].values())
    assert max((gradients[0][key] - gradients[1][key]).abs().max() for key in gradients[0]) < 1e-5 * scale


def test_the_regression_phase_comes_first_and_changes_the_prediction(tmp_path, teacher_folder):
    recipe = recipe_of(teacher_folder, {"name": "lagrangian", "stop": "target"}, steps=2)
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"regression_steps": 2})})
    train(recipe, tmp_path)
    phases = [line.split('"phase": "')[1].split('"')[0] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert phases == ["regression", "regression", "lagrangian", "lagrangian"]
    first = float((tmp_path / "steps.jsonl").read_text().split('"loss": ')[1].split(",")[0])
    # The student starts as the teacher, so there is nothing to regress: the phase measures what it says.
    assert first < 1e-10


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, teacher_folder):
    recipe = recipe_of(teacher_folder, {"name": "lagrangian", "stop": "target"}, learning_rate=1e30, clip=1e30)
    with pytest.raises(TrainingDivergedError, match="--fresh"):
        train(recipe, tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_learning_rate():
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=3, decay="cosine")
    assert learning_rate(settings, 0, 100) == pytest.approx(0.5)
    assert learning_rate(settings, 50, 100) == pytest.approx(1.0)
    assert learning_rate(settings, 99, 100) < 1e-3
    constant = settings.model_copy(update={"decay": "constant"})
    assert [learning_rate(constant, step, 100) for step in (1, 3, 99)] == [1.0, 2.0, 2.0]
    assert math.isclose(learning_rate(constant, 0, 1), 0.5)
