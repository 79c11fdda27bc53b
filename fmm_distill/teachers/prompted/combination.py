"""How a pipeline combines the outputs of its network when it guides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.prompted.probe import PipelineProbe
    from fmm_distill.teachers.recording import Recording

__all__ = ["find_norm_axis", "has_numbers", "outputs_of_step"]

# Relative difference between the pipeline's guided output and ours: a difference of two outputs times the scale
# amplifies their rounding, and the weight is itself a quotient of such differences.
_TOLERANCE = 1e-2
# Rounding of a network's output in float32, in batches of other sizes.
_ROUNDING = 1e-5


def find_norm_axis(
    probe: PipelineProbe, guided: Recording, cond: Conditioning, null: Conditioning, scale: float
) -> int | None:
    """Return the axis along which a guided output has the norms of the output with the prompt.

    0, the axis of the batch: it is ``null + w (output - null)``, one w at two steps, whose norms are its own. None: it
    is another combination.

    Args:
        scale: of a guided output with other norms.
    """
    steps = [outputs_of_step(probe, guided, step, (cond, null)) for step in (0, len(guided.steps) - 1)]
    if any(stepped.numel() != output.numel() for (output, _), stepped in steps):
        return None
    weights = [_weight(output, uncond, stepped) for (output, uncond), stepped in steps]
    if None not in weights and _is_one(*weights):
        return 0
    if probe.spec.prediction != "flow_prediction":
        # The norms are those of a velocity for no other prediction.
        return None
    axes = reversed(range(1, steps[0][0][0].ndim))
    return next((axis for axis in axes if all(_has_norms(*each, scale, axis) for each in steps)), None)


@torch.no_grad()
def outputs_of_step(
    probe: PipelineProbe, guided: Recording, step: int, conds: Sequence[Conditioning]
) -> tuple[list[Tensor], Tensor]:
    """Return the network's outputs at a step of a guided run, and what the scheduler gets there, in float64."""
    call, calls_per_step = probe.call, len(guided.calls) // len(guided.steps)
    arguments = guided.calls[step * calls_per_step].arguments
    x = call.sample_of(arguments)[: len(probe.two)]
    time = call.time_of(arguments).expand(len(x))
    stepped = guided.steps[step].output * (-1 if probe.spec.inverted != probe.turned else 1)
    # A learned variance is not guided.
    stepped = call.output_of(stepped, x) if stepped.ndim == x.ndim else stepped
    # Means of a million numbers in float32 have the rounding of their sum, which hides a small difference.
    return [call(probe.network, x, time, each, None).double() for each in conds], stepped.double()


def has_numbers(combined: Tensor, stepped: Tensor) -> bool:
    """Return whether both have the same numbers, in whatever layout."""
    return bool(_difference(combined, stepped, sort=True) <= _TOLERANCE * stepped.abs().max())


def _is_one(first: float | None, last: float | None) -> bool:
    return first is not None and last is not None and abs(first - last) < _TOLERANCE * abs(first)


def _weight(output: Tensor, uncond: Tensor, stepped: Tensor) -> float | None:
    """Return w of the plain combination; None: it is another one."""
    change = output - uncond
    if stepped.shape == output.shape:
        weight = ((stepped - uncond) * change).sum() / change.square().sum()
        if _is_near(uncond + weight * change, stepped, weight * change):
            return float(weight)
    # In another layout: the mean does not depend on it.
    weight = (stepped.mean() - uncond.mean()) / change.mean()
    return float(weight) if has_numbers(uncond + weight * change, stepped) else None


def _has_norms(outputs: Sequence[Tensor], stepped: Tensor, scale: float, axis: int) -> bool:
    output, uncond = outputs
    plain = uncond + scale * (output - uncond)
    expected = plain * output.norm(dim=axis, keepdim=True) / plain.norm(dim=axis, keepdim=True)
    return _is_near(expected, stepped, expected - output)


def _is_near(expected: Tensor, stepped: Tensor, change: Tensor) -> bool:
    """Return whether a pipeline's output is the expected one, up to a small part of what guidance changes."""
    sort = expected.shape != stepped.shape
    most = _TOLERANCE * change.abs().max() + _ROUNDING * stepped.abs().max()
    return bool(_difference(expected, stepped, sort=sort) <= most)


def _difference(one: Tensor, other: Tensor, *, sort: bool) -> Tensor:
    one, other = one.flatten(), other.flatten()
    if sort:
        one, other = one.sort().values, other.sort().values
    return (one - other).abs().max()
