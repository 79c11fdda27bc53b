"""Layers whose weights change with the length h of the jump, ``W(h) = W + h dW``.

The file is part of the code that is saved with every exported student, so it imports torch alone.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

# A convolution whose kernel has one element, by the number of dimensions of its input.
_POINTWISE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
# Lengths of one group may differ by the rounding of float32, and by no more.
_EQUAL = 1e-5


class Jump(NamedTuple):
    """The condition of one call of a network.

    Attributes:
        h: the lengths of the jumps, shape ``[batch]``; None: the network is the stock one.
        fraction: the guidance as a fraction of its range, shape ``[batch]``; None: there is no range.
        group: the number of consecutive samples that share a length; 1: each has its own; 0: all share one.
        regression: the change at h = 0 is trained and all lengths are 0; else this change is constant.
    """

    h: torch.Tensor | None = None
    fraction: torch.Tensor | None = None
    group: int = 1
    regression: bool = False

    def check(self) -> None:
        """Fail if the samples of a group have different lengths, without waiting for a GPU."""
        size = 1 if self.h is None else self.group or len(self.h)
        if size > 1 and len(self.h) % size == 0:
            _check_equal(self.h.reshape(-1, size))

    def lengths_of_groups(self, rows: int) -> torch.Tensor | None:
        """Return one length per group of equally many rows of a layer's input; None: samples have their own."""
        h, size = self.h, self.group or len(self.h)
        if len(h) > 1 and (size == 1 or len(h) % size):
            return None
        lengths = h[::size]
        # A length with a tangent has the form of two products, whose derivative costs one more and not two.
        return lengths if rows % len(lengths) == 0 and not _has_tangent(h) else None

    def lengths_of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the lengths of the rows of a layer's input or output, shaped to be multiplied with it."""
        h = self.h.to(x.dtype)
        rows, rest = divmod(len(x), len(h))
        if rest:
            # Samples have different numbers of rows, for example of tokens: only one length for all is unambiguous.
            _check_equal(h[None])
            h, rows = h[:1], 1
        # Tokens, frames or windows of one sample are consecutive rows.
        return h.repeat_interleave(rows).reshape(-1, *[1] * (x.ndim - 1))


class Call:
    """The current call of a network, which all of its scaled layers read.

    Attributes:
        jump: of the current call.
        group, regression: of the calls to come; see ``Jump``.
    """

    def __init__(self) -> None:
        self.jump = Jump()
        self.group = 1
        self.regression = False

    def of(self, h: torch.Tensor | None, fraction: torch.Tensor | None) -> Jump:
        """Return the jump of a call with these lengths."""
        if h is None:
            return Jump()
        jump = Jump(h, fraction, self.group, self.regression)
        jump.check()
        return jump


def _check_equal(groups: torch.Tensor) -> None:
    equal = ((groups - groups[:, :1]).abs() <= _EQUAL).all()
    torch._assert_async(equal, "expected one length of the jump for all samples of a group, got several")


def _has_tangent(tensor: torch.Tensor) -> bool:
    # Forward mode is never compiled.
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None


class _Scaled:
    """The mixin that ``scale_layers`` adds to the class of a linear layer or a convolution.

    Of full rank the parameters are ``jump_weight`` and ``jump_bias``, of low rank ``jump_A`` and ``jump_B`` with
    ``dW = jump_B jump_A``. ``diagonal_A`` and ``diagonal_B`` are a change that does not depend on h.
    """

    def add_change(self, rank: int, call: Call, *, diagonal: bool) -> None:
        """Add the parameters of the change, which is zero at first. The network is not changed by them then."""
        self.call, self.jump_rank = call, rank
        if not rank:
            self.jump_weight = nn.Parameter(torch.zeros_like(self.weight))
            if self.bias is not None:
                self.jump_bias = nn.Parameter(torch.zeros_like(self.bias))
            return
        self.jump_A, self.jump_B = self._factors(rank)
        if diagonal:
            self.diagonal_A, self.diagonal_B = self._factors(rank)

    def _factors(self, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
        if isinstance(self, nn.Linear):
            inner, outer, ones = (self.in_features,), self.out_features, ()
        else:
            inner, outer, ones = (self.in_channels, *self.kernel_size), self.out_channels, self.kernel_size
        # Quantized weights have a dtype that nothing is trained in.
        floats = self.weight.dtype if self.weight.dtype in (torch.float32, torch.float64) else torch.float32
        kind = {"device": self.weight.device, "dtype": floats}
        first = torch.randn(rank, *inner, **kind) / torch.Size(inner).numel() ** 0.5
        return nn.Parameter(first), nn.Parameter(torch.zeros(outer, rank, *(1 for _ in ones), **kind))

    def change(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return dW and the change of the bias, None where there is none."""
        if not self.jump_rank:
            return self.jump_weight, getattr(self, "jump_bias", None)
        return product_of(self.jump_A, self.jump_B), None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.call.jump.h is None:
            return super().forward(input)
        return self._low_rank(input) if self.jump_rank else self._full_rank(input)

    def _full_rank(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, jump = self.weight, self.bias, self.call.jump
        if jump.regression:
            return self._product(x, weight, bias)
        if weight.requires_grad:
            # The regression has trained them; from then on the diagonal stays.
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        change = self.change()
        lengths = jump.lengths_of_groups(len(x))
        if lengths is None:
            moved = self._product(x, *change)
            # In the dtype of the product, which autocast chooses.
            return self._product(x, weight, bias) + jump.lengths_of_rows(moved) * moved
        # One product per group with the sum of both weights, in place of two products per sample.
        parts = zip(x.chunk(len(lengths)), lengths, strict=True) if len(lengths) > 1 else [(x, lengths[0])]
        outputs = [self._product(part, *_sums((weight, bias), change, h)) for part, h in parts]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _low_rank(self, x: torch.Tensor) -> torch.Tensor:
        y, jump = super().forward(x), self.call.jump
        if hasattr(self, "diagonal_A"):
            first, second = self.diagonal_A, self.diagonal_B
            if not jump.regression:
                first, second = first.detach(), second.detach()
            y = y + _mixed(self._product(x, first.to(x.dtype), None), second)
        if jump.regression:
            return y
        hidden = self._product(x, self.jump_A.to(x.dtype), None)
        # The smaller factor: there are fewer ranks than features.
        return y + _mixed(jump.lengths_of_rows(hidden) * hidden, self.jump_B)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias) if isinstance(self, nn.Linear) else self._conv_forward(x, weight, bias)


def _mixed(hidden: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    second = second.to(hidden.dtype)
    return F.linear(hidden, second) if second.ndim == 2 else _POINTWISE[second.ndim](hidden, second)


def _sums(base: tuple, change: tuple, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    (weight, bias), (d_weight, d_bias) = base, change
    return _sum(weight, d_weight, h), bias if d_bias is None else _sum(bias, d_bias, h)


def _sum(value: torch.Tensor, change: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    # In half precision the length itself would be rounded, and the product once more.
    precise = torch.promote_types(value.dtype, torch.float32)
    return (value.to(precise) + h * change.to(precise)).to(value.dtype)


def product_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the weight that the two factors of a low rank are, in the shape of the layer's."""
    return (second.flatten(1) @ first.flatten(1)).reshape(len(second), *first.shape[1:])


@functools.cache
def _scaled(kind: type) -> type:
    return type(f"Scaled{kind.__name__}", (_Scaled, kind), {"__module__": __name__})


def can_be_scaled(layer: nn.Module, rank: int) -> bool:
    """Return whether a layer is one that ``scale_layers`` takes: its output is a product of input and weight."""
    if isinstance(layer, nn.Linear):
        # A subclass may store its weight in another form, for example quantized.
        return rank > 0 or type(layer).forward is nn.Linear.forward
    convolution = next((k for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, k)), None)
    if convolution is None or type(layer).forward is not convolution.forward:
        return False
    # Adapters of a grouped convolution have no form that other tools read.
    return rank == 0 or layer.groups == 1


def scale_layers(network: nn.Module, ranks: dict[str, int], call: Call, *, diagonal: bool = False) -> None:
    """Give layers of a network a change of their weights that is multiplied by the length of the jump.

    Args:
        ranks: the rank of each layer's change, by the layer's name; 0: any rank, with a change of the bias.
        call: what the layers read the length from.
        diagonal: add a change of the same low rank that does not depend on the length.
    """
    for name, rank in ranks.items():
        layer = network.get_submodule(name)
        layer.__class__ = _scaled(type(layer))
        layer.add_change(rank, call, diagonal=diagonal)


def scaled_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the scaled layers of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _Scaled)}
