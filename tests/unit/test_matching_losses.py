"""Losses of distribution matching: their settings, formulas on numbers, gradients, and rollouts."""

from __future__ import annotations

import json
import re
from typing import ClassVar, Literal, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fmm_distill import losses
from fmm_distill.config.matching import MatchingSettings
from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.errors import UserError
from fmm_distill.losses import (
    AnyMatchingLoss,
    Lagrangian,
    MatchingLoss,
    NoisedSamples,
    RealData,
    Rollout,
    critic_loss,
    matching_losses,
    registered_losses,
)
from fmm_distill.losses.distribution_matching import DistributionMatching
from fmm_distill.losses.flow_generator_matching import FlowGeneratorMatching
from fmm_distill.losses.matching_registry import find_matching_loss
from fmm_distill.losses.registry import MATCHING
from fmm_distill.losses.score_identity_distillation import ScoreIdentityDistillation
from fmm_distill.losses.score_implicit_matching import ScoreImplicitMatching

ANY = TypeAdapter(AnyMatchingLoss)
KNOWN = matching_losses()
EVERY = pytest.mark.parametrize("name", KNOWN)
VARIANTS = {
    "kl": DistributionMatching(),
    "kl-equal": DistributionMatching(weight="none"),
    "fisher": DistributionMatching(divergence="fisher"),
    "fisher-huber": DistributionMatching(divergence="fisher", balance=1, distance="pseudo_huber", constant=0.2),
    "generator": FlowGeneratorMatching(),
    "generator-distance": FlowGeneratorMatching(weight="distance", time_power=1),
    "generator-real": FlowGeneratorMatching(real=RealData(a=0.9, b=0.8)),
    "implicit": ScoreImplicitMatching(),
    "identity": ScoreIdentityDistillation(),
}
VARIANT = pytest.mark.parametrize("loss", VARIANTS.values(), ids=VARIANTS)


class Field(nn.Module):
    """A smooth velocity field with weights, whose value depends on each sample's own point, time and condition."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.4 * torch.randn(6, 6, generator=generator, dtype=torch.float64))

    def forward(self, x, t, cond=None):
        shift = 0 if cond is None else cond.inputs["shift"]
        mixed = x.flatten(1) @ self.weight.to(x.dtype) + t[:, None].to(x.dtype) + shift
        return torch.sin(mixed).unflatten(1, x.shape[1:])


def samples(batch=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x_0, noise = (torch.randn(batch, 2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64)
    cond = Conditioning({"shift": torch.linspace(-1, 1, batch, dtype=torch.float64)[:, None].to(dtype)})
    return NoisedSamples(x_0.requires_grad_(), noise, t, cond)


def frozen(seed):
    return Field(seed).requires_grad_(False)


@EVERY
def test_a_loss_is_found_by_its_name_and_frozen(name):
    loss = ANY.validate_python({"name": name})
    assert type(loss) is KNOWN[name]
    assert loss == KNOWN[name]()
    assert get_args(type(loss).model_fields["name"].annotation) == (name,)
    assert getattr(losses, KNOWN[name].__name__) is KNOWN[name]
    assert KNOWN[name].__name__ in dir(losses)
    assert ANY.validate_json(loss.model_dump_json()) == loss
    assert ANY.validate_python(loss) is loss
    with pytest.raises(ValidationError, match="frozen"):
        loss.balance = 1.0


@EVERY
def test_a_loss_names_its_source_and_describes_its_settings(name):
    loss = KNOWN[name]
    assert {"summary", "paper"} <= vars(loss).keys()
    assert 20 < len(loss.summary) < 140
    assert re.search(r"arXiv \d{4}\.\d{5}", loss.paper)
    assert all(field.description for field in loss.model_fields.values())
    assert not loss().needs_data


def test_no_name_is_of_both_kinds():
    assert list(KNOWN) == list(MATCHING)
    assert not set(KNOWN) & set(registered_losses())


def test_the_presets_are_settings_of_the_family():
    assert FlowGeneratorMatching().balance == 1
    assert ScoreImplicitMatching().balance == 0
    assert ScoreImplicitMatching().distance == "pseudo_huber"
    assert ScoreIdentityDistillation().balance == -0.4
    assert ScoreIdentityDistillation().times[1] == 0.8
    here, teacher, critic = samples(), frozen(1), frozen(2)
    for preset in (loss for loss in VARIANTS.values() if type(loss) is not DistributionMatching):
        same = DistributionMatching(**preset.model_dump(exclude={"name"}))
        torch.testing.assert_close(preset(here, teacher, critic), same(here, teacher, critic), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DistributionMatching, {"balance": 1}, "balance: expected divergence: fisher, in which alone they act, got kl"),
        (DistributionMatching, {"distance": "pseudo_huber"}, "distance: expected divergence: fisher"),
        (DistributionMatching, {"constant": 0.1, "time_power": 1}, "constant and time_power: expected divergence"),
        (DistributionMatching, {"real": {}}, "real: expected divergence: fisher"),
        (
            DistributionMatching,
            {"divergence": "fisher", "constant": 0.1},
            "constant acts on distance: pseudo_huber only",
        ),
        (DistributionMatching, {"divergence": "fisher", "real": {}}, "expected balance: 1 and distance: squared"),
        (FlowGeneratorMatching, {"distance": "pseudo_huber", "real": {}}, "got 1 and pseudo_huber"),
        (FlowGeneratorMatching, {"divergence": "kl"}, "Input should be 'fisher'"),
        (ScoreIdentityDistillation, {"balance": -3}, "greater than or equal to -2"),
        (ScoreIdentityDistillation, {"times": (0.5, 0.5)}, "expected the smallest time before the largest"),
        (DistributionMatching, {"times": (0.9, 0.2)}, "expected the smallest time before the largest"),
        (DistributionMatching, {"times": (-0.1, 0.2)}, "greater than or equal to 0"),
        (DistributionMatching, {"times": (0.1, 1.1)}, "less than or equal to 1"),
        (RealData, {"a": 1.0}, "less than 1"),
        (Rollout, {"steps": ()}, "at least 1 item"),
        (Rollout, {"steps": (0, 1)}, "greater than or equal to 1"),
        (Rollout, {"steps": (1, 2, 2)}, "expected each number of steps once, not 2 twice"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(kind, values, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        kind(**values)


def refused(**settings):
    with pytest.raises(UserError) as caught:
        parse(settings, "here")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@EVERY
def test_a_recipe_names_a_loss_in_its_matching_and_nowhere_else(name):
    recipe = parse({"matching": {"steps": 5, "loss": {"name": name}}}, "here")
    assert recipe.matching.loss == KNOWN[name]()
    assert parse(json.loads(recipe.model_dump_json()), "here") == recipe
    expected = f"loss: expected a loss of the map, got {name}, a loss of distribution matching; try --set 'matching="
    assert f"here: {expected}" in refused(loss={"name": name})
    group = [{"loss": {"name": name}, "fraction": 0.5}]
    assert f"here: extra_losses.0.{expected}" in refused(extra_losses=group)
    assert f"here: stages.0.{expected}" in refused(stages=group)
    with pytest.raises(ValidationError, match="expected a loss of the map"):
        Recipe(loss=KNOWN[name]())
    path = refused(matching={"steps": 5, "loss": {"name": name, "balnce": 1}})
    assert f"matching.loss.balnce is not a setting of {name}, did you mean matching.loss.balance?" in path


def test_a_loss_of_the_map_is_no_matching_loss():
    known = f"here: matching.loss: expected one of {', '.join(KNOWN)}, got "
    message = refused(matching={"steps": 5, "loss": {"name": "lagrangian"}})
    assert message == f"{known}'lagrangian', a loss of the map; try the recipe's loss for it"
    assert refused(matching={"steps": 5, "loss": {"name": "dmd"}}) == f"{known}'dmd'"
    assert "expected a group with a name, such as {name: d" in refused(matching={"steps": 5, "loss": {"balance": 1}})
    with pytest.raises(ValidationError, match="got 'lagrangian', a loss of the map"):
        MatchingSettings(steps=5, loss=Lagrangian())
    trained = refused(matching={"steps": 5, "loss": {"name": "flow_generator_matching", "real": {}}})
    assert "matching.loss.real: expected images, which the critic learns from too, got data.source: none" in trained
    nested = {"name": "flow_generator_matching", "real": {"c": 1}}
    assert "matching.loss.real.c is not a setting" in refused(matching={"steps": 5, "loss": nested})


class Mine(MatchingLoss):
    """A loss that is registered nowhere."""

    summary: ClassVar[str] = "a matching loss of a script"
    paper: ClassVar[str] = "none"

    name: Literal["my_matching"] = "my_matching"
    """Name of the loss."""


def test_a_recipe_takes_an_instance():
    recipe = Recipe(matching=MatchingSettings(steps=5, loss=ScoreImplicitMatching(constant=0.1)))
    assert parse(recipe.model_dump(mode="json"), "here") == recipe
    assert find_matching_loss("my_matching") is None
    mine = Recipe(matching=MatchingSettings(steps=5, loss=Mine(weight="none")))
    # A resumed run reads the recipe that it wrote.
    assert parse(mine.model_dump(mode="json"), "here") == mine
    assert "my_matching" not in matching_losses()

    class Other(Mine):
        name: Literal["distribution_matching"] = "distribution_matching"

    with pytest.raises(ValidationError, match="Other has the name of fmm_distill"):
        MatchingSettings(steps=5, loss=Other())


def test_the_schema_of_a_recipe_has_every_loss():
    found = Recipe.model_json_schema()["$defs"]["MatchingSettings"]["properties"]["loss"]["oneOf"]
    assert [schema["properties"]["name"]["const"] for schema in found] == list(KNOWN)


def test_times_are_uniform_between_their_ends():
    class Squared(LinearClock):
        def time_at(self, progress):
            return progress**2

    loss = DistributionMatching(times=(0.2, 0.6))
    t = loss.times_at(Squared(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(t, torch.tensor([0.04, 0.16, 0.36], dtype=torch.float64))


@VARIANT
def test_a_batch_is_its_samples(loss):
    here, teacher, critic = samples(), frozen(1), frozen(2)
    together = loss(here, teacher, critic)
    assert together.shape == (5,)
    (gradient,) = torch.autograd.grad(together.sum(), here.x_0)
    for i in range(5):
        x_0, noise, t = here.x_0[i : i + 1].detach().requires_grad_(), here.noise[i : i + 1], here.t[i : i + 1]
        alone = loss(NoisedSamples(x_0, noise, t, here.cond.part(i, i + 1)), teacher, critic)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            torch.autograd.grad(alone.sum(), x_0)[0], gradient[i : i + 1], rtol=1e-10, atol=1e-13
        )


@VARIANT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_is_in_single_precision(loss, dtype):
    value = loss(samples(dtype=dtype), frozen(1), frozen(2))
    assert value.dtype == torch.float32
    expected = loss(samples(), frozen(1), frozen(2)).float()
    torch.testing.assert_close(value, expected, rtol=0.2 if dtype == torch.bfloat16 else 1e-4, atol=0.05)


@VARIANT
def test_the_gradient_is_in_the_samples_alone(loss):
    here, teacher, critic = samples(), Field(1), Field(2)
    if loss.divergence == "fisher":
        teacher, critic = teacher.requires_grad_(False), critic.requires_grad_(False)
    loss(here, teacher, critic).sum().backward()
    assert here.x_0.grad.abs().min() > 0
    # With trainable weights too, kl has no graph in either network.
    assert teacher.weight.grad is None
    assert critic.weight.grad is None


def test_the_gradient_of_kl_is_as_written():
    here, teacher, critic = samples(), frozen(1), frozen(2)
    x_t, t = here.x_t.detach(), here.t[:, None, None]
    v_teacher, v_critic = teacher(x_t, here.t, here.cond), critic(x_t, here.t, here.cond)
    distance = (here.x_0.detach() - (x_t - t * v_teacher)).abs().mean((1, 2), keepdim=True)
    for loss, n in ((DistributionMatching(), distance), (DistributionMatching(weight="none"), 1)):
        (gradient,) = torch.autograd.grad(loss(here, teacher, critic).sum(), here.x_0)
        # 6 coordinates, of which the loss is the mean.
        torch.testing.assert_close(6 * gradient, t * (v_teacher - v_critic) / n, rtol=1e-12, atol=1e-14)


def test_a_sample_at_the_teachers_estimate_has_a_bounded_weight():
    x_0 = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    here = NoisedSamples(x_0, torch.zeros_like(x_0), torch.tensor([0.5], dtype=torch.float64), None)
    loss = DistributionMatching()(here, lambda x, t, cond: torch.zeros_like(x), lambda x, t, cond: torch.ones_like(x))
    (gradient,) = torch.autograd.grad(loss.sum(), x_0)
    torch.testing.assert_close(6 * gradient, torch.full_like(gradient, -0.5 / 0.02))


def parts():
    here, teacher, critic = samples(), frozen(1), frozen(2)
    v_teacher, v_critic = teacher(here.x_t, here.t, here.cond), critic(here.x_t, here.t, here.cond)
    return here, teacher, critic, v_teacher, v_critic


def agree(loss, expected, here, teacher, critic):
    found = loss(here, teacher, critic)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(value.sum(), here.x_0, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_flow_generator_matching_is_as_published():
    here, teacher, critic, v_teacher, v_critic = parts()
    d = v_teacher - v_critic
    agree(FlowGeneratorMatching(), (d * d + 2 * d * (v_critic - here.velocity)).mean((1, 2)), here, teacher, critic)


def test_with_images_it_is_as_published():
    here, teacher, critic, v_teacher, v_critic = parts()
    a, b = 0.9, 0.8
    expected = a * (v_teacher - b / a * here.velocity) ** 2 - a * (v_critic - b / a * here.velocity) ** 2
    agree(FlowGeneratorMatching(real=RealData(a=a, b=b)), expected.mean((1, 2)), here, teacher, critic)


def test_score_implicit_matching_is_as_published():
    here, teacher, critic, v_teacher, v_critic = parts()
    d = v_teacher - v_critic
    # In the paper's norm, the sum over 6 coordinates, the constant is larger by the root of their number.
    norm = ((d**2).sum((1, 2)) + 6 * 0.2**2).sqrt()
    published = (d * (v_critic - here.velocity)).sum((1, 2)) / norm
    agree(ScoreImplicitMatching(constant=0.2), here.t**2 * published / 6**0.5, here, teacher, critic)


def test_score_identity_distillation_is_as_published():
    here, teacher, critic, v_teacher, v_critic = parts()
    t, alpha = here.t[:, None, None], 1.2
    of_teacher, of_critic = here.x_t - t * v_teacher, here.x_t - t * v_critic
    moved = of_teacher - of_critic
    published = ((1 - alpha) * moved**2 + moved * (of_critic - here.x_0)).mean((1, 2))
    distance = (here.x_0 - of_teacher).abs().mean((1, 2)).detach()
    agree(ScoreIdentityDistillation(), 2 * published / distance, here, teacher, critic)


def test_the_critics_gradient_is_in_its_weights_alone():
    here, images, critic = samples(), samples(), Field(2)
    real = RealData(a=0.9, b=0.8)
    for arguments in ((), (images, real)):
        critic.zero_grad()
        loss = critic_loss(critic, here, *arguments)
        assert loss.shape == (5,)
        loss.sum().backward()
        assert critic.weight.grad.abs().max() > 0
        assert here.x_0.grad is None
        assert images.x_0.grad is None
    prediction = critic(here.x_t, here.t, here.cond)
    expected = (prediction - here.velocity).square().mean((1, 2))
    torch.testing.assert_close(critic_loss(critic, here), expected)
    # The same samples as images: with a = b both parts are the plain loss.
    torch.testing.assert_close(critic_loss(critic, here, here, RealData(a=0.9, b=0.9)), expected)


def test_the_critic_gets_images_with_their_setting():
    critic = frozen(2)
    for arguments in ((samples(), None), (None, RealData())):
        with pytest.raises(ValueError, match="images and real together"):
            critic_loss(critic, samples(), *arguments)
    with pytest.raises(ValueError, match="an image per sample, got 4 for 5"):
        critic_loss(critic, samples(), samples(4), RealData())


class Recorder(FlowMap):
    """A map that records its jumps and whether they have a graph."""

    clock = LinearClock()
    t_max = 1.0

    def __init__(self):
        self.jumps = []
        self.factor = torch.tensor(0.5, requires_grad=True)

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        self.jumps.append((float(t[0]), float((t - h)[0]), torch.is_grad_enabled()))
        return self.factor * x


@pytest.mark.parametrize(
    ("gradient", "k", "jumps"),
    [
        ("last", 0, [(1.0, 0.1, True)]),
        ("last", 2, [(1.0, 0.5, False), (0.5, 0.1, True)]),
        ("last", 3, [(1.0, 0.25, False), (0.25, 0.1, True)]),
        ("all", 0, [(1.0, 0.75, True), (0.75, 0.1, True)]),
        ("all", 2, [(1.0, 0.5, True), (0.5, 0.25, True), (0.25, 0.1, True)]),
        ("all", 3, [(1.0, 0.25, True), (0.25, 0.1, True)]),
    ],
)
def test_jumps_of_a_rollout(gradient, k, jumps):
    flow_map, rollout = Recorder(), Rollout(gradient=gradient)
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.1], dtype=torch.float64)
    x_0 = rollout(flow_map, torch.ones(3, 2), grid, k)
    assert [(t, pytest.approx(r), graph) for t, r, graph in flow_map.jumps] == jumps
    assert x_0.requires_grad
    with torch.no_grad():
        assert not rollout(flow_map, torch.ones(3, 2), grid, k).requires_grad
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="expected a point of the grid from 0 to 3"):
            rollout(flow_map, torch.ones(3, 2), grid, wrong)


def test_one_step_is_one_jump():
    flow_map = Recorder()
    Rollout(gradient="all")(flow_map, torch.ones(3, 2), torch.tensor([1.0, 0.0]), 0)
    assert flow_map.jumps == [(1.0, 0.0, True)]


def test_every_number_of_steps_and_every_point_is_drawn():
    rollout = Rollout(steps=(4, 1, 2))
    assert rollout.steps == (1, 2, 4)
    drawn = [rollout.draw(torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert set(drawn) == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}
    # Each number with equal chance, whatever the number of its points.
    assert min([steps for steps, _ in drawn].count(steps) for steps in rollout.steps) > 45
