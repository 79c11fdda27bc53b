"""The fold: the student at one number of steps as a stock network, without the second time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.core.staged import StagedNetwork
from fmm_distill.errors import UserError
from fmm_distill.student.scaled_layers import scaled_layers
from fmm_distill.student.stages import of_stage
from fmm_distill.student.strength import strength_of
from fmm_distill.teachers.frozen_adapter import share_adapter

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["OWN_SETTINGS", "fold", "stock_part"]

# The entries that the configuration of a two-time network adds to the stock one's.
OWN_SETTINGS = ("jump_hosts", "jump_widths", "scaled_layers", "diagonal", "guidance_range", "flow_map")
# Below this fraction of the largest jump the jumps differ by rounding alone: they fold into a bias.
_EQUAL = 1e-6
# The largest error of a fold into weight and bias, as a fraction of the largest jump: far below a pixel's rounding.
_EXACT = 1e-5


def stock_part(network: nn.Module) -> nn.Module:
    """Return a stock network of the same class with the weights of a two-time one, without its jump embeddings.

    Of two networks, return the two stock ones.
    """
    if isinstance(network, StagedNetwork):
        return network.map(stock_part)
    config = {key: value for key, value in cast("Any", network).config.items() if not key.startswith("_")}
    config = {key: value for key, value in config.items() if key not in OWN_SETTINGS}
    # A two-time class has the mixin and the stock class as its bases.
    kind = cast("Any", type(network).__bases__[-1])
    stock = cast("nn.Module", kind.from_config(config))
    # Only the stock keys: the others are the embeddings of the jump and the changes of the weights.
    state = network.state_dict()
    stock.load_state_dict({key: state[key] for key in stock.state_dict()})
    share_adapter(network, stock)
    # ``from_config`` returns a network in training mode, with dropout active.
    return stock.eval()


@torch.no_grad()
def fold(student: Student, teacher: Teacher, times: Float[Tensor, " points"]) -> nn.Module:
    """Return the stock network that equals the student's on the grid ``times``, one jump between neighbors.

    On a uniform grid all jumps have one length h, so their embeddings are one vector, which is added to the bias of
    the layer. On another grid the fold is the smallest change of weight and bias that gives every jump its own vector
    at the time where it starts (least squares; there are fewer times than inputs of the layer). A range of guidance
    folds to the teacher's scale.

    Each of two networks is folded for all jumps of the grid.

    The changes of a scaled student's weights are added at one strength (``strength_of``), as if all jumps were equal.

    Raises:
        UserError: on a grid with more different jumps than the layer can represent, or with jumps that are too
            different for one strength.
    """
    if isinstance(student.network, StagedNetwork):
        kind, parametrization = type(student), of_stage(student.parametrization)
        return student.network.map(lambda part: fold(kind(part, parametrization), teacher, times))
    network = cast("Any", student.network)
    stock = stock_part(student.network)
    device = next(student.network.parameters()).device
    starts, positions = times[:-1].to(device), student.clock.warp(times.to(device))
    lengths = (positions[:-1] - positions[1:]).float()
    if scaled_layers(student.network):
        strength = strength_of(student, times)
        strength.check(len(times) - 1)
        _add_changes(student.network, stock, strength.value)
        # A range of guidance also embeds the lengths.
        lengths = torch.full_like(lengths, strength.value)
    if not network.config["jump_hosts"]:
        return stock
    scale = None if network.config["guidance_range"] is None else cast("Any", teacher.guidance).scale
    fraction = network.guidance_fraction(None if scale is None else torch.full_like(lengths, scale))
    for name, embedding in zip(network.config["jump_hosts"], network.jump_embedding, strict=True):
        host = cast("nn.Linear", stock.get_submodule(name))
        # float64: inputs of neighboring times are nearly equal, which makes the least squares ill-conditioned.
        jumps = embedding(lengths, fraction).double()
        # The common part goes into the bias exactly; only the rest depends on least squares.
        mean = torch.zeros_like(jumps[0]) if host.bias is None else jumps.mean(0)
        if host.bias is not None:
            host.bias.add_(mean.to(host.bias))
        rest = jumps - mean
        if float(rest.abs().max()) > _EQUAL * float(jumps.abs().max()):
            _add_to_layer(host, _host_inputs(student, teacher, name, starts), rest)
    return stock


def _add_changes(network: nn.Module, stock: nn.Module, length: float) -> None:
    """Add the changes of the weights at one length of the jump to a stock network."""
    for name, layer in scaled_layers(network).items():
        weight, bias = cast("Any", layer).change()
        target = cast("Any", stock.get_submodule(name))
        target.weight.add_(length * weight.to(target.weight))
        if bias is not None:
            target.bias.add_(length * bias.to(target.bias))


def _host_inputs(student: Student, teacher: Teacher, name: str, times: Tensor) -> Tensor:
    """Return the inputs of a layer that h is added to, at these times; they depend on the times alone."""
    seen: list[Tensor] = []
    host = student.network.get_submodule(name)
    hook = host.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    cond = teacher.conditioned_on(torch.zeros(1))
    cond = None if cond is None else cond.to(times.device)
    try:
        for t in times:
            # Any sample: the inputs depend on the time alone.
            x = torch.zeros(1, *teacher.event_shape, device=times.device)
            student.mean_velocity_of_jump(x, t[None], torch.zeros(1, device=times.device), cond)
    finally:
        hook.remove()
    # One row per call: a network that embeds a time per token has equal rows here.
    return torch.cat([inputs.reshape(-1, inputs.shape[-1])[:1] for inputs in seen])


def _add_to_layer(host: nn.Linear, inputs: Tensor, jumps: Tensor) -> None:
    """Apply the smallest change of weight and bias (where there is one) that adds ``jumps`` at ``inputs``."""
    constant = inputs.new_full((len(inputs), 1), float(host.bias is not None))
    rows = torch.cat([inputs, constant], 1).double()
    # The pseudo-inverse gives the solution of smallest norm, so that other inputs of the layer change least.
    change = torch.linalg.pinv(rows) @ jumps
    if float((rows @ change - jumps).abs().max()) > _EXACT * float(jumps.abs().max()):
        raise UserError(
            f"a grid of {len(inputs)} different jumps does not fold into a layer of {host.in_features} inputs; "
            "expected fewer steps in export.steps"
        )
    host.weight.add_(change[:-1].T.to(host.weight))
    if host.bias is not None:
        host.bias.add_(change[-1].to(host.bias))
