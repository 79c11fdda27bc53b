from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from fmm_distill.losses import Jump
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.student.fold import fold
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conftest import save_teacher, tiny_unet


def perturb(student, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        student.network.jump_embedding[0].linear_2.weight.normal_(0, scale, generator=generator)
    return student


def relative(a, b):
    return (a - b).norm() / b.norm()


@pytest.fixture
def student(teacher):
    return Student.from_teacher(teacher)


@pytest.fixture
def jumps(teacher):
    """Points and times t > r over the whole range, with t_max, t_min and data among them."""
    schedule, generator = teacher.schedule, torch.Generator().manual_seed(4)
    x = torch.randn(8, *teacher.event_shape, generator=generator)
    times = schedule.t_max * torch.rand(2, 8, generator=generator, dtype=torch.float64)
    t, r = times.amax(0), times.amin(0)
    t[0], r[0] = schedule.t_max, 0
    t[1], r[1] = schedule.t_max, schedule.t_min
    t[2], r[2] = schedule.t_min, 0
    return x, t, r


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_starts_as_the_teacher(tmp_path, jumps, prediction, beta_schedule):
    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule=beta_schedule)
    teacher = load_teacher(str(save_teacher(tmp_path, scheduler=scheduler)))
    student = Student.from_teacher(teacher)
    x, t, r = jumps
    t, r = (time * teacher.schedule.t_max / t.max() for time in (t, r))
    v = teacher.velocity(x, t)
    with torch.no_grad():
        assert torch.equal(student.mean_velocity(x, t, t), v)
        assert relative(student.mean_velocity(x, t, r), v) < 1e-6
        assert torch.equal(student(x, t, t), x)
        torch.testing.assert_close(student(x, t, r), x - (t - r).reshape(-1, 1, 1, 1).float() * v)


def test_stays_the_teacher_on_the_diagonal(teacher, student, jumps):
    x, t, r = jumps
    v = teacher.velocity(x, t)
    with torch.no_grad():
        assert torch.equal(perturb(student).mean_velocity(x, t, t), v)
        away = (student.mean_velocity(x, t, r) - v).flatten(1).norm(dim=1)
    long = student.clock.warp(t) - student.clock.warp(r) > 0.05
    assert long.sum() >= 4
    assert (away[long] > 1e-3).all()


def test_mean_velocity_of_the_whole_jump_is_told_h_of_one(student, teacher):
    told = []
    student.network.jump_embedding[0].register_forward_pre_hook(lambda module, args: told.append(args[0]))
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64)
    student(torch.zeros(2, *teacher.event_shape), t, 0 * t)
    torch.testing.assert_close(told[0], torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_times_reach_the_network_in_single_precision(student, teacher, dtype):
    told = []

    def network(x, timestep, *, h):
        told.extend([timestep, h])
        return UNet2DModel.forward(student.network, x.float(), timestep)

    student.network.forward = network
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64)
    out = student(torch.zeros(2, *teacher.event_shape, dtype=dtype), t, 0 * t)
    assert out.dtype == dtype
    assert [value.dtype for value in told] == [torch.float32] * 2
    assert told[0].tolist() == [999, 999]


def test_a_training_step_makes_it_depend_on_r(teacher, student, jumps):
    x, t, r = jumps
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    settings = Lagrangian(derivative="exact")

    def loss():
        return settings(student, teacher.velocity, Jump(x, t, r, None, t)).mean()

    loss().backward()
    assert student.network.jump_embedding[0].linear_2.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    optimizer.step()
    after = student.state_dict()
    assert not torch.equal(after["network.jump_embedding.0.linear_2.weight"], torch.zeros(()))
    assert not torch.equal(after["network.conv_in.weight"], before["network.conv_in.weight"])
    with torch.no_grad():
        moved = student.mean_velocity(x, t, r) - student.mean_velocity(x, t, t)
    assert moved[0].abs().max() > 1e-3


def test_a_few_training_steps_lower_the_loss(teacher, student, jumps):
    x, t, r = jumps
    optimizer = torch.optim.AdamW(student.network.parameters(), lr=2e-3, weight_decay=0)
    settings = Lagrangian(derivative="exact")
    losses = []
    for _ in range(12):
        loss = settings(student, teacher.velocity, Jump(x, t, r, None, t)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_does_not_share_weights_with_the_teacher(teacher, student):
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())


def test_is_trainable_and_the_teacher_is_not(teacher, student):
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not student.network.training


@pytest.mark.parametrize(("asked", "kept"), [("teacher", "epsilon"), ("v_prediction", "v_prediction")])
def test_prediction(tmp_path, asked, kept):
    teacher = load_teacher(str(save_teacher(tmp_path, scheduler=DDPMScheduler(prediction_type="epsilon"))))
    assert Student.from_teacher(teacher, asked).prediction == kept


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_fold_is_the_two_time_network_at_one_h(teacher, student, jumps, steps):
    network = perturb(student).network
    x, _, _ = jumps
    timesteps = torch.linspace(0, 999, len(x))
    stock = fold(student, teacher, student.schedule.grid(steps))
    assert type(stock) is UNet2DModel
    assert set(stock.state_dict()) == set(tiny_unet().state_dict())
    with torch.no_grad():
        expected = network(x, timesteps, h=torch.full((len(x),), 1 / steps)).sample
        unfolded = network(x, timesteps).sample
        folded = stock(x, timesteps).sample
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5)
    assert (folded - unfolded).abs().max() > 1e-3


def test_fold_leaves_the_network_alone(teacher, student):
    before = copy.deepcopy(perturb(student).network.state_dict())
    folded = fold(student, teacher, student.schedule.grid(2))
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())
    assert not torch.equal(folded.time_embedding.linear_2.bias, before["time_embedding.linear_2.bias"])
    assert not folded.training
