"""A run of a stock pipeline, with the calls of its network and the steps of its scheduler.

Pipelines embed prompts, pack latents, scale times and change signs in their own ways. A recorded run shows all of this
without a table of pipeline classes.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.call_errors import refuse_call, refuse_run
from fmm_distill.teachers.components import STOCK_ERRORS
from fmm_distill.teachers.side_networks import SideCall, recorder_of_side, side_networks, take_results
from fmm_distill.teachers.stages import networks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = [
    "NetworkCall",
    "Recording",
    "SchedulerStep",
    "count_tensors",
    "patched_method",
    "record",
    "run_pipeline",
    "tensor_of",
]


class _StopPipelineError(Exception):
    """Raised inside of a pipeline to stop it after the first call of its network."""


@dataclass(frozen=True)
class NetworkCall:
    """A call of the network.

    Attributes:
        arguments: by their names.
        output: the first tensor that it returned.
        outputs: the number of tensors that it returned, each with rows of the samples.
        network: the name of the network in the pipeline.
        sides: calls of other networks before it in the same step, whose arguments are a dictionary of its own.
    """

    arguments: dict[str, Any]
    output: Tensor
    outputs: int = 1
    sides: dict[str, SideCall] = field(default_factory=dict)
    network: str = ""


@dataclass(frozen=True)
class SchedulerStep:
    """The arguments of a step of the scheduler, and the samples that it returned."""

    output: Tensor
    timestep: float
    sample: Tensor
    after: Tensor | None = None


@dataclass
class Recording:
    """The calls of a network and the steps of a scheduler in one run of a pipeline.

    Attributes:
        mu: the shift that the pipeline passes to its scheduler; None: it passes none.
        sigmas: the noise levels of the scheduler; empty if it has none.
        grids: the arguments of each call of the scheduler's ``set_timesteps``.
    """

    calls: list[NetworkCall] = field(default_factory=list)
    steps: list[SchedulerStep] = field(default_factory=list)
    mu: float | None = None
    sigmas: list[float] = field(default_factory=list)
    grids: list[dict[str, Any]] = field(default_factory=list)

    @property
    def takes_guidance(self) -> bool:
        """True if the network is called with a guidance scale."""
        return self.calls[0].arguments.get("guidance") is not None


def tensor_of(value: Any) -> Tensor:  # noqa: ANN401 any argument or output of a network
    """Return the tensor in a network's output or sample argument; a list of samples is stacked."""
    if hasattr(value, "sample") and not isinstance(value, torch.Tensor):
        value = value.sample
    elif isinstance(value, tuple):
        value = value[0]
    return torch.stack(list(value)) if isinstance(value, list) else value


def count_tensors(output: Any) -> int:  # noqa: ANN401 any output of a network
    """Return the number of tensors in an output of a network."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return max(1, sum(isinstance(value, torch.Tensor) for value in values))


@contextmanager
def patched_method(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:  # noqa: ANN401 a diffusers object
    """Replace the method ``owner.name`` of this one object by ``make(original)`` inside of the context.

    A deep copy of the object that is made inside of the context has the original method: some pipelines copy their
    scheduler, and a method that belongs to the original would step the original.
    """
    original = getattr(owner, name)
    replacement = make(original)

    def method(instance: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 those of the method
        called = replacement if instance is owner else getattr(type(instance), name).__get__(instance)
        return called(*args, **kwargs)

    # Pipelines inspect the parameters of their scheduler's methods. The one of ``instance`` is bound.
    method.__signature__ = inspect.signature(original.__func__)  # type: ignore[attr-defined]
    # A bound method: a deep copy of the object binds it to the copy.
    owner.__dict__[name] = MethodType(method, owner)
    try:
        yield
    finally:
        # The method of the class, which the entry of the object has hidden, is visible again.
        del owner.__dict__[name]


def _copied(value: Any) -> Any:  # noqa: ANN401 any argument of a network
    """Return the value with copies of its tensors, since pipelines change some of them in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(_copied(item) for item in value) if type(value) in (list, tuple) else value


@torch.no_grad()
def record(pipeline: Any, component: str, call: dict[str, Any], *, first_only: bool = False) -> Recording:  # noqa: ANN401
    """Run a pipeline with the keywords ``call`` and record its network and scheduler.

    Args:
        component: the name of the network in the pipeline.
        first_only: stop at the first call of the network, before the network runs.

    Raises:
        UserError: if the pipeline fails with these keywords, or never calls the network.
    """
    recording, networks = Recording(), networks_of(pipeline, component)
    sides = {name: side for name, side in side_networks(pipeline, component).items() if name not in networks}
    pending: dict[str, SideCall] = {}

    with ExitStack() as stack:
        for name, side in sides.items():
            seen = partial(pending.__setitem__, name)
            stack.enter_context(patched_method(side, "forward", recorder_of_side(side, _copied, seen)))
        for name, network in networks.items():
            owner = _Owner(type(pipeline).__name__, name, network)
            record_call = _recorder_of_calls(recording, owner, pending, first_only=first_only)
            stack.enter_context(patched_method(network, "forward", record_call))
        stack.enter_context(patched_method(pipeline.scheduler, "step", partial(_step_recorder, recording)))
        stack.enter_context(patched_method(pipeline.scheduler, "set_timesteps", partial(_grid_recorder, recording)))
        run_pipeline(pipeline, call)
        recording.sigmas = [float(sigma) for sigma in getattr(pipeline.scheduler, "sigmas", ())]
    if not recording.calls:
        raise UserError(
            f"{type(pipeline).__name__}: expected calls of its {component}, got none; try another pipeline class"
        )
    if not first_only and not recording.steps:
        raise UserError(
            f"{type(pipeline).__name__}: expected steps of its scheduler, got none: it steps copies of it, such as one "
            "per frame (diffusion forcing); try a pipeline with one time for the complete sample"
        )
    return recording


def _step_recorder(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a scheduler's ``step`` that is recorded."""
    parameters = inspect.signature(original)

    def step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 those of the scheduler
        given = parameters.bind(*args, **kwargs).arguments
        # Copies, since schedulers may change their arguments in place.
        output, sample = given["model_output"].clone(), given["sample"].clone()
        timestep = float(given["timestep"])
        made = original(*args, **kwargs)
        after = made[0] if isinstance(made, tuple) else made.prev_sample
        recording.steps.append(SchedulerStep(output, timestep, sample, after.clone()))
        return made

    return step


def _grid_recorder(recording: Recording, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a scheduler's ``set_timesteps`` that is recorded."""
    parameters = inspect.signature(original)

    def set_timesteps(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 those of the scheduler
        recording.mu = kwargs.get("mu")
        recording.grids.append(dict(parameters.bind(*args, **kwargs).arguments))
        return original(*args, **kwargs)

    return set_timesteps


@dataclass(frozen=True)
class _Owner:
    """A network, its name, and the class of its pipeline."""

    pipeline: str
    name: str
    network: Any


def _recorder_of_calls(
    recording: Recording, owner: _Owner, pending: dict[str, SideCall], *, first_only: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes a recording ``forward`` of the original one.

    Args:
        owner: of the original one.
        pending: the calls of other networks since the last call of this one, which are taken from it.
    """
    signature = inspect.signature(owner.network.forward)

    def record_call(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 those of the network
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            # Copies: pipelines and schedulers change samples in place.
            given = _copied(arguments)
            sides = {name: take_results(call, given, arguments) for name, call in pending.items()}
            pending.clear()
            given |= {name: call.arguments for name, call in sides.items()}
            if first_only:
                recording.calls.append(NetworkCall(given, torch.empty(0), sides=sides, network=owner.name))
                raise _StopPipelineError
            try:
                output = original(*args, **kwargs)
            except STOCK_ERRORS as error:
                sample = tensor_of(next(iter(arguments.values())))
                raise refuse_call(owner.pipeline, owner.network, tuple(sample.shape[1:]), error) from error
            made = tensor_of(output).clone()
            recording.calls.append(NetworkCall(given, made, count_tensors(output), sides, owner.name))
            return output

        return forward

    return record_call


def run_pipeline(pipeline: Any, call: dict[str, Any]) -> Any:  # noqa: ANN401 a diffusers class
    """Return the output of a pipeline; None if ``record`` stopped it.

    Raises:
        UserError: if the pipeline fails with these keywords.
    """
    pipeline.set_progress_bar_config(disable=True)
    try:
        return pipeline(**call)
    except _StopPipelineError:
        return None
    except STOCK_ERRORS as error:
        raise refuse_run(pipeline, call, error) from error
