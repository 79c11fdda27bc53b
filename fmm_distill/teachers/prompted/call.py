"""How a stock pipeline calls its network, found by watching it and checked at other times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.parametrization import keywords
from fmm_distill.core.schedules import FlowMatching, VarianceExploding
from fmm_distill.errors import UserError
from fmm_distill.teachers.components import STOCK_ERRORS
from fmm_distill.teachers.first_call import refuse_call
from fmm_distill.teachers.prompted.cache import EACH, LENGTHS
from fmm_distill.teachers.recording import TIMES, tensor_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.recording import Recording
    from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["RecordedCall", "check_recorded_call", "read_call", "uses_unshifted_time"]

# Of a network's prediction, against what the pipeline itself got from it.
TOLERANCE = 1e-4
# Timesteps by which a scheduler's own may differ from its levels: some round them to whole numbers.
_ROUNDED = 1.5


@dataclass(frozen=True)
class RecordedCall:
    """How a pipeline calls its network, found by watching.

    Attributes:
        sample, time: names of the network's two first arguments.
        slope, offset: the time that it takes is ``slope * schedule's time + offset``.
        sign: a factor of its output.
        listed: it takes a list of samples and returns one.
    """

    sample: str
    time: str
    slope: float
    offset: float
    sign: float
    listed: bool = False

    def __call__(
        self, network: nn.Module, x: Tensor, time: Tensor, cond: Conditioning | None, h: Tensor | None
    ) -> Tensor:
        """The prediction at x; channels beyond those of x are a learned variance and left out."""
        given: dict[str, Any] = _listed(keywords(cond, h), len(x))
        given |= {self.sample: list(x.unbind()) if self.listed else x, self.time: self._told(time)}
        return self.sign * cut(tensor_of(network(**given)), x)

    def _told(self, time: Tensor) -> Tensor:
        """In the pipeline's own order of operations: a product with 0.001 is rounded otherwise than a quotient."""
        inverse = round(1 / self.slope)
        scaled = time / inverse if inverse * self.slope == 1 else self.slope * time
        return scaled + self.offset if self.offset else scaled


def cut(output: Tensor, like: Tensor) -> Tensor:
    """The part of an output that is of the sample's shape: the rest is a learned variance, or reference tokens."""
    return output[:, : like.shape[1]] if output.shape[1] > like.shape[1] else output


def _listed(given: dict[str, Any], batch: int) -> dict[str, Any]:
    """Padded rows with their lengths back to lists, and what is the same for each sample repeated."""
    lengths = given.pop(LENGTHS, {})
    for name, rows in lengths.items():
        given[name] = [row[: int(length)] for row, length in zip(given[name], rows, strict=True)]
    for name in [name for name in given if name.endswith(EACH)]:
        given[name.removesuffix(EACH)] = [given.pop(name)] * batch
    return given


def uses_unshifted_time(probe: Recording, timesteps: int) -> bool:
    """Whether a flow model's times are those before its scheduler's shift, not its levels times ``timesteps``."""
    pairs = list(zip(probe.sigmas, probe.steps, strict=False))
    return bool(pairs) and any(abs(step.timestep - timesteps * sigma) > _ROUNDED for sigma, step in pairs[1:])


def read_call(probe: Recording, levels: ScheduleSpec, source: str) -> RecordedCall:
    """How the network was called: names of sample and time, the time's scale, the output's sign."""
    first = probe.calls[0].given
    names = list(first)
    sample, time = names[0], next((name for name in names if name in TIMES), None)
    if time is None:
        raise UserError(f"{source}: the network takes no time among {', '.join(names)}; wanted one of {TIMES}")
    if any(name in first and first[name] is not None for name in ("timestep_r", "r_timestep")):
        raise UserError(f"{source}: the network takes a second time already; wanted the model it was distilled from")
    told = torch.tensor([_told(call.given[time]) for call in probe.calls])
    if len(probe.calls) != len(probe.steps):
        raise UserError(
            f"{source}: {len(probe.calls)} calls in {len(probe.steps)} steps; wanted one network call per step"
        )
    slope, offset = _line(_own_times(probe, levels), told.double(), levels.schedule.num_timesteps, source)
    x = tensor_of(first[sample])
    # Sorted: some pipelines hand their scheduler the same numbers in another layout. A learned variance goes along.
    wanted = probe.steps[0].output
    wanted = cut(wanted, x) if wanted.ndim == x.ndim else wanted
    flat, other = cut(probe.calls[0].output, x).flatten().sort().values, wanted.flatten().sort().values
    sign = next((s for s in (1.0, -1.0) if flat.shape == other.shape and _near((s * flat).sort().values, other)), None)
    if sign is None:
        raise UserError(f"{source}: the pipeline changes its network's output in a way that is not known here")
    if levels.inverted:
        sign = -sign
    return RecordedCall(sample, time, slope, offset, sign, isinstance(first[sample], list))


def check_recorded_call(
    network: nn.Module, call: RecordedCall, seen: Recording, cond: Conditioning, levels: ScheduleSpec, source: str
) -> None:
    """Call the network as a student will, by way of the schedule, and compare with what the pipeline got.

    Args:
        seen: a run at other times than those that ``call`` was read from.
        cond: of the prompts of that run.

    Raises:
        UserError: where the times or the answers differ.
    """
    times = _times_by_level(seen, levels)
    for i, (asked, own) in enumerate(zip(seen.calls, _own_times(seen, levels), strict=True)):
        x = tensor_of(asked.given[call.sample])
        by_level = own if times is None else times[i]
        if abs(float(by_level - own)) > (_ROUNDED if float(own).is_integer() else 1e-3 * abs(float(own))):
            raise UserError(
                f"{source}: at a noise level where its scheduler's time is {float(own):g} the schedule that was read "
                f"from the scheduler has {float(by_level):g}; write an adapter for it (docs/add-a-teacher.md)"
            )
        # Whole timesteps are rounded by the scheduler: the network is to be compared at the one that it got.
        time = (own if float(own).is_integer() else by_level).float().expand(len(x))
        try:
            with torch.no_grad():
                output = call(network, x, time, cond, None)
        except STOCK_ERRORS as error:
            raise refuse_call(source, network, tuple(x.shape[1:]), error) from error
        wanted = cut(asked.output, x)
        if not _near(output.abs(), wanted.abs()):
            raise UserError(
                f"{source}: called as its pipeline calls it, the network answers otherwise "
                f"(by {float((output - wanted).abs().max()):.1e}); write an adapter for it (docs/add-a-teacher.md)"
            )
    if isinstance(levels.schedule, FlowMatching):
        x, sample = tensor_of(seen.calls[0].given[call.sample]), seen.steps[0].sample
        if not _near(x.flatten().sort().values, sample.flatten().sort().values):
            raise UserError(f"{source}: the pipeline scales what it gives its network; wanted a plain flow model")


def _times_by_level(seen: Recording, levels: ScheduleSpec) -> Tensor | None:
    """The network's time at the scheduler's levels, by the schedule that was read; None: times are the levels."""
    schedule = levels.schedule
    if len(seen.sigmas) < len(seen.steps):
        return None
    sigmas = torch.tensor(seen.sigmas[: len(seen.steps)], dtype=torch.float64)
    if isinstance(schedule, FlowMatching):
        return schedule.network_time(1 - sigmas if levels.inverted else sigmas)
    return schedule.network_time(sigmas / (1 + sigmas)) if isinstance(schedule, VarianceExploding) else None


def _told(time: Any) -> float:  # noqa: ANN401 whatever a network takes as its time
    return float(torch.as_tensor(time).flatten()[0])


def _own_times(probe: Recording, levels: ScheduleSpec) -> Tensor:
    """The schedule's times at the recorded steps, as the scheduler counts them."""
    own = torch.tensor([step.timestep for step in probe.steps], dtype=torch.float64)
    return levels.schedule.num_timesteps - own if levels.inverted else own


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def _line(own: Tensor, told: Tensor, timesteps: int, source: str) -> tuple[float, float]:
    """The straight line from the scheduler's times to those of the network, in plain numbers where it is."""
    # Some pipelines divide by their scheduler's number of timesteps, some by 1000 whatever that number is.
    scales = dict.fromkeys((1.0, 1e-3, 1 / timesteps))
    lines = [(scale, 0.0) for scale in scales] + [(-scale, 0.0) for scale in scales]
    lines += [(-1e-3, 1.0), (-1 / timesteps, 1.0), (-1.0, float(timesteps)), (-1.0, 1000.0)]
    for slope, offset in lines:
        if (slope * own + offset - told).abs().max() <= 1e-6 * told.abs().max():
            return slope, offset
    slope = float((told[0] - told[-1]) / (own[0] - own[-1]))
    offset = float(told[0] - slope * own[0])
    if not (slope * own + offset - told).abs().max() <= 1e-5 * told.abs().max():
        raise UserError(f"{source}: the network's times {told.tolist()} are no line in the scheduler's {own.tolist()}")
    return slope, offset
