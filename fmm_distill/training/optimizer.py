"""Optimizers of torch.optim by name, their learning rate, and the size of their state."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmm_distill.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fmm_distill.config.settings import OptimizerSettings, TrainingSettings

__all__ = [
    "OptimizerFactory",
    "build_optimizer",
    "check_optimizer",
    "learning_rate",
    "optimizer_factory",
    "state_bytes",
    "stores_factors",
]

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Different lengths: a dimension of the state that has the length of a parameter's dimension grows with it.
_LENGTHS = (2, 3, 5, 7, 11, 13)


def build_optimizer(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Build the optimizer of a recipe for parameters on one device.

    Raises:
        UserError: if torch.optim has no such optimizer, or if it refuses a setting or the parameters.
    """
    kind = _class_of(settings.name)
    arguments = _arguments(kind, settings)
    known = inspect.signature(kind).parameters
    if "fused" in known and not {"fused", "foreach", "differentiable"} & settings.options.keys():
        # One kernel per step. Other devices have none.
        arguments["fused"] = parameters[0].device.type in ("cpu", "cuda")
    try:
        return kind(parameters, **arguments)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"optimizer: expected settings that {settings.name} takes for this student's parameters, got an error from "
            f"it ({first_line(error)}); try AdamW, or other optimizer.options"
        ) from error


def optimizer_factory(settings: OptimizerSettings) -> OptimizerFactory:
    """Return ``build_optimizer`` with the settings of a recipe."""
    return partial(build_optimizer, settings=settings)


def check_optimizer(settings: OptimizerSettings) -> None:
    """Build the optimizer for a parameter of four numbers and take a step.

    Raises:
        UserError: on an unknown name, a setting that the optimizer does not take, and an optimizer that needs more
            than gradients, such as LBFGS.
    """
    # A matrix, since Muon takes nothing else.
    parameter = nn.Parameter(torch.zeros(2, 2))
    try:
        _stepped(optimizer_factory(settings), parameter)
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"optimizer.name: expected an optimizer that steps on dense gradients alone, got {settings.name} "
            f"({first_line(error)}); try AdamW"
        ) from error


def learning_rate(peak: float, training: TrainingSettings, step: int, total: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then constant or half a cosine.

    The cosine reaches 0 at step ``total``, one after the last, so that every step changes the weights.

    Args:
        peak: learning rate at the end of the warm-up.
        step: number of the step, from 0.
        total: number of all steps.
    """
    # The first step has a rate above 0, and without a warm-up the full one.
    warm = min(1.0, (step + 1) / (training.warmup_steps + 1))
    if training.lr_schedule == "constant":
        return peak * warm
    return peak * warm * (0.5 + 0.5 * math.cos(math.pi * step / total))


def state_bytes(factory: OptimizerFactory, parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of the state that an optimizer stores for parameters, without allocating it.

    The optimizer steps once on one tiny parameter per number of dimensions. A dimension of the state is scaled if it
    has the length of the parameter's dimension, so factored moments (Adafactor) are counted as they are. Scalars, such
    as the count of steps, are left out.
    """
    tiny: dict[int, dict[str, torch.Tensor]] = {}
    total = 0
    for parameter in parameters:
        dims = parameter.dim()
        if dims not in tiny:
            tiny[dims] = _stepped(factory, nn.Parameter(torch.zeros(_LENGTHS[:dims], dtype=parameter.dtype)))
        total += sum(_scaled_bytes(value, parameter.shape) for value in tiny[dims].values())
    return total


def stores_factors(factory: OptimizerFactory) -> bool:
    """Return True if the state of a matrix has tensors of another shape, as the factored moments of Adafactor."""
    state = _stepped(factory, nn.Parameter(torch.zeros(_LENGTHS[:2])))
    return any(value.dim() > 0 and tuple(value.shape) != _LENGTHS[:2] for value in state.values())


def _class_of(name: str) -> type[torch.optim.Optimizer]:
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name not in classes:
        lower = {key.lower(): key for key in classes}
        # Lower case on both sides, so that adamw is recognized as AdamW.
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        guess = f"; did you mean {lower[near[0]]}?" if near else ""
        raise UserError(f"optimizer.name: expected one of {', '.join(sorted(classes))}, got {name}{guess}")
    return classes[name]


def _arguments(kind: type[torch.optim.Optimizer], settings: OptimizerSettings) -> dict[str, Any]:
    """Return the keyword arguments of an optimizer, each of which its constructor takes."""
    name = settings.name
    known = inspect.signature(kind).parameters
    fields = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    # A setting at its default may have no effect; any other one must have one.
    idle = {
        "betas": settings.betas != type(settings).model_fields["betas"].default,
        "weight_decay": settings.weight_decay != 0,
    }
    for field in idle:
        if field not in known and idle[field]:
            raise UserError(f"optimizer.{field}: {name} has no {field}; leave it out, or try AdamW")
    options = [key for key in known if key not in ("params", *fields)]
    if unknown := [key for key in settings.options if key not in options]:
        raise UserError(f"optimizer.options: expected some of {', '.join(options)} for {name}, got {unknown[0]}")
    return {key: value for key, value in fields.items() if key in known} | settings.options


def _stepped(factory: OptimizerFactory, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the tensors of an optimizer's state after one step on a parameter."""
    # Any gradient: optimizers make their state in the first step.
    parameter.grad = torch.ones_like(parameter)
    optimizer = factory([parameter])
    optimizer.step()
    state = optimizer.state_dict()["state"].get(0, {})
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _scaled_bytes(value: torch.Tensor, shape: torch.Size) -> int:
    """Return the bytes of a tensor of a tiny parameter's state for a parameter of another shape."""
    if value.numel() == 1:
        return 0
    if value.dim() != len(shape):
        lengths = _LENGTHS[: len(shape)]
        return value.element_size() * math.ceil(value.numel() * shape.numel() / math.prod(lengths))
    pairs = zip(value.shape, _LENGTHS, shape, strict=False)
    return value.element_size() * math.prod(real if length == tiny else length for length, tiny, real in pairs)
