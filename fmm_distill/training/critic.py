"""The critic: a network that starts as the teacher and learns the velocity of the student's samples."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from torch import nn

from fmm_distill.student.lora import lora_layers
from fmm_distill.student.scaled_adapters import without_changes
from fmm_distill.student.scaled_layers import scaled_layers
from fmm_distill.student.shared_network import SharedNetwork, without_checkpointing
from fmm_distill.teachers.velocity_field import VelocityNetwork
from fmm_distill.training.compile import network_of
from fmm_distill.training.ema import load_trained

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.teachers.base import Distillable, Teacher

__all__ = ["AdaptedNetwork", "Critic", "DiagonalCritic", "build_critic", "reset_critic"]

# A convolution whose kernel has one element, by the number of dimensions of its input.
_POINTWISE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Critic(nn.Module):
    """The velocity of the student's samples, ``v_F(x, t) = E[eps - x_0 | x_t = x]`` over generated x_0.

    Args:
        network: called as the teacher's network is.
    """

    def __init__(self, network: nn.Module, parametrization: Parametrization) -> None:
        super().__init__()
        self.network, self.parametrization = network, parametrization

    @property
    def called(self) -> nn.Module:
        """The module whose network the velocity is computed with."""
        return self

    @property
    def own_network(self) -> nn.Module | None:
        """The network with all its weights; None: the critic has adapters on the teacher's."""
        return None if isinstance(self.network, AdaptedNetwork) else self.network

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Return the velocity at x and t, shape ``[batch, *event]``."""
        # The samples of a guided student are a distribution of their own, so the critic is not guided again.
        cond = None if cond is None else cond.unguided()
        return self.parametrization.velocity(self.network, x, t, cond)


class DiagonalCritic(nn.Module):
    """A critic for a teacher without a network: a copy of the student, ``v_F(x, t) = u(x, t, t)``."""

    def __init__(self, student: LearnedFlowMap) -> None:
        super().__init__()
        self.flow_map = copy.deepcopy(student).requires_grad_()

    @property
    def called(self) -> nn.Module:
        """The module whose network the velocity is computed with."""
        return self.flow_map

    @property
    def own_network(self) -> nn.Module:
        """The network with all its weights."""
        return network_of(self.flow_map)

    def velocity(
        self, x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Return the velocity at x and t, shape ``[batch, *event]``."""
        return self.flow_map.mean_velocity(x, t, t, cond)


class AdaptedNetwork(nn.Module):
    """The teacher's network with adapters of low rank, which are its only parameters.

    Teacher, student and critic so have one copy of the large weights. The adapters act during a call of this module
    alone, which is never compiled.

    Args:
        network: the teacher's network, which is also the student's.
        layers: the layers that get adapters, by name: those that the student has adapters on.
        seed: of the adapters' first factors; the second ones are zero.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module], rank: int, *, seed: int) -> None:
        super().__init__()
        # Tuples hide the modules from torch: the student already counts, moves and saves these weights.
        self._network, self._layers = (network,), tuple(layers.values())
        self.first, self.second = nn.ParameterList(), nn.ParameterList()
        for layer in self._layers:
            inner, outer = _widths(layer)
            self.first.append(nn.Parameter(torch.empty(rank, *inner)))
            self.second.append(nn.Parameter(torch.empty(outer, rank, *(1 for _ in inner[1:]))))
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw the first factors and set the second ones to zero: the network is the teacher's then."""
        generator = torch.Generator().manual_seed(seed)
        for first, second in zip(self.first, self.second, strict=True):
            first.copy_(torch.randn(first.shape, generator=generator) / first[0].numel() ** 0.5)
            second.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy with adapters of its own on the same network."""
        other = copy.copy(self)
        memo[id(self)] = other
        # A module's dictionaries are shared by its shallow copy.
        other._modules = {name: copy.deepcopy(module, memo) for name, module in self._modules.items()}
        return other

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 the network's own
        """Call the network with the adapters."""
        (network,) = self._network
        with ExitStack() as attached, without_checkpointing(cast("nn.Module", getattr(network, "shared", network))):
            for layer, first, second in zip(self._layers, self.first, self.second, strict=True):
                hook = partial(_add, first=first, second=second)
                attached.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            # Compiled code of an earlier call is not checked for hooks, so it would leave the adapters out.
            attached.enter_context(torch.compiler.set_stance("force_eager"))
            return network(*args, **kwargs)


def _widths(layer: nn.Module) -> tuple[tuple[int, ...], int]:
    """Return the shape of a row of a layer's weight and the number of rows."""
    # peft's layers have the network's own inside.
    base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]
    if isinstance(base, nn.Linear):
        return (base.in_features,), base.out_features
    return (base.in_channels, *base.kernel_size), base.out_channels


def _add(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, *, first: Tensor, second: Tensor
) -> Tensor:
    """Return the output of a layer with the product of its input and the two factors added."""
    x = next(iter((*args, *kwargs.values())))
    first = first.to(x.dtype)
    hidden = F.linear(x, first) if first.ndim == 2 else cast("Any", layer)._conv_forward(x, first, None)
    second = second.to(hidden.dtype)
    return output + (F.linear(hidden, second) if second.ndim == 2 else _POINTWISE[second.ndim](hidden, second))


def build_critic(student: LearnedFlowMap, teacher: Distillable, rank: int, *, seed: int) -> Critic | DiagonalCritic:
    """Return a critic that equals the teacher's conditional velocity until it is trained.

    A student of full rank has a critic with all weights, and one with adapters a critic with adapters.

    Args:
        rank: of the adapters; 0: the critic is a copy of the teacher's network.
    """
    network: nn.Module | None = getattr(teacher, "network", None)
    if network is None or isinstance(network, VelocityNetwork):
        return DiagonalCritic(student)
    parametrization = cast("Teacher", teacher).parametrization
    if rank:
        layers = scaled_layers(network_of(student)) or lora_layers(network_of(student))
        return Critic(AdaptedNetwork(network, layers, rank, seed=seed), parametrization)
    own = without_changes(network.shared) if isinstance(network, SharedNetwork) else copy.deepcopy(network)
    return Critic(own.requires_grad_().eval(), parametrization)


def reset_critic(critic: Critic | DiagonalCritic, student: LearnedFlowMap, teacher: Distillable, *, seed: int) -> None:
    """Give a critic the weights that it is built with, those of the teacher or of the student's diagonal, in place."""
    if isinstance(critic, DiagonalCritic):
        load_trained(critic.flow_map, critic.flow_map, dict(student.state_dict()))
    elif isinstance(critic.network, AdaptedNetwork):
        critic.network.reset(seed)
    else:
        network = cast("Teacher", teacher).network
        weights = getattr(network, "shared", network).state_dict()
        # The network that the teacher shares with a scaled student has the changes of the weights too.
        own = {name: weights[name] for name in critic.network.state_dict()}
        load_trained(critic.network, critic.network, own)
