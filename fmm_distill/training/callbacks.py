"""Callbacks: hooks that the trainer calls, and the log and the progress bar that use them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fmm_distill.io.files import append_line, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["Callback", "CallbackList", "ProgressBar", "StepLog"]


class Callback:
    """Hooks into the training loop, each of which does nothing by default.

    The trainer calls them in the first process only, in the order in which the callbacks were passed. A hook must not
    change the student or wait for other processes. An exception in a hook ends the run, which can be resumed.
    """

    def on_start(self, step: int) -> None:
        """Training starts, or returns to a checkpoint, after ``step`` steps: remove what belongs to later ones."""

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """An optimizer step has ended.

        Args:
            step: number of steps done.
            metrics: the line of ``steps.jsonl``: loss, gradient_norm, learning_rate and others.
        """

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint of ``step`` steps is complete in the folder ``path``."""

    def on_evaluate(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The moving average was evaluated after ``step`` steps.

        Args:
            rows: one per sampler and number of steps, with ``sampler``, ``steps`` and the measured quantities.
        """

    def on_end(self) -> None:
        """Training has ended, also because of an exception."""


class CallbackList(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def on_start(self, step: int) -> None:
        """Call this hook of each callback."""
        for callback in self.callbacks:
            callback.on_start(step)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call this hook of each callback."""
        for callback in self.callbacks:
            callback.on_step(step, metrics)

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Call this hook of each callback."""
        for callback in self.callbacks:
            callback.on_checkpoint(step, path)

    def on_evaluate(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Call this hook of each callback."""
        for callback in self.callbacks:
            callback.on_evaluate(step, rows)

    def on_end(self) -> None:
        """Call this hook of each callback."""
        for callback in self.callbacks:
            callback.on_end()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Call ``on_end`` at the end of a ``with`` block."""
        try:
            yield
        finally:
            self.on_end()


class StepLog(Callback):
    """The file ``steps.jsonl`` of a run: one JSON object per step."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "steps.jsonl"

    def on_start(self, step: int) -> None:
        """Remove the lines of later steps."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        # Line k belongs to step k: the lines of later steps come after the first ``step``.
        write_text(self.path, "".join(lines[:step]))

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the line of a step."""
        append_line(self.path, json.dumps(metrics))


class ProgressBar(Callback):
    """A progress bar on stderr.

    Args:
        total: number of all steps.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar: Any = None

    def on_start(self, step: int) -> None:
        """Open the bar, or set it back."""
        if self.bar is not None:
            self.bar.n = step
        elif step < self.total:
            # At most one refresh per second: output that is not a terminal gets a line for each.
            self.bar = tqdm(total=self.total, initial=step, unit="step", mininterval=1.0, desc="distill")

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Advance the bar, with the loss, the images per second and the memory."""
        # JSON has no NaN: a loss that is not finite is null.
        loss = "nan" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        rate, memory = f"{metrics['images_per_second']:.0f}", f"{metrics['peak_memory_gib']:.1f}"
        self.bar.set_postfix(phase=metrics["phase"], loss=loss, images_s=rate, GiB=memory)
        self.bar.update()

    def on_end(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
