"""Fréchet distance, recall and endpoint error of samplers on the same noises, and the operations of training steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from experiments.cifar10.budget import Budget as JudgeBudget
from experiments.cifar10.measure import Judge
from experiments.cifar10.scaling import flops
from fmm_distill.evaluation.metrics.precision_recall import PrecisionRecall

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from experiments.matching.cases import Budget
    from fmm_distill.teachers.base import Teacher

__all__ = ["RecallJudge", "open_judge", "passes"]


class RecallJudge(Judge):
    """The judge of the CIFAR-10 experiment, whose rows have precision and recall too."""

    coverage: PrecisionRecall

    def scores(self, features: Tensor) -> dict[str, float]:
        """Return the quantities of the features of all samples."""
        found = {name: value.value for name, value in self.coverage(features).items()}
        return super().scores(features) | found


def open_judge(teacher: Teacher, work: Path, budget: Budget, cache: Path) -> RecallJudge:
    """Return the judge of a teacher's students.

    Args:
        work: of the CIFAR-10 experiment, with its images and its classifier.
        cache: a folder for features and endpoints.
    """
    settings = JudgeBudget(
        samples=budget.samples,
        endpoint_samples=budget.endpoint_samples,
        solver_steps=budget.solver_steps,
        measure_batch=budget.measure_batch,
    )
    images = load_file(work / "images.safetensors")["train"]
    judge = RecallJudge(teacher, work / "classifier" / "classifier.pt", images, "cpu", settings, cache)
    judge.coverage = PrecisionRecall(load_file(cache / "judge.safetensors")["reference"], budget.samples)
    return judge


def passes(teacher: Teacher, images: int, train: Callable[[], None]) -> float:
    """Return the operations of training per image, in calls of the teacher's network; a backward pass counts as two.

    Args:
        images: the number of images, of all steps of ``train``.
    """
    with FlopCounterMode(display=False) as counter:
        train()
    return counter.get_total_flops() / (images * flops(teacher))
