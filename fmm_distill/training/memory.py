"""The memory of a training step: its peak, and an estimate without a run."""

from __future__ import annotations

import resource
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmm_distill.core.draws import draw, step_generator
from fmm_distill.data.samples import ImageBatch
from fmm_distill.errors import FmmDistillError
from fmm_distill.training.compile import checkpoint_critic
from fmm_distill.training.critic import build_critic
from fmm_distill.training.ema import frozen_copy
from fmm_distill.training.matching import CriticObjective
from fmm_distill.training.objective import Objective, resolve_engine
from fmm_distill.training.optimizer import optimizer_factory, state_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

    from fmm_distill.config.matching import MatchingSettings
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.training.critic import Critic, DiagonalCritic
    from fmm_distill.training.optimizer import OptimizerFactory

__all__ = [
    "Memory",
    "OutOfMemoryError",
    "forecast_memory",
    "memory_error",
    "memory_unit",
    "peak_memory",
    "peak_memory_of",
]

_MIB, _GIB = 2**20, 2**30
# Largest batch of a trace. Several losses divide a batch by their fractions, and a small fraction needs many samples.
_LARGEST_TRACE = 8


class OutOfMemoryError(FmmDistillError):
    """A training step does not fit into the memory of the device."""


def memory_error(error: RuntimeError, step: int) -> RuntimeError | OutOfMemoryError:
    """Return an error of a training step, as ``OutOfMemoryError`` if it is one of memory."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate memory" not in text:
        return error
    return OutOfMemoryError(
        f"step {step} does not fit into memory ({text.splitlines()[0]}). Try training.gradient_accumulation_steps "
        "(twice as many halve the batch in memory), student.lora.rank (16 instead of every weight), or the loss's "
        "derivative: central (no tangents in memory); the run resumes from its newest checkpoint"
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the process in bytes: on a GPU the allocated device memory, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # In KiB. getrusage also counts the memory of the parent at the start of this process.
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a training step; they add up to ``peak``.

    Attributes:
        weights: student, teacher and a weaker teacher, each tensor once; without a GPU also an autoencoder.
        gradients: gradients at the peak. A peak of activations comes before most gradients exist. With several
            processes the buckets of their exchange are included.
        optimizer: the state of the student's optimizer, of which each stage has its own.
        averages: the moving averages and the frozen target network.
        activations: tensors of the backward pass, tangents of forward mode and temporary tensors.
        per_sample: increase of the peak with each sample in a network call.
        critic: the weights of the critic and of its moving average that are no other network's, and in the second stage
            the state of the critic's optimizer.
        peak_of: the part of the run that the peak is in; empty: there is one stage.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    per_sample: int
    critic: int = 0
    peak_of: str = ""

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return self.weights + self.critic + self.gradients + self.optimizer + self.averages + self.activations

    def __str__(self) -> str:
        names = ["weights", "gradients", "optimizer", "averages", "activations"]
        names[1:1] = ["critic"] if self.critic else []
        unit, name_of_unit, form = memory_unit(self.peak)
        parts = ", ".join(f"{name} {getattr(self, name) / unit:{form}}" for name in names)
        where = f" of {self.peak_of}" if self.peak_of else ""
        return f"{self.peak / unit:{form}} {name_of_unit} at peak{where}: {parts}"


def memory_unit(count: int) -> tuple[int, str, str]:
    """Return the unit for a number of bytes, its name, and the format of a number in it: MiB below 1 GiB."""
    return (_MIB, "MiB", ".1f") if count < _GIB else (_GIB, "GiB", ".2f")


@dataclass(frozen=True)
class _Moment:
    """Bytes of all tensors of a step after an operation, and of the gradients among them."""

    live: float
    gradients: float


class _Live(TorchDispatchMode):
    """A dispatch mode that counts the bytes of new tensors until they are freed, in the backward pass too.

    The workspace of kernels is not counted. On CPU the peak equals that of the allocator's log (torch.profiler).
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[_Moment] = []
        self.gradients = self._live = 0
        self._made: dict[int, tuple[int, Any]] = {}
        # Older storages. A reference to each keeps its address from being given to a new one.
        self._older: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 torch's protocol
        """Run an operation and count the storages of its outputs."""
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._older[storage._cdata] = storage
        outputs = func(*args, **(kwargs or {}))
        for storage in _storages(outputs):
            key = storage._cdata
            if key not in self._made and key not in self._older:
                self._made[key] = storage.nbytes(), weakref.ref(storage, self._forget(key))
                self._live += storage.nbytes()
        self.moments.append(_Moment(self._live, self.gradients))
        return outputs

    def _forget(self, key: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._live -= self._made.pop(key)[0]

        return forget


def peak_memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of the tensors that a call makes, without those that existed before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        call()
    return int(max((moment.live for moment in live.moments), default=0))


def _storages(values: object) -> Iterator[Any]:
    """Return the storages of the tensors in nested values. Forward mode's zero tensors have a size and no memory."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return (tensor.untyped_storage() for tensor in tensors if not tensor._is_zerotensor())


def forecast_memory(
    student: LearnedFlowMap,
    teacher: Distillable,
    recipe: Recipe,
    processes: int = 1,
    optimizer: OptimizerFactory | None = None,
) -> Memory:
    """Estimate the peak memory of the tensors of one process in a training step.

    The loss and its backward pass run on one sample and on two (more if several losses divide the batch), in the
    recipe's precision and with its derivative engine. The bytes after each operation are extrapolated linearly to the
    batch, and the largest value over all phases and the optimizer's step is the peak. The optimizer's state is measured
    on tiny parameters (``state_bytes``). The student is not changed.

    Not included: Python and its libraries, the workspace of kernels, the fragmentation of the allocator
    (docs/benchmarks.md: 7 to 33 % on CPU), the data, and the evaluation.

    Args:
        processes: number of processes; with more than one, gradients are exchanged in buckets of the same size.
        optimizer: builds the optimizer; None: the recipe's.
    """
    losses = [resolve_engine(student, teacher, loss, recipe.training)[0] for loss in recipe.losses]
    copies = len(recipe.training.ema) + any(loss.target_network == "frozen" for loss in losses)
    critic = _critic(student, teacher, recipe)
    maps = {"average": student, "frozen": student}
    # The student's loss calls the critic's average, whose weights have no gradients.
    average = None if critic is None else frozen_copy(critic)
    objective = Objective(student, teacher, recipe, losses, maps, critic=average)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    of_critic = [] if critic is None else [p for p in critic.parameters() if p.requires_grad]
    weights = _weights(student, teacher)
    of_critics = [*_tensors(critic), *_tensors(average)]
    factory = optimizer or optimizer_factory(recipe.optimizer)
    of_map = _phases(objective, recipe, teacher)
    stages = [_Stage("", state_bytes(factory, parameters), 0, of_map)]
    if (matching := recipe.matching) is not None and critic is not None:
        stages = [replace(stages[0], name="the map")] if of_map else []
        second = state_bytes(optimizer_factory(matching.optimizer), parameters)
        moments = state_bytes(optimizer_factory(matching.critic.optimizer), of_critic)
        stages += [
            _Stage("the critic", second, moments, [_critic_phase(objective, critic, recipe, teacher)]),
            _Stage("the matching", second, moments, [_matching_phase(objective, recipe, teacher)]),
        ]
    samples = recipe.training.batch_size // (processes * recipe.training.gradient_accumulation_steps)
    several = recipe.training.gradient_accumulation_steps > 1
    found = [(stage, *stage.peak(samples, several=several)) for stage in stages]
    stage, peak, growth = max(found, key=lambda item: item[0].states + item[1].live)
    return Memory(
        weights=_bytes(weights),
        # The buckets of the exchange are copies of all gradients.
        gradients=round(peak.gradients) + (trained + _bytes(of_critic) if processes > 1 else 0),
        optimizer=stage.optimizer,
        # Copies share the frozen parameters with the student.
        averages=copies * (trained + _bytes(student.buffers())),
        activations=round(peak.live - peak.gradients),
        per_sample=round(growth),
        critic=_bytes([*weights, *of_critics]) - _bytes(weights) + stage.critic,
        peak_of=stage.name,
    )


@dataclass
class _Phase:
    """A loss of some draws, the parameters that it trains, and whether it runs in half precision."""

    loss: Callable[[Draws], Tensor]
    parameters: list[nn.Parameter]
    draws: Draws
    half: bool


@dataclass
class _Stage:
    """The phases between which the states of the optimizers stay.

    Attributes:
        optimizer: bytes of the state of the student's optimizer.
        critic: those of the critic's.
    """

    name: str
    optimizer: int
    critic: int
    phases: list[_Phase]

    @property
    def states(self) -> int:
        """The bytes of both states."""
        return self.optimizer + self.critic

    def peak(self, samples: int, *, several: bool) -> tuple[_Moment, float]:
        """Return the largest moment for some number of samples, and its growth per sample.

        Args:
            several: the gradients of one pass exist during the forward pass of the next (gradient accumulation).
        """
        moments: list[tuple[_Moment, float]] = []
        for phase in self.phases:
            trained = _bytes(phase.parameters)
            earlier = trained if several else 0
            for moment, growth in _moments(phase, samples):
                more = max(0.0, earlier - moment.gradients)
                moments.append((_Moment(moment.live + more, moment.gradients + more), growth))
            # The optimizer's step works in place, next to the gradients.
            moments.append((_Moment(trained, trained), 0.0))
        return max(moments, key=lambda pair: pair[0].live)


def _critic(student: LearnedFlowMap, teacher: Distillable, recipe: Recipe) -> Critic | DiagonalCritic | None:
    """Return the critic of a recipe's second stage, as the trainer builds it."""
    if recipe.matching is None:
        return None
    critic = build_critic(student, teacher, recipe.student.lora.rank, seed=recipe.training.seed)
    if recipe.training.gradient_checkpointing:
        checkpoint_critic(critic)
    return critic


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _weights(student: LearnedFlowMap, teacher: Distillable) -> list[Tensor]:
    """Return the tensors of the networks in the device's memory. A teacher from Python may have no network."""
    weaker, codec = (getattr(teacher, name, None) for name in ("weaker", "codec"))
    networks: list[nn.Module | None] = [student, getattr(teacher, "network", None), getattr(weaker, "network", None)]
    if not torch.cuda.is_available():
        # With a GPU the autoencoder is on the CPU.
        networks.append(getattr(codec, "autoencoder", None))
    return [tensor for net in networks if net is not None for tensor in (*net.parameters(), *net.buffers())]


def _tensors(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _phases(objective: Objective, recipe: Recipe, teacher: Distillable) -> list[_Phase]:
    """Return the phases before the second stage: the regression, the stages and the main losses."""
    regression = recipe.student.regression_steps
    one, least = _one_sample(recipe, teacher), _least(recipe)
    steps = [(one, 0)] if regression else []
    # The last step of a stage: its warm-ups are over.
    last = {recipe.stage_at(step)[0]: step for step in range(recipe.training.steps)}
    steps += [(one, regression + last[index]) for index in last.keys() - {None}]
    if recipe.training.steps:
        steps.append((_divided(one, _fractions(recipe), least), regression + recipe.training.steps - 1))
    return [_of_objective(objective, draws, step) for draws, step in steps]


def _matching_phase(objective: Objective, recipe: Recipe, teacher: Distillable) -> _Phase:
    """Return a step of the matching, with the map's losses on the rest of the batch."""
    settings = cast("MatchingSettings", recipe.matching)
    rest = [(1 - settings.fraction) * fraction for fraction in _fractions(recipe)] if settings.fraction < 1 else []
    draws = _divided(_one_sample(recipe, teacher), [settings.fraction, *rest], _least(recipe))
    start = recipe.map_steps + settings.critic.warmup_steps

    def jumps(step: int) -> int:
        n, k = settings.rollout.draw(step_generator(recipe.training.seed, step, "rollout"))
        return 1 + (k > 0) + (settings.rollout.gradient == "all" and 0 < k + 1 < n)

    # The step of the longest rollout among the first ones.
    return _of_objective(objective, draws, max(range(start, start + min(settings.steps, 1000)), key=jumps))


def _critic_phase(
    objective: Objective, critic: Critic | DiagonalCritic, recipe: Recipe, teacher: Distillable
) -> _Phase:
    """Return an update of the critic."""
    own = CriticObjective(critic, objective.sample, teacher, recipe)
    needs_data = cast("MatchingSettings", recipe.matching).loss.needs_data

    def loss(draws: Draws) -> Tensor:
        data = ImageBatch(torch.zeros_like(draws.noise)) if needs_data else None
        losses: Tensor = own(draws, data, recipe.map_steps, 0, compare=True)[0]
        return losses.mean()

    trained = [p for p in critic.parameters() if p.requires_grad]
    return _Phase(loss, trained, _one_sample(recipe, teacher), _is_half(recipe))


def _of_objective(objective: Objective, draws: Draws, step: int) -> _Phase:
    """Return the phase of a step of the student."""
    has_images = objective.recipe.data.has_images

    def loss(draws: Draws) -> Tensor:
        data = ImageBatch(torch.zeros_like(draws.noise)) if has_images else None
        weighted: Tensor = objective(draws, data, step)[1]
        return weighted.mean()

    trained = [p for p in objective.parameters() if p.requires_grad]
    return _Phase(loss, trained, draws, _is_half(objective.recipe))


def _is_half(recipe: Recipe) -> bool:
    return recipe.training.precision != "fp32"


def _least(recipe: Recipe) -> int:
    # A scaled network forms its weights for a single sample, and takes two products for several.
    return 2 if recipe.student_kind == "scaled" else 1


def _one_sample(recipe: Recipe, teacher: Distillable) -> Draws:
    return draw(0, 0, _least(recipe), teacher.event_shape, renoised=recipe.matching is not None)


def _fractions(recipe: Recipe) -> list[float]:
    """Return the fractions of a batch that the main and the extra losses have."""
    extra = [term.fraction for term in recipe.extra_losses]
    return [1 - sum(extra), *extra]


def _divided(one: Draws, fractions: list[float], least: int) -> Draws:
    """Return draws of a batch that several losses divide by their fractions."""
    scale = min(1 / min(fractions), _LARGEST_TRACE)
    # At least one sample of each loss, so that every loss is traced.
    counts = [least * max(1, round(fraction * scale)) for fraction in fractions]
    ends = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    # The middle of each loss's interval, away from the borders between losses.
    position = ((ends[1:] + ends[:-1]) / 2).repeat_interleave(torch.tensor(counts))
    return replace(one.rows(torch.zeros(len(position), dtype=torch.long)), position=position)


def _moments(phase: _Phase, samples: int) -> list[tuple[_Moment, float]]:
    """Return the moments of a phase with some number of samples, each with its growth per sample."""
    count = len(phase.draws.position)
    # Two counts determine the line: each moment is linear in the number of samples.
    first, stored_first = _trace(phase, phase.draws)
    second, stored_second = _trace(phase, phase.draws.rows(torch.arange(count).repeat(2)))
    if len(first) != len(second):
        # The network loops over the samples, so that the peak of two samples may be at another operation.
        first, second = ([max(moments, key=lambda m: m.live)] for moments in (first, second))
        steepest = max(stored_second - stored_first, second[0].live - first[0].live)
        second = [replace(second[0], live=first[0].live + steepest)]
    grown = [((b.live - a.live) / count, a) for a, b in zip(first, second, strict=True)]
    return [(_Moment(a.live + growth * (samples - count), a.gradients), growth) for growth, a in grown]


def _trace(phase: _Phase, draws: Draws) -> tuple[list[_Moment], float]:
    """Return the moments of a loss and its backward pass, and the bytes stored between the two."""
    live = _Live()

    def made(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.gradients += parameter.grad.untyped_storage().nbytes()

    hooks = [parameter.register_post_accumulate_grad_hook(made) for parameter in phase.parameters]
    try:
        with torch.enable_grad(), live:
            # fp16 and bf16 have the same size, and CPUs run bf16.
            with torch.autocast("cpu", torch.bfloat16, enabled=phase.half):
                loss = phase.loss(draws)
            stored = live.moments[-1].live
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in phase.parameters:
            parameter.grad = None
    return live.moments, stored
