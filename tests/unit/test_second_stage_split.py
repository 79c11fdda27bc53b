"""However a batch of the second stage is split over processes and parts, losses and weights are the same."""

from __future__ import annotations

import json

import pytest

from fmm_distill.config.recipe import Recipe
from fmm_distill.run.plan import plan
from fmm_distill.training.critic import build_critic
from fmm_distill.training.ema import trained_state
from tests import processes
from tests.scaled import train
from tests.unit.test_scaled_runs import SPLIT, with_unused_parameters
from tests.unit.test_second_stage import TOTAL, records, settings_of, tensors
from tests.unit.test_trainer import flat

SIM, KL = {"name": "score_implicit_matching"}, {"name": "distribution_matching"}
# The student, its settings of the stage, and the recipe's own.
CASES = {
    # Samples that are matched have no learned weight.
    "kl": ("embedded", {"loss": KL, "rollout": {"steps": [2, 4], "gradient": "all"}}, {"weight": {"kind": "learned"}}),
    "fisher": ("scaled", {"loss": SIM}, {}),
    "fisher-lora": ("embedded-lora", {"loss": SIM}, {}),
    "kl-scaled-lora": ("scaled-lora", {"loss": KL, "fraction": 0.3}, {}),
    "all-matched": ("embedded", {"loss": SIM, "fraction": 1.0}, {}),
}
SOON = ("kl", "fisher-lora")
# FSDP splits students of full rank.
SPLIT_WEIGHTS = ("kl", "fisher", "all-matched")


def recipe_of(folder, name, **training):
    student, matching, more = CASES[name]
    return settings_of(folder, student, {"batch_size": 8, "ema": [0.9]} | training, **matching) | more


def on_two_processes(folder, recipes, *how):
    folder.mkdir()
    (folder / "recipes.json").write_text(json.dumps(recipes))
    run = processes.on_two_processes(SPLIT, folder / "recipes.json", folder, *how)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["processes"] == 2


def starts(settings):
    """The weights of student and critic before the first step."""
    job = plan(Recipe.model_validate(settings))
    critic = build_critic(job.student, job.teacher, job.recipe.student.lora.rank, seed=job.recipe.training.seed)
    return {"student": trained_state(job.student), "critic": trained_state(critic)}


def assert_same_training(ours, theirs, first):
    """The same losses, and the same weights but for rounding, which Adam's first steps blow up in small gradients."""
    for name, start in first.items():
        mine, other = tensors(ours, name), tensors(theirs, name)
        assert mine.keys() == other.keys()
        moved = (flat(other) - flat(start)).norm()
        assert moved > 1e-3
        assert (flat(mine) - flat(other)).norm() < 5e-2 * moved, name
    assert len(records(ours)) == len(records(theirs)) == TOTAL
    for mine, other in zip(records(ours), records(theirs), strict=True):
        for key in ("loss", "weighted", "critic_loss", "teacher_loss", "gradient_norm"):
            assert (key in mine) == (key in other)
            if key in mine:
                assert mine[key] == pytest.approx(other[key], rel=2e-3), (mine["step"], key)


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (SOON, ()),
        pytest.param(tuple(CASES), (), marks=pytest.mark.slow),
        pytest.param(SPLIT_WEIGHTS, ("shard",), marks=pytest.mark.slow),
    ],
    ids=["some", "all", "shards"],
)
def test_two_processes_give_the_numbers_of_one(tmp_path, teacher_folder, names, how):
    recipes = {name: recipe_of(teacher_folder, name) for name in names}
    more = {}
    if not how:
        # The critic has all weights of the network, also those that no layer of the student uses.
        more = {"outputs that nothing reads": with_unused_parameters(tmp_path)}
        stage = {"steps": 1, "critic": {"warmup_steps": 2}, "rollout": {"steps": [2]}}
        more["outputs that nothing reads"] |= {"matching": stage}
    on_two_processes(tmp_path / "two", recipes | more, *how)
    assert all(len(records(tmp_path / "two" / name)) == 2 + 2 + 1 for name in more)
    for name in names:
        train(recipes[name], tmp_path / name)
        assert_same_training(tmp_path / "two" / name, tmp_path / name, starts(recipes[name]))


@pytest.mark.parametrize("name", ["kl", pytest.param("fisher", marks=pytest.mark.slow)])
def test_parts_of_a_batch_give_the_numbers_of_the_batch(tmp_path, teacher_folder, name):
    train(recipe_of(teacher_folder, name), tmp_path / "one")
    train(recipe_of(teacher_folder, name, gradient_accumulation_steps=2), tmp_path / "parts")
    assert_same_training(tmp_path / "parts", tmp_path / "one", starts(recipe_of(teacher_folder, name)))
