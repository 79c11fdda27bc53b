"""Teacher data: trajectories that the teacher solves before training, stored on disk; jumps start on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.device import to_device
from fmm_distill.core.draws import draw
from fmm_distill.core.solvers import solve
from fmm_distill.core.time_axis import expand
from fmm_distill.data.row_store import Layout, Parts
from fmm_distill.data.samples import row_of
from fmm_distill.data.starting_points import draw_conditioning

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float, Int
    from torch import Tensor

    from fmm_distill.config.settings import TrajectorySettings
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.time_axis import TimeAxis
    from fmm_distill.teachers.base import Distillable

__all__ = ["Trajectories", "TrajectoryBatch", "solve_trajectories", "trajectory_layout"]


# Trajectories of a part, which is the work that a kill can lose.
_PART = 256


def trajectory_layout(folder: Path, settings: TrajectorySettings, event_shape: tuple[int, ...]) -> Layout:
    """Return the layout of trajectories: states and velocities in float32, positions of condition and guidance."""
    # 4 bytes per number, and two float64 positions per trajectory.
    return Layout(folder, settings.count, 2 * settings.points * 4 * torch.Size(event_shape).numel() + 16, _PART)


def trajectory_times(axis: TimeAxis, points: int) -> Float[Tensor, " points"]:
    """Return the times at which trajectories are stored, from t_max to t_min, equally far apart in timesteps."""
    return axis.time_at(torch.linspace(1, 0, points, dtype=torch.float64))


@torch.no_grad()
def solve_trajectories(
    teacher: Distillable,
    settings: TrajectorySettings,
    layout: Layout,
    seed: int,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Solve the trajectories that are not on disk yet, with RK4.

    Noise, condition and guidance scale are functions of the seed and of the trajectory's number.

    Args:
        batch: trajectories that are solved together.
        shard: the index of this process, and the number of processes that divide the work.
    """

    def make(number: int, start: int, stop: int) -> dict[str, Tensor]:
        # Negative steps: training counts from 0, so that no trajectory has the noise of one of its samples.
        draws = draw(seed, -1 - number, layout.size, teacher.event_shape)
        firsts = range(0, stop - start, batch)
        parts = [draws.part(first, min(first + batch, stop - start), device) for first in firsts]
        solved = [_solve(teacher, settings, part) for part in parts]
        states, velocities = (torch.cat(values).cpu() for values in zip(*solved, strict=True))
        positions = {name: getattr(draws, name)[: stop - start] for name in ("condition", "guidance")}
        return {"states": states, "velocities": velocities} | positions

    layout.fill(make, *shard)


def _solve(teacher: Distillable, settings: TrajectorySettings, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return states and velocities of trajectories, shape ``[batch, points, *event]`` each."""
    cond = draw_conditioning(teacher, draws)
    x = teacher.prior(draws.noise)
    fractions = torch.linspace(1, 0, settings.solver_steps + 1, dtype=torch.float64, device=x.device)
    times = teacher.schedule.time_at(fractions)
    # The settings make it a divisor, so that stored points are points of the solver.
    each = settings.solver_steps // (settings.points - 1)
    states, velocities = [], []
    for first in range(0, settings.solver_steps + 1, each):
        states.append(x)
        velocities.append(teacher.velocity(x, times[first].expand(len(x)), cond))
        x = solve(teacher.velocity, x, times[first : first + each + 1], cond=cond)
    return torch.stack(states, 1), torch.stack(velocities, 1)


class Trajectories:
    """Solved trajectories as data to start from.

    Args:
        layout: the layout that ``solve_trajectories`` filled.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, layout: Layout, axis: TimeAxis, points: int) -> None:
        self.parts, self.times = Parts(layout), trajectory_times(axis, points)

    def __len__(self) -> int:
        return len(self.parts)

    def pick(self, draws: Draws) -> TrajectoryBatch:
        """Return the trajectories at the positions ``draws.image``."""
        return TrajectoryBatch(self, row_of(draws.image, len(self)))

    def at(self, index: Int[Tensor, " batch"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """Return points of these trajectories at these times, by cubic Hermite interpolation.

        The two neighboring stored points have a state and a velocity, so the teacher is not called; the error is of
        fourth order in their distance (measured in ``docs/decisions.md``).
        """
        t = t.cpu().clamp(float(self.times[-1]), float(self.times[0]))
        # searchsorted needs ascending numbers, and the times descend.
        above = (torch.searchsorted(-self.times, -t, right=True) - 1).clamp(0, len(self.times) - 2)
        read = self.parts.rows
        x, y = read("states", index, above), read("states", index, above + 1)
        v, w = read("velocities", index, above), read("velocities", index, above + 1)
        length = self.times[above + 1] - self.times[above]
        s, step = expand((t - self.times[above]) / length, x), expand(length, x)
        # The cubic Hermite basis, factored: x and v belong to the upper end, y and w to the lower one.
        from_above = (1 - s).square() * ((1 + 2 * s) * x + s * step * v)
        return from_above + s.square() * ((3 - 2 * s) * y - (1 - s) * step * w)


@dataclass(frozen=True)
class TrajectoryBatch:
    """Trajectories of the samples of a batch, read when the times of the jumps are known.

    Attributes:
        index: numbers of the trajectories, shape ``[batch]``.
    """

    trajectories: Trajectories
    index: Int[Tensor, " batch"]
    images: None = None

    def with_conditions(self, draws: Draws) -> Draws:
        """Return the draws with the trajectories' own conditions and guidance scales."""
        positions = {name: self.trajectories.parts.rows(name, self.index) for name in ("condition", "guidance")}
        return replace(draws, **positions)

    def points(self, draws: Draws, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """Return the teacher's own x_t."""
        return to_device(self.trajectories.at(self.index, t), draws.noise.device)

    def rows(self, index: Int[Tensor, " some"]) -> TrajectoryBatch:
        """Return the samples at these rows."""
        return replace(self, index=self.index[index.to(self.index.device)])

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """Return the batch itself: points are read to the device of the draws."""
        return self
