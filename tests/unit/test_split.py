"""However a batch is split over processes and parts, losses and weights are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from fmm_distill.config.recipe import Recipe
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training import checkpoint
from fmm_distill.training.trainer import Trainer
from tests import processes
from tests.unit.split_training import images_of
from tests.unit.test_trainer import EVERY_LOSS, LOSSES, flat, losses

SPLIT = Path(__file__).parent / "split_training.py"
CASES = [*((loss, {}, ()) for loss in LOSSES), *EVERY_LOSS]
IDS = [f"{i}-{loss['name']}" for i, (loss, _, _) in enumerate(CASES)]
LONG = 20
# With weights split too, in the short form: a gradient through a derivative, several losses in a batch, a learned
# weight, targets that follow an average and a frozen copy.
SPLIT_SOON = (0, 3, 5, 7)
# Trained in the short form: those, and one that takes data. A gradient of all is compared.
SOON = (*SPLIT_SOON, 10)
SLOW = [number for number in range(len(CASES)) if number not in SOON]
assert CASES[10][0]["name"] == "mean_flow"


def settings_of(folder, number, steps):
    loss, pairs, also = CASES[number]
    training = {"steps": steps, "batch_size": 8, "checkpoint_every": 100, "lr_schedule": "constant"}
    data = "builtin:digits" if loss["name"] in ("flow_map_matching", "mean_flow", "terminal_velocity") else "none"
    data = "builtin:digits" if loss.get("velocity") == "data" else data
    parts = {"distance": {"kind": "pseudo_huber"}, "weight": {"kind": "learned"}} if number % 2 else {}
    settings = {
        "teacher": str(folder),
        "loss": loss,
        "time_sampling": pairs,
        "extra_losses": also,
        "data": data,
        "training": training,
    }
    return settings | parts


def train(settings, folder):
    recipe = Recipe.model_validate(settings)
    folder.mkdir(parents=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=recipe.training.gradient_accumulation_steps)
    teacher, data = load_teacher(recipe.teacher), images_of(recipe)
    Trainer(Student.from_teacher(teacher), teacher, recipe, data, folder, accelerator).run()


def on_two_processes(folder, teacher_folder, steps, numbers, how):
    """Cases under one start of torch; what it printed."""
    folder.mkdir()
    (folder / "recipes.json").write_text(json.dumps({i: settings_of(teacher_folder, i, steps) for i in numbers}))
    run = processes.on_two_processes(SPLIT, folder / "recipes.json", folder, how)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["processes"] == 2
    return found


@pytest.fixture(scope="module")
def differences(tmp_path_factory, teacher_folder):
    """Between the gradient of two halves of a batch and that of the batch, for each case."""
    folder = tmp_path_factory.mktemp("gradients") / "all"
    return on_two_processes(folder, teacher_folder, 1, range(len(CASES)), "gradients")["differences"]


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
def test_two_processes_have_the_gradient_of_the_complete_batch(differences, number):
    assert differences[number] < 1e-5


@pytest.fixture(scope="module", params=[3, pytest.param(LONG, marks=pytest.mark.slow)])
def two(request, tmp_path_factory, teacher_folder):
    """Runs on two processes: with all weights in each, and with weights split over the two."""
    steps, folder = request.param, tmp_path_factory.mktemp("two")
    every = range(len(CASES))
    on_two_processes(folder / "batch", teacher_folder, steps, every if steps == LONG else SOON, "train")
    on_two_processes(folder / "shards", teacher_folder, steps, every if steps == LONG else SPLIT_SOON, "shard")
    return folder, steps


def weights(folder):
    return flat(load_file(checkpoint.newest(folder / "checkpoints") / "student.safetensors"))


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=[pytest.mark.slow] * (number in SLOW), id=IDS[number]) for number in range(len(CASES))],
)
def test_two_processes_two_parts_and_shards_give_the_numbers_of_one(tmp_path, teacher_folder, two, number):
    folder, steps = two
    if steps < LONG and number in SLOW:
        pytest.skip("the long form has it")
    settings = settings_of(teacher_folder, number, steps)
    train(settings, tmp_path / "one")
    settings["training"]["gradient_accumulation_steps"] = 2
    train(settings, tmp_path / "parts")
    start = flat(Student.from_teacher(load_teacher(str(teacher_folder))).state_dict())
    whole = weights(tmp_path / "one")
    moved = (whole - start).norm()
    assert moved > 0.05
    others = [tmp_path / "parts", folder / "batch" / str(number)]
    if steps == LONG or number in SPLIT_SOON:
        others.append(folder / "shards" / str(number))
    for other in others:
        # Equal but for rounding (most of central differences), which Adam's first steps blow up in small gradients.
        assert (weights(other) - whole).norm() < 5e-2 * moved
        for mine, theirs in zip(losses(other), losses(tmp_path / "one"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-7)
