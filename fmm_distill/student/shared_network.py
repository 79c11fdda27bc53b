"""The network of a teacher that is its student's: one copy of the weights serves both."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SharedNetwork", "without_checkpointing"]


class SharedNetwork(nn.Module):
    """A student's network that is called as its teacher. It owns no weights.

    A scaled network is its teacher's without a jump, so it is called as it is.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # A tuple hides the network from torch: the student already counts, moves and saves these weights.
        self._network = (network,)

    @property
    def shared(self) -> nn.Module:
        """The network that is called."""
        return self._network[0]

    @property
    def config(self) -> Any:  # noqa: ANN401 a diffusers configuration
        """The configuration of the network."""
        return cast("Any", self.shared).config

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 the network's own
        """Call the network."""
        return self.shared(*args, **kwargs)


@contextmanager
def without_checkpointing(network: nn.Module) -> Iterator[None]:
    """Store the activations of a network's blocks during its calls in a ``with`` block.

    A block that is computed again in the backward pass would have other adapters than in the call.
    """
    blocks = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    for block in blocks:
        cast("Any", block).gradient_checkpointing = False
    try:
        yield
    finally:
        for block in blocks:
            cast("Any", block).gradient_checkpointing = True
