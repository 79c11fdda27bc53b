"""Two networks in the place of one, each for a range of noise levels.

Some pipelines have a network for high noise levels and another one for low ones, such as Wan 2.2 A14B. Together they
are one velocity field, which is discontinuous in time at the boundary. Its ODE has a flow map nevertheless, whose jumps
may cross the boundary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.parametrization import Call

__all__ = ["StagedNetwork", "parts_of", "stages_of"]


class StagedNetwork(nn.Module):
    """Two networks, of which the time of a sample selects one.

    The networks are modules under the names that they have in their pipeline.

    Args:
        high, low: the networks of high and of low noise levels.
        names: their names in the pipeline.
    """

    def __init__(self, high: nn.Module, low: nn.Module, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], high)
        self.add_module(names[1], low)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by their names, the one of high noise levels first."""
        return {name: self.get_submodule(name) for name in self.names}

    def map(self, change: Callable[[nn.Module], nn.Module]) -> StagedNetwork:
        """Return the two networks that ``change`` makes of these."""
        high, low = (change(part) for part in self.parts.values())
        return StagedNetwork(high, low, self.names)

    def forward(
        self,
        call: Call,
        x: Float[Tensor, "batch *event"],
        time: Float[Tensor, " batch"],
        cond: Conditioning | None,
        h: Float[Tensor, " batch"] | None,
        boundary: float,
    ) -> Float[Tensor, "batch *event"]:
        """Call each network for its samples, and return the outputs in the order of the samples.

        Args:
            call: calls one of the networks.
            boundary: the lowest time of the network of high noise levels.
        """
        networks = tuple(self.parts.values())
        is_high = time >= boundary
        rows = [each.nonzero()[:, 0] for each in (is_high, ~is_high)]
        used = [i for i in range(len(networks)) if len(rows[i])]
        if len(used) == 1:
            (only,) = used
            output = call(networks[only], x, time, cond, h)
            return output + _zero_of(networks[1 - only], output) if torch.is_grad_enabled() else output
        outputs = [
            call(
                network,
                x[index],
                time[index],
                None if cond is None else cond.rows(index),
                None if h is None else h[index],
            )
            for network, index in zip(networks, rows, strict=True)
        ]
        return torch.cat(outputs)[torch.cat(rows).argsort()]


def _zero_of(network: nn.Module, like: Tensor) -> Tensor | float:
    """Return a zero whose gradient with respect to every trained parameter is zero.

    Parameters without a gradient would depend on the times of a batch: processes that train together would wait for
    each other's, and optimizers would leave out steps.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    firsts = [parameter.reshape(-1)[:1] for parameter in trained if parameter.numel()]
    return 0.0 if not firsts else 0 * torch.cat([first.to(like.dtype) for first in firsts]).sum()


def stages_of(network: nn.Module) -> list[nn.Module]:
    """Return the networks of a staged one, or the network itself."""
    return list(network.parts.values()) if isinstance(network, StagedNetwork) else [network]


def parts_of(network: nn.Module, component: str) -> dict[str, Any]:
    """Return the components of a pipeline that a network consists of.

    Args:
        component: the name of a network that is no staged one.
    """
    return cast("dict[str, Any]", network.parts) if isinstance(network, StagedNetwork) else {component: network}
