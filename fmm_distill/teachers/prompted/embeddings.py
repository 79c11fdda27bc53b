"""The network's inputs of prompts and of no prompt, as a stock pipeline makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.prompted.cache import cache_file, embed_all, split_arguments
from fmm_distill.teachers.prompted.probe import PROBES
from fmm_distill.teachers.recording import tensor_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.components import PipelineIndex
    from fmm_distill.teachers.prompted.call import RecordedCall
    from fmm_distill.teachers.prompted.probe import DrivenPipeline
    from fmm_distill.teachers.recording import Recording

__all__ = ["embed", "embeddings_of"]

# A scale at which the pipeline's own guidance is looked at.
_GUIDED = 3.0


def embeddings_of(
    driven: DrivenPipeline, call: RecordedCall, prompts: tuple[str, ...], found: PipelineIndex, *, inverted: bool
) -> Embeddings:
    """The embeddings of prompts, and of the empty one where the pipeline guides by it.

    Args:
        inverted: the scheduler's velocity runs from noise to data.
    """
    place = cache_file(found, prompts, {name: repr(value) for name, value in sorted(driven.keys.fixed.items())})
    rows = embed_all(lambda some: embed(driven, call, some), prompts, place)
    return Embeddings(prompts, rows, *_null(driven, call, inverted=inverted))


def embed(driven: DrivenPipeline, call: RecordedCall, prompts: Sequence[str]) -> Conditioning:
    """The network's inputs of these prompts, two or more; the network itself does not run."""
    several, single = driven.given(prompts), driven.given(prompts[:1])
    return split_arguments(several, (call.sample, call.time), len(prompts), single)


def _null(driven: DrivenPipeline, call: RecordedCall, *, inverted: bool) -> tuple[Conditioning | None, str]:
    """The inputs of no prompt, if the pipeline's own guidance is the plain combination with it; else the reason."""
    kind = driven.kind
    if driven.keys.guidance is None:
        return None, f"{kind} has no classifier-free guidance"
    seen, count = driven.record_guided(_GUIDED), len(PROBES)
    cond, single = embed(driven, call, PROBES), driven.given(PROBES[:1])
    first = seen.calls[0].given
    x = tensor_of(first[call.sample])
    if len(seen.calls) > len(seen.steps):
        parts = [asked.given for asked in seen.calls[:2]]
    elif len(x) == 2 * count:
        parts = [{name: _half(value, count, second) for name, value in first.items()} for second in (False, True)]
    else:
        return None, f"{kind} has no classifier-free guidance"
    told = [split_arguments(part, (call.sample, call.time), count, single) for part in parts]
    null = told[0] if _same(told[1], cond) else told[1]
    if not _same(told[0], cond) and not _same(told[1], cond):
        return None, f"{kind} gives its network other inputs when it is guided"
    if not _combines(driven, call, seen, cond, null, inverted=inverted):
        return None, f"{kind} guides by more than a plain combination of two answers"
    return null.rows(torch.tensor([0])), ""


def _half(value: Any, count: int, second: bool) -> Any:  # noqa: ANN401 whatever a network takes
    """One half of what has two rows per sample."""
    if isinstance(value, dict):
        return {key: _half(item, count, second) for key, item in value.items()}
    rows = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)
    if rows and len(value) == 2 * count:
        return value[count:] if second else value[:count]
    return value


def _same(one: Conditioning, other: Conditioning) -> bool:
    return one.inputs.keys() == other.inputs.keys() and all(
        rows.shape == other.inputs[name].shape and torch.allclose(rows, other.inputs[name], rtol=1e-4, atol=1e-5)
        for name, rows in one.inputs.items()
    )


@torch.no_grad()
def _combines(
    driven: DrivenPipeline,
    call: RecordedCall,
    seen: Recording,
    cond: Conditioning,
    null: Conditioning,
    *,
    inverted: bool,
) -> bool:
    """Whether ``null + w (answer - null)`` with one w is what the pipeline hands its scheduler, at two steps."""
    per_step, weights = len(seen.calls) // len(seen.steps), []
    for i in (0, len(seen.steps) - 1):
        given = seen.calls[i * per_step].given
        x = tensor_of(given[call.sample])[: len(PROBES)]
        # The network's own time: back through the line of the call.
        told = torch.as_tensor(given[call.time]).flatten()[:1].float().expand(len(x))
        time = (told - call.offset) / call.slope
        answer, nothing = (call(driven.network, x, time, about, None).flatten() for about in (cond, null))
        wanted = seen.steps[i].output * (-1 if inverted else 1)
        # A learned variance goes along, unguided.
        wanted = wanted[:, : x.shape[1]] if wanted.ndim == x.ndim else wanted
        if wanted.numel() != answer.numel():
            return False
        # The mean does not depend on the layout, the deviation tells the answers apart.
        weight = float((wanted.mean() - nothing.mean()) / (answer.mean() - nothing.mean()))
        weights.append(weight)
        combined = (nothing + weight * (answer - nothing)).sort().values
        if not bool((combined - wanted.flatten().sort().values).abs().max() <= 1e-2 * wanted.abs().max()):
            return False
    return abs(weights[0] - weights[1]) < 1e-2 * abs(weights[0])
