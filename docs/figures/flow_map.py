"""Draw the picture of t, r, x_t, X, u and v: trajectories of a two-mode mixture on a line, and one jump.

    python docs/figures/flow_map.py

The velocity is the closed form of the mixture, so the curves are the ODE's. Colors are of a middle lightness: the
background is transparent, and the picture is read on white and on black.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

PICTURE = Path(__file__).parents[1] / "assets" / "flow-map.svg"
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 690, 20, 350
HIGHEST = 2.1
MODE, DEVIATION = 1.6, 0.12
START, T, R = 0.28, 0.75, 0.15
NOISES = (-1.9, -1.3, -0.8, -0.4, -0.15, -0.03, 0.8, 1.3, 1.9)
GRAY, BLUE, ORANGE, GREEN = "#868e96", "#228be6", "#e8590c", "#2f9e44"


def velocity(x: float, t: float) -> float:
    """Return E[eps - x_0 | x_t = x] for data at two modes of equal weight."""
    variance = ((1 - t) * DEVIATION) ** 2 + t**2
    means = np.array([-MODE, MODE])
    weights = np.exp(-((x - (1 - t) * means) ** 2) / (2 * variance))
    residual = x - (1 - t) * means
    data = means + (1 - t) * DEVIATION**2 / variance * residual
    noise = t / variance * residual
    return float(((noise - data) * weights).sum() / weights.sum())


def trajectory(x: float, count: int = 240) -> list[tuple[float, float]]:
    """Return the points (t, x) of the ODE from noise to data, by Heun's method."""
    times = np.linspace(1, 0, count + 1)
    points = [(1.0, x)]
    for t, s in pairwise(times):
        first = velocity(x, t)
        second = velocity(x + (s - t) * first, s)
        x += (s - t) * (first + second) / 2
        points.append((float(s), x))
    return points


def across(t: float) -> float:
    """Return the horizontal coordinate of a time: noise is left, data right."""
    return LEFT + (1 - t) * (RIGHT - LEFT)


def down(x: float) -> float:
    """Return the vertical coordinate of a state."""
    return TOP + (HIGHEST - x) / (2 * HIGHEST) * (BOTTOM - TOP)


def path(points: list[tuple[float, float]], color: str, width: float, *, dash: str = "", opacity: float = 1) -> str:
    """Return a curve through points (t, x)."""
    corners = " ".join(f"{across(t):.1f},{down(x):.1f}" for t, x in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{corners}" fill="none" stroke="{color}" stroke-width="{width}" opacity="{opacity}"'
        f' stroke-linejoin="round" stroke-linecap="round"{dashes}/>'
    )


def text(words: str, left: float, top: float, color: str, *, anchor: str = "start", size: int = 16) -> str:
    """Return a label; ``_a`` in it is a subscript of one letter."""
    parts = words.split("_")
    body = parts[0] + "".join(
        f'<tspan dy="4" font-size="{size - 4}">{part[0]}</tspan><tspan dy="-4">{part[1:]}</tspan>' for part in parts[1:]
    )
    return f'<text x="{left:.1f}" y="{top:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size}">{body}</text>'


def dot(t: float, x: float, color: str) -> str:
    """Return a point (t, x)."""
    return f'<circle cx="{across(t):.1f}" cy="{down(x):.1f}" r="5" fill="{color}"/>'


def axis() -> list[str]:
    """Return the axis of time with r and t on it."""
    found = [path([(1, -HIGHEST), (0, -HIGHEST)], GRAY, 1.5)]
    for label, t in {"t = 1, noise": 1.0, "t": T, "r": R, "t = 0, data": 0.0}.items():
        found.append(path([(t, -HIGHEST), (t, -HIGHEST - 0.06)], GRAY, 1.5))
        found.append(text(label, across(t), BOTTOM + 26, GRAY, anchor="middle"))
    found.append(text("h = t - r", (across(T) + across(R)) / 2, BOTTOM + 54, ORANGE, anchor="middle"))
    beneath = BOTTOM + 36
    found.append(f'<path d="M{across(T):.1f},{beneath} H{across(R):.1f}" stroke="{ORANGE}" stroke-width="1.5"/>')
    return found


def drawing() -> str:
    """Return the picture."""
    curve = trajectory(START)
    at = {round(t, 6): x for t, x in curve}
    x_t, x_r = at[T], at[R]
    slope = velocity(x_t, T)
    ahead = T - 0.2
    body = [path(trajectory(noise), GRAY, 1, opacity=0.6) for noise in NOISES]
    body += [path([(time, -HIGHEST), (time, x)], GRAY, 1, dash="2 4") for time, x in ((T, x_t), (R, x_r))]
    body += [path(curve, BLUE, 2.5), path([(T, x_t), (ahead, x_t + (ahead - T) * slope)], GREEN, 2.5)]
    body += [path([(T, x_t), (R, x_r)], ORANGE, 2.5, dash="7 5"), dot(T, x_t, BLUE), dot(R, x_r, ORANGE)]
    body += axis()
    body += [
        text("x_t", across(T) - 8, down(x_t) + 22, BLUE, anchor="end"),
        text("X(x_t, t, r) = x_t - (t - r) u", across(R) - 8, down(x_r) - 12, ORANGE, anchor="end"),
        text("slope u(x_t, t, r)", across((T + R) / 2) - 6, down((x_t + x_r) / 2) - 8, ORANGE, anchor="end"),
        text("slope v(x_t, t)", across(ahead) - 40, down(x_t + (ahead - T) * slope) + 22, GREEN),
        text("the teacher's ODE", across(1) + 4, down(START) - 10, BLUE),
    ]
    title = "A jump of the flow map from time t to time r along a trajectory of the ODE"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-style="italic"',
            f'  font-family="Georgia, DejaVu Serif, serif" role="img" aria-label="{title}">',
            *body,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
