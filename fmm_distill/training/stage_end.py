"""The end of the second stage in a run of one or several processes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from fmm_distill.training import checkpoint
from fmm_distill.training.early_stopping import describe_end, judge_run, judged

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.training.checkpoint import Checkpoint

__all__ = ["StageEnd"]

logger = logging.getLogger(__name__)


class StageEnd:
    """Decides when training ends, by ``matching.stop``, and which checkpoint is exported.

    Every process has one. The first reads ``evaluations.jsonl``, and all have its answer.

    Args:
        folder: of the run.
    """

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.checkpoints = folder / "checkpoints"

    def may_export(self, step: int) -> bool:
        """Return whether the evaluations may choose the state after this number of steps."""
        return judged(self.recipe, step)

    def stores(self, step: int) -> bool:
        """Return whether the state after this number of steps has a checkpoint."""
        recipe = self.recipe
        # Those of both stages' ends belong to another optimizer each.
        ends = step in (recipe.map_steps, recipe.total_steps)
        return ends or step % recipe.training.checkpoint_every == 0 or self.may_export(step)

    def save(self, stored: Checkpoint) -> Path:
        """Write a checkpoint in the first process; older ones stay within the limit, and the best so far."""
        verdict = judge_run(self.recipe, self.folder)
        best = () if verdict is None else (verdict.step,)
        return checkpoint.save(self.checkpoints, stored, self.recipe.training.checkpoints_total_limit, best)

    def reached(self, step: int) -> bool:
        """Return whether training ends after this number of steps. Every process has to call it."""
        if step >= self.recipe.total_steps:
            return True
        if not self.may_export(step):
            return False
        reason = None
        if self.accelerator.is_main_process and (verdict := judge_run(self.recipe, self.folder)) is not None:
            reason = verdict.reason
        return bool(self._of_first(int(reason is not None)))

    def exported(self) -> Checkpoint | None:
        """Load the checkpoint that is exported; None: the last state. Every process has to call it.

        Raises:
            UserError: if it is missing or damaged.
        """
        verdict = judge_run(self.recipe, self.folder) if self.accelerator.is_main_process else None
        if verdict is not None:
            logger.info(f"the second stage {describe_end(self.recipe, verdict)}")
        step = self._of_first(-1 if verdict is None else verdict.step)
        return None if step < 0 else checkpoint.load_step(self.checkpoints, step)[1]

    def _of_first(self, value: int) -> int:
        """Return the value of the first process."""
        values = [value]
        broadcast_object_list(values)
        return values[0]
