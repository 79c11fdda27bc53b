"""The students of the CIFAR-10 experiment: recipes that differ only in the loss and its time sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.losses import registered_losses
from fmm_distill.losses.base import DerivativeLoss

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.cifar10.budget import Budget

__all__ = ["METHODS", "recipe_of"]

TO_DATA = {"prior": 0, "data": 1}
# Trains the velocity, for losses that alone train it at no time or not at every time.
VELOCITY = {"loss": {"name": "flow_matching"}, "fraction": 0.5, "time_sampling": TO_DATA}
LAGRANGIAN = {"name": "lagrangian", "stop_gradient": "target"}
REGRESSION = {"name": "operator_regression", "solver_steps": 4}
# The derivative along the flow contains the network's roughness in time, up to ten times the change of the flow.
EULERIAN = {"name": "eulerian", "step": 0.1}

# Weights that change with the length of the jump: the velocity is the teacher's, so no loss has to train it.
SCALED = {"kind": "scaled"}

# In the order of importance: the last ones are left out when the time is over.
METHODS: dict[str, dict[str, Any]] = {
    "lagrangian": {"loss": LAGRANGIAN},
    "lagrangian-scaled": {"loss": LAGRANGIAN, "student": SCALED},
    # With its own jumps as the target it diverges from its teacher within a hundred steps.
    "progressive": {"loss": {"name": "progressive", "target": "average"}, "extra_losses": [VELOCITY]},
    "eulerian": {"loss": EULERIAN},
    "eulerian-scaled": {"loss": EULERIAN, "student": SCALED},
    "progressive-scaled": {"loss": {"name": "progressive", "target": "average"}, "student": SCALED},
    "consistency-scaled": {
        "loss": {"name": "consistency", "step": 0.05, "solver": "heun"},
        "student": SCALED,
        "time_sampling": TO_DATA,
    },
    # With the derivative, as published.
    "mean_flow": {"loss": {"name": "eulerian"}, "time_sampling": {"prior": 0.25, "diagonal": 0.5}},
    "consistency": {
        "loss": {"name": "consistency", "step": 0.05, "solver": "heun"},
        "extra_losses": [VELOCITY],
        "time_sampling": TO_DATA,
    },
    "consistency_trajectory": {"loss": {"name": "consistency_trajectory"}, "extra_losses": [VELOCITY]},
    "operator_regression": {"loss": REGRESSION, "extra_losses": [VELOCITY], "time_sampling": {"prior": 1}},
    "regression-then-lagrangian": {
        "stages": [{"loss": REGRESSION, "fraction": 0.3, "time_sampling": {"prior": 1}}],
        "loss": LAGRANGIAN,
    },
    "lagrangian-and-eulerian": {"loss": LAGRANGIAN, "extra_losses": [{"loss": EULERIAN, "fraction": 0.5}]},
    "lagrangian-data": {"loss": LAGRANGIAN, "data": True},
    "progressive-data": {
        "loss": {"name": "progressive", "target": "average"},
        "extra_losses": [VELOCITY],
        "data": True,
    },
}


def recipe_of(name: str, teacher: Path, data: Path, budget: Budget, steps: int, seed: int) -> Recipe:
    """Return the recipe of a student, with a minimal evaluation and export: the experiment measures it afterwards."""
    changes = dict(METHODS[name])
    loss = dict(changes.pop("loss"))
    if issubclass(registered_losses()[loss["name"]], DerivativeLoss) and not loss.get("step"):
        # Differences need additional calls in half precision; in full precision they are the cheapest.
        loss["derivative"] = "exact" if budget.student_precision == "bf16" else "central"
    source = {"source": str(data), "flip": True, "fit": "crop"} if changes.pop("data", False) else {"source": "none"}
    settings = {
        "teacher": str(teacher),
        "data": source,
        "loss": loss,
        # A relative weight: errors where the residual is small are amplified on the path to data.
        "weight": {"power": 1.0, "constant": 1e-3},
        "optimizer": {"lr": budget.learning_rate},
        "training": {
            "steps": steps,
            "batch_size": budget.batch,
            "warmup_steps": min(100, steps // 10),
            "ema": 0.99,
            "precision": budget.student_precision,
            "checkpoint_every": max(steps // 3, 1),
            "checkpoints_total_limit": 1,
            "seed": seed,
        },
        "evaluation": {
            "steps": [1],
            "ddim_steps": [],
            "dpmsolver_steps": [],
            "endpoint_samples": 16,
            "endpoint_solver_steps": 2,
            "batch_size": 16,
        },
        "export": {"steps": []},
    }
    return parse(settings | changes, name)
