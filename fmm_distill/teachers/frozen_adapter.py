"""The weights of an IP-Adapter in a network, without a place among the network's own weights.

Stock diffusers registers them as modules of the network. Then they would be trained, get adapters of their own, and be
saved in a form that stock diffusers can't open. Here the network refers to them, and torch does not know: its
parameters, state and configuration are those of the network without the adapter, and copies of the network share it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FrozenAdapter", "adapter_of", "share_adapter", "take_adapter"]

# The attribute of a network that has an adapter.
_ATTRIBUTE = "frozen_ip_adapter"
_PROJECTION, _TEXT_PROJECTION = "encoder_hid_proj", "text_encoder_hid_proj"
_PROCESSOR = "processor"


class _Shared:
    """A module that copies of a network share: it is not trained, and may be large."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class FrozenAdapter(_Shared, nn.Module):
    """The projection of image embeddings to tokens, and the attention processors that read them.

    Args:
        projection: the ``encoder_hid_proj`` of the network.
        processors: by the name of their attention layer.
    """

    def __init__(self, projection: nn.Module, processors: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = tuple(processors)
        self.projection, self.processors = projection, nn.ModuleList(processors.values())
        self.eval().requires_grad_(False)
        for module in (projection, *processors.values()):
            module.__class__ = _shared(cast("Any", type(module)))

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return cast("Tensor", next(self.parameters())).device

    def install(self, network: nn.Module) -> None:
        """Make a network without an adapter use this one."""
        # In the dictionary of the object: torch registers the modules that it sees as attributes.
        for name, processor in zip(self.layers, self.processors, strict=True):
            network.get_submodule(name).__dict__[_PROCESSOR] = processor
        if (own := network._modules.get(_PROJECTION)) is not None:
            # A projection of the text, which stock diffusers then expects by this name.
            network.__dict__[_TEXT_PROJECTION] = own
        network.__dict__ |= {_PROJECTION: self.projection, _ATTRIBUTE: self}
        network.register_forward_pre_hook(_announce)


@cache
def _shared(kind: Any) -> Any:  # noqa: ANN401 a class of modules
    """Return the class of a module that copies of a network share."""
    return type(f"Shared{kind.__name__}", (_Shared, kind), {})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _announce(network: nn.Module, _: object) -> None:
    """Set the type of the projection, by which a network decides how it calls it.

    It is an attribute of the configuration and no entry, so that saved configurations don't have it. Every change of
    the configuration makes a new one without it.
    """
    cast("Any", network).config.encoder_hid_dim_type = "ip_image_proj"


def take_adapter(network: nn.Module) -> FrozenAdapter:
    """Take the adapter that stock diffusers has loaded into a network out of its modules; the network still uses it."""
    found = cast("Any", network).attn_processors.items()
    processors = {name.removesuffix(f".{_PROCESSOR}"): one for name, one in found if isinstance(one, nn.Module)}
    for name in processors:
        del network.get_submodule(name)._modules[_PROCESSOR]
    projection = cast("nn.Module", network._modules.pop(_PROJECTION))
    # The text's own projection, which the loader has moved.
    network.__dict__[_PROJECTION] = None
    if (own := network._modules.pop(_TEXT_PROJECTION, None)) is not None:
        network._modules[_PROJECTION] = own
    adapter = FrozenAdapter(projection, processors)
    adapter.install(network)
    return adapter


def adapter_of(network: nn.Module) -> FrozenAdapter | None:
    """Return the adapter that a network uses; None: it has none."""
    found: FrozenAdapter | None = network.__dict__.get(_ATTRIBUTE)
    return found


def share_adapter(source: nn.Module, target: nn.Module) -> None:
    """Make a network use the adapter of another one of the same layers, where that has one."""
    if (adapter := adapter_of(source)) is not None:
        adapter.install(target)
