"""Forward-mode rules for the layers of stock networks: what torch has no rule for, and what its rules make dear.

A rule gets value and tangent of a layer's input apart and returns both of its output. In reverse over forward mode each
saves its inputs alone, where torch saves every step of a formula.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Layer = Callable[..., Tensor]

__all__ = ["RULES"]

# Attention weights of one block: 16 MiB in float32. More of them are computed block by block.
BLOCK = 2**22

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward
_silu_backward = torch.ops.aten.silu_backward


class _Dual(NamedTuple):
    """A value and its tangent, None where it does not move."""

    value: Tensor
    tangent: Tensor | None


def _split(tensor: Tensor | None) -> _Dual:
    return _Dual(*(forward_ad.unpack_dual(tensor) if tensor is not None else (tensor, None)))


def _moves(*tensors: Tensor | None) -> bool:
    return any(_split(tensor).tangent is not None for tensor in tensors)


def _linear(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any) -> Tensor:  # noqa: ANN401 the layer's own
    """Convolutions and linear layers: torch's rule takes the layer of x with the weight's zero tangent too."""
    value, tangent = _split(x)
    if tangent is None or _moves(weight, bias):
        return layer(x, weight, bias, *rest, **more)
    moved = layer(tangent, weight, None, *rest, **more)
    return forward_ad.make_dual(layer(value, weight, bias, *rest, **more), moved)


def _project(v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """``rstd (v - mean(v) - x_hat mean(x_hat v))`` in every row: the derivative of x_hat in x, a symmetric matrix.

    So it is what layer normalisation computes in its backward pass, in one kernel.
    """
    projected: Tensor = _layer_norm_backward(v, x, x.shape[-1:], mean, rstd, None, None, (True, False, False))[0]
    return projected


class _Normalised(torch.autograd.Function):
    """The tangent of ``x_hat = (x - mean) rstd`` in every row."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return _project(dx, x, mean, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401 torch's protocol
        # Not the output: networks scale it in place.
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 torch's protocol
        x, dx, mean, rstd = ctx.saved_tensors
        tangent, back = _project(dx, x, mean, rstd), _project(gradient, x, mean, rstd)
        x_hat = (x - mean) * rstd

        def along(v: Tensor, w: Tensor) -> Tensor:
            return (v * w).mean(-1, keepdim=True)

        # Of (gradient . tangent): rstd is one factor of it, the projection on x_hat the other that x moves.
        turned = along(gradient, tangent) * x_hat + along(x_hat, dx) * back + along(x_hat, gradient) * tangent
        return -rstd * turned, back, None, None


def _normalised(x: Tensor, dx: Tensor, size: int, mean: Tensor, rstd: Tensor) -> Tensor:
    """The tangent of x normalised in rows of this size, without weight and bias."""
    rows = (x.reshape(-1, size), dx.reshape(-1, size), mean.detach().reshape(-1, 1), rstd.detach().reshape(-1, 1))
    moved: Tensor = _Normalised.apply(*rows) if torch.is_grad_enabled() else _project(rows[1], rows[0], *rows[2:])
    return moved.reshape(x.shape)


def _group_norm(
    layer: Layer,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Torch's rule wants contiguous memory, returns a float32 tangent in half precision, and takes a dozen kernels."""
    if weight is not None and weight.dtype != x.dtype:
        return _group_norm(layer, x.to(weight.dtype), num_groups, weight, bias, eps).to(x.dtype)
    value, tangent = _split(x.contiguous())
    if tangent is None or _moves(weight, bias):
        return layer(x.contiguous(), num_groups, weight, bias, eps)
    rows, channels = value.shape[:2]
    size = value[0, 0].numel()
    out, mean, rstd = torch.native_group_norm(value, weight, bias, rows, channels, size, num_groups, eps)
    moved = _normalised(value, tangent, channels // num_groups * size, mean, rstd)
    return forward_ad.make_dual(out, moved if weight is None else moved * weight.reshape(-1, *[1] * (x.ndim - 2)))


def _layer_norm(
    layer: Layer,
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Torch's own tangent (2.13) has a wrong gradient in x: it takes mean and deviation for constants there."""
    value, tangent = _split(x)
    other = weight is not None and weight.dtype != x.dtype
    if tangent is None or other or _moves(weight, bias):
        return layer(x, normalized_shape, weight, bias, eps)
    out, mean, rstd = torch.native_layer_norm(value, normalized_shape, weight, bias, eps)
    moved = _normalised(value, tangent, math.prod(normalized_shape), mean, rstd)
    return forward_ad.make_dual(out, moved if weight is None else moved * weight)


class _SiluTangent(torch.autograd.Function):
    """``dx silu'(x)``."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor) -> Tensor:
        moved: Tensor = _silu_backward(dx, x)
        return moved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401 torch's protocol
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 torch's protocol
        x, dx = ctx.saved_tensors
        s = torch.sigmoid(x)
        second = s * (1 - s) * (2 + x * (1 - 2 * s))
        return gradient * dx * second, _silu_backward(gradient, x)


def _silu(layer: Layer, x: Tensor, inplace: bool = False) -> Tensor:
    value, tangent = _split(x)
    if tangent is None or inplace:
        return layer(x, inplace=inplace)
    moved = _SiluTangent.apply(value, tangent) if torch.is_grad_enabled() else _silu_backward(tangent, value)
    return forward_ad.make_dual(layer(value), moved)


def _attention(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention; torch's fused kernels have no rule.

    Masked scores get a finite floor: a row with every key masked would otherwise give NaN in reverse over forward.
    """
    if not _moves(query, key, value, attn_mask):
        return layer(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (q, dq), (k, dk), (v, dv), (mask, d_mask) = map(_split, (query * scale, key, value, attn_mask))
    rows = q.shape[-2]
    size = min(rows, max(1, BLOCK // (q[..., 0].numel() // rows * k.shape[-2])))
    # What is left out at random would be another when a block is computed again.
    again = size < rows and torch.is_grad_enabled() and not dropout_p
    attend: Callable[..., tuple[Tensor, Tensor]] = _AttendedAgain.apply if again else _attended
    blocks = []
    for first in range(0, rows, size):
        of_rows = [_rows(tensor, first, size) for tensor in (q, dq, mask, d_mask)]
        blocks.append(attend(*of_rows, k, dk, v, dv, first if is_causal else None, dropout_p))
    if len(blocks) == 1:
        return forward_ad.make_dual(*blocks[0])
    return forward_ad.make_dual(*(torch.cat(parts, -2) for parts in zip(*blocks, strict=True)))


def _rows(tensor: Tensor | None, first: int, size: int) -> Tensor | None:
    """Some rows; all of what is the same in each, as some masks are."""
    if tensor is None or tensor.shape[-2] in (1, size):
        return tensor
    return tensor[..., first : first + size, :]


def _attended(
    q: Tensor,
    dq: Tensor | None,
    mask: Tensor | None,
    d_mask: Tensor | None,
    k: Tensor,
    dk: Tensor | None,
    v: Tensor,
    dv: Tensor | None,
    first: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Attention of some queries and its tangent; ``first``: the place of the first, where later keys are masked."""
    scores, moved = q @ k.mT, _sum_of_products((dq, k.mT), (q, None if dk is None else dk.mT))
    floor = torch.finfo(scores.dtype).min / 4
    if first is not None:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1 + first)
        scores = scores.masked_fill(future, floor)
    if mask is not None:
        scores = scores.masked_fill(~mask, floor) if mask.dtype == torch.bool else scores + mask.clamp_min(floor)
        moved = d_mask if moved is None else moved if d_mask is None else moved + d_mask
    weights = scores.softmax(-1)
    kept = F.dropout(torch.ones_like(weights), dropout_p) if dropout_p else None
    applied = weights if kept is None else weights * kept
    out = applied @ v
    tangent = _sum_of_products((applied, dv))
    if moved is not None:
        turned = weights * moved
        through = (turned if kept is None else turned * kept) @ v - turned.sum(-1, keepdim=True) * out
        tangent = through if tangent is None else tangent + through
    assert tangent is not None
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


def _sum_of_products(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """``a @ b`` of those that there are: one product over both inner dimensions, so that the sum takes no pass."""
    there = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not there:
        return None
    left, right = zip(*there, strict=True)
    if len(there) == 1:
        return left[0] @ right[0]
    return torch.cat(left, -1) @ torch.cat(right, -2)


RULES: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.conv1d: _linear,
    F.conv2d: _linear,
    F.conv3d: _linear,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.silu: _silu,
    F.scaled_dot_product_attention: _attention,
}
"""By what a network calls: the layer itself, its arguments, and what it returns."""
