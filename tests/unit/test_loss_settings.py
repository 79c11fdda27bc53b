from __future__ import annotations

import inspect
import re
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fmm_distill import losses
from fmm_distill.losses import (
    LOSSES,
    SETTINGS,
    AnyLossSettings,
    ConsistencySettings,
    EulerianSettings,
    LagrangianSettings,
    MeanFlowSettings,
    ProgressiveSettings,
)
from fmm_distill.losses.base import DerivativeSettings, LossSettings, squared_norm

ANY = TypeAdapter(AnyLossSettings)
EVERY = pytest.mark.parametrize("name", SETTINGS)


def test_tables_name_the_same_losses():
    assert len(LOSSES) == 11
    assert list(LOSSES) == list(SETTINGS)
    assert set(get_args(get_args(AnyLossSettings)[0])) == set(SETTINGS.values())
    assert len(set(LOSSES.values())) == len(set(SETTINGS.values())) == 11
    public = {*LOSSES, *(settings.__name__ for settings in SETTINGS.values())}
    assert public <= set(losses.__all__)


@EVERY
def test_settings_are_found_by_name_and_frozen(name):
    settings = ANY.validate_python({"name": name})
    assert type(settings) is SETTINGS[name]
    assert settings == SETTINGS[name]()
    assert settings.name == name == LOSSES[name].__name__
    with pytest.raises(ValidationError, match="frozen"):
        settings.velocity = "data"
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ANY.validate_python({"name": name, "no_such_setting": 1})


@EVERY
def test_settings_survive_a_round_trip(name):
    settings = SETTINGS[name]()
    assert ANY.validate_python(settings.model_dump()) == settings
    assert ANY.validate_json(settings.model_dump_json()) == settings


@EVERY
def test_says_what_it_is_and_where_it_comes_from(name):
    settings = SETTINGS[name]
    # Its own, not one inherited from another loss.
    assert {"summary", "paper"} <= vars(settings).keys()
    assert 20 < len(settings.summary) < 140
    assert "\n" not in settings.summary
    assert re.search(r"arXiv \d{4}\.\d{5}", settings.paper)
    assert len({other.summary for other in SETTINGS.values()}) == 11


@EVERY
def test_takes_what_its_function_takes(name):
    parameters = inspect.signature(LOSSES[name]).parameters
    assert list(parameters)[:5] == ["flow_map", "velocity", "x_t", "t", "r"]
    keywords = {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
    assert keywords.keys() - {"cond", "settings"} == SETTINGS[name].takes
    assert all(
        value.default is (None if key in ("cond", "target_map") else value.empty) for key, value in keywords.items()
    )


@EVERY
def test_derivative_is_set_where_one_is_taken(name):
    settings = SETTINGS[name]
    differentiates = {"lagrangian", "eulerian", "flow_map_matching", "mean_flow", "consistency", "terminal_velocity"}
    assert issubclass(settings, DerivativeSettings) == ("derivative" in settings.model_fields)
    assert ("derivative" in settings.model_fields) == (name in differentiates)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=lambda settings: settings.__name__)
def test_every_setting_is_described(settings):
    assert all(field.description for field in settings.model_fields.values())


def test_follows_the_average_where_the_target_is_its_jump():
    follows = {name for name, settings in SETTINGS.items() if settings().follows == "average"}
    assert follows == {"consistency_trajectory", "progressive_distillation", "terminal_velocity"}
    for name, settings in SETTINGS.items():
        if "target" in settings.model_fields:
            more = {"step": 0.1} if name == "consistency" else {}
            assert settings(target="average", **more).follows == "average"
            assert settings(target="student", **more).follows is None
    assert ProgressiveSettings(target="frozen").follows == "frozen"
    assert ProgressiveSettings(target="ode").follows is None
    assert LagrangianSettings(stop="target").follows is None


@pytest.mark.parametrize("name", ["lagrangian", "eulerian"])
def test_sees_no_teacher_with_the_students_own_velocity(name):
    assert SETTINGS[name](velocity="self").sees_no_teacher
    assert not SETTINGS[name]().sees_no_teacher


@pytest.mark.parametrize("name", ["progressive", "progressive_distillation"])
def test_sees_no_teacher_with_a_maps_jumps(name):
    assert SETTINGS[name](target="student").sees_no_teacher
    assert SETTINGS[name](target="average").sees_no_teacher
    assert not SETTINGS[name](target="ode").sees_no_teacher


@pytest.mark.parametrize("name", [name for name in SETTINGS if "progressive" not in name])
def test_sees_a_teacher_or_data_by_default(name):
    assert not SETTINGS[name]().sees_no_teacher


@pytest.mark.parametrize("settings", [EulerianSettings, MeanFlowSettings, ConsistencySettings])
@pytest.mark.parametrize(("step", "share"), [(0, 0), (1, 0.08), (5, 0.4), (9, 0.72), (10, 0.8), (11, 0.8), (1000, 0.8)])
def test_warm_up(settings, step, share):
    settings = settings(tangent_warmup_steps=10, tangent_scale=0.8)
    assert settings.at_step(step).tangent_scale == pytest.approx(share)
    assert settings.tangent_scale == 0.8


@EVERY
def test_without_warm_up_every_step_is_alike(name):
    assert SETTINGS[name]().at_step(0) == SETTINGS[name]()


TANGENT = "normalize_tangent, tangent_warmup_steps, tangent_scale and clamp_tangent act on stop: target only"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[
            ({"name": "eulerian", "stop": stop} | setting, TANGENT)
            for stop in ("none", "teacher")
            for setting in (
                {"normalize_tangent": True},
                {"tangent_warmup_steps": 5},
                {"tangent_scale": 0.5},
                {"clamp_tangent": 1.0},
            )
        ],
        ({"name": "eulerian", "stop": "nowhere"}, "Input should be 'none', 'teacher' or 'target'"),
        ({"name": "eulerian", "tangent_warmup_steps": -1}, "greater than or equal to 0"),
        ({"name": "eulerian", "tangent_scale": 1.5}, "less than or equal to 1"),
        ({"name": "eulerian", "clamp_tangent": 0}, "greater than 0"),
        ({"name": "lagrangian", "normalize_tangent": True}, "Extra inputs"),
        ({"name": "lagrangian", "stop": "nowhere"}, "Input should be 'teacher', 'none' or 'target'"),
        ({"name": "lagrangian", "derivative": "symbolic"}, "Input should be 'auto', 'exact' or 'central'"),
        ({"name": "progressive", "pieces": 1}, "greater than or equal to 2"),
        ({"name": "progressive", "pieces": 3, "middle": "uniform"}, "places the one time between 2 pieces, not 3"),
        ({"name": "progressive", "solver": "euler"}, "solver acts on target: ode only"),
        ({"name": "progressive", "target": "average", "solver": "euler"}, "solver acts on target: ode only"),
        ({"name": "progressive", "derivative": "exact"}, "Extra inputs"),
        ({"name": "flow_map_matching", "velocity": "teacher"}, "Input should be 'data'"),
        ({"name": "flow_map_matching", "directions": "neither"}, "Input should be 'both' or 'generate'"),
        ({"name": "flow_matching", "velocity": "self"}, "Input should be 'teacher' or 'data'"),
        ({"name": "mean_flow", "improved": True, "normalize_tangent": True}, "improved regresses on the velocity"),
        ({"name": "mean_flow", "improved": True, "clamp_tangent": 1.0}, "improved regresses on the velocity"),
        ({"name": "mean_flow", "stop": "none"}, "Extra inputs"),
        ({"name": "eulerian", "solver": "euler"}, "solver acts on a finite step only; set loss.step"),
        ({"name": "eulerian", "step": 0.1, "stop": "none"}, "step acts on stop: target only, and takes no derivative"),
        ({"name": "eulerian", "step": 0.1, "derivative": "exact"}, "step acts on stop: target only, and takes no"),
        ({"name": "consistency", "solver": "heun"}, "solver and target act on a finite step only; set loss.step"),
        ({"name": "consistency", "target": "average"}, "solver and target act on a finite step only; set loss.step"),
        ({"name": "consistency", "step": 0.1, "derivative": "exact"}, "act on step: 0 only"),
        ({"name": "consistency", "step": 0.1, "tangent_scale": 0.5}, "act on step: 0 only"),
        ({"name": "consistency", "step": 0.1, "tangent_warmup_steps": 5}, "act on step: 0 only"),
        (
            {"name": "consistency", "step": 0.1, "solver": "heun", "velocity": "data"},
            "the sample's own velocity is constant: solver: heun does nothing",
        ),
        ({"name": "consistency", "step": 1}, "less than 1"),
        ({"name": "consistency", "step": -0.1}, "greater than or equal to 0"),
        ({"name": "consistency_trajectory", "solver_steps": 0}, "greater than or equal to 1"),
        ({"name": "consistency_trajectory", "target": "ode"}, "Input should be 'student' or 'average'"),
        ({"name": "progressive_distillation", "pieces": 3}, "Extra inputs"),
        ({"name": "operator_regression", "solver_steps": 0}, "greater than or equal to 1"),
        ({"name": "operator_regression", "velocity": "data"}, "Input should be 'teacher'"),
        ({"name": "terminal_velocity", "velocity": "teacher"}, "Input should be 'data'"),
        ({"name": "lagrange"}, "does not match any of the expected tags"),
        ({"stop": "none"}, "Unable to extract tag"),
    ],
    ids=str,
)
def test_invalid_settings(values, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        ANY.validate_python(values)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "progressive", "target": "ode", "solver": "euler", "pieces": 4},
        {"name": "consistency", "tangent_warmup_steps": 5, "normalize_tangent": True, "derivative": "central"},
        {"name": "consistency", "step": 0.1, "solver": "heun", "target": "average", "clamp_tangent": 1.0},
        {"name": "mean_flow", "improved": True, "tangent_warmup_steps": 5, "tangent_scale": 0.5},
        {"name": "eulerian", "velocity": "self", "stop": "target", "normalize_tangent": True},
    ],
    ids=str,
)
def test_settings_that_go_together(values):
    assert ANY.validate_python(values).model_dump(include=set(values)) == values


def test_squared_norm_is_a_mean_in_single_precision():
    residual = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)
    # 90000 is infinite in half precision.
    assert squared_norm(residual).tolist() == [90000, 90000]
    assert squared_norm(residual.double()).dtype == torch.float64


def test_base_takes_nothing():
    assert LossSettings.takes == frozenset()
