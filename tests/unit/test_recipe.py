"""Recipes: closed, typed, and every mistake told by the path that can be typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fmm_distill.config.recipe import Recipe, load_recipe, parse, recipe_names
from fmm_distill.errors import UserError
from fmm_distill.losses.eulerian import Eulerian

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert len(FILES) >= 2
    assert recipe_names() == sorted(file.stem for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_parses_and_survives_a_round_trip(file):
    recipe = load_recipe(file.stem)
    assert load_recipe(str(file)) == recipe
    written = yaml.safe_load(recipe.to_yaml())
    assert written != yaml.safe_load(file.read_text(encoding="utf-8"))
    assert parse(written, "again") == recipe


def test_a_round_trip_keeps_what_is_not_the_default():
    changes = {"evaluation": {"steps": (3,), "ddim_steps": ()}, "pipeline": {"layers": (9, 18), "height": None}}
    recipe = Recipe(loss=Eulerian(), revision="main", **changes)
    again = parse(yaml.safe_load(recipe.to_yaml()), "again")
    assert again == recipe
    assert isinstance(again.loss, Eulerian)
    assert again != Recipe()


def test_numbers_as_people_write_them():
    """YAML 1.1 reads 1e-4 as a string."""
    assert isinstance(yaml.safe_load("1e-4"), str)
    recipe = load_recipe("digits", ["optimizer.lr=1e-4", "weight.constant=1E-5", "optimizer.betas=[0.9, 0.95]"])
    assert recipe.optimizer.lr == 1e-4
    assert recipe.weight.constant == 1e-5
    assert recipe.optimizer.betas == (0.9, 0.95)


def test_overrides_win_in_order_and_leave_the_rest():
    plain = load_recipe("digits")
    recipe = load_recipe("digits", ["training.steps=5", "training.steps=7", "export.steps=[1]", "revision=null"])
    assert recipe.training.steps == 7
    assert recipe.export.steps == (1,)
    assert recipe.revision is None
    changed = recipe.model_copy(update={"training": plain.training, "export": plain.export})
    assert changed == plain


def test_an_override_of_the_whole_loss_changes_its_kind():
    assert isinstance(load_recipe("digits", ["loss={name: eulerian}"]).loss, Eulerian)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"loss": {"name": "lagrangian", "stop_gradient": "x"}}, "here: loss.stop_gradient: Input should be "),
        ({"loss": {"name": "eulerian", "derivative": "x"}}, "here: loss.derivative: Input should be "),
        (
            {"loss": {"name": "eulerian", "derivativ": "exact"}},
            "here: loss.derivativ is not a setting of eulerian, did you mean loss.d",
        ),
        ({"loss": {"stop_gradient": "teacher_input"}}, "here: loss: "),
        ({"student": {"lora": {"\n": None}}}, r"here: student.lora.'\n' is not a setting"),
        ({"optimizer": {"betas": [0.9]}}, "here: optimizer.betas.1: Field required"),
        ({"training": None}, "here: training: "),
        (
            {"time_sampling": {"prior": 0.9, "diagonal": 0.2}},
            "here: time_sampling: prior, data and diagonal are fractions",
        ),
        (
            {"evaluation": {"features": "inception"}},
            "here: recipe: evaluation.features: expected data or evaluation.reference",
        ),
    ],
)
def test_mistakes_are_told_by_their_path(settings, wanted):
    with pytest.raises(UserError) as caught:
        parse(settings, "here")
    assert str(caught.value).startswith(wanted)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        parse({"trainin": {}, "training": {"steps": -1, "ema": 1}, "export": {"steps": ["x"]}}, "here")
    parts = str(caught.value).removeprefix("here: ").split("; ")
    assert [part.split(":")[0].split(" ")[0] for part in parts] == [
        "training.steps",
        "training.ema.0",
        "export.steps.0",
        "trainin",
    ]


@pytest.mark.parametrize("steps", [[0], [-1], [2.5]])
@pytest.mark.parametrize("key", ["steps", "ddim_steps", "dpmsolver_steps"])
def test_numbers_of_steps_are_positive(key, steps):
    with pytest.raises(UserError, match=f"evaluation.{key}"):
        parse({"evaluation": {key: steps}}, "here")


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().training.steps = 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["loss.name=lagrangain"], "got 'lagrangain', did you mean lagrangian?"),
        (["loss={name: mean_flow}"], "learns from data and there are none; take eulerian with stop_gradient: target"),
        (["loss={name: terminal_velocity}"], "take lagrangian with velocity: self"),
        (["loss={name: consistency, velocity: data}"], "set its velocity: teacher, or give --data"),
        (["loss.name=eulerian", "loss.clam_tangent=1"], "loss.clam_tangent is not a setting of eulerian, did you mean"),
        (["loss.name=mean_flow"], "--set 'loss={name: mean_flow}' starts from the defaults of that loss"),
        (["student.kind=embedded", "loss={name: progressive}"], "alone learns no velocity"),
        (["student.kind=embedded", "loss.velocity=self"], "alone learns no velocity"),
        (["loss={name: consistency}"], "--set 'time_sampling={prior: 0, data: 1}' (got prior: 0.5, data: 0)"),
        (["loss={name: operator_regression}"], "--set 'time_sampling={prior: 1}' (got prior: 0.5)"),
        (
            ["loss={name: progressive_distillation, target: ode}"],
            "--set 'time_sampling={prior: 0, dyadic: 3}' (got prior: 0.5, dyadic: 0)",
        ),
        (
            ["extra_losses=[{loss: {name: flow_matching}, fraction: 0.5}, {loss: {name: eulerian}, fraction: 0.5}]"],
            "extra_losses: expected fractions with a sum below 1, got 1",
        ),
        (
            ["extra_losses=[{loss: {nam: flow_matching}, fraction: 0.5}]"],
            "extra_losses.0.loss: expected a group with a name",
        ),
        (
            ["extra_losses=[{loss: {name: flow_matching}, fraction: 2}]"],
            "extra_losses.0.fraction: Input should be less than 1 (got 2)",
        ),
    ],
)
def test_a_loss_that_can_not_be_computed_is_refused_before_anything_loads(overrides, says):
    with pytest.raises(UserError) as error:
        load_recipe("digits", overrides)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_sums_of_losses():
    recipe = load_recipe(
        "digits", ["loss.velocity=self", "extra_losses=[{loss: {name: flow_matching}, fraction: 0.75, weight: 2.0}]"]
    )
    assert [loss.name for loss in recipe.losses] == ["lagrangian", "flow_matching"]
    assert recipe.loss_names == "lagrangian and flow_matching"
    assert load_recipe("digits", ["loss={name: mean_flow}"], data="somewhere").loss.velocity == "data"


def test_one_rate_of_averaging_or_several():
    def ema(value):
        return parse({"training": {"ema": value}}, "here").training.ema

    assert ema(0.9) == (0.9,)
    assert ema([0.9, 0.99]) == (0.9, 0.99)
    for wrong in ([], [0.9, 0.9]):
        with pytest.raises(UserError, match=r"training\.ema"):
            ema(wrong)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("training.clip", "training.max_grad_norm"),
        ("training.decay", "training.lr_schedule"),
        ("training.accumulation", "training.gradient_accumulation_steps"),
        ("training.keep_checkpoints", "training.checkpoints_total_limit"),
        ("training.refresh_steps", "training.target_update_every"),
        ("training.bad_steps", "training.max_non_finite_steps"),
        ("training.learning_rate", "optimizer.lr"),
        ("training.weight_decay", "optimizer.weight_decay"),
        ("training.betas", "optimizer.betas"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(old, new):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", [f"{old}=1"])
    assert str(caught.value) == f"recipe digits: {old} is not a setting; expected its new name, {new}"
