from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fmm_distill import losses
from fmm_distill.losses import AnyLoss, DerivativeLoss, Loss, TimeSampling, registered_losses, squared_norm
from fmm_distill.losses.consistency import Consistency
from fmm_distill.losses.eulerian import Eulerian
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.losses.mean_flow import MeanFlow
from fmm_distill.losses.progressive import Progressive
from fmm_distill.losses.registry import BUILT_IN

ANY = TypeAdapter(AnyLoss)
REGISTERED = registered_losses()
EVERY = pytest.mark.parametrize("name", REGISTERED)


def test_the_registry_begins_with_the_losses_of_this_package():
    assert list(REGISTERED)[: len(BUILT_IN)] == list(BUILT_IN)
    assert len(set(REGISTERED.values())) == len(REGISTERED)
    for name in BUILT_IN:
        # The class is an attribute of the package too.
        assert getattr(losses, REGISTERED[name].__name__) is REGISTERED[name]
        assert REGISTERED[name].__name__ in dir(losses)
    with pytest.raises(AttributeError, match="no attribute 'NoSuchLoss'"):
        _ = losses.NoSuchLoss


@EVERY
def test_settings_are_found_by_name_and_frozen(name):
    loss = ANY.validate_python({"name": name})
    assert type(loss) is REGISTERED[name]
    assert loss == REGISTERED[name]()
    assert loss.name == name
    assert get_args(type(loss).model_fields["name"].annotation) == (name,)
    with pytest.raises(ValidationError, match="frozen"):
        loss.velocity = "data"
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ANY.validate_python({"name": name, "no_such_setting": 1})


@EVERY
def test_settings_survive_a_round_trip(name):
    loss = REGISTERED[name]()
    assert ANY.validate_python(loss.model_dump()) == loss
    assert ANY.validate_json(loss.model_dump_json()) == loss
    assert ANY.validate_python(loss) is loss


@EVERY
def test_says_what_it_is_and_where_it_comes_from(name):
    loss = REGISTERED[name]
    # Its own, not one inherited from another loss.
    assert {"summary", "paper"} <= vars(loss).keys()
    assert 20 < len(loss.summary) < 140
    assert "\n" not in loss.summary
    assert name not in BUILT_IN or re.search(r"arXiv \d{4}\.\d{5}", loss.paper)
    assert [other.summary for other in REGISTERED.values()].count(loss.summary) == 1


@EVERY
def test_velocities_are_a_choice_of_sources(name):
    assert set(REGISTERED[name].velocities()) <= set(Loss.velocities()) == {"teacher", "self", "data"}
    assert REGISTERED[name]().velocity in REGISTERED[name].velocities()


@EVERY
def test_times_that_a_loss_needs_are_times_that_it_accepts(name):
    loss = REGISTERED[name]()
    if loss.needed_sampling is None:
        assert loss.accepts(TimeSampling())
        assert loss.accepts(TimeSampling(prior=0, dyadic=2))
    else:
        assert loss.accepts(loss.needed_sampling)
        assert not loss.accepts(TimeSampling())


def test_more_dyadic_levels_are_accepted():
    loss = REGISTERED["progressive_distillation"]()
    assert loss.accepts(TimeSampling(prior=0, dyadic=1))
    assert loss.accepts(TimeSampling(prior=0, dyadic=5))


@EVERY
def test_derivative_is_set_where_one_is_taken(name):
    loss = REGISTERED[name]
    assert issubclass(loss, DerivativeLoss) == ("derivative" in loss.model_fields)
    assert loss().differentiates == issubclass(loss, DerivativeLoss)


def test_a_finite_step_takes_no_derivative():
    assert not Eulerian(step=0.1).differentiates
    assert not Consistency(step=0.1).differentiates


@EVERY
def test_every_setting_is_described(name):
    assert all(field.description for field in REGISTERED[name].model_fields.values())


def test_the_target_network_is_the_average_where_the_target_is_its_jump():
    average = {name for name in BUILT_IN if REGISTERED[name]().target_network == "average"}
    assert average == {"consistency_trajectory", "progressive_distillation", "terminal_velocity"}
    for name in BUILT_IN:
        loss = REGISTERED[name]
        if "target" in loss.model_fields:
            more = {"step": 0.1} if name == "consistency" else {}
            assert loss(target="average", **more).target_network == "average"
            assert loss(target="student", **more).target_network is None
    assert Progressive(target="frozen").target_network == "frozen"
    assert Progressive(target="ode").target_network is None
    assert Lagrangian(stop_gradient="target").target_network is None


@pytest.mark.parametrize("name", ["lagrangian", "eulerian"])
def test_needs_a_velocity_term_with_the_students_own_velocity(name):
    assert REGISTERED[name](velocity="self").needs_velocity_term
    assert not REGISTERED[name]().needs_velocity_term


@pytest.mark.parametrize("name", ["progressive", "progressive_distillation"])
def test_needs_a_velocity_term_with_a_maps_jumps(name):
    assert REGISTERED[name](target="student").needs_velocity_term
    assert REGISTERED[name](target="average").needs_velocity_term
    assert not REGISTERED[name](target="ode").needs_velocity_term


@pytest.mark.parametrize("name", [name for name in BUILT_IN if "progressive" not in name])
def test_sees_a_teacher_or_data_by_default(name):
    assert not REGISTERED[name]().needs_velocity_term


@pytest.mark.parametrize("settings", [Eulerian, MeanFlow, Consistency])
@pytest.mark.parametrize(("step", "share"), [(0, 0), (1, 0.08), (5, 0.4), (9, 0.72), (10, 0.8), (11, 0.8), (1000, 0.8)])
def test_warm_up(settings, step, share):
    settings = settings(tangent_warmup_steps=10, tangent_scale=0.8)
    assert settings.at_step(step).tangent_scale == pytest.approx(share)
    assert settings.tangent_scale == 0.8
    assert settings.progress(step) == ({"tangent_scale": pytest.approx(share)} if step < 10 else {})


@EVERY
def test_without_warm_up_every_step_is_alike(name):
    assert REGISTERED[name]().at_step(0) == REGISTERED[name]()
    assert REGISTERED[name]().progress(0) == {}


TANGENT = "normalize_tangent, tangent_warmup_steps, tangent_scale and clamp_tangent act on stop_gradient: target only"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[
            ({"name": "eulerian", "stop_gradient": stop} | setting, TANGENT)
            for stop in ("nowhere", "teacher_input")
            for setting in (
                {"normalize_tangent": True},
                {"tangent_warmup_steps": 5},
                {"tangent_scale": 0.5},
                {"clamp_tangent": 1.0},
            )
        ],
        ({"name": "eulerian", "stop_gradient": "none"}, "Input should be 'nowhere', 'teacher_input' or 'target'"),
        ({"name": "eulerian", "tangent_warmup_steps": -1}, "greater than or equal to 0"),
        ({"name": "eulerian", "tangent_scale": 1.5}, "less than or equal to 1"),
        ({"name": "eulerian", "clamp_tangent": 0}, "greater than 0"),
        ({"name": "lagrangian", "normalize_tangent": True}, "Extra inputs"),
        ({"name": "lagrangian", "stop_gradient": "none"}, "Input should be 'teacher_input', 'nowhere' or 'target'"),
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
        ({"name": "mean_flow", "stop_gradient": "nowhere"}, "Extra inputs"),
        ({"name": "eulerian", "solver": "euler"}, "solver acts on a finite step only; set loss.step"),
        (
            {"name": "eulerian", "step": 0.1, "stop_gradient": "nowhere"},
            "step acts on stop_gradient: target only, and takes no derivative",
        ),
        (
            {"name": "eulerian", "step": 0.1, "derivative": "exact"},
            "step acts on stop_gradient: target only, and takes no",
        ),
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
        ({"name": "lagrange"}, "loss lagrange is unknown"),
        ({"stop_gradient": "nowhere"}, "expected a group with a name, such as {name: lagrangian}"),
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
        {"name": "eulerian", "velocity": "self", "stop_gradient": "target", "normalize_tangent": True},
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
