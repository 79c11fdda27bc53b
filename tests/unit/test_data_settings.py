"""The recipe's group of data: a string alone is its source, and what can't act is refused."""

from __future__ import annotations

import pytest
import yaml

from fmm_distill.config.recipe import Recipe, load_recipe, parse
from fmm_distill.errors import UserError


@pytest.mark.parametrize(
    ("settings", "source", "flip"),
    [
        ({}, "none", False),
        ({"data": "somewhere"}, "somewhere", False),
        ({"data": {"source": "somewhere", "flip": True}}, "somewhere", True),
        ({"data": "teacher"}, "teacher", False),
    ],
)
def test_a_string_is_the_source(settings, source, flip):
    recipe = parse(settings, "here")
    assert (recipe.data.source, recipe.data.flip) == (source, flip)
    assert parse(yaml.safe_load(recipe.to_yaml()), "again") == recipe


def test_the_source_of_a_python_recipe_may_be_a_string():
    assert Recipe(data="somewhere").data.source == "somewhere"


@pytest.mark.parametrize("group", ["data: here", "data: {source: here}", "data: {flip: true}", ""])
def test_the_command_line_sets_the_source_and_leaves_the_rest(tmp_path, group):
    (tmp_path / "mine.yaml").write_text(group, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "mine.yaml"), ["data.condition=label"], data="2024")
    assert (recipe.data.source, recipe.data.condition) == ("2024", "label")
    assert recipe.data.flip == ("flip" in group)


def test_the_source_can_be_set_before_and_after_a_field_of_its_group():
    recipe = load_recipe("digits", ["data=there", "data.flip=true"])
    assert (recipe.data.source, recipe.data.flip) == ("there", True)
    assert load_recipe("digits", ["data.source=teacher", "data.on_policy=0.25"]).data.on_policy == 0.25


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"data": 3}, "here: data: "),
        (yaml.safe_load("data: no"), "here: data.source: expected text, and YAML reads no and off as false; try none"),
        (yaml.safe_load("data: {source: off}"), "here: data.source: expected text, and YAML reads no and off as false"),
        ({"data": {"background": "black"}}, "here: data: background: expected a source of images, got source: none"),
        ({"data": {"source": "teacher", "config": "en"}}, "here: data: config: expected a source of images"),
        ({"data": {"source": "x", "background": "pink"}}, "here: data.background: "),
        ({"data": {"source": "x", "on_policy": 1.5}}, "here: data.on_policy: "),
        ({"data": {"sourc": "x"}}, "here: data.sourc is not a setting, did you mean data.source?"),
        ({"data": {"flip": True}}, "here: data: flip: expected a source of images, got source: none"),
        ({"data": {"source": "teacher", "condition": "label"}}, "here: data: condition: expected a source of images"),
        ({"data": {"source": "x", "trajectories": {"count": 3}}}, "here: data: trajectories: expected source: teacher"),
        ({"data": {"on_policy": 0.5}}, "here: data: on_policy: expected 1 or null without data"),
        (
            {"data": {"source": "teacher", "trajectories": {"points": 6}}},
            "here: data.trajectories: solver_steps: expected a multiple of 5",
        ),
        (
            {"data": {"source": "x", "condition": "text"}, "prompts": {"file": "y"}},
            "here: recipe: expected one source of conditions",
        ),
        ({"data": "teacher", "loss": {"name": "mean_flow"}}, "here: recipe: loss mean_flow learns from data"),
        (
            {"data": {"source": "x", "on_policy": 0.5}, "loss": {"name": "mean_flow"}},
            "here: recipe: data.on_policy: a loss that learns from data",
        ),
        (
            {"data": "teacher", "evaluation": {"features": "inception"}},
            "here: recipe: evaluation.features: expected data or evaluation.reference with inception",
        ),
    ],
)
def test_what_can_not_act_is_refused(settings, wanted):
    with pytest.raises(UserError) as caught:
        parse(settings, "here")
    assert str(caught.value).startswith(wanted)
    assert "\n" not in str(caught.value)
