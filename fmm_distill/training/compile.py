"""Gradient checkpointing and torch.compile, each compared with the plain networks before it is used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.utils.checkpoint import checkpoint

from fmm_distill.core.derivatives.engines import derivative_in_r
from fmm_distill.core.derivatives.precision import without_tensor_float
from fmm_distill.core.staged import StagedNetwork, stages_of
from fmm_distill.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from fmm_distill.config.settings import TrainingSettings
    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.teachers.base import Distillable

    Points = tuple[Tensor, Tensor, Tensor, Conditioning | None]

__all__ = ["TrainedVelocity", "accelerate_networks", "checkpoint_blocks", "checkpoint_critic", "network_of"]

logger = logging.getLogger(__name__)

# Compiled kernels sum in another order, which moves float32 results by 1e-6 to 1e-4; a wrong network moves more.
TOLERANCE = 1e-3


class TrainedVelocity(Protocol):
    """A velocity field with weights that are trained: the critic.

    Attributes:
        own_network: with all its weights; None: it has adapters on the teacher's network.
    """

    @property
    def own_network(self) -> nn.Module | None:
        """See the class."""
        ...

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return the velocity at x and t."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the weights."""
        ...


def accelerate_networks(
    training: TrainingSettings,
    student: LearnedFlowMap,
    teacher: Distillable,
    at: Points,
    critic: TrainedVelocity | None = None,
) -> None:
    """Switch on ``training.gradient_checkpointing`` and ``training.compile``.

    Args:
        at: x, t, r and a condition at which values, derivatives and gradients are compared with the plain networks.
        critic: of a second stage; None: there is none.

    Raises:
        UserError: if a network does not support the option, or if its results differ by more than 1e-3 (relative).
    """
    options: list[tuple[str, Callable[[], None]]] = []
    if training.gradient_checkpointing:
        options.append(("training.gradient_checkpointing", lambda: checkpoint_blocks(student, critic)))
    if training.compile != "none":
        backend = training.compile
        options.append((f"training.compile: {backend}", lambda: _compile(backend, student, teacher, critic)))
    for name, switch_on in options:
        before = _results(student, teacher, at, critic)
        try:
            switch_on()
            after = _results(student, teacher, at, critic)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{name}: expected a network that runs with it, got an error from {type(network_of(student)).__name__} "
                f"({first_line(error)}); leave the setting out"
            ) from error
        differences = {key: _difference(after[key], before[key]) for key in before}
        worst = max(differences, key=lambda key: differences[key])
        # Negated, so that NaN is refused too.
        if not differences[worst] <= TOLERANCE:
            raise UserError(
                f"{name}: expected the results of the plain network to {TOLERANCE:g} (relative), got a difference of "
                f"{differences[worst]:.1e} in the {worst}; leave the setting out"
            )
        logger.info(
            f"{name}: compared with the plain networks, largest relative difference {differences[worst]:.0e} ({worst})"
        )


def network_of(student: LearnedFlowMap) -> nn.Module:
    """Return the network of a student: the flow map itself if it has no ``network``."""
    return cast("nn.Module", getattr(student, "network", student))


@without_tensor_float()
def _results(
    student: LearnedFlowMap, teacher: Distillable, at: Points, critic: TrainedVelocity | None
) -> dict[str, list[Tensor]]:
    """Return the velocities, and the gradients of the student's, of its derivative in r and of the critic's."""
    x, t, r, cond = at
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    u = student.mean_velocity(x, t, r, cond)
    value = torch.autograd.grad(u.square().mean(), trained, allow_unused=True)
    du_dr = derivative_in_r(student, x, t, r, cond=cond, engine="central")
    # The derivative of an untrained student is zero; its gradient is not.
    slope = torch.autograd.grad(du_dr.mean(), trained, allow_unused=True)
    with torch.no_grad():
        teachers = teacher.velocity(x, t, cond)
    found: dict[str, list[Any]] = {
        "teacher's velocity": [teachers],
        "student's velocity": [u.detach()],
        "student's gradient": list(value),
        "gradient of the derivative in r": list(slope),
    }
    if critic is not None:
        weights = [parameter for parameter in critic.parameters() if parameter.requires_grad]
        v = critic.velocity(x, t, cond)
        # Also of adapters that do not change the velocity yet: compiled code that leaves them out has no gradient.
        gradients = torch.autograd.grad(v.square().mean(), weights, allow_unused=True)
        found |= {"critic's velocity": [v.detach()], "critic's gradient": list(gradients)}
    return {name: [part for part in parts if part is not None] for name, parts in found.items()}


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the relative difference of two lists of tensors, in the 2-norm over all of them."""
    # A parameter has lost its gradient, or has got one.
    if len(ours) != len(theirs):
        return float("inf")
    # Over all tensors together: the relative error of a tiny gradient alone would be rounding.
    change = sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True))
    size = sum(float(b.double().square().sum()) for b in theirs)
    return float((change / max(size, torch.finfo(torch.float64).tiny)) ** 0.5)


def checkpoint_blocks(student: LearnedFlowMap, critic: TrainedVelocity | None = None) -> None:
    """Recompute the blocks of the student's network, and of a critic's own, in the backward pass."""
    for part in stages_of(network_of(student)):
        _checkpoint(part)
    # The hooks of recomputed blocks do not pass dual tensors.
    student.needs_functional_jvp = True
    if critic is not None:
        checkpoint_critic(critic)


def checkpoint_critic(critic: TrainedVelocity) -> None:
    """Recompute the blocks of a critic's own network in the backward pass; one with adapters stores activations."""
    for part in [] if critic.own_network is None else stages_of(critic.own_network):
        if hasattr(part, "enable_gradient_checkpointing"):
            _checkpoint(part)


def _checkpoint(module: nn.Module) -> None:
    """Recompute the blocks of a network with the jump of their forward pass, where it is conditioned on jumps.

    By the backward pass the network has made other calls, so that each block stores its own jump.
    """
    network = cast("Any", module)
    if not hasattr(network, "jumping"):
        network.enable_gradient_checkpointing()
        return

    # diffusers calls this function in place of torch's checkpoint for each block.
    def checkpointed(block: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 the network's own
        jump = network.jump

        def again(*inputs: Any) -> Any:  # noqa: ANN401 as above
            with network.jumping(jump):
                return block(*inputs)

        # The reentrant form supports neither ``torch.autograd.grad`` nor blocks whose inputs need no gradient.
        return checkpoint(again, *args, use_reentrant=False)

    network.enable_gradient_checkpointing(checkpointed)


def _compile(backend: str, student: LearnedFlowMap, teacher: Distillable, critic: TrainedVelocity | None) -> None:
    """Compile all networks in place, which changes neither the modules nor the names of their weights."""
    networks = [network_of(student), None if critic is None else critic.own_network, getattr(teacher, "network", None)]
    for network in networks:
        if isinstance(getattr(network, "shared", None), StagedNetwork):
            # The student's own two networks, which are compiled already.
            continue
        for part in stages_of(network) if isinstance(network, torch.nn.Module) else ():
            part.compile(backend=backend)
