"""From what a network says to a velocity: the schedule, the prediction, and how the network is called.

Teacher and student share it, so a student that says what its teacher says has its teacher's velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.core.time_axis import expand, velocity_from_prediction

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.core.time_axis import Prediction

__all__ = ["Call", "Parametrization", "call_stock", "keywords"]


class Call(Protocol):
    """How a network is asked for its prediction."""

    def __call__(
        self,
        network: nn.Module,
        x: Float[Tensor, "batch *event"],
        time: Float[Tensor, " batch"],
        cond: Conditioning | None,
        h: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch *event"]:
        """The prediction at x (teacher's coordinates); a stock network is never given h."""
        ...


def keywords(cond: Conditioning | None, h: Tensor | None) -> dict[str, Any]:
    """A condition and the jump's length as keywords of a call, dots led into dictionaries.

    The scale of guidance goes with the length: a stock network is told neither.
    """
    given: dict[str, Any] = {} if h is None else {"h": h}
    if cond is None:
        return given
    if h is not None and cond.guidance is not None:
        given["w"] = cond.guidance.to(h)
    given |= {name: dict(value) if isinstance(value, dict) else value for name, value in cond.shared.items()}
    for name, rows in cond.inputs.items():
        *groups, last = name.split(".")
        place = given
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = rows
    return given


def call_stock(network: nn.Module, x: Tensor, time: Tensor, cond: Conditioning | None, h: Tensor | None) -> Tensor:
    """``network(x, time, **condition).sample``; channels beyond those of x are a learned variance and left out."""
    output: Tensor = network(x, time, **keywords(cond, h)).sample
    return output[:, : x.shape[1]]


@dataclass(frozen=True)
class Parametrization:
    """A network's output as a velocity on the time axis.

    Attributes:
        sigma_data: of the preconditioning of Karras et al. 2022 (arXiv 2206.00364, table 1), where the teacher has it:
            the network's input is scaled by c_in, its output by c_out, and c_skip x added.
    """

    schedule: Schedule
    prediction: Prediction
    call: Call = call_stock
    sigma_data: float | None = None

    def velocity(
        self,
        network: nn.Module,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
        h: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """The velocity at x and t (of the jump of length h, from a two-time network)."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_teacher = expand(alpha + sigma, x) * x
        # Times are never cast below float32: 999 is 1000 in bfloat16.
        precise = torch.promote_types(x.dtype, torch.float32)
        time = self.schedule.network_time(t).to(precise)
        h = None if h is None else h.to(precise)
        if self.sigma_data is None:
            output = self.call(network, x_teacher, time, cond, h).to(x.dtype)
            return velocity_from_prediction(self.prediction, output, x_teacher, alpha, sigma)
        spread = (sigma.square() + self.sigma_data**2).sqrt()
        output = self.call(network, x_teacher / expand(spread, x), time, cond, h).to(x.dtype)
        gain = sigma * self.sigma_data / spread * (-1 if self.prediction == "v_prediction" else 1)
        sample = expand(gain, x) * output + expand((self.sigma_data / spread).square(), x) * x_teacher
        return velocity_from_prediction("sample", sample, x_teacher, alpha, sigma)

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """The teacher's own start at t_max, in the coordinates of the axis.

        Its x_T is N(0, I) where variance is preserved, though sigma is a little below 1 there; else sigma_max N(0, I).
        """
        t = torch.full((len(noise),), self.schedule.t_max, dtype=torch.float64, device=noise.device)
        alpha, sigma = self.schedule.alpha_sigma(t)
        start = torch.ones_like(sigma) if isinstance(self.schedule, VariancePreserving) else sigma
        return noise * expand(start / (alpha + sigma), noise)
