"""Distill with a loss of your own: the Lagrangian residual with a further term for its mean.

    python examples/own_loss.py --output runs/own-loss

A loss is one class whose fields are its settings; ``docs/add-a-loss.md`` explains it and its registration.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fmm_distill import Recipe, distill
from fmm_distill.core.derivatives.engines import value_and_derivative_in_r
from fmm_distill.core.time_axis import expand
from fmm_distill.evaluation.result import Evaluation
from fmm_distill.losses import DerivativeLoss, squared_norm


class Brightness(DerivativeLoss):
    """``|g|^2 + factor |mean of g|^2`` with the Lagrangian residual ``g = u - (t - r) d_r u - v(X, r)``."""

    summary: ClassVar[str] = "the Lagrangian loss with a further term for the mean of its residual"
    paper: ClassVar[str] = "arXiv 2406.07507, with a term of its own"
    in_r: ClassVar[bool] = True

    name: Literal["brightness"] = "brightness"
    velocity: Literal["teacher"] = "teacher"
    factor: float = Field(default=1.0, ge=0, le=1e3)

    def __call__(self, flow_map, velocity, jump):
        """Return the loss of each sample, shape [batch]."""
        x, t, r, cond = jump.x, jump.t, jump.r, jump.cond
        u, du_dr = value_and_derivative_in_r(flow_map, x, t, r, cond=cond, engine=self.engine)
        length = expand(t - r, x)
        with torch.no_grad():
            v = velocity(x - length * u, r, cond)
        residual = u - length * du_dr - v
        mean = residual.flatten(1).mean(1, keepdim=True)
        return squared_norm(residual) + self.factor * squared_norm(mean)


def main(arguments: Sequence[str] | None = None) -> Evaluation:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/own-loss"))
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)
    recipe = Recipe.model_validate(
        {
            "teacher": "builtin:digits",
            "training": {"steps": options.steps, "batch_size": 64, "ema": [0.99]},
            "evaluation": {"steps": [1, 2], "ddim_steps": [2], "dpmsolver_steps": [], "endpoint_samples": 32},
            "export": {"steps": [1, 2]},
        }
    )
    return distill(recipe, options.output, loss=Brightness(factor=2))


if __name__ == "__main__":
    main()
