"""How much memory a run takes, found without running it."""

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

__all__ = ["GIB", "Memory", "forecast_memory", "peak_memory", "peak_memory_of"]

GIB = 2**30
# Samples that a trace is made of at most, where several losses share a batch.
_MOST = 8


def peak_memory(device: torch.device) -> int:
    """Bytes that the process has held at most: of the device's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # In KiB. getrusage counts what the parent held when it started this process, too.
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the moment of a training step when its tensors take most; they add up to ``peak``.

    Attributes:
        weights: of student, teacher and a weaker teacher, each tensor once; without a GPU of an autoencoder too.
        gradients: that exist at that moment: where activations are most of the memory it comes before most of the
            gradients. Under several processes with the buckets in which they are exchanged.
        optimizer: the moments.
        averages: the moving averages, one a rate, and a frozen copy.
        activations: what the backward pass still needs, tangents of forward mode and temporary tensors with it.
        per_sample: by how much one more sample at a time raises the peak.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    per_sample: int

    @property
    def peak(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "averages", "activations")
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in names)
        return f"{self.peak / GIB:.2f} GiB at peak: {parts}"


@dataclass(frozen=True)
class _Moment:
    """Bytes after an operation: of all that the step has made, and of the gradients among it."""

    live: float
    gradients: float


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed; in the backward pass too.

    A kernel's own scratch is not seen. On a CPU the peak is that of the allocator's log (torch.profiler) to the byte.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[_Moment] = []
        self.gradients = self._live = 0
        self._made: dict[int, tuple[int, Any]] = {}
        # What was there before. Held, so that no new storage gets the address of one of these.
        self._there: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 torch's protocol
        """Torch's protocol for dispatch modes."""
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._there[storage._cdata] = storage
        outputs = func(*args, **(kwargs or {}))
        for storage in _storages(outputs):
            key = storage._cdata
            if key not in self._made and key not in self._there:
                self._made[key] = storage.nbytes(), weakref.ref(storage, self._forget(key))
                self._live += storage.nbytes()
        self.moments.append(_Moment(self._live, self.gradients))
        return outputs

    def _forget(self, key: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._live -= self._made.pop(key)[0]

        return forget


def peak_memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that the tensors made in a call take at most, beside those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        call()
    return int(max((moment.live for moment in live.moments), default=0))


def _storages(values: object) -> Iterator[Any]:
    """Of the tensors in nested values. Forward mode's zeros say how large they would be, and take nothing."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return (tensor.untyped_storage() for tensor in tensors if not tensor._is_zerotensor())


def forecast_memory(
    student: LearnedFlowMap,
    teacher: Distillable,
    recipe: Recipe,
    processes: int = 1,
    optimizer: OptimizerFactory | None = None,
) -> Memory:
    """The memory that the tensors of one process take in a training step, at its peak.

    The loss and its backward pass are run on one sample and on two (more where several losses share a batch), in the
    recipe's precision and with the derivatives' engine that training takes; every tensor is watched from its making to
    its end, and each moment's bytes are a line in the number of samples. Of the moments in all phases of training and
    of the optimizer's step the largest counts. The student stays as it is.

    Not in it: what Python and its libraries take; scratch of kernels, and what an allocator keeps or loses between its
    blocks (docs/benchmarks.md: 7 to 33 % on a CPU); the data; the evaluation, whose batch is
    ``evaluation.batch_size``.

    Args:
        processes: that share a batch; with more than one, gradients are exchanged in buckets of their size.
    """
    factory = optimizer or optimizer_factory(recipe.optimizer)
    trained = _bytes(p for p in student.parameters() if p.requires_grad)
    buffers = _bytes(student.buffers())
    losses = [resolve_engine(student, teacher, loss, recipe.training)[0] for loss in recipe.losses]
    copies = len(recipe.training.ema) + any(loss.target_network == "frozen" for loss in losses)
    objective = Objective(student, teacher, recipe, losses, {"average": student, "frozen": student})
    samples = recipe.training.batch_size // (processes * recipe.training.gradient_accumulation_steps)
    phases = [_phase(objective, draws, step, samples) for draws, step in _steps(recipe, teacher)]
    # Gradients of a part before stay while the next part's activations are made.
    kept = trained * (recipe.training.gradient_accumulation_steps > 1)
    moments = [
        (replace(moment, live=moment.live + max(0.0, kept - moment.gradients)), growth)
        for phase in phases
        for moment, growth in phase
    ]
    # The optimizer's step works in place.
    moments.append((_Moment(trained, trained), 0.0))
    peak, growth = max(moments, key=lambda pair: pair[0].live)
    gradients = max(peak.gradients, kept)
    return Memory(
        weights=_bytes(_weights(student, teacher)),
        gradients=round(gradients) + (trained if processes > 1 else 0),
        optimizer=state_bytes(factory, [p for p in objective.parameters() if p.requires_grad]),
        averages=copies * (trained + buffers),
        activations=round(peak.live - gradients),
        per_sample=round(growth),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors that may share their storage."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _weights(student: LearnedFlowMap, teacher: Distillable) -> list[Tensor]:
    """Tensors of the networks that stay in the device's memory: a trainer's teacher may have none that can be seen."""
    weaker, codec = (getattr(teacher, name, None) for name in ("weaker", "codec"))
    networks: list[nn.Module | None] = [student, getattr(teacher, "network", None), getattr(weaker, "network", None)]
    if not torch.cuda.is_available():
        # It stays on the CPU.
        networks.append(getattr(codec, "autoencoder", None))
    return [tensor for net in networks if net is not None for tensor in (*net.parameters(), *net.buffers())]


def _steps(recipe: Recipe, teacher: Distillable) -> Iterator[tuple[Draws, int]]:
    """A few samples and a step number of every phase of training: regression, the stages before, the main losses."""
    regression = recipe.student.regression_steps
    one = draw(0, 0, 1, teacher.event_shape)
    if regression:
        yield one, 0
    # By its last step, where warm-ups are over.
    last = {recipe.stage_at(step)[0]: step for step in range(recipe.training.steps)}
    for index in last.keys() - {None}:
        yield one, regression + last[index]
    extra = [term.fraction for term in recipe.extra_losses]
    fractions = [1 - sum(extra), *extra]
    scale = min(1 / min(fractions), _MOST)
    counts = [max(1, round(fraction * scale)) for fraction in fractions]
    ends = torch.tensor([0.0, *fractions], dtype=torch.float64).cumsum(0)
    position = ((ends[1:] + ends[:-1]) / 2).repeat_interleave(torch.tensor(counts))
    main = replace(one.rows(torch.zeros(len(position), dtype=torch.long)), position=position)
    yield main, regression + recipe.training.steps - 1


def _phase(objective: Objective, draws: Draws, step: int, samples: int) -> list[tuple[_Moment, float]]:
    """Moments of a step of so many samples, each with its growth a sample."""
    count = len(draws.position)
    first, kept_of_first = _trace(objective, draws, step)
    second, kept_of_second = _trace(objective, draws.rows(torch.arange(count).repeat(2)), step)
    if len(first) != len(second):
        # A network that does something for every sample in turn. The peak of twice as many may be at another moment.
        first, second = ([max(moments, key=lambda m: m.live)] for moments in (first, second))
        steepest = max(kept_of_second - kept_of_first, second[0].live - first[0].live)
        second = [replace(second[0], live=first[0].live + steepest)]
    grown = [((b.live - a.live) / count, a) for a, b in zip(first, second, strict=True)]
    return [(_Moment(a.live + growth * (samples - count), a.gradients), growth) for growth, a in grown]


def _trace(objective: Objective, draws: Draws, step: int) -> tuple[list[_Moment], float]:
    """The moments of a loss and its backward pass, and the bytes that are kept between the two."""
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
            # Both half precisions have the same size, and a CPU computes in one of them only.
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                weighted = objective(draws, data, step)[1].mean()
            kept = live.moments[-1].live
            weighted.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
    return live.moments, kept
