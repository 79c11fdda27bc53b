"""Forward-mode rules for layers of stock networks: where torch has none, or an expensive one.

A rule splits the layer's input into value and tangent and returns those of its output as one dual tensor. In reverse
over forward mode a rule saves its inputs alone, while torch saves every intermediate result of a formula. With
``graph`` False the tangent is computed without a graph next to a value with one, so that its intermediate results are
free again by the next layer.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fmm_distill.core.derivatives.attention import attention_jvp
from fmm_distill.core.derivatives.dual import Dual, has_tangent, make_dual, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Layer = Callable[..., Tensor]

__all__ = ["RULES"]

# One kernel on all devices; torch has no public name for it.
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def _linear(
    layer: Layer,
    graph: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,  # noqa: ANN401 arguments of the layer
    **more: Any,  # noqa: ANN401 arguments of the layer
) -> Tensor:
    """Apply a convolution or a linear layer: the tangent is the layer of the input's tangent, without the bias.

    torch's rule also applies the layer to the weight's tangent, which is zero: another convolution.
    """
    value, tangent = split(x)
    if tangent is None or has_tangent(weight, bias):
        return layer(x, weight, bias, *rest, **more)
    with torch.set_grad_enabled(graph):
        out_tangent = layer(tangent, weight, None, *rest, **more)
    return make_dual(layer(value, weight, bias, *rest, **more), out_tangent)


def _project(v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return ``rstd (v - mean(v) - x_hat mean(x_hat v))`` for every row: the Jacobian of x_hat in x, times v.

    The Jacobian is symmetric, so that the backward kernel of layer normalization computes the product.
    """
    projected: Tensor = _layer_norm_backward(v, x, x.shape[-1:], mean, rstd, None, None, (True, False, False))[0]
    return projected


class _NormalizedTangent(torch.autograd.Function):
    """The tangent of ``x_hat = (x - mean) rstd`` in every row, with its gradient in closed form."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return _project(dx, x, mean, rstd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ANN401 torch's protocol
        # The inputs and not the output, which networks scale in place.
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 torch's protocol
        x, dx, mean, rstd = ctx.saved_tensors
        tangent, back = _project(dx, x, mean, rstd), _project(gradient, x, mean, rstd)
        # Computed again instead of saved: it has the size of the input.
        x_hat = (x - mean) * rstd

        def mean_product(v: Tensor, w: Tensor) -> Tensor:
            return (v * w).mean(-1, keepdim=True)

        # The gradient of (gradient . tangent) in x, which changes rstd (first term) and x_hat (the other two).
        terms = (
            mean_product(gradient, tangent) * x_hat
            + mean_product(x_hat, dx) * back
            + mean_product(x_hat, gradient) * tangent
        )
        return -rstd * terms, back, None, None


def _normalized_tangent(x: Tensor, dx: Tensor, size: int, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """Return the tangent of x normalized in rows of ``size`` numbers, times a weight that broadcasts to x."""
    rows = (x.reshape(-1, size), dx.reshape(-1, size), mean.detach().reshape(-1, 1), rstd.detach().reshape(-1, 1))
    graph = torch.is_grad_enabled()
    flat: Tensor = _NormalizedTangent.apply(*rows) if graph else _project(rows[1], rows[0], *rows[2:])
    out_tangent = flat.reshape(x.shape)
    if weight is None:
        return out_tangent
    # In place where nothing else uses the tensor.
    return out_tangent * weight if graph else out_tangent.mul_(weight)


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
    """Apply group normalization.

    torch's rule fails on tensors that are not contiguous, returns a float32 tangent for an input in half precision, and
    launches a dozen kernels.
    """
    if weight is not None and weight.dtype != x.dtype:
        return _group_norm(layer, graph, x.to(weight.dtype), num_groups, weight, bias, eps).to(x.dtype)
    value, tangent = split(x)
    if tangent is None or has_tangent(weight, bias):
        return layer(x.contiguous(), num_groups, weight, bias, eps)
    value = value.contiguous()
    rows, channels = value.shape[:2]
    size = math.prod(value.shape[2:])
    # The native function also returns mean and rstd, of which the tangent is made.
    out, mean, rstd = torch.native_group_norm(value, weight, bias, rows, channels, size, num_groups, eps)
    with torch.set_grad_enabled(graph):
        scale = None if weight is None else weight.reshape(-1, *[1] * (x.ndim - 2))
        out_tangent = _normalized_tangent(value, tangent, channels // num_groups * size, mean, rstd, scale)
    return make_dual(out, out_tangent)


def _layer_norm(
    layer: Layer,
    graph: bool,
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Apply layer normalization.

    The tangent of torch (2.13) has a wrong gradient in x, which treats mean and deviation as constants.
    """
    value, tangent = split(x)
    other = weight is not None and weight.dtype != x.dtype
    if tangent is None or other or has_tangent(weight, bias):
        return layer(x, normalized_shape, weight, bias, eps)
    # As above: the tangent is made of mean and rstd.
    out, mean, rstd = torch.native_layer_norm(value, normalized_shape, weight, bias, eps)
    with torch.set_grad_enabled(graph):
        out_tangent = _normalized_tangent(value, tangent, math.prod(normalized_shape), mean, rstd, weight)
    return make_dual(out, out_tangent)


class _ElementwiseTangent(torch.autograd.Function):
    """The tangent ``dx f'(x)`` of an elementwise layer f, with its gradient in closed form."""

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
    """The derivatives of an elementwise layer f.

    Attributes:
        slope: returns ``gradient f'(x)`` for (gradient, x).
        second: returns ``f''(x)`` in new memory.
    """

    slope: Callable[[Tensor, Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def _silu_second(x: Tensor) -> Tensor:
    """Return ``s (1 - s) (2 + x (1 - 2 s))`` with s the sigmoid of x."""
    # In place on new tensors: the input belongs to the network.
    s = torch.sigmoid(x)
    factor = (1 - 2 * s).mul_(x).add_(2)
    return s.addcmul_(s, s, value=-1).mul_(factor)


def _gelu_second(x: Tensor) -> Tensor:
    """Return ``(2 - x^2) phi(x)`` with phi the normal density."""
    return x.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi)).mul_(2 - x.square())


def _gelu_tanh_second(x: Tensor) -> Tensor:
    """Return ``(1 - tanh^2) (w' + x w''/2 - x tanh w'^2)``, the second derivative of ``x (1 + tanh(w)) / 2``."""
    # w = a (x + b x^3), the constants of Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    a, b = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    first = (square * (3 * a * b)).add_(a)
    tanh = (square * (a * b)).add_(a).mul_(x).tanh_()
    bracket = first + square.mul_(3 * a * b)
    bracket.addcmul_(tanh * x, first.square_(), value=-1)
    return bracket.mul_(tanh.square_().neg_().add_(1))


_SILU = _Elementwise(torch.ops.aten.silu_backward, _silu_second)
_GELU = {
    approximate: _Elementwise(partial(torch.ops.aten.gelu_backward, approximate=approximate), second)
    for approximate, second in {"none": _gelu_second, "tanh": _gelu_tanh_second}.items()
}


def _silu(layer: Layer, graph: bool, x: Tensor, inplace: bool = False) -> Tensor:
    """Apply SiLU, in place by torch's own rule."""
    # A rule returns a new dual and cannot change the one that the network holds.
    return layer(x, inplace=True) if inplace else _elementwise(layer, graph, x, _SILU)


def _gelu(layer: Layer, graph: bool, x: Tensor, approximate: str = "none") -> Tensor:
    """Apply GELU: the gradient of torch's tangent is a dozen products."""
    return _elementwise(partial(layer, approximate=approximate), graph, x, _GELU[approximate])


def _elementwise(layer: Layer, graph: bool, x: Tensor, kind: _Elementwise) -> Tensor:
    value, tangent = split(x)
    if tangent is None:
        return layer(x)
    with torch.set_grad_enabled(graph):
        out_tangent: Tensor = _ElementwiseTangent.apply(value, tangent, kind) if graph else kind.slope(tangent, value)
    return make_dual(layer(value), out_tangent)


def _sum(layer: Layer, graph: bool, x: Tensor, other: Tensor | float, **more: Any) -> Tensor:  # noqa: ANN401 arguments of the layer
    """Add or subtract: torch's rules allocate zeros for the tangent of a constant operand."""
    da: Any
    db: Any
    (a, da), (b, db) = split(x), split(other)
    if more or (da is None and db is None):
        return layer(x, other, **more)
    with torch.set_grad_enabled(graph):
        # A tensor of its own, not the operand's tangent: the network may change the sum in place.
        if da is not None and db is not None:
            out_tangent = layer(da, db)
        elif da is not None:
            out_tangent = da.clone()
        else:
            out_tangent = -db if layer is torch.Tensor.sub else db.clone()
    return make_dual(layer(a, b), out_tangent)


def _product(layer: Layer, graph: bool, x: Tensor, other: Tensor | float) -> Tensor:
    """Multiply, without the zero tangent of a constant operand."""
    (a, da), (b, db) = split(x), split(other)
    if da is None and db is None:
        return layer(x, other)
    with torch.set_grad_enabled(graph):
        # The product rule; at most one part for a constant operand.
        parts = [d * factor for d, factor in ((da, b), (db, a)) if d is not None]
        out_tangent = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return make_dual(layer(a, b), out_tangent)


def _quotient(layer: Layer, graph: bool, x: Tensor, other: Tensor | float, **more: Any) -> Tensor:  # noqa: ANN401 arguments of the layer
    """Divide by a constant; other quotients have torch's rule."""
    (a, da), (b, db) = split(x), split(other)
    if more or da is None or db is not None:
        return layer(x, other, **more)
    with torch.set_grad_enabled(graph):
        out_tangent = da / b
    return make_dual(layer(a, b), out_tangent)


def _softmax(
    layer: Layer,
    graph: bool,
    x: Tensor,
    dim: int | None,
    *rest: Any,  # noqa: ANN401 the layer's own
    dtype: torch.dtype | None = None,
    # An argument of F.softmax, without effect here.
    _stacklevel: int = 3,
) -> Tensor:
    """Apply softmax: outside of torch.func, torch's rule overwrites a tensor that its own gradient needs."""
    # As a positional argument the dtype is the last; F.softmax has another argument before it.
    dtype = rest[-1] if rest and isinstance(rest[-1], torch.dtype) else dtype
    value, tangent = split(x if dtype is None else x.to(dtype))
    # torch chooses the dimension itself if dim is None, with a deprecation warning.
    if tangent is None or dim is None:
        return layer(x, dim, dtype=dtype)
    out = layer(value, dim)
    with torch.set_grad_enabled(graph):
        # The Jacobian of softmax, diag(out) - out out^T, times the tangent.
        product = out * tangent
        out_tangent = product - out * product.sum(dim, keepdim=True)
    return make_dual(out, out_tangent)


def _broadcast(*duals: Dual) -> list[Dual]:
    """Expand the duals to the same samples and heads."""
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
    """Apply scaled dot-product attention: torch's fused kernels have no forward-mode rule.

    If the tangent has no graph and the value has one, the fused kernel computes the value.
    """

    def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return layer(query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if not has_tangent(query, key, value, attn_mask):
        return fused(query, key, value, attn_mask)
    # With dropout, a second computation would drop other weights than the tangent has dropped.
    separate = torch.is_grad_enabled() and not graph and not dropout_p
    out = fused(*(split(tensor).value for tensor in (query, key, value, attn_mask))) if separate else None
    with torch.set_grad_enabled(torch.is_grad_enabled() and not separate):
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            # Fused kernels repeat the shared heads themselves; the blocks of heads here need them all.
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v, mask = (split(tensor) for tensor in (query, key, value, attn_mask))
        if (lead := query.shape[:-2]) != key.shape[:-2] or lead != value.shape[:-2]:
            q, k, v = _broadcast(q, k, v)
        # Scaled once on the queries, which are smaller than the scores.
        q = Dual(q.value * scale, None if q.tangent is None else q.tangent * scale)
        found, out_tangent = attention_jvp(q, k, v, mask, is_causal=is_causal, dropout_p=dropout_p)
    return make_dual(found if out is None else out, out_tangent)


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
"""Functions that a network calls, and their rules.

A rule takes the function itself, whether the tangent has a graph, and the arguments of the call.
"""
