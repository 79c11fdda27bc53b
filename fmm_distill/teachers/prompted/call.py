"""The call of a network as a recorded run of its pipeline shows it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.arguments import ArgumentLayout
from fmm_distill.teachers.prompted.joined import find_joined
from fmm_distill.teachers.recording import tensor_of
from fmm_distill.teachers.side_networks import TIME_NAMES, SideNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.frozen_adapter import FrozenAdapter
    from fmm_distill.teachers.prompted.joined import JoinedPart
    from fmm_distill.teachers.recording import Recording
    from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["RecordedCall", "crop_to", "is_near", "read_call", "scheduler_times"]

# Names of the end of a jump, in networks that are maps or can be trained as one.
_SECOND_TIMES = ("timestep_r", "r_timestep")
# Largest difference between an output and the pipeline's own, relative to the largest value: rounding of a deep network
# in float32, whose sums may run in another order.
_TOLERANCE = 1e-4
# Largest relative error of a line with plain numbers, and of one through two recorded times, which are float32.
_PLAIN_LINE, _FITTED_LINE = 1e-6, 1e-5


@dataclass(frozen=True)
class RecordedCall:
    """The call of a network, as its pipeline makes it.

    Attributes:
        sample, time: names of the arguments for sample and time.
        slope, offset: the network's time is ``slope * schedule's time + offset``.
        sign: a factor of the output.
        listed: the network takes a list of samples and returns one.
        layout: which parts of the other arguments are rows of the samples.
        joined: what the pipeline joins to the sample before the call; None: nothing.
        timed: 1 for the tokens or frames of a sample that have the time of the call, 0 for those that have the time 0,
            such as a given first frame; None: the network takes one time per sample.
        second_time: the name of a second time, which is always equal to the first; None: there is none.
        sides: networks that run before it, such as a ControlNet.
        adapter: an IP-Adapter that the network uses; None: there is none.
        boundary: the lowest time of the schedule at which a ``StagedNetwork`` calls its network of high noise levels;
            None: there is one network.
    """

    sample: str
    time: str
    slope: float
    offset: float
    sign: float
    listed: bool = False
    layout: ArgumentLayout = field(default_factory=lambda: ArgumentLayout(("", "")))
    joined: JoinedPart | None = None
    second_time: str | None = None
    timed: Tensor | None = None
    sides: tuple[SideNetwork, ...] = ()
    adapter: FrozenAdapter | None = None
    boundary: float | None = None

    def __call__(
        self, network: nn.Module, x: Tensor, time: Tensor, cond: Conditioning | None, h: Tensor | None
    ) -> Tensor:
        """Return the prediction at x, shape ``[batch, *event]``, without a learned variance."""
        if self.boundary is not None:
            output: Tensor = network(self.of_stage(), x, time, cond, h, self.boundary)
            return output
        if len(x) > 1 and cond is not None and self.layout.takes_one:
            each = (slice(i, i + 1) for i in range(len(x)))
            rows = [self(network, x[i], time[i], cond.part(i.start, i.stop), None if h is None else h[i]) for i in each]
            return torch.cat(rows)
        arguments = self.layout.join(cond, h, len(x))
        given, time = x if self.joined is None else self.joined.join(x, arguments), self._network_time(time)
        for side in self.sides:
            arguments = side(arguments, x, given, time)
        arguments |= {self.sample: list(given.unbind()) if self.listed else given, self.time: time}
        if self.second_time is not None:
            arguments[self.second_time] = arguments[self.time]
        if self.adapter is not None and self.adapter.device != x.device:
            # Moving a network leaves it behind.
            self.adapter.to(x.device)
        return self.sign * self.output_of(tensor_of(network(**arguments)), x)

    def of_stage(self) -> RecordedCall:
        """Return the call of one of the networks."""
        return replace(self, boundary=None)

    def to(self, device: torch.device | str) -> None:
        """Move the networks that run before the main one, and the adapter that it uses."""
        for side in self.sides:
            side.network.to(device)
        if self.adapter is not None:
            self.adapter.to(device)

    def output_of(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the part of the network's output that is of the samples x."""
        joined = self.joined
        if joined is not None and output.ndim == x.ndim:
            output = joined.sample_of_output(output)
        return crop_to(output, x)

    def time_of(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the schedule's time in the arguments of a call, shape ``[1]``."""
        return (_time_in(arguments[self.time], self.timed) - self.offset) / self.slope

    def sample_of(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the samples in the arguments of a call, shape ``[batch, *event]``."""
        given = tensor_of(arguments[self.sample])
        return given if self.joined is None else self.joined.sample_in(given)

    def conditions_of(self, arguments: Mapping[str, Any], count: int) -> Conditioning:
        """Return the conditions in the arguments of a call with ``count`` samples."""
        cond = self.layout.split(arguments, count)
        return cond if self.joined is None else self.joined.add_to(cond, tensor_of(arguments[self.sample]))

    def _network_time(self, time: Tensor) -> Tensor:
        # In the order of the pipeline's operations: a product with 0.001 is rounded otherwise than a quotient by 1000.
        inverse = round(1 / self.slope)
        scaled = time / inverse if inverse * self.slope == 1 else self.slope * time
        scaled = scaled + self.offset if self.offset else scaled
        return scaled if self.timed is None else scaled.reshape(-1, *[1] * self.timed.ndim) * self.timed.to(scaled)


def crop_to(output: Tensor, like: Tensor) -> Tensor:
    """Return the part of an output that has the shape of the sample.

    The rest is a learned variance (more channels), or belongs to what the pipeline joins to the sample (a longer
    sequence, a wider picture).
    """
    for axis in range(1, min(output.ndim, like.ndim)):
        if output.shape[axis] > like.shape[axis]:
            output = output.narrow(axis, 0, like.shape[axis])
    return output


def is_near(a: Tensor, b: Tensor) -> bool:
    """Return whether a is b up to rounding, relative to the largest value of b."""
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())


def read_call(
    recording: Recording, spec: ScheduleSpec, source: str, sides: Mapping[str, nn.Module] | None = None
) -> RecordedCall:
    """Read a recording: names of sample and time, scale of the time, sign of the output.

    Args:
        sides: networks of the pipeline that may run before the main one.

    Raises:
        UserError: if the network takes no time or two, is called more than once per step, or if the pipeline changes
            its output in an unknown way.
    """
    first = recording.calls[0].arguments
    sample, time = next(iter(first)), next((name for name in first if name in TIME_NAMES), None)
    if time is None:
        raise UserError(
            f"{source}: expected a time argument named {', '.join(TIME_NAMES)}, got {', '.join(first)}; write an "
            "adapter for it (docs/add-a-teacher.md)"
        )
    second = next((name for name in _SECOND_TIMES if first.get(name) is not None), None)
    if second is not None and not all(torch.equal(*_times(call.arguments, time, second)) for call in recording.calls):
        raise UserError(
            f"{source}: expected a network with one time, got one with a second ({second}), which its pipeline sets to "
            "the end of each step; try the model that it was distilled from"
        )
    calls, steps = len(recording.calls), len(recording.steps)
    if calls != steps:
        # A scheduler that is stepped twice gives an estimate of the data, from which the pipeline makes the output.
        reason = " (its pipeline preconditions the network itself)" if calls < steps else ""
        raise UserError(
            f"{source}: expected one network call per step, got {calls} calls in {steps} steps{reason}; write an "
            "adapter for it (docs/add-a-teacher.md)"
        )
    if recording.calls[0].outputs > 1:
        raise UserError(
            f"{source}: expected a network of one sample, got one of {recording.calls[0].outputs}, such as video and "
            "its sound, which are stepped together; try a pipeline of one of them alone"
        )
    timed = _find_timed([call.arguments[time] for call in recording.calls])
    times = torch.cat([_time_in(call.arguments[time], timed) for call in recording.calls])
    own = scheduler_times(recording, spec)
    slope, offset = _fit_line(own, times.double(), _time_scale(spec), source)
    joined = find_joined(recording, sample, source)
    listed = isinstance(first[sample], list)
    call = RecordedCall(sample, time, slope, offset, 1.0, listed, joined=joined, second_time=second, timed=timed)
    call = replace(call, sides=_read_sides(recording, call, sides or {}, source))
    sign = _sign_of_output(recording, call, source)
    # The velocity of an inverted scheduler runs from noise to data.
    sign = -sign if spec.inverted else sign
    return replace(call, sign=sign)


def _read_sides(
    recording: Recording, call: RecordedCall, networks: Mapping[str, nn.Module], source: str
) -> tuple[SideNetwork, ...]:
    found = []
    for name, side in recording.calls[0].sides.items():
        arguments = recording.calls[0].arguments
        given, x = tensor_of(arguments[call.sample]), call.sample_of(arguments)
        try:
            found.append(SideNetwork.of(name, networks[name], side, given, x))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        pairs = ((one.arguments[call.time], one.sides[name].time) for one in recording.calls)
        if not all(torch.equal(*(torch.as_tensor(time).flatten()[:1].float() for time in pair)) for pair in pairs):
            raise UserError(
                f"{source}: expected one time for the network and its {name}, got another; write an adapter for it "
                "(docs/add-a-teacher.md)"
            )
    return tuple(found)


def _times(arguments: Mapping[str, Any], *names: str) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(arguments[name]).flatten() for name in names)


def _find_timed(times: Sequence[Any]) -> Tensor | None:
    """Return which tokens have the time of the call, where others have the time 0 in all steps; None: no others."""
    if not all(isinstance(time, torch.Tensor) and time.ndim > 1 for time in times):
        return None
    timed = torch.stack([time != 0 for time in times]).any(0)
    return None if timed.all() or not torch.equal(timed, timed[:1].expand_as(timed)) else timed[0]


def _time_in(time: Any, timed: Tensor | None) -> Tensor:  # noqa: ANN401 any time argument
    """Return the first time of a network's argument that is not that of a clean token, shape ``[1]``."""
    given = torch.as_tensor(time).float().flatten()
    first = 0 if timed is None else int(timed.flatten().nonzero()[0])
    return given[first : first + 1]


def scheduler_times(recording: Recording, spec: ScheduleSpec) -> Tensor:
    """Return the schedule's times at the recorded steps, as its scheduler counts them."""
    own = torch.tensor([step.timestep for step in recording.steps], dtype=torch.float64)
    return _time_scale(spec) - own if spec.inverted else own


def _time_scale(spec: ScheduleSpec) -> int:
    """Return the largest time of the scheduler."""
    schedule = spec.schedule
    return schedule.time_scale if isinstance(schedule, FlowMatching) else schedule.num_timesteps


def _sign_of_output(recording: Recording, call: RecordedCall, source: str) -> float:
    """Return the factor between the network's first output and the input of the scheduler's first step."""
    first, stepped = recording.calls[0], recording.steps[0].output
    x = call.sample_of(first.arguments)
    stepped = call.output_of(stepped, x) if stepped.ndim == x.ndim else stepped
    # Sorted: some pipelines pass the same numbers in another layout to their scheduler.
    output, stepped = call.output_of(first.output, x).flatten().sort().values, stepped.flatten().sort().values
    if output.shape == stepped.shape:
        for sign in (1.0, -1.0):
            if is_near((sign * output).sort().values, stepped):
                return sign
    raise UserError(
        f"{source}: expected a scheduler that gets the network's output, got other numbers from the pipeline; write an "
        "adapter for it (docs/add-a-teacher.md)"
    )


def _shown(times: Tensor) -> str:
    return ", ".join(f"{float(time):.4g}" for time in times)


def _fit_line(own: Tensor, times: Tensor, timesteps: int, source: str) -> tuple[float, float]:
    """Return slope and offset of the network's times over the scheduler's, as plain numbers where these fit."""
    # Some pipelines divide by the number of timesteps of their scheduler, some by 1000 whatever that number is.
    scales = dict.fromkeys((1.0, 1e-3, 1 / timesteps))
    lines = [(scale, 0.0) for scale in scales] + [(-scale, 0.0) for scale in scales]
    lines += [(-1e-3, 1.0), (-1 / timesteps, 1.0), (-1.0, float(timesteps)), (-1.0, 1000.0)]
    for slope, offset in lines:
        if (slope * own + offset - times).abs().max() <= _PLAIN_LINE * times.abs().max():
            return slope, offset
    slope = float((times[0] - times[-1]) / (own[0] - own[-1]))
    offset = float(times[0] - slope * own[0])
    if slope == 0 or not (slope * own + offset - times).abs().max() <= _FITTED_LINE * times.abs().max():
        raise UserError(
            f"{source}: expected network times on a line over the scheduler's {_shown(own)}, got {_shown(times)}: its "
            "pipeline makes times of its own, as preconditioning does; write an adapter for it (docs/add-a-teacher.md)"
        )
    return slope, offset
