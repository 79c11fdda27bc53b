"""The critic: what it shares with student and teacher, and that its adapters act in its own calls alone."""

from __future__ import annotations

import copy

import pytest
import torch

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import TrainingSettings
from fmm_distill.core.draws import draw
from fmm_distill.data.starting_points import probe_inputs
from fmm_distill.errors import UserError
from fmm_distill.run.given import Given
from fmm_distill.run.plan import open_student, open_teacher, plan
from fmm_distill.teachers.velocity_field import as_teacher
from fmm_distill.training.compile import accelerate_networks
from fmm_distill.training.critic import DiagonalCritic, build_critic, reset_critic
from fmm_distill.training.ema import averaged, frozen_copy
from fmm_distill.training.memory import forecast_memory
from fmm_distill.training.objective import Objective
from tests.conftest import save_teacher, tiny_unet
from tests.scaled import randomize
from tests.slow import with_slow
from tests.tiny.diffusion import PIPELINES
from tests.unit.test_scaled_runs import held_by, storages
from tests.unit.test_second_stage import FIRST, STUDENTS, settings_of

ADAPTED = [name for name, student in STUDENTS.items() if "lora" in student]
# Dynamo reads the attribute where it compiles a part of a network, and hides the warning unless it is an error.
COMPILED = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(scope="module")
def one_block_folder(tmp_path_factory):
    """A teacher of one block on each side: compiling a network takes as long as the network is deep."""
    types = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    return save_teacher(tmp_path_factory.mktemp("one_block"), tiny_unet(block_out_channels=(8,), **types))


def opened(folder, name, **matching):
    """A student that is no teacher any more, its teacher, and a critic that is neither."""
    recipe = Recipe.model_validate(settings_of(folder, name, **matching))
    student, teacher = open_student(recipe, open_teacher(recipe), Given())
    randomize(student.network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in student.named_parameters():
            if "lora_B" in key or key.endswith("linear_2.weight"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    critic = build_critic(student, teacher, recipe.student.lora.rank, seed=0)
    return recipe, student, teacher, critic


def moved(critic):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in critic.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return critic


def hooks(*modules):
    return sum(len(module._forward_hooks) for one in modules for module in one.modules())


@pytest.mark.parametrize("name", STUDENTS)
def test_a_critic_is_the_teacher_at_first_and_again_after_a_reset(teacher_folder, name):
    _, student, teacher, critic = opened(teacher_folder, name)
    x, t, r, _ = probe_inputs(teacher, torch.device("cpu"))
    with torch.no_grad():
        v, u = teacher.velocity(x, t), student.mean_velocity(x, t, r)
        assert torch.equal(critic.velocity(x, t), v)
        first = [value.clone() for value in critic.parameters()]
        assert not torch.equal(moved(critic).velocity(x, t), v)
        # Training it leaves the two others.
        assert torch.equal(teacher.velocity(x, t), v)
        assert torch.equal(student.mean_velocity(x, t, r), u)
        reset_critic(critic, student, teacher, seed=0)
        assert torch.equal(critic.velocity(x, t), v)
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), first, strict=True))
    assert all(parameter.requires_grad for parameter in critic.parameters())


@pytest.mark.parametrize("name", STUDENTS)
def test_the_bytes_of_three_roles(teacher_folder, name):
    recipe = Recipe.model_validate(settings_of(teacher_folder, name))
    job = plan(recipe)
    critic = build_critic(job.student, job.teacher, recipe.student.lora.rank, seed=0)
    average = averaged(critic, 0.9).module
    network = storages(open_teacher(recipe).network)
    own = storages(critic)
    together = storages(job.student, held_by(job.teacher), critic, average)
    if name in ADAPTED:
        # One copy of the large weights.
        adapters = 4 * sum(p.numel() for p in critic.parameters())
        assert own == adapters < network / 4
        assert together == storages(job.student) + 2 * adapters
        assert storages(job.student) < 1.5 * network
    else:
        assert own == network
        copies = 3 if name == "embedded" else 2
        assert together == storages(job.student) + copies * network
    memory = forecast_memory(job.student, job.teacher, recipe)
    moments = 0 if memory.peak_of == "the map" else 2 * 4 * sum(p.numel() for p in critic.parameters())
    assert memory.weights + memory.critic == together + moments


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_act_in_the_calls_of_the_critic_alone(teacher_folder, name):
    _, student, teacher, critic = opened(teacher_folder, name)
    moved(critic)
    before = hooks(student)
    x, t, _, _ = probe_inputs(teacher, torch.device("cpu"))
    seen = []
    inner = held_by(teacher).conv_in
    handle = inner.register_forward_hook(lambda *_: seen.append((hooks(student), hooks(averaged(student, 0.9).module))))
    critic.velocity(x, t)
    teacher.velocity(x, t)
    ((during, copied), (after, _)) = seen
    assert during == before + 1 + len(critic.network.first)
    # A copy that is made within a call would have them; the trainer makes none there.
    assert copied == during
    assert after == before + 1
    handle.remove()
    assert hooks(student) == hooks(frozen_copy(student)) == hooks(copy.deepcopy(student)) == before

    def failing(*_):
        raise RuntimeError("it ends here")

    handle = inner.register_forward_hook(failing)
    with pytest.raises(RuntimeError, match="it ends here"):
        critic.velocity(x, t)
    handle.remove()
    assert hooks(student) == before


def gradients(folder, name, training=None):
    """Of the student's matching loss and of the critic's own, with an option of the training."""
    loss = {"name": "score_implicit_matching"}
    recipe, student, teacher, critic = opened(folder, name, loss=loss, fraction=1.0)
    moved(critic)
    at = probe_inputs(teacher, torch.device("cpu"))
    average = frozen_copy(critic)
    with torch.no_grad():
        # Two critics on one network, each with its own adapters.
        for value in average.parameters():
            value *= 1.1
    if training is not None:
        accelerate_networks(training, student, teacher, at, critic)
    objective = Objective(student, teacher, recipe, recipe.losses, critic=average)
    draws = draw(0, 0, 4, teacher.event_shape, renoised=True)
    objective(draws, None, FIRST)[1].mean().backward()
    assert all(p.grad is None for p in (*critic.parameters(), *average.parameters()))
    of_student = [p.grad for p in student.parameters() if p.requires_grad]
    critic.velocity(at[0], at[1], at[3]).square().mean().backward()
    of_critic = [p.grad for p in critic.parameters()]
    assert len(of_student) > 10
    assert len(of_critic) > 10
    return [*of_student, *of_critic], student.network


@COMPILED
@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, "gradient_checkpointing") for name in STUDENTS),
        # Each takes many seconds. By default the one with both a scaled network and adapters.
        ("scaled-lora", "compile"),
        *(pytest.param(name, "compile", marks=pytest.mark.slow) for name in STUDENTS if name != "scaled-lora"),
    ],
)
def test_options_of_the_training_change_no_gradient(teacher_folder, one_block_folder, name, option):
    training = TrainingSettings(**{option: "eager" if option == "compile" else True})
    folder = one_block_folder if option == "compile" else teacher_folder
    ours, network = gradients(folder, name, training)
    theirs, _ = gradients(folder, name)
    if option == "gradient_checkpointing":
        assert network.is_gradient_checkpointing
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ADAPTED)
def test_blocks_with_adapters_that_are_computed_again(tmp_path, name):
    """A transformer's blocks have the adapters inside: those of its call, off for the teacher."""
    PIPELINES["dit"].build().save_pretrained(tmp_path)
    ours, network = gradients(tmp_path, name, TrainingSettings(gradient_checkpointing=True))
    theirs, _ = gradients(tmp_path, name)
    assert network.is_gradient_checkpointing
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


@COMPILED
@pytest.mark.parametrize("name", with_slow(ADAPTED, ["scaled-lora"]))
def test_compiled_code_of_the_teacher_does_not_replace_a_critic_with_adapters(one_block_folder, name):
    _, student, teacher, critic = opened(one_block_folder, name)
    at = x, t, _, _ = probe_inputs(teacher, torch.device("cpu"))
    average = averaged(critic, 0.9).module
    moved(critic)
    accelerate_networks(TrainingSettings(compile="eager"), student, teacher, at, critic)
    seen = [[field.velocity(x, t).detach() for field in (critic, average, teacher)] for _ in range(3)]
    for ours, averages, teachers in seen:
        torch.testing.assert_close(ours, seen[0][0])
        torch.testing.assert_close(averages, teachers)
        assert (ours - teachers).abs().max() > 0.01
    critic.velocity(x, t).square().mean().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


@COMPILED
def test_compiled_code_that_leaves_the_adapters_out_is_refused(one_block_folder):
    _, student, teacher, critic = opened(one_block_folder, "scaled-lora")

    class Forgetful(torch.nn.Module):
        """As compiled code is that was made before the adapters were attached."""

        own_network = None

        def __init__(self):
            super().__init__()
            self.critic = critic

        def velocity(self, x, t, cond=None):
            return (critic if student.network._compiled_call_impl is None else teacher).velocity(x, t, cond) + 0 * sum(
                p.sum() for p in critic.parameters()
            )

    at = probe_inputs(teacher, torch.device("cpu"))
    with pytest.raises(UserError, match=r"training\.compile: eager: expected .* in the critic's gradient; leave the"):
        accelerate_networks(TrainingSettings(compile="eager"), student, teacher, at, Forgetful())


class Line:
    """A teacher of points without a network."""

    event_shape = (2,)

    def velocity(self, x, t, cond=None):
        return x


def test_a_teacher_without_a_network_has_a_critic_that_starts_as_the_students_velocity(teacher_folder):
    _, student, _, _ = opened(teacher_folder, "embedded")
    critic = build_critic(student, as_teacher(Line()), 0, seed=0)
    assert isinstance(critic, DiagonalCritic)
    x, t, *_ = probe_inputs(open_teacher(Recipe.model_validate(settings_of(teacher_folder))), torch.device("cpu"))
    with torch.no_grad():
        u = student.mean_velocity(x, t, t)
        assert torch.equal(critic.velocity(x, t), u)
        moved(critic)
        assert not torch.equal(critic.velocity(x, t), u)
        assert torch.equal(student.mean_velocity(x, t, t), u)
        reset_critic(critic, student, as_teacher(Line()), seed=0)
        assert torch.equal(critic.velocity(x, t), u)
