"""Runs of a pipeline that takes one prompt at a time, joined to a run of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.rows import Ragged
from fmm_distill.teachers.recording import Recording, SchedulerStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmm_distill.teachers.side_networks import SideCall

__all__ = ["join_recordings"]


def join_recordings(singles: Sequence[Recording]) -> Recording:
    """Return the recording that a batch would have: the samples of the runs one after the other.

    With guidance a network may be called with several rows per sample: first those without the prompts, then those with
    them, as a batch has them.

    Args:
        singles: runs with one sample each, of the same number of steps.

    Raises:
        UserError: if an argument has neither the rows of the samples nor one value for all.
    """
    first = singles[0]
    joined = Recording(mu=first.mu, sigmas=first.sigmas, grids=first.grids)
    for calls in zip(*(one.calls for one in singles), strict=True):
        # The network did not run in a recording of the first call alone, which is one without guidance.
        rows = max(1, len(calls[0].output))
        names = dict.fromkeys(name for call in calls for name in call.arguments)
        # A list of a network before the main one has an entry for each of several networks: its sample is a tensor.
        listed = {name: name not in calls[0].sides for name in names}
        arguments = {
            name: _join(name, [call.arguments.get(name) for call in calls], rows, listed=listed[name]) for name in names
        }
        output = _interleaved([call.output for call in calls], rows)
        sides = {name: _join_sides([call.sides[name] for call in calls], rows) for name in calls[0].sides}
        joined.calls.append(replace(calls[0], arguments=arguments, output=output, sides=sides))
    for steps in zip(*(one.steps for one in singles), strict=True):
        output, sample = (torch.cat([getattr(step, name) for step in steps]) for name in ("output", "sample"))
        joined.steps.append(SchedulerStep(output, steps[0].timestep, sample))
    return joined


def _join_sides(calls: list[SideCall], rows: int) -> SideCall:
    # The frames of a video are rows of their own.
    each = max(1, len(calls[0].sample) // rows)
    return replace(calls[0], sample=_interleaved([call.sample for call in calls], rows, each))


def _join(name: str, values: list[Any], rows: int, *, listed: bool) -> Any:  # noqa: ANN401 any argument of a network
    """Return one argument of a batch.

    Args:
        rows: per sample.
        listed: a list of that length has an entry for each row.
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _mixed(name)
    if isinstance(first, torch.Tensor):
        return _join_tensors(name, values, rows)
    if isinstance(first, dict):
        return {key: _join(f"{name}.{key}", [value.get(key) for value in values], rows, listed=listed) for key in first}
    if isinstance(first, list | tuple):
        if listed and len(first) == rows and not _are_batches(values, rows):
            items = [value[i] for i in range(rows) for value in values]
        else:
            parts = zip(*values, strict=True)
            items = [_join(f"{name}.{i}", list(part), rows, listed=listed) for i, part in enumerate(parts)]
        return items if isinstance(first, list) else tuple(items)
    return first


def _are_batches(values: list[Any], rows: int) -> bool:
    """Return whether the entries of lists are batches, one per IP-Adapter, and not of one sample each.

    The entry of a sample, such as the embedding of its prompt, has no axis of the batch.
    """
    entries = [entry for value in values for entry in value]
    return all(isinstance(one, torch.Tensor) and one.ndim > 2 and len(one) == rows for one in entries)


def _join_tensors(name: str, values: list[torch.Tensor], rows: int) -> torch.Tensor | Ragged:
    first, shapes = values[0], {value.shape[1:] for value in values}
    if rows == 1 and first.ndim > 0 and len({value.shape for value in values}) == 1 and not _all_equal(values):
        # One row per sample, or several, such as the embeddings of two images.
        return torch.cat(values)
    if all(value.ndim > 0 and len(value) == rows for value in values):
        if len(shapes) > 1:
            if rows == 1 and len({shape[1:] for shape in shapes}) == 1:
                return Ragged(value[0] for value in values)
            raise UserError(
                f"expected inputs of one length from a pipeline that takes one prompt at a time, got several in {name};"
                " try prompts of one length"
            )
        return _interleaved(values, rows)
    if not _all_equal(values):
        raise _mixed(name)
    return first


def _all_equal(values: list[torch.Tensor]) -> bool:
    return all(value.shape == values[0].shape and torch.equal(value, values[0]) for value in values)


def _interleaved(values: list[torch.Tensor], rows: int, each: int = 1) -> torch.Tensor:
    """Return the first ``each`` rows of all samples, then their second ones, and so on."""
    return torch.cat([value[i * each : (i + 1) * each] for i in range(rows) for value in values])


def _mixed(name: str) -> UserError:
    return UserError(
        f"expected one row per sample, or one value for all, from a pipeline that takes one prompt at a time, got "
        f"others in {name}; write an adapter for it (docs/add-a-teacher.md)"
    )
