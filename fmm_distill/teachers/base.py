"""What the rest of the package knows of a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import torch

from fmm_distill.errors import UserError
from fmm_distill.interpolant import expand, velocity_from_prediction

if TYPE_CHECKING:
    import diffusers
    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.interpolant import Prediction, Schedule, TimeAxis
    from fmm_distill.velocity import Conditioning

__all__ = ["Distillable", "Teacher"]


class Distillable(Protocol):
    """What training needs of a teacher, wherever it comes from.

    Attributes:
        event_shape: shape of one sample.
    """

    event_shape: tuple[int, ...]

    @property
    def schedule(self) -> TimeAxis:
        """The times that it is trained on."""
        ...

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Its velocity at x and t."""
        ...

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Where sampling starts, at t_max, from N(0, I)."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same teacher on ``device``."""
        ...


@dataclass
class Teacher:
    """A network and its schedule as a velocity field; what it is and where it comes from.

    Attributes:
        network: ``network(x_teacher, timestep).sample`` is the prediction; frozen, in evaluation mode.
        schedule: its variance-preserving schedule.
        prediction: what the network predicts.
        event_shape: shape of one sample, (channels, height, width).
        source: the id or folder that it was loaded from.
        revision: the commit on the Hub, where it comes from there.
        licence: as its model card says, where it says so.
        scheduler_config: the configuration of its diffusers scheduler.
        adapter: the name of the rule that opened it.
    """

    network: nn.Module
    schedule: Schedule
    prediction: Prediction
    event_shape: tuple[int, ...]
    source: str
    adapter: str
    scheduler_config: dict[str, Any]
    revision: str | None = None
    licence: str | None = None

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """``v(x, t)`` for t in [t_min, t_max]; below t_min the network is told timestep 0."""
        if cond is not None:
            raise UserError(f"{self.source} is unconditional, but a condition came: pass none")
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_teacher = expand(alpha + sigma, x) * x
        precise = torch.promote_types(x.dtype, torch.float32)
        timestep = self.schedule.timestep(t).clamp_min(0).to(precise)
        output = self.network(x_teacher, timestep).sample.to(x.dtype)
        return velocity_from_prediction(self.prediction, output, x_teacher, alpha, sigma)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of its diffusers network."""
        return dict(cast("diffusers.ModelMixin", self.network).config)

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Where sampling starts, at t_max: the teacher's own x_T ~ N(0, I), in the coordinates of the axis."""
        t = torch.full((len(noise),), self.schedule.t_max, dtype=torch.float64, device=noise.device)
        return noise / expand(self.schedule.scale(t), noise)

    def to(self, device: torch.device | str) -> Self:
        """The same teacher with its network on ``device``."""
        self.network.to(device)
        return self
