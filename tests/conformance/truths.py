"""Closed-form fields for the tests of this folder, and a network that computes their posterior mean."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler
from torch import nn

from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.closed_form import Gaussian, TwoModes

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")

_IMAGE_MEAN = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(3, 4, 4)

# Name to the field and the shape of its events.
TRUTHS = {
    "gaussian-unit": (Gaussian(torch.zeros(3, dtype=torch.float64), 1.0), (3,)),
    "gaussian-narrow": (Gaussian(torch.tensor([0.7, -1.3], dtype=torch.float64), 0.2), (2,)),
    "gaussian-wide": (Gaussian(torch.tensor([2.0], dtype=torch.float64), 3.0), (1,)),
    "gaussian-image": (Gaussian(_IMAGE_MEAN, 0.5), (3, 4, 4)),
    "modes-plane": (TwoModes(torch.tensor([0.8, 0.6], dtype=torch.float64), 0.5), (2,)),
    "modes-apart": (TwoModes(torch.tensor([1.5, 0.0, -0.5], dtype=torch.float64), 0.4), (3,)),
    "modes-line": (TwoModes(torch.tensor([0.5], dtype=torch.float64), 0.7), (1,)),
}


def start(name: str, batch: int = 8, seed: int = 0, low: float = 0.05) -> tuple[FlowMap, torch.Tensor, ...]:
    """A field, points x_t of its own path and times t > r, with the interval's middle: truth, x, t, m, r."""
    truth, data, noise, t, r = samples(name, batch, seed, low)
    time = t.reshape(-1, *[1] * (data.ndim - 1))
    return truth, (1 - time) * data + time * noise, t, (t + r) / 2, r


def samples(name: str, batch: int, seed: int = 0, low: float = 0.05) -> tuple[FlowMap, torch.Tensor, ...]:
    """A field with samples of its data and noise, and times t > r: truth, data, noise, t, r."""
    truth, shape = TRUTHS[name]
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(batch, generator=generator, dtype=torch.float64)

    r = low + 0.5 * uniform()
    t = r + 0.05 + (0.95 - r) * uniform()
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    spread = torch.randn(batch, *shape, generator=generator, dtype=torch.float64) * truth.std
    if isinstance(truth, Gaussian):
        data = truth.mean + spread
    else:
        sign = torch.where(uniform() < 0.5, -1.0, 1.0)
        data = sign.unsqueeze(1) * truth.center + spread
    return truth, data, noise, t, r


class Exact(nn.Module):
    """What a perfectly trained network of this prediction type returns: the posterior mean, in closed form."""

    def __init__(self, truth: Gaussian | TwoModes, schedule: VariancePreserving, prediction: str) -> None:
        super().__init__()
        self.truth, self.schedule, self.prediction = truth, schedule, prediction

    def alpha_sigma(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The schedule at a fractional timestep, by bisection: it never saw the t that the adapter had."""
        below = timestep.long()
        low, high = self.schedule.time(below), self.schedule.time((below + 1).clamp_max(999))
        for _ in range(36):
            middle = (low + high) / 2
            above = self.schedule.timestep(middle) > timestep
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        t = (low + high) / 2
        norm = torch.hypot(1 - t, t)
        return (1 - t) / norm, t / norm

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> SimpleNamespace:
        alpha, sigma = self.alpha_sigma(timestep)
        data = self.truth.denoise(x, alpha, sigma)
        a, s = (value.reshape(-1, *[1] * (x.ndim - 1)) for value in (alpha, sigma))
        noise = (x - a * data) / s
        outputs = {"sample": data, "epsilon": noise, "v_prediction": a * noise - s * data}
        return SimpleNamespace(sample=outputs[self.prediction])


def schedule_of(beta_schedule: str) -> VariancePreserving:
    return VariancePreserving(DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod)


def exact_teacher(name: str, beta_schedule: str, prediction: str) -> Teacher:
    truth, shape = TRUTHS[name]
    schedule = schedule_of(beta_schedule)
    network = Exact(truth, schedule, prediction)
    return Teacher(network, Parametrization(schedule, prediction), shape, name, "closed form", {})
