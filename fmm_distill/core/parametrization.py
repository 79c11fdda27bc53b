"""The velocity of a network: its schedule, its prediction, and how it is called.

Teacher and student share it: with the same output, they have the same velocity.
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
    """The call of a network."""

    def __call__(
        self,
        network: nn.Module,
        x: Float[Tensor, "batch *event"],
        time: Float[Tensor, " batch"],
        cond: Conditioning | None,
        h: Float[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch *event"]:
        """Return the prediction at x.

        Args:
            x: in the teacher's coordinates.
            time: the network's time, shape ``[batch]``.
            h: lengths of the jumps, shape ``[batch]``; None: a stock network, which has no such input.
        """
        ...


def keywords(cond: Conditioning | None, h: Tensor | None) -> dict[str, Any]:
    """Return conditions and the length of the jump as keywords of a network's call.

    A name with a dot becomes an entry of a nested dictionary, of inputs and shared values alike. The guidance scale is
    passed with the length only: a stock network has neither input.
    """
    arguments: dict[str, Any] = {} if h is None else {"h": h}
    if cond is None:
        return arguments
    if h is not None and cond.guidance is not None:
        arguments["w"] = cond.guidance.to(h)
    # Copies of the dictionaries: entries are added to them.
    shared = {name: dict(value) if isinstance(value, dict) else value for name, value in cond.shared.items()}
    for name, value in (*shared.items(), *cond.inputs.items()):
        *groups, last = name.split(".")
        target = arguments
        for group in groups:
            target = target.setdefault(group, {})
        target[last] = value
    return arguments


def call_stock(network: nn.Module, x: Tensor, time: Tensor, cond: Conditioning | None, h: Tensor | None) -> Tensor:
    """Return ``network(x, time, **conditions).sample``, without the channels of a learned variance."""
    # Networks with a learned variance return it in further channels after the prediction.
    output: Tensor = network(x, time, **keywords(cond, h)).sample
    return output[:, : x.shape[1]]


@dataclass(frozen=True)
class Parametrization:
    """A network's output as a velocity on the time axis.

    Attributes:
        call: calls the network; ``call_stock`` for most.
        sigma_data: of the preconditioning of Karras et al. 2022 (arXiv 2206.00364, table 1): the network's input is
            scaled by c_in, its output by c_out, and c_skip x is added; None: no preconditioning.
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
        """Return the velocity at x and t, shape ``[batch, *event]``.

        Args:
            h: lengths of the jumps from t, for a two-time network; the result is then the mean velocity.
        """
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_teacher = expand(alpha + sigma, x) * x
        # Times are never cast below float32: in bfloat16, 999 is 1000.
        precise = torch.promote_types(x.dtype, torch.float32)
        time = self.schedule.network_time(t).to(precise)
        h = None if h is None else h.to(precise)
        if self.sigma_data is None:
            # A half-precision output is cast first: the division by a small alpha or sigma needs the digits of x.
            output = self.call(network, x_teacher, time, cond, h).to(x.dtype)
            return velocity_from_prediction(self.prediction, output, x_teacher, alpha, sigma)
        # The standard deviation of the teacher's x for data with deviation sigma_data.
        spread = (sigma.square() + self.sigma_data**2).sqrt()
        output = self.call(network, x_teacher / expand(spread, x), time, cond, h).to(x.dtype)
        # The EDM schedulers of diffusers have c_out of the opposite sign for v_prediction.
        gain = sigma * self.sigma_data / spread * (-1 if self.prediction == "v_prediction" else 1)
        sample = expand(gain, x) * output + expand((self.sigma_data / spread).square(), x) * x_teacher
        return velocity_from_prediction("sample", sample, x_teacher, alpha, sigma)

    def prior(self, noise: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return the start of sampling at t_max, in the coordinates of the time axis.

        It is N(0, I) for a variance-preserving teacher, although its last sigma is slightly below 1, since stock
        samplers start there; else ``sigma_max N(0, I)``.

        Args:
            noise: N(0, I).
        """
        t = torch.full((len(noise),), self.schedule.t_max, dtype=torch.float64, device=noise.device)
        alpha, sigma = self.schedule.alpha_sigma(t)
        # Sigma itself would be a start that no stock sampler uses: they draw N(0, I) for this kind of schedule.
        start = torch.ones_like(sigma) if isinstance(self.schedule, VariancePreserving) else sigma
        return noise * expand(start / (alpha + sigma), noise)
