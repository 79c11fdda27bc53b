"""Forward-mode rules for the layers of stock networks: what torch has no rule for, and what its rules make dear.

A rule gets value and tangent of a layer's input apart and returns both of its output. In reverse over forward mode each
saves its inputs alone, where torch saves every step of a formula. Told that the tangent has no graph, a rule leaves the
value's as it is and computes the tangent beside it: what is only needed on the way is gone by the next layer.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fmm_distill.core.derivatives.attention import attended
from fmm_distill.core.derivatives.dual import Dual, moves, split, together

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Layer = Callable[..., Tensor]

__all__ = ["RULES"]

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def _linear(
    layer: Layer,
    graph: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,  # noqa: ANN401 the layer's own
    **more: Any,  # noqa: ANN401 as above
) -> Tensor:
    """Convolutions and linear layers: torch's rule takes the layer of x with the weight's zero tangent too."""
    value, tangent = split(x)
    if tangent is None or moves(weight, bias):
        return layer(x, weight, bias, *rest, **more)
    with torch.set_grad_enabled(graph):
        moved = layer(tangent, weight, None, *rest, **more)
    return together(layer(value, weight, bias, *rest, **more), moved)


def _project(v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """``rstd (v - mean(v) - x_hat mean(x_hat v))`` in every row: the derivative of x_hat in x, a symmetric matrix.

    So it is what layer normalization computes in its backward pass, in one kernel.
    """
    projected: Tensor = _layer_norm_backward(v, x, x.shape[-1:], mean, rstd, None, None, (True, False, False))[0]
    return projected


class _Normalized(torch.autograd.Function):
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


def _normalized(x: Tensor, dx: Tensor, size: int, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """The tangent of x normalized in rows of this size, times a weight of the right shape."""
    rows = (x.reshape(-1, size), dx.reshape(-1, size), mean.detach().reshape(-1, 1), rstd.detach().reshape(-1, 1))
    moved: Tensor = _Normalized.apply(*rows) if torch.is_grad_enabled() else _project(rows[1], rows[0], *rows[2:])
    moved = moved.reshape(x.shape)
    if weight is None:
        return moved
    return moved * weight if torch.is_grad_enabled() else moved.mul_(weight)


def _group_norm(
    layer: Layer,
    graph: bool,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Torch's rule wants contiguous memory, returns a float32 tangent in half precision, and takes a dozen kernels."""
    if weight is not None and weight.dtype != x.dtype:
        return _group_norm(layer, graph, x.to(weight.dtype), num_groups, weight, bias, eps).to(x.dtype)
    value, tangent = split(x)
    if tangent is None or moves(weight, bias):
        return layer(x.contiguous(), num_groups, weight, bias, eps)
    value = value.contiguous()
    rows, channels = value.shape[:2]
    size = math.prod(value.shape[2:])
    out, mean, rstd = torch.native_group_norm(value, weight, bias, rows, channels, size, num_groups, eps)
    with torch.set_grad_enabled(graph):
        scale = None if weight is None else weight.reshape(-1, *[1] * (x.ndim - 2))
        moved = _normalized(value, tangent, channels // num_groups * size, mean, rstd, scale)
    return together(out, moved)


def _layer_norm(
    layer: Layer,
    graph: bool,
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Torch's own tangent (2.13) has a wrong gradient in x: it takes mean and deviation for constants there."""
    value, tangent = split(x)
    other = weight is not None and weight.dtype != x.dtype
    if tangent is None or other or moves(weight, bias):
        return layer(x, normalized_shape, weight, bias, eps)
    out, mean, rstd = torch.native_layer_norm(value, normalized_shape, weight, bias, eps)
    with torch.set_grad_enabled(graph):
        moved = _normalized(value, tangent, math.prod(normalized_shape), mean, rstd, weight)
    return together(out, moved)


class _ElementwiseTangent(torch.autograd.Function):
    """``dx f'(x)`` of a layer ``f`` that takes each number by itself."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor, kind: _Elementwise) -> Tensor:
        return kind.slope(dx, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401 torch's protocol
        *tensors, ctx.kind = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 torch's protocol
        x, dx = ctx.saved_tensors
        return ctx.kind.second(x).mul_(gradient).mul_(dx), ctx.kind.slope(gradient, x), None


class _Elementwise(NamedTuple):
    """Of layers that take each number by itself: ``gradient f'(x)``, and ``f''(x)`` in new memory."""

    slope: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def _silu_second(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    turned = (1 - 2 * s).mul_(x).add_(2)
    return s.addcmul_(s, s, value=-1).mul_(turned)


def _gelu_second(x: Tensor) -> Tensor:
    return x.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi)).mul_(2 - x.square())


def _gelu_tanh_second(x: Tensor) -> Tensor:
    """Of ``x (1 + tanh(w)) / 2`` with ``w = a (x + b x^3)``: ``(1 - tanh^2) (w' + x w''/2 - x tanh w'^2)``."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    first = (square * (3 * a * b)).add_(a)
    tanh = (square * (a * b)).add_(a).mul_(x).tanh_()
    rising = first + square.mul_(3 * a * b)
    rising.addcmul_(tanh * x, first.square_(), value=-1)
    return rising.mul_(tanh.square_().neg_().add_(1))


_SILU = _Elementwise(torch.ops.aten.silu_backward, _silu_second)
_GELU = {
    approximate: _Elementwise(partial(torch.ops.aten.gelu_backward, approximate=approximate), second)
    for approximate, second in {"none": _gelu_second, "tanh": _gelu_tanh_second}.items()
}


def _silu(layer: Layer, graph: bool, x: Tensor, inplace: bool = False) -> Tensor:
    return layer(x, inplace=True) if inplace else _elementwise(layer, graph, x, _SILU)


def _gelu(layer: Layer, graph: bool, x: Tensor, approximate: str = "none") -> Tensor:
    """Torch's rule has the right tangent; its gradient is a dozen products."""
    return _elementwise(partial(layer, approximate=approximate), graph, x, _GELU[approximate])


def _elementwise(layer: Layer, graph: bool, x: Tensor, kind: _Elementwise) -> Tensor:
    value, tangent = split(x)
    if tangent is None:
        return layer(x)
    with torch.set_grad_enabled(graph):
        moved: Tensor = _ElementwiseTangent.apply(value, tangent, kind) if graph else kind.slope(tangent, value)
    return together(layer(value), moved)


def _sum(layer: Layer, graph: bool, x: Tensor, other: Tensor | float, **more: Any) -> Tensor:  # noqa: ANN401 the layer's own
    """Sums and differences: torch's rules of arithmetic make a tangent of zeros for what does not move."""
    da: Any
    db: Any
    (a, da), (b, db) = split(x), split(other)
    if more or (da is None and db is None):
        return layer(x, other, **more)
    with torch.set_grad_enabled(graph):
        # A tangent of its own: the network may change the sum in place.
        if da is not None and db is not None:
            moved = layer(da, db)
        elif da is not None:
            moved = da.clone()
        else:
            moved = -db if layer is torch.Tensor.sub else db.clone()
    return together(layer(a, b), moved)


def _product(layer: Layer, graph: bool, x: Tensor, other: Tensor | float) -> Tensor:
    (a, da), (b, db) = split(x), split(other)
    if da is None and db is None:
        return layer(x, other)
    with torch.set_grad_enabled(graph):
        parts = [d * factor for d, factor in ((da, b), (db, a)) if d is not None]
        moved = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return together(layer(a, b), moved)


def _quotient(layer: Layer, graph: bool, x: Tensor, other: Tensor | float, **more: Any) -> Tensor:  # noqa: ANN401 the layer's own
    (a, da), (b, db) = split(x), split(other)
    if more or da is None or db is not None:
        return layer(x, other, **more)
    with torch.set_grad_enabled(graph):
        moved = da / b
    return together(layer(a, b), moved)


def _softmax(
    layer: Layer,
    graph: bool,
    x: Tensor,
    dim: int | None,
    *rest: Any,  # noqa: ANN401 the layer's own
    dtype: torch.dtype | None = None,
    _stacklevel: int = 3,
) -> Tensor:
    """Torch's rule works in place on what its gradient needs, where torch.func does not wrap the tensors."""
    # By place it comes last, after what F.softmax has besides.
    dtype = rest[-1] if rest and isinstance(rest[-1], torch.dtype) else dtype
    value, tangent = split(x if dtype is None else x.to(dtype))
    if tangent is None or dim is None:
        return layer(x, dim, dtype=dtype)
    out = layer(value, dim)
    with torch.set_grad_enabled(graph):
        rising = out * tangent
        moved = rising - out * rising.sum(dim, keepdim=True)
    return together(out, moved)


def _broadcast(*duals: Dual) -> list[Dual]:
    """With the same samples and heads."""
    lead = torch.broadcast_shapes(*(dual.value.shape[:-2] for dual in duals))
    return [
        Dual(*(tensor if tensor is None else tensor.expand(*lead, *tensor.shape[-2:]) for tensor in dual))
        for dual in duals
    ]


def _attention(
    layer: Layer,
    graph: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's fused kernels have no rule. Where only the value has a graph they take it, and the tangent is beside."""

    def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return layer(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if not moves(query, key, value, attn_mask):
        return fused(query, key, value, attn_mask)
    # What is left out at random would be another beside it.
    beside = torch.is_grad_enabled() and not graph and not dropout_p
    out = fused(*(split(tensor).value for tensor in (query, key, value, attn_mask))) if beside else None
    with torch.set_grad_enabled(torch.is_grad_enabled() and not beside):
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v, mask = (split(tensor) for tensor in (query, key, value, attn_mask))
        if (lead := query.shape[:-2]) != key.shape[:-2] or lead != value.shape[:-2]:
            q, k, v = _broadcast(q, k, v)
        q = Dual(q.value * scale, None if q.tangent is None else q.tangent * scale)
        found, moved = attended(q, k, v, mask, is_causal=is_causal, dropout_p=dropout_p)
    return together(found if out is None else out, moved)


RULES: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.conv1d: _linear,
    F.conv2d: _linear,
    F.conv3d: _linear,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.silu: _silu,
    F.gelu: _gelu,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    torch.Tensor.softmax: _softmax,
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.add: _sum,
    torch.Tensor.sub: _sum,
    torch.Tensor.mul: _product,
    torch.Tensor.div: _quotient,
}
"""By what a network calls: the layer itself, its arguments, and what it returns."""
