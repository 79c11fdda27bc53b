"""What the checkerboard benchmark is made of: the perceptron, the teachers, the data and the two yardsticks.

Everything is in units of the data's standard deviation, so that noise is N(0, I) as the package draws it.
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
from fmm_distill.teachers.checkerboard import Checkerboard

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
# Half boards; 4.3 standard deviations of the noise.
REACH = 2.5
# Rows at a time: the activations of this many stay in the processor's cache.
CHUNK = 2048
# The closed form's rounding grows like 1/t at the squares' edges.
CLOSED_FORM_T_MIN = 0.02


class Perceptron(LearnedFlowMap):
    """``u(x, t, h)`` by four hidden layers of GELU units (the network of arXiv 2505.18825's checkerboard).

    It is told sines and cosines of x and t beside the numbers themselves: the squares' edges are narrow beside the
    noise. What it is told of h is slow, as a derivative in h stands in the losses, and zero at h = 0; its weights are
    zero at first, so that every jump begins with the diagonal's velocity.
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
        """u, shape ``[batch, 2]``."""
        # Beyond what noise reaches it stays constant: were it to grow there, a student and a teacher that is asked at
        # the student's own ends would drive each other away, and did (docs/results/checkerboard.md).
        place = torch.cat([(x / HALF_WIDTH).clamp(-REACH, REACH), t.to(x.dtype)[:, None]], 1)
        angles = [math.pi * 2**octave * place for octave in range(self.octaves)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        length = h.to(x.dtype)[:, None]
        jump = [length, (math.pi * length).sin(), (math.pi * length).cos() - 1]
        velocity: Tensor = self.layers(torch.cat([place, *waves, *jump], 1))
        return velocity


@dataclass
class PlaneTeacher:
    """A velocity field on the plane, as a trainer wants it.

    Attributes:
        velocity: the field.
        schedule: the times that it is good for.
    """

    velocity: VelocityField
    schedule: LinearClock
    event_shape: tuple[int, ...] = (2,)
    conditions: None = None
    guidance: None = None

    def prior(self, noise: Tensor) -> Tensor:
        """The noise itself."""
        return noise

    def to(self, device: torch.device | str) -> Self:
        """Itself: the plane stays on the processor."""
        return self


def closed_form() -> PlaneTeacher:
    """The checkerboard's own velocity."""
    board = Checkerboard()

    def velocity(x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        return HALF_WIDTH * board.velocity(x / HALF_WIDTH, t)

    return PlaneTeacher(velocity, LinearClock(CLOSED_FORM_T_MIN))


class Board:
    """The checkerboard as a dataset without end: the places of one uniform each become a point."""

    def pick(self, draws: Draws) -> ImageBatch:
        """The points at the samples' places."""
        return ImageBatch(self.at(draws.image))

    def at(self, places: Tensor) -> Tensor:
        """Points at float64 uniforms, shape ``[batch, 2]``: 3 bits say which square, 24 each where in it."""
        square = (places * 8).floor()
        across = (places * 8 - square) * 2**24
        down = across - across.floor()
        row = (square / 2).floor()
        column = 2 * (square % 2) + row % 2
        within = torch.stack([across.floor() / 2**24, down], 1)
        return ((torch.stack([row, column], 1) + within) / 2 - 1).float() * HALF_WIDTH


def divergence(points: Tensor, bins: int) -> float:
    """KL divergence from the board to a histogram of ``points``, in nats.

    The board is uniform on the bins whose center lies on a white square (the published protocol with 50 bins). A white
    bin without a point counts as if it had one.
    """
    place = ((points.double() / HALF_WIDTH + 1) / 2 * bins).floor()
    place = place[((place >= 0) & (place < bins)).all(1)].long()
    counts = torch.bincount(place[:, 0] * bins + place[:, 1], minlength=bins * bins)
    square = ((torch.arange(bins, dtype=torch.float64) + 0.5) / bins * 4).long()
    white = ((square[:, None] + square) % 2 == 0).flatten()
    filled = counts[white].clamp_min(1).double()
    share = filled / (len(points) + int((counts[white] == 0).sum()))
    return float(-(share * int(white.sum())).log().mean())


def endpoint_error(points: Tensor, ends: Tensor) -> float:
    """Root mean square difference per coordinate; a sample that is lost counts as one a board's width away.

    Without that limit a few samples off the board, where a short run has learned nothing, are the whole figure.
    """
    apart = (points - ends).square().mean(1)
    lost = ~(apart < WIDTH**2)
    return float(torch.where(lost, WIDTH**2, apart).mean().sqrt())


@torch.no_grad()
def sample(flow_map: FlowMap, noise: Tensor, steps: int) -> Tensor:
    """Where ``steps`` jumps, equal in time, take noise."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=noise.device)
    return _chunked(lambda x: _walk(flow_map, x, times), noise)


@torch.no_grad()
def solved(teacher: PlaneTeacher, noise: Tensor, steps: int) -> Tensor:
    """Where Heun steps, equal in time down to the teacher's t_min, and a straight last stretch to data take noise."""
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
