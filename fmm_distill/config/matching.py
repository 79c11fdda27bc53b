"""Settings of the second stage: distribution matching with a critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fmm_distill.config.settings import MOST_STEPS, OptimizerSettings, Rate
from fmm_distill.losses.distribution_matching import DistributionMatching
from fmm_distill.losses.rollout import Rollout
from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from fmm_distill.config.settings import StudentSettings

__all__ = ["CriticSettings", "MatchingSettings", "check_map_steps"]


class CriticSettings(Settings):
    """The critic, a network that starts as the teacher and learns the velocity of the student's samples."""

    warmup_steps: int = Field(default=150, ge=0, le=MOST_STEPS)
    """Updates of the critic alone, before the first step of the student."""
    updates: int = Field(default=2, ge=1, le=1000)
    """Updates of the critic before each step of the student."""
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, betas=(0.0, 0.999))
    """The critic's optimizer and its constant learning rate."""


class MatchingSettings(Settings):
    """A second stage after training.steps: distribution matching on samples of the student."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    """Optimizer steps of the student in this stage."""
    loss: DistributionMatching = DistributionMatching()
    """The matching loss and its settings."""
    fraction: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the batch that is matched; the map's losses have the rest, which preserves the coupling."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Factor of the matching loss."""
    rollout: Rollout = Rollout()
    """How the student makes the samples that are matched."""
    optimizer: OptimizerSettings = OptimizerSettings(lr=2e-4, betas=(0.0, 0.999))
    """The student's optimizer in this stage and its constant learning rate."""
    ema: Rate = 0.95
    """Largest decay of the moving averages in this stage, which starts from the first average."""
    critic: CriticSettings = CriticSettings()
    """The critic."""


def check_map_steps(steps: int, student: StudentSettings, matching: MatchingSettings | None) -> None:
    """Refuse a run without a step of the map's losses whose student is no map, or which has no other stage.

    Args:
        steps: ``training.steps`` of a recipe.

    Raises:
        ValueError: with what is missing.
    """
    missing = [name for name, value in (("matching", matching), ("student.init", student.init)) if value is None]
    if steps == 0 and missing:
        raise ValueError(
            f"training.steps: expected at least 1 without {' and '.join(missing)}, got 0; with both, the run is "
            "distribution matching of an earlier student alone"
        )
