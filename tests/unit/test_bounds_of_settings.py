"""Each number of a recipe has bounds, and whatever is written for a setting gives a recipe or one line."""

from __future__ import annotations

import math
from typing import Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fmm_distill.config.plain_yaml import read
from fmm_distill.config.recipe import Recipe, load_recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.losses import Loss, MatchingLoss, matching_losses, registered_losses
from fmm_distill.losses.settings import Settings, value_types

# Fields with a number that need no bounds of their own, and why.
UNBOUNDED = {
    "Recipe.pipeline": "keywords of any pipeline, which judges them itself",
    **{
        f"{group}.options": "keywords of any optimizer, which judges them itself"
        for group in ("OptimizerSettings", "MatchingOptimizer", "CriticOptimizer")
    },
}
HARD = (
    True,
    False,
    math.inf,
    -math.inf,
    math.nan,
    10**30,
    -(10**30),
    2**64,
    -1,
    0,
    1e-400,
    1e-320,
    1.5,
    "",
    " ",
    [],
    {},
)


def groups(model: type[Settings], found: dict[str, type[Settings]]) -> dict[str, type[Settings]]:
    """The classes of a recipe's groups, by their names."""
    if model.__name__ not in found:
        found[model.__name__] = model
        for field in model.model_fields.values():
            for kind in value_types(field.annotation):
                if isinstance(kind, type) and issubclass(kind, Settings):
                    groups(kind, found)
        if model is Loss:
            for kind in registered_losses().values():
                groups(kind, found)
        if model is MatchingLoss:
            for other in matching_losses().values():
                groups(other, found)
    return found


GROUPS = dict(sorted(groups(Recipe, {}).items()))
FIELDS = [(group, name) for group in GROUPS for name in GROUPS[group].model_fields]


def bounds(annotation: Any, metadata: list[Any]) -> list[set[str]]:
    """Of each number in an annotation, which ends are bound."""
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        inner, *more = get_args(annotation)
        return bounds(inner, [*metadata, *(part for each in more for part in getattr(each, "metadata", [each]))])
    if annotation in (int, float):
        low = {"low" for part in metadata if isinstance(part, Ge | Gt)}
        return [low | {"high" for part in metadata if isinstance(part, Le | Lt)}]
    return [found for part in get_args(annotation) if part is not Ellipsis for found in bounds(part, metadata)]


def test_the_groups_are_those_of_all_losses():
    assert {kind.__name__ for kind in registered_losses().values()} < set(GROUPS)
    assert len(GROUPS) > 25


@pytest.mark.parametrize("group", GROUPS)
def test_every_number_has_both_bounds(group):
    for name, field in GROUPS[group].model_fields.items():
        if f"{group}.{name}" not in UNBOUNDED:
            assert all(ends == {"low", "high"} for ends in bounds(field.annotation, field.metadata)), name


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=".".join)
def test_truth_values_infinities_and_nan_are_no_numbers(group, name):
    model = GROUPS[group]
    kinds = value_types(model.model_fields[name].annotation)
    if not kinds & {int, float} or bool in kinds:
        return
    for value in (True, math.inf, -math.inf, math.nan, "nan", "inf", 10**400, [True], [math.nan, math.inf]):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({name: value})
        assert any(error["loc"][0] == name for error in caught.value.errors()), value


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "training.steps=true",
            "training.steps: Input should be a valid integer, unable to parse string as an integer (got 'true')",
        ),
        ("optimizer.lr=yes", "optimizer.lr: Input should be a valid number"),
        ("training.ema=[false]", "training.ema.0: Input should be a valid number"),
        ("optimizer.betas=[1.5, 2]", "optimizer.betas.0: Input should be less than 1"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number"),
        ("training.max_grad_norm=.nan", "training.max_grad_norm: Input should be a finite number"),
        (
            "training.seed=18446744073709551616",
            "training.seed: Input should be less than or equal to 9223372036854775807",
        ),
        ("training.batch_size=100000000000", "training.batch_size: Input should be less than or equal to 1048576"),
        ("training.ema=[-0.5]", "training.ema.0: Input should be greater than or equal to 0"),
        ("training.ema=[]", "training.ema: expected one or more different rates"),
        ("training.steps=1000000000000", "training.steps: Input should be less than or equal to 40000000"),
        ("evaluation.steps=[]", "evaluation.steps: Tuple should have at least 1 item"),
        ("evaluation.steps=[4, 4]", "evaluation.steps: expected each number of steps once, not 4 twice"),
        ("export.steps=[8, 1, 8]", "export.steps: expected each number of steps once, not 8 twice"),
        ("logging.trackers=[wandb, wandb]", "logging.trackers: expected each tracker once (got ['wandb', 'wandb'])"),
        ("teacher=''", "teacher: expected a text that is not empty"),
        ("student.lora.targets=['']", "student.lora.targets: expected a text that is not empty"),
        ('teacher="a\\0b"', "teacher: expected text in UTF-8 without NUL characters"),
        ('variant="\\ud800"', "variant: expected text in UTF-8"),
        ('pipeline={system_prompt: "\\ud800"}', "pipeline: expected text in UTF-8"),
        ('pipeline.names=["\\ud800"]', "pipeline: expected text in UTF-8"),
        ("pipeline.sizes={a: 1}", "pipeline: expected numbers, texts, true, false, null or a list of these for sizes"),
        ("pipeline.sizes=[[1]]", "pipeline: expected numbers, texts, true, false, null or a list of these for sizes"),
        ("guidance.interval=[-1, 0.5]", "guidance.interval.0: "),
        ("weight.constant=1e-300", "weight.constant: Input should be greater than or equal to 0.000000000001"),
    ],
)
def test_values_out_of_bounds_are_one_line(change, says):
    with pytest.raises(UserError) as caught:
        load_recipe("digits", [change])
    assert f"recipe digits: {says}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("training.steps=1e3", 1000),
        ("training.steps='250'", 250),
        ("training.ema=9e-1", (0.9,)),
        ("export.steps=[8, 1, 4]", (1, 4, 8)),
        ("evaluation.ddim_steps=[]", ()),
        ("training.seed=9223372036854775807", 2**63 - 1),
        ("pipeline.system_prompt=''", {"system_prompt": ""}),
        ("pipeline.layers=[9, 18]", {"layers": [9, 18]}),
        ("pipeline.words=[a, 0.5, true, null]", {"words": ["a", 0.5, True, None]}),
        ("pipeline.words=[]", {"words": []}),
        ("pipeline.height=null", {"height": None}),
    ],
)
def test_values_that_are_meant(change, value):
    recipe = load_recipe("digits", [change])
    for name in change.partition("=")[0].split(".")[:2]:
        recipe = getattr(recipe, name, recipe)
    assert recipe == value


NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(-(2**70), 2**70), st.sampled_from(HARD))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.dates(), st.binary(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
PLACES = {(name,): field.annotation for name, field in Recipe.model_fields.items()} | {
    (): Recipe,
    ("student", "lora"): GROUPS["LoraSettings"],
    ("data", "trajectories"): GROUPS["TrajectorySettings"],
}
PATHS = [(*place, name) for place, group in PLACES.items() if group in GROUPS.values() for name in group.model_fields]


def set_at(path: tuple[str, ...], value: object) -> dict[str, object]:
    return {path[0]: value if len(path) == 1 else set_at(path[1:], value)}


def is_one_line(error: UserError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 3000


def judged(plain: dict[str, object]) -> None:
    try:
        recipe = parse(plain, "here")
    except UserError as error:
        if not is_one_line(error):
            raise AssertionError from error
    else:
        assert parse(read(recipe.to_yaml(), "there"), "there") == recipe


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_of_any_setting_gives_a_recipe_or_one_line(path, value):
    judged(set_at(path, value))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(registered_losses())),
    st.sampled_from(sorted({name for kind in registered_losses().values() for name in kind.model_fields})),
    VALUES,
)
def test_any_value_of_any_loss(loss, name, value):
    judged({"loss": {"name": loss, name: value}})
    judged({"extra_losses": [{"loss": {"name": "flow_matching"}, "fraction": value, "weight": value}]})


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_of_a_file_gives_settings_or_one_line(text):
    try:
        found = read(text, "here")
    except UserError as error:
        if not is_one_line(error):
            raise AssertionError from error
    else:
        judged(found if isinstance(found, dict) else {})
