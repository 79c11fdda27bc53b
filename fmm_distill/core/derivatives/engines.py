"""Derivatives of the mean velocity, exact (forward mode) or central, through stock diffusers networks.

Ask for a detached one, or call under ``torch.no_grad``: detaching afterwards keeps the tangent's whole graph alive
until the backward pass.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch.overrides import TorchFunctionMode

from fmm_distill.core.derivatives.dual import without_tangents
from fmm_distill.core.derivatives.rules import RULES
from fmm_distill.core.time_axis import expand
from fmm_distill.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap

__all__ = [
    "Engine",
    "StockNetworks",
    "choose_engine",
    "derivative_along_flow",
    "derivative_in_r",
    "value_and_derivative_along_flow",
    "value_and_derivative_in_r",
    "value_and_parts_along_flow",
    "without_tensor_float",
]

Engine = Literal["exact", "central"]

# In units of the clock. h enters through frequencies of at most 10, so this step is far above the rounding of
# float32 and far below a period.
JUMP_STEP = 2e-3
# The teacher's own embedding turns by one radian per timestep: a longer step aliases, a shorter one drowns in
# the float32 that diffusers computes the embedding in. 0.05 of 1000 timesteps: on trained networks twice that and half
# of it are both further from the exact derivative.
TIME_STEP = 5e-5
# Along the velocity alone no embedding turns: differences in float32 are nearest to exact here.
PLACE_STEP = 1e-3


class StockNetworks(TorchFunctionMode):
    """Around forward mode: layers of diffusers networks with rules of our own.

    Fused attention has no forward-mode rule; torch's own for ``group_norm`` fails on some inputs; and the others' take
    more kernels than they need (``forward_mode``).

    Args:
        detached: values have a graph, tangents have none.
    """

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 torch's protocol
        """Torch's protocol for function modes."""
        kwargs = dict(kwargs or {})
        rule = RULES.get(func)
        if rule is None:
            return func(*args, **kwargs)
        # The one name for what rules take first.
        given = (*args, kwargs.pop("input")) if "input" in kwargs else args
        return rule(func, torch.is_grad_enabled() and not self.detached, *given, **kwargs)


def derivative_in_r(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    engine: Engine = "exact",
) -> Float[Tensor, "batch *event"]:
    """The derivative of ``u(x, t, r)`` in the target time r.

    The network is differentiated in the jump's length h and the result multiplied by dh/dr: r reaches it through
    the slow embedding of h alone, where differences are exact enough; the schedule is steep near its ends.
    The central engine takes two calls, and is within 1e-3 of the exact one in float32.
    """
    h = flow_map.clock.warp(t) - flow_map.clock.warp(r)
    if engine == "exact":
        du_dh = _forward_mode(
            _of_jump(flow_map, x, t, cond),
            (h,),
            (torch.ones_like(h),),
            functional=flow_map.needs_functional_jvp,
        )[1]
    else:
        du_dh = _mean_and_difference(_beside_jump(flow_map, x, t, h, cond))[1] / JUMP_STEP
    return -expand(flow_map.clock.dwarp_dt(r), x) * du_dh


def value_and_derivative_in_r(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    engine: Engine = "exact",
    detached: bool = False,
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
    """``u(x, t, r)`` and ``derivative_in_r``.

    The exact engine takes one pass. The central one takes two calls, with a graph in one of twice the samples; its
    value is their mean, as near to u as the difference is to the derivative.

    Args:
        detached: the derivative has no gradient. Of the central engine's two calls the later has a graph then: the
            value's gradient is that of a jump longer by 2e-3 of the clock. In half precision, where derivatives stay
            in float32, and for the exact engine where a call leaves hooks (``needs_functional_jvp``), the value has a call of
            its own.
    """
    if detached and _apart(flow_map, x, engine):
        with torch.no_grad():
            du_dr = derivative_in_r(flow_map, x, t, r, cond=cond, engine=engine)
        return flow_map.mean_velocity(x, t, r, cond), du_dr
    h = flow_map.clock.warp(t) - flow_map.clock.warp(r)
    if engine == "exact":
        of_jump = _of_jump(flow_map, x, t, cond)
        along = (torch.ones_like(h),)
        u, du_dh = _forward_mode(of_jump, (h,), along, detached=detached, functional=flow_map.needs_functional_jvp)
    else:
        u, difference = _mean_and_difference(_beside_jump(flow_map, x, t, h, cond), detached=detached)
        du_dh = difference / JUMP_STEP
    return u, -expand(flow_map.clock.dwarp_dt(r), x) * du_dh


def _of_jump(flow_map: FlowMap, x: Tensor, t: Tensor, cond: Conditioning | None) -> Callable[[Tensor], Tensor]:
    """U as a function of the jump's length."""
    return lambda h: flow_map.mean_velocity_of_jump(x, t, h, cond)


def _beside_jump(flow_map: FlowMap, x: Tensor, t: Tensor, h: Tensor, cond: Conditioning | None) -> _Beside:
    """A shorter and a longer jump."""
    return _Beside(flow_map.mean_velocity_of_jump, lambda side: (x, t, h + side * JUMP_STEP), cond)


def derivative_along_flow(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    v: Float[Tensor, "batch *event"],
    *,
    cond: Conditioning | None = None,
    engine: Engine = "exact",
) -> Float[Tensor, "batch *event"]:
    """The derivative ``d_t u + grad u . v`` of ``u(x, t, r)`` along the flow with velocity v, r fixed.

    The central engine takes two calls, a twentieth of a timestep of 1000 before and after; where that would pass t_max,
    around the point of the flow so far before t_max. It is within about 1 % in float32, while the exact one is accurate
    to rounding.
    """
    if engine == "exact":
        along = _along(flow_map, r, cond)
        return _forward_mode(along, (x, t), (v, torch.ones_like(t)), functional=flow_map.needs_functional_jvp)[1]
    beside, step = _beside_point(flow_map, x, t, r, v, cond)
    return _mean_and_difference(beside)[1] / step


def _beside_point(
    flow_map: FlowMap, x: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Conditioning | None
) -> tuple[_Beside, Tensor]:
    """A step before and after a point of the flow; and the step, to be divided by."""
    step = TIME_STEP / flow_map.clock.dwarp_dt(t)
    # A schedule ends at t_max.
    moved = torch.minimum(flow_map.t_max - step - t, torch.zeros_like(t))

    def at(side: int) -> tuple[Tensor, Tensor, Tensor]:
        change = moved + side * step
        return x + expand(change, x) * v, t + change, r

    return _Beside(flow_map.mean_velocity, at, cond), expand(step, x)


class _Beside(NamedTuple):
    """Two calls of a map whose difference is wanted.

    Attributes:
        call: the map, of these three numbers a sample and a condition.
        at: the three on side -1 and on side 1.
    """

    call: Callable[..., Tensor]
    at: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    cond: Conditioning | None

    def alone(self, side: int) -> Tensor:
        """The call of one side."""
        return self.call(*self.at(side), self.cond)

    def together(self) -> tuple[Tensor, Tensor]:
        """Both in one call, whose gradient is one for every weight, and not two to be added."""
        cond = None if self.cond is None else self.cond.twice()
        before, after = self.call(*map(torch.cat, zip(self.at(-1), self.at(1), strict=True)), cond).chunk(2)
        return before, after


def _mean_and_difference(beside: _Beside, *, detached: bool = False) -> tuple[Tensor, Tensor]:
    """Half of the sum and half of the difference of the calls for sides 1 and -1, in float32 at least.

    Detached, the difference has no gradient, and the mean has the gradient of side 1.
    """
    with _precise(beside.at(1)[0]), without_tensor_float():
        if torch.is_grad_enabled() and not detached:
            before, after = beside.together()
        else:
            # The one without a graph first: what it holds on the way is gone before there is a graph.
            with torch.no_grad():
                before = beside.alone(-1)
            after = beside.alone(1)
    difference = (after - before) / 2
    if detached:
        difference = difference.detach()
    return after - difference, difference


def value_and_derivative_along_flow(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    v: Float[Tensor, "batch *event"],
    *,
    cond: Conditioning | None = None,
    engine: Engine = "exact",
    detached: bool = False,
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
    """``u(x, t, r)`` and ``derivative_along_flow``, as ``value_and_derivative_in_r`` has them.

    Args:
        detached: the derivative has no gradient; the central engine's value has that of a start a twentieth of a
            timestep on.
    """
    if detached and _apart(flow_map, x, engine):
        with torch.no_grad():
            du = derivative_along_flow(flow_map, x, t, r, v, cond=cond, engine=engine)
        return flow_map.mean_velocity(x, t, r, cond), du
    if engine == "exact":
        along = _along(flow_map, r, cond)
        return _forward_mode(along, (x, t), (v, torch.ones_like(t)), detached=detached, functional=needs_functional_jvp)
    beside, step = _beside_point(flow_map, x, t, r, v, cond)
    u, difference = _mean_and_difference(beside, detached=detached)
    return u, difference / step


def value_and_parts_along_flow(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    v: Float[Tensor, "batch *event"],
    *,
    cond: Conditioning | None = None,
    engine: Engine = "exact",
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch *event"], Float[Tensor, "batch *event"]]:
    """``u(x, t, r)``, ``d_t u``, and without a graph ``grad u . v``.

    The central engine takes a third point, for a difference to one side in x, where no embedding is: on two
    trained networks 1e-3 from the exact part.
    """
    if engine == "exact":
        with torch.no_grad():
            transport = _forward_mode(lambda y: flow_map.mean_velocity(y, t, r, cond), (x,), (v,))[1]
        in_t = (torch.ones_like(t),)
        u, du_dt = _forward_mode(
            lambda s: flow_map.mean_velocity(x, s, r, cond),
            (t,),
            in_t,
            functional=flow_map.needs_functional_jvp,
        )
        return u, du_dt, transport
    beside, step = _beside_point(flow_map, x, t, r, torch.zeros_like(x), cond)
    aside = PLACE_STEP / TIME_STEP * step
    # Before there is a graph.
    with torch.no_grad(), _precise(x), without_tensor_float():
        there = _beside_point(flow_map, x + aside * v, t, r, torch.zeros_like(x), cond)[0].alone(1)
    u, difference = _mean_and_difference(beside)
    return u, difference / step, (there - (u + difference).detach()) / aside


def _along(flow_map: FlowMap, r: Tensor, cond: Conditioning | None) -> Callable[[Tensor, Tensor], Tensor]:
    """U as a function of where a jump to r starts."""
    return lambda x, t: flow_map.mean_velocity(x, t, r, cond)


def _precise(like: Tensor) -> torch.autocast:
    """Autocast off: in half precision a tangent loses two digits, and a difference is noise."""
    return torch.autocast(like.device.type, enabled=False)


def _apart(flow_map: FlowMap, like: Tensor, engine: Engine) -> bool:
    """Whether a detached derivative takes a pass of its own.

    It does where calls are in half precision, since it stays in float32, and in forward mode where a call with a graph
    leaves hooks that have no rule.
    """
    return torch.is_autocast_enabled(like.device.type) or (engine == "exact" and flow_map.needs_functional_jvp)


@contextlib.contextmanager
def without_tensor_float() -> Iterator[None]:
    """TensorFloat-32 off: its 11 bits, the default of convolutions on a GPU, leave a small difference no digits.

    The backward pass of a difference is one, too. Forward mode takes no difference and may have it.
    """
    # torch 2.8 has the older switches alone; later ones refuse to read those beside the newer.
    switch, off = ("fp32_precision", "ieee") if hasattr(torch.backends.cudnn, "conv") else ("allow_tf32", False)
    convolutions: Any = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    places: tuple[Any, ...] = (convolutions, torch.backends.cuda.matmul)
    before = [getattr(place, switch) for place in places]
    try:
        for place in places:
            setattr(place, switch, off)
        yield
    finally:
        for place, setting in zip(places, before, strict=True):
            setattr(place, switch, setting)


def _forward_mode(
    function: Callable[..., Tensor],
    at: tuple[Tensor, ...],
    along: tuple[Tensor, ...],
    *,
    detached: bool = False,
    functional: bool = False,
) -> tuple[Tensor, Tensor]:
    """Value and directional derivative, which may be one without a graph.

    Raises:
        RuntimeError: in ``torch.inference_mode``, where tangents vanish without a word.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("forward mode does not run in torch.inference_mode; wanted torch.no_grad")
    # What is compiled has no tangent; where no graph is kept, not even an error.
    plain = torch.compiler.set_stance("force_eager")
    if functional and torch.is_grad_enabled():
        with plain, StockNetworks(), _precise(at[0]):
            return torch.func.jvp(function, at, along)[:2]
    # Not torch.func.jvp: it wraps every tensor, a sixth of the time of a step.
    saved = without_tangents() if detached else contextlib.nullcontext()
    with plain, StockNetworks(detached=detached), _precise(at[0]), forward_ad.dual_level(), saved:
        duals = [forward_ad.make_dual(point, direction) for point, direction in zip(at, along, strict=True)]
        value, derivative = forward_ad.unpack_dual(function(*duals))
    if derivative is None:
        derivative = torch.zeros_like(value)
    return value, derivative.detach() if detached else derivative


def choose_engine(
    flow_map: FlowMap,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    cond: Conditioning | None = None,
    *,
    with_gradient: bool = True,
) -> tuple[Engine, str]:
    """``exact`` where forward mode runs through this map, else ``central``; and the reason.

    Leaves gradients behind on the map's parameters.

    Args:
        with_gradient: of the derivative; without it, only the value's has to run beside it.
    """
    detached = not with_gradient
    try:
        found = [
            *value_and_derivative_in_r(flow_map, x, t, r, cond=cond, detached=detached),
            *value_and_derivative_along_flow(flow_map, x, t, r, x, cond=cond, detached=detached),
        ]
        loss = torch.stack([part.square().sum() for part in found]).sum()
        if loss.requires_grad:
            loss.backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return "central", f"forward mode does not run through this network ({first_line(error)})"
    return "exact", "forward mode runs through this network"
