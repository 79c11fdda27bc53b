"""Forward-mode differentiation of stock diffusers networks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch.overrides import TorchFunctionMode

from fmm_distill.core.derivatives.dual import without_tangents
from fmm_distill.core.derivatives.precision import full_precision
from fmm_distill.core.derivatives.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["StockNetworks", "jvp"]


class StockNetworks(TorchFunctionMode):
    """A function mode that replaces layers of stock networks by the rules of ``core.derivatives.rules``.

    torch has no forward-mode rule for fused attention, its rule for ``group_norm`` fails on some inputs, and other
    rules of torch launch more kernels than necessary.

    Args:
        detached: values have a graph, tangents have none.
    """

    def __init__(self, *, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 torch's protocol
        """Call the rule of a layer, or the layer itself if it has none (the protocol of torch's function modes)."""
        kwargs = dict(kwargs or {})
        # Every call of torch passes here, so the lookup is one dictionary access.
        rule = RULES.get(func)
        if rule is None:
            return func(*args, **kwargs)
        # Rules take the layer's input by position; layers may be called with it as the keyword ``input``.
        given = (*args, kwargs.pop("input")) if "input" in kwargs else args
        return rule(func, torch.is_grad_enabled() and not self.detached, *given, **kwargs)


def jvp(
    function: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    *,
    detached: bool = False,
    functional: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the value of a function and its Jacobian-vector product.

    Args:
        detached: the product has no graph, while the value has one.
        functional: use ``torch.func.jvp`` where there is a graph (see ``FlowMap.needs_functional_jvp``).

    Raises:
        RuntimeError: in ``torch.inference_mode``, where torch silently drops tangents.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("expected torch.no_grad, got torch.inference_mode, in which forward mode has no tangents")
    # A compiled network has no tangents, and without a graph torch does not even raise an error.
    eager = torch.compiler.set_stance("force_eager")
    if functional and torch.is_grad_enabled():
        with eager, StockNetworks(), full_precision(primals[0]):
            return torch.func.jvp(function, primals, tangents)[:2]
    # Not torch.func.jvp: it wraps every tensor, which takes a sixth of the time of a training step.
    saved = without_tangents() if detached else contextlib.nullcontext()
    with eager, StockNetworks(detached=detached), full_precision(primals[0]), forward_ad.dual_level(), saved:
        duals = [forward_ad.make_dual(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True)]
        value, product = forward_ad.unpack_dual(function(*duals))
    if product is None:
        # None: no primal reaches the output, as in a network that ignores its time.
        product = torch.zeros_like(value)
    # The rules make the tangent without a graph, but torch's own tangents of other operations have one.
    return value, product.detach() if detached else product
