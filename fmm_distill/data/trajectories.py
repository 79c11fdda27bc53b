"""Teacher data: trajectories that the teacher solves before training, kept on disk; jumps start from points on them."""

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
from fmm_distill.data.starting_points import condition_of

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float, Int
    from torch import Tensor

    from fmm_distill.config.settings import TrajectorySettings
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.time_axis import TimeAxis
    from fmm_distill.teachers.base import Distillable

__all__ = ["PickedPoints", "Trajectories", "solve_trajectories", "trajectory_layout"]


_PART = 256


def trajectory_layout(folder: Path, settings: TrajectorySettings, event_shape: tuple[int, ...]) -> Layout:
    """Where trajectories stand in a folder: states and velocities in float32, places of condition and guidance."""
    return Layout(folder, settings.count, 2 * settings.points * 4 * torch.Size(event_shape).numel() + 16, _PART)


def trajectory_times(axis: TimeAxis, points: int) -> Float[Tensor, " points"]:
    """The times at which trajectories are kept, from t_max down to t_min, equally far apart in timesteps."""
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
    process: int = 0,
    processes: int = 1,
) -> None:
    """Solve the trajectories that are not on the disk yet, with RK4.

    Noise, condition and scale of guidance are functions of the seed and of the trajectory's number.

    Args:
        batch: trajectories at a time.
    """

    def make(number: int, start: int, stop: int) -> dict[str, Tensor]:
        # Steps of the training count from 0: no trajectory has the noise of one of its samples.
        draws = draw(seed, -1 - number, layout.size, teacher.event_shape)
        firsts = range(0, stop - start, batch)
        parts = [draws.part(first, min(first + batch, stop - start), device) for first in firsts]
        solved = [_solve(teacher, settings, part) for part in parts]
        states, velocities = (torch.cat(values).cpu() for values in zip(*solved, strict=True))
        places = {name: getattr(draws, name)[: stop - start] for name in ("condition", "guidance")}
        return {"states": states, "velocities": velocities} | places

    layout.fill(make, process, processes)


def _solve(teacher: Distillable, settings: TrajectorySettings, draws: Draws) -> tuple[Tensor, Tensor]:
    """States and velocities of some trajectories, shape ``[batch, points, *event]`` each."""
    cond = condition_of(teacher, draws)
    x = teacher.prior(draws.noise)
    shares = torch.linspace(1, 0, settings.solver_steps + 1, dtype=torch.float64, device=x.device)
    times = teacher.schedule.time_at(shares)
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
        layout: where ``solve_trajectories`` wrote them.

    Raises:
        UserError: if a part is missing or damaged.
    """

    def __init__(self, layout: Layout, axis: TimeAxis, points: int) -> None:
        self.parts, self.times = Parts(layout), trajectory_times(axis, points)

    def __len__(self) -> int:
        return len(self.parts)

    def pick(self, draws: Draws) -> PickedPoints:
        """The trajectories at shares of the way through the set."""
        return PickedPoints(self, row_of(draws.image, len(self)))

    def at(self, index: Int[Tensor, " batch"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """Points of these trajectories at these times, by cubic Hermite interpolation between the two kept beside.

        Both have their state and their velocity, so the teacher is not asked; the error is of fourth order in their
        distance (``docs/decisions.md`` has it measured).
        """
        t = t.cpu().clamp(float(self.times[-1]), float(self.times[0]))
        # The times fall.
        above = (torch.searchsorted(-self.times, -t, right=True) - 1).clamp(0, len(self.times) - 2)
        read = self.parts.rows
        x, y = read("states", index, above), read("states", index, above + 1)
        v, w = read("velocities", index, above), read("velocities", index, above + 1)
        length = self.times[above + 1] - self.times[above]
        share, step = expand((t - self.times[above]) / length, x), expand(length, x)
        from_above = (1 - share).square() * ((1 + 2 * share) * x + share * step * v)
        return from_above + share.square() * ((3 - 2 * share) * y - (1 - share) * step * w)


@dataclass(frozen=True)
class PickedPoints:
    """Trajectories of some samples of a batch, read when the times of the jumps are known.

    Attributes:
        index: which trajectories, shape ``[batch]``.
    """

    trajectories: Trajectories
    index: Int[Tensor, " batch"]
    images: None = None

    def told(self, draws: Draws) -> Draws:
        """The draws with the trajectories' own conditions and scales of guidance."""
        places = {name: self.trajectories.parts.rows(name, self.index) for name in ("condition", "guidance")}
        return replace(draws, **places)

    def points(self, draws: Draws, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """The teacher's own x_t."""
        return to_device(self.trajectories.at(self.index, t), draws.noise.device)

    def rows(self, index: Int[Tensor, " some"]) -> PickedPoints:
        """The samples at these rows."""
        return replace(self, index=self.index[index.to(self.index.device)])

    def to(self, device: torch.device | str) -> PickedPoints:
        """Itself: what is read goes to the device of the draws."""
        return self
