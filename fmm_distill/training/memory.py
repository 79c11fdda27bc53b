"""The memory of a training step: its peak, and an estimate without a run."""

from __future__ import annotations

import resource
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmm_distill.core.draws import draw
from fmm_distill.data.samples import ImageBatch
from fmm_distill.errors import FmmDistillError
from fmm_distill.training.objective import Objective, resolve_engine
from fmm_distill.training.optimizer import optimizer_factory, state_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.teachers.base import Distillable
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
        optimizer: the optimizer's state.
        averages: the moving averages and the frozen target network.
        activations: tensors of the backward pass, tangents of forward mode and temporary tensors.
        per_sample: increase of the peak with each sample in a network call.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    per_sample: int

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "averages", "activations")
        unit, name_of_unit, form = memory_unit(self.peak)
        parts = ", ".join(f"{name} {getattr(self, name) / unit:{form}}" for name in names)
        return f"{self.peak / unit:{form}} {name_of_unit} at peak: {parts}"


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
    if recipe.training.steps == 0:
        # A step of the map's losses, which a fraction of each batch of the second stage has.
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 1})})
    factory = optimizer or optimizer_factory(recipe.optimizer)
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    buffers = _bytes(student.buffers())
    losses = [resolve_engine(student, teacher, loss, recipe.training)[0] for loss in recipe.losses]
    copies = len(recipe.training.ema) + any(loss.target_network == "frozen" for loss in losses)
    objective = Objective(student, teacher, recipe, losses, {"average": student, "frozen": student})
    samples = recipe.training.batch_size // (processes * recipe.training.gradient_accumulation_steps)
    phases = [_phase(objective, draws, step, samples) for draws, step in _steps(recipe, teacher)]
    # With gradient accumulation the gradients of one pass exist during the forward pass of the next.
    earlier = trained * (recipe.training.gradient_accumulation_steps > 1)
    moments = [
        (replace(moment, live=moment.live + max(0.0, earlier - moment.gradients)), growth)
        for phase in phases
        for moment, growth in phase
    ]
    # The optimizer's step works in place, next to the gradients.
    moments.append((_Moment(trained, trained), 0.0))
    peak, growth = max(moments, key=lambda pair: pair[0].live)
    gradients = max(peak.gradients, earlier)
    return Memory(
        weights=_bytes(_weights(student, teacher)),
        # The buckets of the exchange are copies of all gradients.
        gradients=round(gradients) + (trained if processes > 1 else 0),
        optimizer=state_bytes(factory, [p for p in objective.parameters() if p.requires_grad]),
        # Copies share the frozen parameters with the student.
        averages=copies * (trained + buffers),
        activations=round(peak.live - gradients),
        per_sample=round(growth),
    )


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


def _steps(recipe: Recipe, teacher: Distillable) -> Iterator[tuple[Draws, int]]:
    """Yield some draws and a step of each phase of training: the regression, the stages and the main losses."""
    regression = recipe.student.regression_steps
    # A scaled network forms its weights for a single sample, and takes two products for several.
    least = 2 if recipe.student_kind == "scaled" else 1
    one = draw(0, 0, least, teacher.event_shape)
    if regression:
        yield one, 0
    # The last step of a stage: its warm-ups are over.
    last = {recipe.stage_at(step)[0]: step for step in range(recipe.training.steps)}
    for index in last.keys() - {None}:
        yield one, regression + last[index]
    extra = [term.fraction for term in recipe.extra_losses]
    fractions = [1 - sum(extra), *extra]
    scale = min(1 / min(fractions), _LARGEST_TRACE)
    # At least one sample of each loss, so that every loss is traced.
    counts = [least * max(1, round(fraction * scale)) for fraction in fractions]
    ends = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    # The middle of each loss's interval, away from the borders between losses.
    position = ((ends[1:] + ends[:-1]) / 2).repeat_interleave(torch.tensor(counts))
    main = replace(one.rows(torch.zeros(len(position), dtype=torch.long)), position=position)
    yield main, regression + recipe.training.steps - 1


def _phase(objective: Objective, draws: Draws, step: int, samples: int) -> list[tuple[_Moment, float]]:
    """Return the moments of a step of some number of samples, each with its growth per sample."""
    count = len(draws.position)
    # Two counts determine the line: each moment is linear in the number of samples.
    first, stored_first = _trace(objective, draws, step)
    second, stored_second = _trace(objective, draws.rows(torch.arange(count).repeat(2)), step)
    if len(first) != len(second):
        # The network loops over the samples, so that the peak of two samples may be at another operation.
        first, second = ([max(moments, key=lambda m: m.live)] for moments in (first, second))
        steepest = max(stored_second - stored_first, second[0].live - first[0].live)
        second = [replace(second[0], live=first[0].live + steepest)]
    grown = [((b.live - a.live) / count, a) for a, b in zip(first, second, strict=True)]
    return [(_Moment(a.live + growth * (samples - count), a.gradients), growth) for growth, a in grown]


def _trace(objective: Objective, draws: Draws, step: int) -> tuple[list[_Moment], float]:
    """Return the moments of a loss and its backward pass, and the bytes stored between the two."""
    recipe, live = objective.recipe, _Live()
    data = ImageBatch(torch.zeros_like(draws.noise)) if recipe.data.has_images else None
    half = recipe.training.precision != "fp32"

    def made(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.gradients += parameter.grad.untyped_storage().nbytes()

    parameters = [p for p in objective.parameters() if p.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(made) for parameter in parameters]
    try:
        with torch.enable_grad(), live:
            # fp16 and bf16 have the same size, and CPUs run bf16.
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                weighted = objective(draws, data, step)[1].mean()
            stored = live.moments[-1].live
            weighted.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
    return live.moments, stored
