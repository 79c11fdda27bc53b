"""Scaled dot-product attention and its tangent, in blocks of heads and queries.

torch's fused kernels have no forward-mode rule, and its formula for the mathematical kernel stores all attention
weights of a layer several times. Here a block has at most ``BLOCK`` weights, and the backward pass computes them again
from queries, keys and values, as FlashAttention does (Dao et al. 2022, arXiv 2205.14135). Memory grows with the number
of tokens, not with its square.

With weights ``W = softmax(q k^T)``, M the tangent of the scores and ``R = W * M``, the tangent of ``W v`` is
``W dv + R v - rowsum(R) W v``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fmm_distill.core.derivatives.dual import Dual

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

__all__ = ["attention_jvp"]

# Attention weights of one block: 16 MiB in float32. Smaller blocks take more kernel launches, larger ones more memory
# for each of the three to four tensors of this size.
BLOCK = 2**22
# On CPU: 256 KiB in float32, which the cache of a core holds.
CPU_BLOCK = 2**16


class _Factors(NamedTuple):
    """The tensors that attention and its tangent are products of.

    Attributes:
        q: queries, scaled.
        tangent_q, tangent_k: two factors of the tangent M of the scores, ``dq k^T + q dk^T``, as one product:
            ``[dq, q]`` and ``[k, dk]``, joined in the last dimension; None: M is 0.
        values: v and its tangent, joined in the last dimension; v alone if it is constant.
    """

    q: Tensor
    tangent_q: Tensor | None
    k: Tensor
    tangent_k: Tensor | None
    v: Tensor
    values: Tensor


def attention_jvp(q: Dual, k: Dual, v: Dual, mask: Dual, *, is_causal: bool, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Return the output of attention and its tangent.

    Args:
        q: queries, multiplied by the scale already; shape ``[..., queries, width]``.
        mask: boolean (True: attend), or added to the scores. Masked scores have a finite minimum: a row in which every
            key is masked would have NaN gradients in reverse over forward mode.
    """
    # Heads are often strided views of the tokens, which each of the products would copy.
    q, k, v = (Dual(*(tensor if tensor is None else tensor.contiguous() for tensor in dual)) for dual in (q, k, v))
    # One product over the joined inner dimensions is the sum of two products without a pass for the sum.
    tangent_q = _joined(q.tangent, None if k.tangent is None else q.value)
    tangent_k = _joined(None if q.tangent is None else k.value, k.tangent)
    values = v.value if v.tangent is None else torch.cat((v.value, v.tangent), -1)
    factors = _Factors(q.value, tangent_q, k.value, tangent_k, v.value, values)
    # A mask can broadcast over heads, and its blocks would depend on how; queries are split in any case.
    if mask.value is not None or is_causal or q.value.ndim < 3:
        return _in_blocks_of_queries(factors, mask, BLOCK, is_causal=is_causal, dropout_p=dropout_p)
    # On a GPU a smaller block is only more launches; on CPU the three to four passes over a block then stay in cache.
    block = min(BLOCK, CPU_BLOCK) if q.value.device.type == "cpu" else BLOCK
    parts = [
        _in_blocks_of_queries(some, mask, block, is_causal=False, dropout_p=dropout_p)
        for some in _blocks_of_heads(factors, block)
    ]
    shape = (*q.value.shape[:-1], v.value.shape[-1])
    out, tangent = (torch.cat(found).reshape(shape) for found in zip(*parts, strict=True))
    return out, tangent


def _joined(*tensors: Tensor | None) -> Tensor | None:
    """Concatenate the tensors that are not None, in the last dimension."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there, -1) if there else None


def _blocks_of_heads(factors: _Factors, block: int) -> Iterator[_Factors]:
    """Yield the factors of as many heads, of any samples, as fit into a block."""
    # A single head may exceed the block; it is then split by queries.
    size = max(1, block // (factors.q.shape[-2] * factors.k.shape[-2]))
    count = -(-factors.q.shape[:-2].numel() // size)
    flat = (tensor if tensor is None else tensor.flatten(0, -3) for tensor in factors)
    return (_Factors(*some) for some in zip(*(_parts(tensor, size, 0, count) for tensor in flat), strict=True))


def _parts(tensor: Tensor | None, size: int, axis: int, count: int) -> Sequence[Tensor | None]:
    """Split a tensor for ``count`` blocks; one with a single entry, as some masks have, is the same in each."""
    if tensor is None or tensor.shape[axis] == 1 or count == 1:
        return [tensor] * count
    # One split for all: the gradient of each slice would have the size of the complete tensor.
    return tensor.split(size, axis)


def _in_blocks_of_queries(
    factors: _Factors, mask: Dual, block: int, *, is_causal: bool, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Return output and tangent, computed for as many queries at a time as fit into a block."""
    q, tangent_q, *rest = factors
    rows = q.shape[-2]
    size = min(rows, max(1, block // (q[..., 0].numel() // rows * factors.k.shape[-2])))
    # With dropout, a block that is computed again would drop other weights.
    recompute = torch.is_grad_enabled() and not dropout_p
    attend: Callable[..., tuple[Tensor, Tensor]] = _RecomputedAttention.apply if recompute else _attention
    of_rows = [_parts(tensor, size, -2, -(-rows // size)) for tensor in (q, tangent_q, *mask)]
    blocks = [
        attend(*some, *rest, i * size if is_causal else None, dropout_p)
        for i, some in enumerate(zip(*of_rows, strict=True))
    ]
    if len(blocks) == 1:
        return blocks[0]
    out, tangent = (torch.cat(parts, -2) for parts in zip(*blocks, strict=True))
    return out, tangent


def _attention(
    q: Tensor,
    tangent_q: Tensor | None,
    mask: Tensor | None,
    d_mask: Tensor | None,
    k: Tensor,
    tangent_k: Tensor | None,
    v: Tensor,
    values: Tensor,
    first: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Return output and tangent for a block of queries; ``_Factors`` describes most arguments.

    Args:
        first: the index of the first query, for causal attention; None: every query attends to all keys.
    """
    scores = q @ k.mT
    moved = None if tangent_q is None or tangent_k is None else tangent_q @ tangent_k.mT
    # A quarter of the most negative number: sums of a score and a mask stay finite.
    floor = torch.finfo(scores.dtype).min / 4
    if first is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + first)
        scores = scores.masked_fill(future, floor)
    if mask is not None:
        scores = scores.masked_fill(~mask, floor) if mask.dtype == torch.bool else scores + mask.clamp_min(floor)
        moved = d_mask if moved is None else moved if d_mask is None else moved + d_mask
    weights = scores.softmax(-1)
    dropout = F.dropout(torch.ones_like(weights), dropout_p) if dropout_p else None
    # One product for the output and the values' part of the tangent: the weights are read once.
    both = (weights if dropout is None else weights * dropout) @ values
    out, tangent = both[..., : v.shape[-1]], both[..., v.shape[-1] :]
    if moved is not None:
        # Without a graph the weights are not needed again, and their memory is reused.
        product = weights * moved if torch.is_grad_enabled() else weights.mul_(moved)
        through = (product if dropout is None else product * dropout) @ v - product.sum(-1, keepdim=True) * out
        tangent = tangent + through if tangent.shape[-1] else through
    return out, tangent


class _RecomputedAttention(torch.autograd.Function):
    """``_attention`` that saves its inputs alone and computes the weights again in the backward pass."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 those of _attention
        return _attention(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 torch's protocol
        *tensors, first, dropout_p = inputs
        ctx.save_for_backward(*tensors)
        ctx.rest = first, dropout_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 torch's protocol
        q, tangent_q, mask, _, k, tangent_k, v, values = ctx.saved_tensors
        # Self- and cross-attention of diffusers almost always take this path.
        if tangent_q is not None and mask is None and ctx.rest == (None, 0):
            of_q, of_tangent_q, *rest = _attention_backward(q, tangent_q, k, tangent_k, v, values, *gradients)
            return of_q, of_tangent_q, None, None, *rest, None, None
        # With a mask, autograd differentiates the formula.
        needed = ctx.needs_input_grad[: len(ctx.saved_tensors)]
        inputs: list[Any] = [
            None if tensor is None else tensor.detach().requires_grad_(needs_grad)
            for tensor, needs_grad in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = _attention(*inputs, *ctx.rest)
        differentiated = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, differentiated, gradients, allow_unused=True))
        return *(next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs), None, None


def _attention_backward(
    q: Tensor,
    tangent_q: Tensor,
    k: Tensor,
    tangent_k: Tensor,
    v: Tensor,
    values: Tensor,
    of_out: Tensor,
    of_tangent: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``_attention`` without a mask, in half of the passes over the weights of autograd.

    It is the derivative of ``out = W v`` and ``tangent = W dv + R v - rowsum(R) out`` with ``R = W * M``.

    Args:
        of_out, of_tangent: gradients of the loss in output and tangent.

    Returns:
        The gradients in q, tangent_q, k, tangent_k, v and values.
    """
    weights, moved = (q @ k.mT).softmax(-1), tangent_q @ tangent_k.mT
    product = weights * moved
    # The gradient of ``- rowsum(R) out`` in R: one number per row.
    of_sum = -torch.linalg.vecdot(of_tangent, weights @ v)[..., None]
    of_out = of_out - product.sum(-1, keepdim=True) * of_tangent
    of_both = of_out if values.shape[-1] == v.shape[-1] else torch.cat((of_out, of_tangent), -1)
    # In place from here on: these tensors have the size of the weights, the largest of a layer.
    of_product = (of_tangent @ v.mT).add_(of_sum)
    of_scores = (of_both @ values.mT).addcmul_(moved, of_product).mul_(weights)
    # The gradient of softmax, W (g - rowsum(W g)), with W g in of_scores already.
    of_scores.addcmul_(weights, of_scores.sum(-1, keepdim=True), value=-1)
    of_moved = of_product.mul_(weights)
    return (
        of_scores @ k,
        of_moved @ tangent_k,
        of_scores.mT @ q,
        of_moved.mT @ tangent_q,
        product.mT @ of_tangent,
        weights.mT @ of_both,
    )
