"""What a stock pipeline gives its network and its scheduler, seen from outside while it runs.

Every pipeline embeds prompts, packs latents, scales times and turns signs in its own way. Running it once and looking
says it all, and needs no table of classes.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.components import STOCK_ERRORS
from fmm_distill.teachers.first_call import refuse_call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["NetworkCall", "Recording", "SchedulerStep", "record", "replaced", "run_pipeline", "tensor_of"]

TIMES = ("timestep", "timesteps", "t")


class _EnoughError(Exception):
    """Raised inside a pipeline once what it was run for has been seen."""


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network: its arguments by name, and the first thing that it returned."""

    given: dict[str, Any]
    output: Tensor


@dataclass(frozen=True)
class SchedulerStep:
    """One step of the scheduler."""

    output: Tensor
    timestep: float
    sample: Tensor


@dataclass
class Recording:
    """A run of a pipeline.

    Attributes:
        mu: the shift that the pipeline gave its scheduler, where it did.
        sigmas: the scheduler's levels, where it has them.
    """

    calls: list[NetworkCall] = field(default_factory=list)
    steps: list[SchedulerStep] = field(default_factory=list)
    mu: float | None = None
    sigmas: list[float] = field(default_factory=list)


def tensor_of(value: Any) -> Tensor:  # noqa: ANN401 whatever a network takes or returns
    """The tensor in a network's output or sample argument; a list of samples is stacked."""
    if hasattr(value, "sample") and not isinstance(value, torch.Tensor):
        value = value.sample
    elif isinstance(value, tuple):
        value = value[0]
    return torch.stack(list(value)) if isinstance(value, list) else value


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:  # noqa: ANN401 a diffusers object
    """``owner.name`` replaced on this one object by ``make(original)`` for a while, its signature kept."""
    original = getattr(owner, name)
    replacement = make(original)
    # Pipelines look at the parameters of their scheduler's methods.
    replacement.__signature__ = inspect.signature(original)
    owner.__dict__[name] = replacement
    try:
        yield
    finally:
        del owner.__dict__[name]


@torch.no_grad()
def record(pipeline: Any, component: str, call: dict[str, Any], *, first_only: bool = False) -> Recording:  # noqa: ANN401
    """Run a pipeline with the keywords ``call`` and keep what its network and scheduler saw.

    Args:
        component: the network's name in the pipeline.
        first_only: stop at the network's first call, before the network runs.

    Raises:
        UserError: if the pipeline can't be run so.
    """
    seen, network = Recording(), getattr(pipeline, component)
    signature = inspect.signature(network.forward)

    def watch_network(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 the network's own
            given = dict(signature.bind(*args, **kwargs).arguments)
            if first_only:
                seen.calls.append(NetworkCall(given, torch.empty(0)))
                raise _EnoughError
            try:
                output = original(*args, **kwargs)
            except STOCK_ERRORS as error:
                sample = tensor_of(next(iter(given.values())))
                raise refuse_call(type(pipeline).__name__, network, tuple(sample.shape[1:]), error) from error
            seen.calls.append(NetworkCall(given, tensor_of(output).clone()))
            return output

        return forward

    def watch_step(original: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(original)

        def step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 the scheduler's own
            given = parameters.bind(*args, **kwargs).arguments
            seen.steps.append(
                SchedulerStep(given["model_output"].clone(), float(given["timestep"]), given["sample"].clone())
            )
            return original(*args, **kwargs)

        return step

    def watch_times(original: Callable[..., Any]) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 the scheduler's own
            seen.mu = kwargs.get("mu")
            return original(*args, **kwargs)

        return set_timesteps

    with (
        replaced(network, "forward", watch_network),
        replaced(pipeline.scheduler, "step", watch_step),
        replaced(pipeline.scheduler, "set_timesteps", watch_times),
    ):
        run_pipeline(pipeline, call)
        seen.sigmas = [float(sigma) for sigma in getattr(pipeline.scheduler, "sigmas", ())]
    if not seen.calls:
        raise UserError(f"{type(pipeline).__name__} never calls its {component}; wanted a pipeline that does")
    return seen


def run_pipeline(pipeline: Any, call: dict[str, Any]) -> Any:  # noqa: ANN401 a diffusers class
    """The pipeline's result; None where it was stopped on purpose, ``UserError`` where it fails."""
    pipeline.set_progress_bar_config(disable=True)
    try:
        return pipeline(**call)
    except _EnoughError:
        return None
    except STOCK_ERRORS as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in call.items() if key not in ("generator", "latents"))
        raise UserError(
            f"{type(pipeline).__name__} does not run with {shown[:300]} ({named(error)}); wanted a "
            "whole pipeline that starts from prompts alone, and its own keywords under pipeline in the recipe"
        ) from error
