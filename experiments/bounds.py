"""Compute both sides of the two Wasserstein bounds of flow map matching during training on a Gaussian.

    python -m experiments.bounds --output docs/results

The student is affine, so that its samples are Gaussian. The squared Wasserstein distance to the data, the losses on the
row t = 1 and on the column r = 0, and the bounds of arXiv 2406.07507 (propositions 3.7 and 3.8) are then integrals in
one variable. Writes ``bounds.png``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.losses import Jump
from fmm_distill.losses.eulerian import Eulerian
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.teachers.closed_form import Gaussian

TRUTH = Gaussian(torch.tensor([0.7], dtype=torch.float64), 0.3)
TIMES = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
LOSSES = {"lagrangian": Lagrangian(stop_gradient="nowhere"), "eulerian": Eulerian(stop_gradient="nowhere")}


class Affine(FlowMap, nn.Module):
    """``u(x, t, h) = gain x + shift``, with gain and shift by one small network of (t, h)."""

    clock = LinearClock()
    t_max = 1.0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
        self.double()

    def mean_velocity_of_jump(self, x: Tensor, t: Tensor, h: Tensor, cond: object = None) -> Tensor:
        """Return u, shape ``[batch, 1]``."""
        gain, shift = self.layers(torch.stack([t, h], 1)).unbind(1)
        return gain[:, None] * x + shift[:, None]


def distance(student: FlowMap) -> float:
    """Return the squared Wasserstein distance between the data and the student's samples of one jump."""
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    at = student(torch.tensor([[0.0], [1.0]], dtype=torch.float64), one, zero)[:, 0]
    mean, std = at[0].item(), abs((at[1] - at[0]).item())
    return (mean - TRUTH.mean.item()) ** 2 + (std - TRUTH.std) ** 2


def loss_on_its_line(student: FlowMap, name: str) -> Tensor:
    """Return the Lagrangian loss on the row t = 1 or the Eulerian loss on the column r = 0, integrated over time.

    The residual is affine in x, so that two points, one standard deviation to each side of the mean, give its
    mean square.
    """
    if name == "lagrangian":
        t, r = torch.ones_like(TIMES), TIMES
    else:
        t, r = TIMES, torch.zeros_like(TIMES)
    center = (1 - t) * TRUTH.mean
    spread = ((1 - t).square() * TRUTH.std**2 + t.square()).sqrt()
    points = [(center + sign * spread)[:, None] for sign in (-1, 1)]
    loss, u = LOSSES[name], torch.zeros_like(t)
    losses = [loss(student, TRUTH.velocity, Jump(x, t, r, None, u)) for x in points]
    return torch.stack(losses).mean()


def constant(name: str) -> float:
    """Return the factor of the loss in its bound."""
    if name == "eulerian":
        return math.e
    variance = (1 - TIMES).square() * TRUTH.std**2 + TIMES.square()
    slope = (TIMES - (1 - TIMES) * TRUTH.std**2) / variance
    return math.exp(1 + 2 * slope.abs().mean().item())


def run(name: str, steps: int = 300, every: int = 10) -> list[tuple[int, float, float]]:
    """Train with one loss on its line; return (step, squared distance, bound) of every ``every``-th step."""
    student = Affine()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    record = []
    for step in range(steps + 1):
        loss = loss_on_its_line(student, name)
        if step % every == 0:
            record.append((step, distance(student), constant(name) * loss.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return record


def plot(records: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Plot distance and bound against steps, one panel per loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(records), figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, (name, record) in zip(panels, records.items(), strict=True):
        steps, reached, bound = zip(*record, strict=True)
        panel.semilogy(steps, bound, label="bound", color="tab:red")
        panel.semilogy(steps, reached, label="squared W2 to the data", color="tab:blue")
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    records = {name: run(name) for name in LOSSES}
    for name, record in records.items():
        for step, reached, bound in record[:: len(record) // 6]:
            print(f"{name:<11} step {step:4d}  squared W2 {reached:.2e}  bound {bound:.2e}")
    plot(records, output / "bounds.png")


if __name__ == "__main__":
    main()
