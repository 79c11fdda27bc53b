from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.derivatives.central import TIME_STEP
from fmm_distill.core.derivatives.engines import (
    choose_engine,
    derivative_along_flow,
    derivative_in_r,
    value_and_derivative_along_flow,
    value_and_derivative_in_r,
    value_and_parts_along_flow,
)
from fmm_distill.core.derivatives.forward_mode import StockNetworks
from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.time_axis import LinearClock, expand
from fmm_distill.student.student import Student
from fmm_distill.teachers.closed_form import Gaussian


class Polynomial(FlowMap):
    """``u = x (t^2 + h^3)``, whose derivatives can be written down."""

    clock = LinearClock()
    t_max = 1.0

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        return x * expand(t.square() + h**3, x)


@pytest.fixture
def student(teacher):
    student = Student.from_teacher(teacher)
    with torch.no_grad():
        student.network.jump_embedding[0].linear_2.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return student


@pytest.fixture
def jumps(teacher):
    schedule, generator = teacher.schedule, torch.Generator().manual_seed(4)
    x = torch.randn(6, *teacher.event_shape, generator=generator)
    shares = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    shares[0, 0], shares[1, 0] = 1, 0
    times = schedule.t_min + (schedule.t_max - schedule.t_min) * shares
    return x, times.amax(0), times.amin(0)


def relative(a, b):
    return ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max()


@pytest.mark.parametrize("engine", ["exact", "central"])
def test_against_a_polynomial(engine):
    x, v = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r = torch.tensor([0.9, 0.7, 0.5, 0.8]).double(), torch.tensor([0.1, 0.2, 0.5, 0.79]).double()
    h = t - r
    in_r = derivative_in_r(Polynomial(), x, t, r, engine=engine)
    torch.testing.assert_close(in_r, x * expand(-3 * h**2, x), rtol=1e-7, atol=1e-4)
    along = derivative_along_flow(Polynomial(), x, t, r, v, engine=engine)
    expected = x * expand(2 * t + 3 * h**2, x) + v * expand(t**2 + h**3, x)
    torch.testing.assert_close(along, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("engine", ["exact", "central"])
def test_values_come_with_derivatives(student, jumps, engine):
    x, t, r = jumps
    v = torch.ones_like(x)
    with torch.no_grad():
        expected = student.mean_velocity(x, t, r)
        in_r = derivative_in_r(student, x, t, r, engine=engine)
        along = derivative_along_flow(student, x, t, r, v, engine=engine)
        found = {
            in_r: (value_and_derivative_in_r, ()),
            along: (value_and_derivative_along_flow, (v,)),
        }
        for derivative, (of_both, more) in found.items():
            for detached in (False, True):
                u, du = of_both(student, x, t, r, *more, engine=engine, detached=detached)
                torch.testing.assert_close(du, derivative)
                # A mean of two calls is off by half of the second derivative, 6e-4 measured.
                assert relative(u, expected) < (1e-5 if engine == "exact" else 2e-3)


@pytest.mark.parametrize("engine", ["exact", "central"])
@pytest.mark.parametrize("of_both", [value_and_derivative_in_r, value_and_derivative_along_flow])
def test_a_detached_derivative_has_no_gradient(student, jumps, of_both, engine):
    x, t, r = jumps
    more = () if of_both is value_and_derivative_in_r else (torch.ones_like(x),)
    u, du = of_both(student, x, t, r, *more, engine=engine, detached=True)
    assert not du.requires_grad
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    found = torch.autograd.grad(u.square().sum(), weights)
    # That of the value, taken at the later of the two calls.
    expected = torch.autograd.grad(student.mean_velocity(x, t, r).square().sum(), weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < (1e-4 if engine == "exact" else 5e-2) * theirs.norm() + 1e-6


@pytest.mark.parametrize(("engine", "halved", "plain"), [("central", 2, [False, True]), ("exact", 1, [True])])
def test_in_half_precision_a_derivative_has_calls_of_its_own(student, jumps, engine, halved, plain):
    x, t, r = jumps
    kinds = []
    first = student.network.conv_in
    first.register_forward_hook(lambda *given: kinds.append((given[2].dtype, torch.is_grad_enabled())))
    with torch.autocast("cpu", torch.bfloat16):
        u, du = value_and_derivative_in_r(student, x, t, r, engine=engine, detached=True)
    assert sorted(kinds, key=str) == [(torch.bfloat16, True), *[(torch.float32, False)] * halved]
    kinds.clear()
    value_and_derivative_in_r(student, x, t, r, engine=engine, detached=True)
    assert kinds == [(torch.float32, graph) for graph in plain]
    assert u.requires_grad
    assert relative(du, derivative_in_r(student, x, t, r)) < 1e-3


@pytest.mark.parametrize("engine", ["exact", "central"])
def test_parts_along_the_flow(student, jumps, engine):
    student.double()
    x, t, r = jumps[0].double(), *jumps[1:]
    # Away from t_max, where the central engine takes a point before.
    t = t.clamp_max(0.9 * student.t_max)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, in_t, in_x = value_and_parts_along_flow(student, x, t, r, v, engine=engine)
    assert not in_x.requires_grad
    place, time = x.clone().requires_grad_(), t.clone().requires_grad_()
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    value = student.mean_velocity(place, time, r)
    of_x, of_t = torch.autograd.grad((value * weight).sum(), (place, time))
    near = 1e-4 if engine == "exact" else 1e-2
    torch.testing.assert_close(u, value, rtol=near, atol=near)
    for part, expected in ((in_t, of_t), (in_x, (of_x * v).flatten(1).sum(1))):
        assert ((part * weight).flatten(1).sum(1) - expected).norm() < near * expected.norm()
    # The gradient is that of the part in time alone.
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    alone = derivative_along_flow(student, x, t, r, torch.zeros_like(x))
    found, expected = (torch.autograd.grad((part * weight).sum(), weights) for part in (in_t + in_x, alone))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 5 * near * theirs.norm() + 1e-3 * near


@torch.no_grad()
def test_engines_agree_in_r(student, jumps):
    # 2e-4 measured; DESIGN section 5 has 7e-4.
    central, exact = (derivative_in_r(student, *jumps, engine=engine) for engine in ("central", "exact"))
    assert exact.abs().max() > 0.1
    assert relative(central, exact) < 1e-3


@torch.no_grad()
def test_engines_agree_along_the_flow(teacher, student, jumps):
    v = teacher.velocity(*jumps[:2])
    x, t, r = jumps
    assert t[0] == student.t_max
    central = derivative_along_flow(student, x, t, r, v, engine="central")
    # At t_max it is that of a point of the flow a step before.
    before = torch.minimum(student.t_max - TIME_STEP / student.clock.dwarp_dt(t) - t, torch.zeros_like(t))
    assert (before < 0).tolist() == [True] + 5 * [False]
    exact = derivative_along_flow(student, x + expand(before, x) * v, t + before, r, v)
    assert exact.abs().max() > 0.1
    # 1e-3 measured.
    assert relative(central, exact) < 5e-3


def test_exact_in_r_is_the_reverse_mode_derivative(student, jumps):
    student.double()
    x, t, r = jumps[0].double(), *jumps[1:]
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = r.clone().requires_grad_()
    (reverse,) = torch.autograd.grad((student.mean_velocity(x, t, target) * weight).sum(), target)
    forward = (derivative_in_r(student, x, t, r) * weight).flatten(1).sum(1)
    # diffusers computes the sinusoids in float32 whatever the network's precision.
    torch.testing.assert_close(forward, reverse, rtol=1e-5, atol=1e-5)


def test_exact_in_r_against_differences(student, jumps):
    student.double()
    x, t, r = jumps[0].double(), *jumps[1:]
    h = student.clock.warp(t) - student.clock.warp(r)
    step = 1e-2
    with torch.no_grad():

        def at(shift):
            return student.mean_velocity_of_jump(x, t, h + shift * step)

        fourth_order = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
        difference = -expand(student.clock.dwarp_dt(r), x) * fourth_order
        assert relative(derivative_in_r(student, x, t, r), difference) < 1e-4


def test_exact_along_the_flow_is_the_reverse_mode_derivative(teacher, student, jumps):
    student.double()
    x, t, r = jumps[0].double(), *jumps[1:]
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    position, time = x.clone().requires_grad_(), t.clone().requires_grad_()
    value = (student.mean_velocity(position, time, r) * weight).sum()
    in_x, in_t = torch.autograd.grad(value, (position, time))
    forward = (derivative_along_flow(student, x, t, r, v) * weight).flatten(1).sum(1)
    torch.testing.assert_close(forward, (in_x * v).flatten(1).sum(1) + in_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["exact", "central"])
def test_gradients_pass_through_the_derivative(student, jumps, engine):
    student.double()
    x, t, r = jumps[0].double(), *jumps[1:]
    weight = student.network.jump_embedding[0].linear_2.weight
    push = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def value():
        return derivative_in_r(student, x, t, r, engine=engine).square().mean()

    (gradient,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        weight += 1e-5 * push
        above = value()
        weight -= 2e-5 * push
        below = value()
    torch.testing.assert_close((gradient * push).sum(), (above - below) / 2e-5, rtol=1e-4, atol=0)


def test_central_stays_inside_the_interval():
    """Never above t_max, where a schedule ends, and with r where it is."""
    seen = []

    class Recorder(Polynomial):
        def mean_velocity_of_jump(self, x, t, h, cond=None):
            seen.append((t.clone(), t - h))
            return super().mean_velocity_of_jump(x, t, h)

    x = torch.ones(3, 2, dtype=torch.float64)
    t, r = torch.tensor([1.0, 0.5, 1.0]).double(), torch.tensor([0.2, 0.5, 0.0]).double()
    with torch.no_grad():
        derivative = derivative_along_flow(Recorder(), x, t, r, x, engine="central")
    assert len(seen) == 2
    for time, end in seen:
        assert (time <= 1).all()
        assert (time >= t - 2.1 * TIME_STEP).all()
        torch.testing.assert_close(end, r)
    assert derivative.isfinite().all()


@pytest.mark.parametrize("of_both", [value_and_derivative_in_r, value_and_derivative_along_flow])
def test_both_sides_of_a_difference_are_one_call_where_there_is_a_graph(of_both):
    calls = []

    class Told(Polynomial):
        def mean_velocity_of_jump(self, x, t, h, cond=None):
            calls.append(len(x))
            return super().mean_velocity_of_jump(x, t, h) * expand(cond.inputs["scale"] + cond.guidance, x)

    x = torch.linspace(1, 2, 6, dtype=torch.float64).reshape(3, 2)
    t, r = torch.tensor([0.9, 0.5, 0.7]).double(), torch.tensor([0.2, 0.5, 0.1]).double()
    cond = Conditioning({"scale": torch.tensor([1.0, 2.0, 3.0])}, guidance=torch.tensor([0.5, 0.0, 0.25]))
    more = () if of_both is value_and_derivative_in_r else (torch.ones_like(x),)
    found = of_both(Told(), x, t, r, *more, cond=cond, engine="central")
    with torch.no_grad():
        expected = of_both(Told(), x, t, r, *more, cond=cond, engine="central")
    assert calls == [6, 3, 3]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, of_both(Told(), x, t, r, *more, cond=cond), rtol=1e-3, atol=1e-3)


def test_short_jumps_at_the_end_have_a_derivative():
    x = torch.ones(1, 2, dtype=torch.float64)
    t = torch.ones(1, dtype=torch.float64)
    derivative = derivative_along_flow(Polynomial(), x, t, t - 1e-6, x, engine="central")
    exact = derivative_along_flow(Polynomial(), x, t, t - 1e-6, x, engine="exact")
    torch.testing.assert_close(derivative, exact, rtol=1e-3, atol=1e-3)


def test_stock_network_has_no_forward_mode_without_the_mode(student, jumps):
    x, t, r = jumps
    h = student.clock.warp(t) - student.clock.warp(r)

    def of_jump(length):
        return student.mean_velocity_of_jump(x, t, length)

    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(of_jump, (h,), (torch.ones_like(h),))
    with StockNetworks():
        _, tangent = torch.func.jvp(of_jump, (h,), (torch.ones_like(h),))
    assert tangent.abs().max() > 0


def test_group_norm_of_a_tensor_with_channels_last():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).permute(0, 3, 1, 2)
    weight, bias = torch.rand(2, 4, dtype=torch.float64)

    def norm(x):
        return F.group_norm(x, 2, weight, bias)

    with pytest.raises(RuntimeError, match="view"):
        torch.func.jvp(norm, (x,), (x,))
    with StockNetworks():
        value, tangent = torch.func.jvp(norm, (x,), (x,))
    torch.testing.assert_close(value, norm(x))
    difference = (norm(x * (1 + 1e-5)) - norm(x * (1 - 1e-5))) / 2e-5
    torch.testing.assert_close(tangent, difference, rtol=1e-4, atol=1e-5)


def test_group_norm_keeps_the_precision_of_its_input():
    x = torch.randn(2, 4, 5).bfloat16()
    weight, bias = torch.rand(2, 4)
    with StockNetworks():
        value, tangent = torch.func.jvp(lambda x: F.group_norm(x, 2, weight=weight, bias=bias), (x,), (x,))
    assert value.dtype == tangent.dtype == torch.bfloat16


def test_value_is_that_of_the_stock_network(student, jumps):
    x, t, r = jumps
    with torch.no_grad():
        stock = student.mean_velocity(x, t, r)
        with StockNetworks():
            torch.testing.assert_close(student.mean_velocity(x, t, r), stock, rtol=1e-4, atol=1e-5)


def test_choose_exact(student, jumps):
    engine, reason = choose_engine(student, *jumps)
    assert engine == "exact"
    assert "runs" in reason


def test_choose_central_where_forward_mode_fails(jumps):
    class ReverseOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Opaque(Polynomial):
        def mean_velocity_of_jump(self, x, t, h, cond=None):
            return ReverseOnly.apply(super().mean_velocity_of_jump(x, t, h))

    engine, reason = choose_engine(Opaque(), *jumps)
    assert engine == "central"
    assert "forward mode" in reason
    assert derivative_in_r(Opaque(), *jumps, engine=engine).isfinite().all()


def test_choose_tries_what_is_trained(jumps):
    class InTraining(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Hooked(Polynomial):
        def mean_velocity_of_jump(self, x, t, h, cond=None):
            u = super().mean_velocity_of_jump(x, t, h)
            return InTraining.apply(u) if torch.is_grad_enabled() else u

    assert choose_engine(Hooked(), *jumps, with_gradient=False)[0] == "central"
    assert choose_engine(Polynomial(), *jumps, with_gradient=False)[0] == "exact"


def test_rate_of_the_clock_is_applied():
    class Fast(LinearClock):
        def warp(self, t):
            return t.square()

        def dwarp_dt(self, t):
            return 2 * t

    flow_map = Polynomial()
    flow_map.clock = Fast()
    x = torch.ones(2, 3, dtype=torch.float64)
    t, r = torch.tensor([0.9, 0.8]).double(), torch.tensor([0.4, 0.3]).double()
    expected = x * expand(-3 * (t**2 - r**2) ** 2 * 2 * r, x)
    torch.testing.assert_close(derivative_in_r(flow_map, x, t, r), expected)
    torch.testing.assert_close(derivative_in_r(flow_map, x, t, r, engine="central"), expected, rtol=1e-3, atol=1e-4)


def test_exact_gaussian_derivatives():
    truth = Gaussian(torch.zeros(2, dtype=torch.float64), 0.5)
    x = torch.ones(2, 2, dtype=torch.float64)
    t, r = torch.tensor([0.9, 0.6]).double(), torch.tensor([0.4, 0.6]).double()
    end = truth(x, t, r)
    lagrangian = truth.mean_velocity(x, t, r) - expand(t - r, x) * derivative_in_r(truth, x, t, r)
    torch.testing.assert_close(lagrangian, truth.velocity(end, r))


@pytest.mark.parametrize("engine", ["central", "exact"])
def test_differences_alone_are_without_tensor_float(engine):
    seen = []

    class Watched(Polynomial):
        def mean_velocity_of_jump(self, x, t, h, cond=None):
            seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
            return super().mean_velocity_of_jump(x, t, h, cond)

    before = (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    x, t, r = torch.ones(1, 2), torch.tensor([0.6]), torch.tensor([0.2])
    derivative_in_r(Watched(), x, t, r, engine=engine)
    derivative_along_flow(Watched(), x, t, r, x, engine=engine)
    assert set(seen) == {("ieee", "ieee") if engine == "central" else before}
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before
