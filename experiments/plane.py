"""The network, the teachers, the data and the two metrics of the checkerboard.

All coordinates are in units of the data's standard deviation, so that noise is N(0, I) as elsewhere in the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from fmm_distill.core.flow_map import FlowMap, LearnedFlowMap
from fmm_distill.core.solvers import solve
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.data.samples import ImageBatch
from fmm_distill.teachers.closed_form import Checkerboard

if TYPE_CHECKING:
    from collections.abc import Callable

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.velocity import VelocityField

__all__ = [
    "WIDTH",
    "Board",
    "Perceptron",
    "PlaneTeacher",
    "closed_form",
    "divergence",
    "endpoint_error",
    "sample",
    "solved",
]

HALF_WIDTH = 1 / Checkerboard.scale
WIDTH = 2 * HALF_WIDTH
# In half boards: 4.3 standard deviations of the noise.
REACH = 2.5
# Rows per network call: their activations fit into the CPU's cache.
CHUNK = 2048
# At the edges of the squares the rounding error of the closed form grows like 1/t.
CLOSED_FORM_T_MIN = 0.02


class Perceptron(LearnedFlowMap):
    """``u(x, t, h)`` by four hidden layers of GELU units (the network of arXiv 2505.18825's checkerboard).

    Inputs are x and t with sines and cosines of them, since the edges of the squares are narrow compared with the
    noise. The features of h vary slowly, because losses differentiate with respect to h, and are zero at h = 0. Their
    weights are zero initially, so that every jump begins with the velocity of the diagonal.
    """

    t_max = 1.0
    octaves = 3

    def __init__(self, seed: int, *, width: int = 512) -> None:
        super().__init__()
        self.clock = LinearClock()
        inputs = 3 * (1 + 2 * self.octaves) + 3
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = [(nn.Linear(a, b), nn.GELU()) for a, b in pairwise([inputs, *[width] * 4])]
            self.layers = nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(width, 2))
        with torch.no_grad():
            next(self.layers.parameters())[:, -3:] = 0

    def mean_velocity_of_jump(self, x: Tensor, t: Tensor, h: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return u, shape ``[batch, 2]``."""
        # Constant beyond the reach of the noise: with growing inputs, a student and a teacher that is evaluated at the
        # student's endpoints drive each other off the board (docs/results/checkerboard.md).
        point = torch.cat([(x / HALF_WIDTH).clamp(-REACH, REACH), t.to(x.dtype)[:, None]], 1)
        angles = [math.pi * 2**octave * point for octave in range(self.octaves)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        length = h.to(x.dtype)[:, None]
        jump = [length, (math.pi * length).sin(), (math.pi * length).cos() - 1]
        velocity: Tensor = self.layers(torch.cat([point, *waves, *jump], 1))
        return velocity


@dataclass
class PlaneTeacher:
    """A velocity field in the plane, with the attributes that a trainer needs of a teacher.

    Attributes:
        schedule: the times at which the field is accurate.
    """

    velocity: VelocityField
    schedule: LinearClock
    event_shape: tuple[int, ...] = (2,)
    conditions: None = None
    guidance: None = None

    def prior(self, noise: Tensor) -> Tensor:
        """Return the noise."""
        return noise

    def to(self, device: torch.device | str) -> Self:
        """Return the teacher: it has no weights to move."""
        return self


def closed_form() -> PlaneTeacher:
    """Return the exact velocity of the checkerboard."""
    board = Checkerboard()

    def velocity(x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        return HALF_WIDTH * board.velocity(x / HALF_WIDTH, t)

    return PlaneTeacher(velocity, LinearClock(CLOSED_FORM_T_MIN))


class Board:
    """The checkerboard as an infinite dataset: each uniform number is one point."""

    def pick(self, draws: Draws) -> ImageBatch:
        """Return one point per draw."""
        return ImageBatch(self.at(draws.image))

    def at(self, positions: Tensor) -> Tensor:
        """Return the points of float64 uniforms, shape ``[batch, 2]``: 3 bits for the square, 24 per coordinate."""
        square = (positions * 8).floor()
        across = (positions * 8 - square) * 2**24
        down = across - across.floor()
        row = (square / 2).floor()
        column = 2 * (square % 2) + row % 2
        within = torch.stack([across.floor() / 2**24, down], 1)
        return ((torch.stack([row, column], 1) + within) / 2 - 1).float() * HALF_WIDTH


def divergence(points: Tensor, bins: int) -> float:
    """Return the KL divergence from the board to a histogram of ``points``, in nats.

    The board is uniform on the bins whose center is in a white square (the published protocol with 50 bins). An empty
    white bin counts as one point.
    """
    index = ((points.double() / HALF_WIDTH + 1) / 2 * bins).floor()
    index = index[((index >= 0) & (index < bins)).all(1)].long()
    counts = torch.bincount(index[:, 0] * bins + index[:, 1], minlength=bins * bins)
    square = ((torch.arange(bins, dtype=torch.float64) + 0.5) / bins * 4).long()
    white = ((square[:, None] + square) % 2 == 0).flatten()
    filled = counts[white].clamp_min(1).double()
    fractions = filled / (len(points) + int((counts[white] == 0).sum()))
    return float(-(fractions * int(white.sum())).log().mean())


def endpoint_error(points: Tensor, ends: Tensor) -> float:
    """Return the root mean square difference per coordinate; a lost sample counts as a board's width away.

    Without this limit, a few samples off the board, where a short run learns nothing, would determine the value.
    """
    apart = (points - ends).square().mean(1)
    lost = ~(apart < WIDTH**2)
    return float(torch.where(lost, WIDTH**2, apart).mean().sqrt())


@torch.no_grad()
def sample(flow_map: FlowMap, noise: Tensor, steps: int) -> Tensor:
    """Return the endpoints of ``steps`` jumps of equal length from noise."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=noise.device)
    return _chunked(lambda x: _walk(flow_map, x, times), noise)


@torch.no_grad()
def solved(teacher: PlaneTeacher, noise: Tensor, steps: int) -> Tensor:
    """Return the endpoints of Heun steps of equal length down to the teacher's t_min and a straight line to data."""
    low = teacher.schedule.t_min
    times = torch.linspace(1, low, steps + 1, dtype=torch.float64, device=noise.device)

    def run(x: Tensor) -> Tensor:
        x = solve(teacher.velocity, x, times, method="heun")
        return x if low == 0 else x - low * teacher.velocity(x, times[-1].expand(len(x)))

    return _chunked(run, noise)


def _walk(flow_map: FlowMap, x: Tensor, times: Tensor) -> Tensor:
    for t, r in pairwise(times):
        x = flow_map(x, t.expand(len(x)), r.expand(len(x)))
    return x


def _chunked(run: Callable[[Tensor], Tensor], noise: Tensor) -> Tensor:
    return torch.cat([run(part) for part in noise.split(CHUNK)])
