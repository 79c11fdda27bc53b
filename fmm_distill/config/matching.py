"""Settings of the second stage: distribution matching with a critic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from fmm_distill.config.settings import MOST_RATE, MOST_STEPS, OptimizerSettings, Rate
from fmm_distill.losses.distribution_matching import DistributionMatching
from fmm_distill.losses.matching_registry import AnyMatchingLoss
from fmm_distill.losses.rollout import Rollout
from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from fmm_distill.config.settings import (
        DataSettings,
        EvaluationSettings,
        GuidanceSettings,
        StudentSettings,
    )

    class _Settings(Protocol):
        """The parts of a recipe that a second stage depends on."""

        data: DataSettings
        evaluation: EvaluationSettings
        guidance: GuidanceSettings


__all__ = ["CriticSettings", "MatchingSettings", "StopSettings", "check_map_steps", "check_matching", "check_stop"]


class MatchingOptimizer(OptimizerSettings):
    """The student's optimizer in the second stage, with a constant or a falling learning rate."""

    lr: float = Field(default=1e-4, gt=0, le=MOST_RATE)
    """Peak learning rate, which matching.lr_schedule scales."""
    # Both networks follow each other: a gradient of earlier steps points to where the other one was.
    betas: tuple[Rate, Rate] = (0.0, 0.999)
    """Decay rates of the running averages of the gradient and its square, for optimizers with the argument betas;
    with others the default is ignored and any other value is refused."""


class CriticOptimizer(MatchingOptimizer):
    """The critic's optimizer, with a constant learning rate."""

    lr: float = Field(default=3e-4, gt=0, le=MOST_RATE)
    """Learning rate."""


class CriticSettings(Settings):
    """The critic, a network that starts as the teacher and learns the velocity of the student's samples."""

    warmup_steps: int = Field(default=150, ge=0, le=MOST_STEPS)
    """Updates of the critic alone, before the first step of the student."""
    updates: int = Field(default=2, ge=1, le=1000)
    """Updates of the critic before each step of the student."""
    ema: Rate = 0.95
    """Decay of the critic's moving average, whose velocity the student's step takes; smaller in the first updates. The
    critic's latest weights follow single batches: on digits the student diverged with them."""
    optimizer: CriticOptimizer = CriticOptimizer()
    """The critic's optimizer and its constant learning rate."""


class StopSettings(Settings):
    """Early stopping of the second stage by its evaluations. The average of the best evaluation is exported."""

    metric: Literal["frechet", "recall", "endpoint_error"] = "frechet"
    """Quantity that has to improve: the Fréchet distance, the recall or the endpoint error."""
    calls: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Number of student steps at which quantities are read, one of evaluation.steps; null: their mean over all."""
    patience: int | None = Field(default=2, ge=1, le=MOST_STEPS)
    """Evaluations in a row without an improvement after which the stage ends; null: only a bound ends it."""
    max_endpoint_error: float | None = Field(default=None, gt=0, le=1e6)
    """Bound of the endpoint error, the price of the stage: above it the stage ends; null: none."""
    min_recall: float | None = Field(default=None, gt=0, le=1)
    """Bound of the recall, the coverage of the reference: below it the stage ends; null: none."""

    @property
    def has_bounds(self) -> bool:
        """True if a bound can end the stage."""
        return (self.max_endpoint_error, self.min_recall) != (None, None)


class MatchingSettings(Settings):
    """A second stage after training.steps: distribution matching on samples of the student."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    """Optimizer steps of the student in this stage."""
    loss: AnyMatchingLoss = DistributionMatching()
    """The matching loss and its settings."""
    fraction: float = Field(default=0.75, gt=0, le=1)
    """Fraction of the batch that is matched; the map's losses have the rest, which preserves the coupling."""
    weight: float = Field(default=6.0, gt=0, le=1e6)
    """Factor of the matching loss, whose gradients are smaller than those of a map's relative errors: with 1 the
    student hardly moves."""
    rollout: Rollout = Rollout()
    """How the student makes the samples that are matched."""
    optimizer: MatchingOptimizer = MatchingOptimizer()
    """The student's optimizer in this stage and its peak learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate of the student in this stage: constant, or half a cosine that would reach 0 one step after the
    last. Student and critic follow each other: at a constant rate the quality at one call swings."""
    ema: Rate = 0.95
    """Largest decay of the moving averages in this stage, which starts from the first average."""
    critic: CriticSettings = CriticSettings()
    """The critic."""
    evaluate_every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps of the student between evaluations in this stage, the first of which is the map's; 0: evaluation.every."""
    stop: StopSettings | None = None
    """End the stage by its evaluations, and export the best average; null: all steps, and the last average."""


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


def check_matching(matching: MatchingSettings, recipe: _Settings) -> None:
    """Refuse settings of a recipe that its second stage does not run with.

    Raises:
        ValueError: with the setting.
    """
    if recipe.guidance.range is not None:
        low, high = recipe.guidance.range
        raise ValueError(
            f"guidance.range: expected one guidance.scale with matching, whose critic does not know the scale of a "
            f"sample, got {low:g} to {high:g}; leave the range out"
        )
    if matching.loss.needs_data and not recipe.data.has_images:
        raise ValueError(
            f"matching.loss.real: expected images, which the critic learns from too, got data.source: "
            f"{recipe.data.source}; leave real out, or give --data"
        )
    check_stop(matching, recipe.evaluation)


def check_stop(matching: MatchingSettings, evaluation: EvaluationSettings) -> None:
    """Check that the evaluations of the second stage measure everything that ``matching.stop`` reads.

    Raises:
        ValueError: if there are no evaluations, or they lack a quantity or a number of steps.
    """
    if (stop := matching.stop) is None:
        return
    if not (matching.evaluate_every or evaluation.every):
        raise ValueError(
            "matching.stop: expected evaluations of the second stage, got none; try --set matching.evaluate_every="
            f"{max(1, matching.steps // 5)}"
        )
    if evaluation.features == "none":
        for name, needed in (
            (f"metric: {stop.metric}", stop.metric != "endpoint_error"),
            (f"min_recall: {stop.min_recall}", stop.min_recall is not None),
        ):
            if needed:
                raise ValueError(
                    f"matching.stop: {name}: expected evaluation.features with it, got none; give features, or try "
                    "metric: endpoint_error without min_recall"
                )
    if evaluation.stochasticity and (stop.metric == "endpoint_error" or stop.max_endpoint_error is not None):
        raise ValueError(
            "matching.stop: expected evaluation.stochasticity 0 with the endpoint error, got "
            f"{evaluation.stochasticity:g}, with which there is none; try metric: frechet without max_endpoint_error"
        )
    if stop.calls is not None and stop.calls not in evaluation.steps:
        numbers = ", ".join(map(str, evaluation.steps))
        raise ValueError(f"matching.stop.calls: expected one of evaluation.steps {numbers}, got {stop.calls}")
