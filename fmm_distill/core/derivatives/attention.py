"""Scaled dot-product attention and its tangent: as many heads and queries at a time as a block has weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fmm_distill.core.derivatives.dual import Dual

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["attended"]

# Attention weights of one block: 16 MiB in float32.
BLOCK = 2**22
# On a processor: what its cache holds.
CACHED = 2**16


class _Factors(NamedTuple):
    """What attention is a product of.

    Attributes:
        q: queries, scaled.
        turning, turned: two factors of the tangent of the scores.
        values: v and, beside it, its tangent where it moves.
    """

    q: Tensor
    turning: Tensor | None
    k: Tensor
    turned: Tensor | None
    v: Tensor
    values: Tensor


def attended(q: Dual, k: Dual, v: Dual, mask: Dual, *, is_causal: bool, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Value and tangent, of queries that are scaled.

    Masked scores get a finite floor: a row with every key masked would otherwise give NaN in reverse over forward.
    """
    # Heads are often strides through tokens, which every product would copy.
    q, k, v = (Dual(*(tensor if tensor is None else tensor.contiguous() for tensor in dual)) for dual in (q, k, v))
    # Two products are one over both inner dimensions, or with both right sides: their sums and halves take no pass.
    turning = _side_by_side(q.tangent, None if k.tangent is None else q.value)
    turned = _side_by_side(None if q.tangent is None else k.value, k.tangent)
    values = v.value if v.tangent is None else torch.cat((v.value, v.tangent), -1)
    factors = _Factors(q.value, turning, k.value, turned, v.value, values)
    if mask.value is not None or is_causal or q.value.ndim < 3:
        return _in_blocks(factors, mask, BLOCK, is_causal=is_causal, dropout_p=dropout_p)
    block = min(BLOCK, CACHED) if q.value.device.type == "cpu" else BLOCK
    parts = [_in_blocks(some, mask, block, is_causal=False, dropout_p=dropout_p) for some in _heads(factors, block)]
    shape = (*q.value.shape[:-1], v.value.shape[-1])
    out, tangent = (torch.cat(found).reshape(shape) for found in zip(*parts, strict=True))
    return out, tangent


def _side_by_side(*tensors: Tensor | None) -> Tensor | None:
    """Those that there are, in one."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there, -1) if there else None


def _heads(factors: _Factors, block: int) -> Iterator[_Factors]:
    """Those of as many heads of any sample as fit into a block."""
    size = max(1, block // (factors.q.shape[-2] * factors.k.shape[-2]))
    count = -(-factors.q.shape[:-2].numel() // size)
    flat = (tensor if tensor is None else tensor.flatten(0, -3) for tensor in factors)
    return (_Factors(*some) for some in zip(*(_parts(tensor, size, 0, count) for tensor in flat), strict=True))


def _parts(tensor: Tensor | None, size: int, axis: int, count: int) -> Sequence[Tensor | None]:
    """A part for each of so many blocks; all of what is the same in each, as some masks are."""
    if tensor is None or tensor.shape[axis] == 1 or count == 1:
        return [tensor] * count
    # In one split: the gradient of a slice is as large as the whole.
    return tensor.split(size, axis)


def _in_blocks(
    factors: _Factors, mask: Dual, block: int, *, is_causal: bool, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Value and tangent, some queries at a time."""
    q, turning, *rest = factors
    rows = q.shape[-2]
    size = min(rows, max(1, block // (q[..., 0].numel() // rows * factors.k.shape[-2])))
    # What is left out at random would be another when a block is computed again.
    again = torch.is_grad_enabled() and not dropout_p
    attend: Callable[..., tuple[Tensor, Tensor]] = _AttendedAgain.apply if again else _attended
    of_rows = [_parts(tensor, size, -2, -(-rows // size)) for tensor in (q, turning, *mask)]
    blocks = [
        attend(*some, *rest, i * size if is_causal else None, dropout_p)
        for i, some in enumerate(zip(*of_rows, strict=True))
    ]
    if len(blocks) == 1:
        return blocks[0]
    out, tangent = (torch.cat(parts, -2) for parts in zip(*blocks, strict=True))
    return out, tangent


def _attended(
    q: Tensor,
    turning: Tensor | None,
    mask: Tensor | None,
    d_mask: Tensor | None,
    k: Tensor,
    turned: Tensor | None,
    v: Tensor,
    values: Tensor,
    first: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Attention of some queries and its tangent.

    Args:
        turning, turned: two factors of the tangent of the scores.
        values: v and, beside it, its tangent where it moves.
        first: the place of the first query, where later keys are masked.
    """
    scores = q @ k.mT
    moved = None if turning is None or turned is None else turning @ turned.mT
    floor = torch.finfo(scores.dtype).min / 4
    if first is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + first)
        scores = scores.masked_fill(future, floor)
    if mask is not None:
        scores = scores.masked_fill(~mask, floor) if mask.dtype == torch.bool else scores + mask.clamp_min(floor)
        moved = d_mask if moved is None else moved if d_mask is None else moved + d_mask
    weights = scores.softmax(-1)
    kept = F.dropout(torch.ones_like(weights), dropout_p) if dropout_p else None
    both = (weights if kept is None else weights * kept) @ values
    out, tangent = both[..., : v.shape[-1]], both[..., v.shape[-1] :]
    if moved is not None:
        rising = weights * moved if torch.is_grad_enabled() else weights.mul_(moved)
        through = (rising if kept is None else rising * kept) @ v - rising.sum(-1, keepdim=True) * out
        tangent = tangent + through if tangent.shape[-1] else through
    return out, tangent


class _AttendedAgain(torch.autograd.Function):
    """``_attended`` that saves its inputs alone and computes the weights again: memory grows as the tokens do."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 those of _attended
        return _attended(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 torch's protocol
        *tensors, first, dropout_p = inputs
        ctx.save_for_backward(*tensors)
        ctx.rest = first, dropout_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 torch's protocol
        q, turning, mask, _, k, turned, v, values = ctx.saved_tensors
        if turning is not None and mask is None and ctx.rest == (None, 0):
            of_q, of_turning, *rest = _attended_backward(q, turning, k, turned, v, values, *gradients)
            return of_q, of_turning, None, None, *rest, None, None
        needed = ctx.needs_input_grad[: len(ctx.saved_tensors)]
        given: list[Any] = [
            None if tensor is None else tensor.detach().requires_grad_(wanted)
            for tensor, wanted in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = _attended(*given, *ctx.rest)
        wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return *(next(found) if tensor is not None and tensor.requires_grad else None for tensor in given), None, None


def _attended_backward(
    q: Tensor,
    turning: Tensor,
    k: Tensor,
    turned: Tensor,
    v: Tensor,
    values: Tensor,
    of_out: Tensor,
    of_tangent: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of ``_attended`` without a mask, written out: half the passes over the weights that autograd takes.

    With ``R = W M``, M the tangent of the scores: ``out = W v`` and ``tangent = W dv + R v - sum(R) out``.
    """
    weights, moved = (q @ k.mT).softmax(-1), turning @ turned.mT
    rising = weights * moved
    of_sum = -torch.linalg.vecdot(of_tangent, weights @ v)[..., None]
    of_out = of_out - rising.sum(-1, keepdim=True) * of_tangent
    of_both = of_out if values.shape[-1] == v.shape[-1] else torch.cat((of_out, of_tangent), -1)
    of_rising = (of_tangent @ v.mT).add_(of_sum)
    of_scores = (of_both @ values.mT).addcmul_(moved, of_rising).mul_(weights)
    of_scores.addcmul_(weights, of_scores.sum(-1, keepdim=True), value=-1)
    of_moved = of_rising.mul_(weights)
    return (
        of_scores @ k,
        of_moved @ turned,
        of_scores.mT @ q,
        of_moved.mT @ turning,
        rising.mT @ of_tangent,
        weights.mT @ of_both,
    )
