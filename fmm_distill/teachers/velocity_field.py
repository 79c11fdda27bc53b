"""A velocity field of any origin as a teacher: a closed form, a simulator, a network that predicts the velocity itself.

Flow map matching distills any velocity field that is known, not pipelines alone (Boffi et al. 2024, arXiv 2406.07507).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import nn

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.core.time_axis import TimeAxis

__all__ = ["KnownVelocity", "OwnAxis", "VelocityNetwork", "VelocityParametrization", "as_teacher"]

# Halvings of an interval of length 1: the last is below the spacing of float64.
_HALVINGS = 60


@runtime_checkable
class KnownVelocity(Protocol):
    """Any object with a velocity, which ``distill(teacher=...)`` takes.

    Attributes:
        event_shape: shape of one sample.

    It may have a ``schedule`` (with ``t_min``, ``t_max``, ``warp(t)`` and ``dwarp_dt(t)``; none: that of flow matching
    on [0.001, 1]) and ``conditions``, as a ``Teacher`` has them.
    """

    event_shape: tuple[int, ...]

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Return ``v(x, t) = E[eps - x_0 | x_t = x]``; t is float64, 1 at noise and 0 at data."""
        ...


class OwnAxis(FlowMatching):
    """The straight path ``x_t = (1 - t) x_0 + t eps`` on a time axis of the user's own.

    Args:
        axis: has the ends ``t_min`` and ``t_max`` and the variable ``warp(t)`` in which jumps are measured, with its
            derivative ``dwarp_dt(t)``. With a ``time_at`` of its own, that chooses the times of the training.
    """

    def __init__(self, axis: TimeAxis) -> None:
        super().__init__()
        self.axis, self.t_min, self.t_max = axis, float(axis.t_min), float(axis.t_max)

    def time_at(self, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time at a progress from 0 (t_min) to 1 (t_max), in equal steps of ``warp``."""
        if hasattr(self.axis, "time_at"):
            return self.axis.time_at(progress.double())
        return self._between(self.t_min, progress.double())

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the variable in which jumps are measured."""
        return self.axis.warp(t.double())

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the derivative of ``warp``."""
        return self.axis.dwarp_dt(t.double())

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``1000 t``, the timesteps that stock networks are built for."""
        return t.double().clamp_min(self.t_min) * self.num_timesteps

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return ``steps + 1`` times from t_max down to 0, equal steps of ``warp``."""
        # For its check of the number of steps alone.
        super().grid(steps)
        return self._between(0.0, torch.arange(steps, -1, -1, dtype=torch.float64) / steps)

    def _between(self, start: float, fraction: Tensor) -> Tensor:
        """Return the times at fractions of the way from ``start`` to t_max, measured by ``warp``; by bisection."""
        ends = self.warp(torch.tensor([start, self.t_max], dtype=torch.float64, device=fraction.device))
        level = ends[0] + (ends[1] - ends[0]) * fraction
        low, high = torch.full_like(level, start), torch.full_like(level, self.t_max)
        # Bisection needs nothing but an increasing ``warp``: an inverse is not part of the interface.
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = self.warp(middle) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        # The ends themselves are exact: a last jump that stops short of data would leave noise.
        return torch.where(fraction <= 0, start, torch.where(fraction >= 1, self.t_max, (low + high) / 2))


class VelocityNetwork(nn.Module):
    """A velocity field as a module, so that its calls can be counted and it moves between devices."""

    def __init__(self, field: KnownVelocity) -> None:
        super().__init__()
        self.field = field

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Return the velocity at x and t."""
        return self.field.velocity(x, t) if cond is None else self.field.velocity(x, t, cond)

    def to(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 torch's own
        """Move the field too, where it has a ``to`` of its own."""
        if not isinstance(self.field, nn.Module) and hasattr(self.field, "to"):
            self.field = cast("Any", self.field).to(*args, **kwargs)
        return super().to(*args, **kwargs)


class VelocityParametrization(Parametrization):
    """The parametrization of a module that returns the velocity itself.

    A teacher's module is called as ``module(x, t, cond)``, a student's as ``module(x, t, h, cond)``. Time reaches it as
    float64 on the axis, where a stock network gets its own timestep in float32.
    """

    def velocity(
        self,
        network: nn.Module,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
        h: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return the velocity at x and t (of the jump of length h), in the dtype of x."""
        velocity: Tensor = network(x, t, cond) if h is None else network(x, t, h, cond)
        # A closed form in float64 must not change the dtype of the samples.
        return velocity.to(x.dtype)


def as_teacher(field: Teacher | KnownVelocity) -> Teacher:
    """Return an object with a velocity as a teacher; a ``Teacher`` is returned frozen and in evaluation mode.

    Raises:
        UserError: if it lacks ``velocity`` or ``event_shape``, or its first call gives another shape or no finite
            numbers.
    """
    if isinstance(field, Teacher):
        field.network.requires_grad_(False).eval()
        return field
    missing = [name for name in ("velocity", "event_shape") if not hasattr(field, name)]
    if missing:
        raise UserError(
            f"teacher: expected a Teacher, or an object with velocity(x, t, cond=None) and event_shape; got "
            f"{type(field).__name__} without {' and '.join(missing)}"
        )
    schedule = _schedule_of(getattr(field, "schedule", None), type(field).__name__)
    teacher = Teacher(
        network=VelocityNetwork(field).requires_grad_(False).eval(),
        parametrization=VelocityParametrization(schedule, "flow_prediction"),
        event_shape=tuple(field.event_shape),
        source=f"{type(field).__module__}.{type(field).__qualname__}",
        adapter="a velocity field",
        scheduler_config={},
        conditions=getattr(field, "conditions", None),
    )
    _check_velocity(teacher)
    return teacher


def _schedule_of(axis: Any, name: str) -> Schedule:  # noqa: ANN401 whatever the user gave
    if axis is None:
        return FlowMatching()
    # A schedule of this package, or one with all of its methods.
    if all(hasattr(axis, attribute) for attribute in ("network_time", "alpha_sigma", "grid")):
        return cast("Schedule", axis)
    missing = [key for key in ("t_min", "t_max", "warp", "dwarp_dt") if not hasattr(axis, key)]
    if missing:
        raise UserError(
            f"teacher: expected a schedule with t_min, t_max, warp and dwarp_dt, got {type(axis).__name__} of {name} "
            f"without {', '.join(missing)}; leave it out for t in [0.001, 1]"
        )
    return OwnAxis(axis)


@torch.no_grad()
def _check_velocity(teacher: Teacher) -> None:
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.5, 1.0], dtype=torch.float64))
    cond = teacher.conditioned_on(torch.tensor([0.0, 0.5], dtype=torch.float64))
    device = next(iter(teacher.network.parameters()), x).device
    v = teacher.velocity(x.to(device), t.to(device), None if cond is None else cond.to(device))
    if v.shape != x.shape:
        raise UserError(
            f"{teacher.source}: expected a velocity of shape {tuple(x.shape)} at samples of that shape, got "
            f"{tuple(v.shape)}; its event_shape is {teacher.event_shape}"
        )
    if not v.isfinite().all():
        raise UserError(
            f"{teacher.source}: its velocity is not finite at t = {t.tolist()}; expected finite numbers on its "
            "time axis"
        )
