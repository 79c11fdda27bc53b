"""A stock pipeline that is run to find out how it calls its network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.schedules import FlowMatching, VarianceExploding
from fmm_distill.errors import UserError
from fmm_distill.teachers.call_errors import refuse_call
from fmm_distill.teachers.components import STOCK_ERRORS
from fmm_distill.teachers.prompted.arguments import Probes, read_layout
from fmm_distill.teachers.prompted.call import is_near, read_call, scheduler_times
from fmm_distill.teachers.prompted.call_keywords import CallKeywords
from fmm_distill.teachers.prompted.first_step import euler_scheduler, is_changed_between_steps, step_error
from fmm_distill.teachers.prompted.joined import check_joined
from fmm_distill.teachers.prompted.runs import record_prompts, record_unguided
from fmm_distill.teachers.prompts import Prompts, pictures_like
from fmm_distill.teachers.recording import tensor_of
from fmm_distill.teachers.scheduler import read_scheduler
from fmm_distill.teachers.side_networks import side_networks
from fmm_distill.teachers.stages import boundary_of, network_of, networks_of
from fmm_distill.teachers.stepped_samples import find_positions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.prompted.arguments import ArgumentLayout
    from fmm_distill.teachers.prompted.call import RecordedCall
    from fmm_distill.teachers.recording import Recording
    from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["STEPS", "PipelineProbe"]

# Steps of the recorded run. PNDM needs at least four.
STEPS = 4
# Another number of steps for the check, so that most of its times were not recorded.
_CHECK_STEPS = 5
# Where these do not reach the times of every network.
_MORE_STEPS = (10, 20, 40, 80)
# Prompts of different lengths: padding shows. The third is not longer than the first: the padding of all is the same.
_TEXTS = ("a red cat on a mat", "dogs", "a house")
# Error of the first step relative to its length. Schedulers round timesteps; a wrong sign has an error of 2.
_STEP_TOLERANCE = 0.01
# Differences in timesteps between a scheduler and its noise levels: some schedulers round to integers.
_ROUNDING = 1.5


@dataclass(frozen=True)
class PipelineProbe:
    """A pipeline, a recorded run of it, and what the run shows.

    Attributes:
        source: the id or folder of the pipeline, for messages.
        component: the name of the network in the pipeline.
        samples: three prompts, with images where the pipeline takes any.
        recording: a run with the first two of them, without guidance.
        spec: noise levels and prediction, read from the scheduler.
        call: how the pipeline calls its network.
        turned: the scheduler steps against the velocity that it gets.
    """

    source: str
    pipeline: Any
    component: str
    keywords: CallKeywords
    samples: Prompts
    recording: Recording
    spec: ScheduleSpec
    call: RecordedCall
    turned: bool = False

    @classmethod
    def of(
        cls,
        pipeline: Any,  # noqa: ANN401 a diffusers class
        component: str,
        call: dict[str, Any],
        scale: float,
        source: str,
        prompts: Prompts,
    ) -> PipelineProbe:
        """Run a pipeline and read its schedule and its network call.

        Args:
            call: the keywords of the pipeline's call that the user gives.
            prompts: those of the teacher. The pipeline is run with other ones, and with pictures like their images.
            scale: the guidance scale of a network that is conditioned on it.

        Raises:
            UserError: if the pipeline does not run, or its run can't be read.
        """
        keywords = CallKeywords.of(pipeline, call, scale)
        pictures = {name: tuple(pictures_like(own[0], len(_TEXTS))) for name, own in prompts.images.items()}
        samples = Prompts(_TEXTS, pictures)
        try:
            keywords, recording = record_unguided(pipeline, component, keywords, samples, STEPS, scale)
        except UserError as refused:
            # Some pipelines take prompts of one form alone, such as JSON with certain entries.
            samples = Prompts(tuple(prompts.texts[i % len(prompts)] for i in range(len(_TEXTS))), pictures)
            try:
                keywords, recording = record_unguided(pipeline, component, keywords, samples, STEPS, scale)
            except UserError:
                raise refused from refused.__cause__
        try:
            return cls._read(source, pipeline, component, keywords, samples, recording)
        except UserError as mixed:
            if keywords.one_prompt or not samples.images:
                raise
            # In some pipelines a list of images is that of one sample: its frames, or all of its references.
            keywords = replace(keywords, one_prompt=True)
            try:
                recording = record_prompts(pipeline, component, keywords, samples.some((0, 1)), STEPS)
                return cls._read(source, pipeline, component, keywords, samples, recording)
            except UserError:
                raise mixed from mixed.__cause__

    @classmethod
    def _read(
        cls,
        source: str,
        pipeline: Any,  # noqa: ANN401 a diffusers class
        component: str,
        keywords: CallKeywords,
        samples: Prompts,
        recording: Recording,
    ) -> PipelineProbe:
        """Read the schedule and the network call of a recorded run."""
        # After the run: the shift of some flow models is known only when their pipeline has passed it.
        spec = _read_schedule(pipeline, recording, source)
        read = read_call(recording, spec, source, side_networks(pipeline, component))
        read = replace(read, boundary=boundary_of(pipeline))
        probe = cls(source, pipeline, component, keywords, samples, recording, spec, read)
        probe = replace(probe, call=replace(probe.call, layout=probe._layout()))
        sign = probe._sign_of_first_step()
        return replace(probe, call=replace(probe.call, sign=sign), turned=sign != probe.call.sign)

    @property
    def network(self) -> nn.Module:
        """The network that is distilled."""
        return network_of(self.pipeline, self.component)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample of the network."""
        return tuple(self.call.sample_of(self.recording.calls[0].arguments).shape[1:])

    @property
    def positions(self) -> Tensor | None:
        """The positions of a sample's numbers among those of the scheduler's; see ``find_positions``."""
        return find_positions(self.call.sample_of(self.recording.calls[0].arguments), self.recording.steps[0].sample)

    @property
    def two(self) -> Prompts:
        """The prompts of the recording."""
        return self.samples.some((0, 1))

    def check(self) -> None:
        """Call the network as a student will and compare with another run of the pipeline, at other times.

        Raises:
            UserError: if times or outputs differ.
        """
        recording = self._record_all_networks()
        cond = self.embed(self.two)
        own_times = scheduler_times(recording, self.spec)
        times = self._times_of_levels(recording)
        for call, own, by_level in zip(recording.calls, own_times, own_times if times is None else times, strict=True):
            self._check_time(own, by_level)
            self._check_network(call.network, own)
            x = self.call.sample_of(call.arguments)
            # Schedulers round timesteps to integers: the outputs are comparable at the time that the network got.
            time = (own if float(own).is_integer() else by_level).float().expand(len(x))
            output, expected = self._output(x, time, cond), self.call.output_of(call.output, x)
            if not is_near(output.abs(), expected.abs()):
                raise UserError(
                    f"{self.source}: expected the output that its pipeline gets, got one that differs by "
                    f"{float((output - expected).abs().max()):.1e}; write an adapter for it (docs/add-a-teacher.md)"
                )
        if isinstance(self.spec.schedule, FlowMatching):
            x, sample = self.call.sample_of(recording.calls[0].arguments), recording.steps[0].sample
            sample = self.call.output_of(sample, x) if sample.ndim == x.ndim else sample
            if not is_near(x.flatten().sort().values, sample.flatten().sort().values):
                raise UserError(
                    f"{self.source}: expected a flow model without input scaling, got a pipeline that scales the "
                    "network's input; write an adapter for it (docs/add-a-teacher.md)"
                )

    def _check_time(self, own: Tensor, by_level: Tensor) -> None:
        # A relative tolerance for fractional times, which are float32 in most schedulers.
        tolerance = _ROUNDING if float(own).is_integer() else 1e-3 * abs(float(own))
        if abs(float(by_level - own)) > tolerance:
            raise UserError(
                f"{self.source}: at a noise level where its scheduler's time is {float(own):g} the schedule that was "
                f"read from the scheduler has {float(by_level):g}; write an adapter for it (docs/add-a-teacher.md)"
            )

    def _record_all_networks(self) -> Recording:
        """Return a run that calls every network: times below a boundary may need many steps."""
        names = networks_of(self.pipeline, self.component)
        for steps in (_CHECK_STEPS, *_MORE_STEPS):
            recording = self._record(self.two, steps)
            called = {call.network for call in recording.calls}
            if called == names.keys():
                return recording
        raise UserError(
            f"{self.source}: expected calls of {' and '.join(names)} within {_MORE_STEPS[-1]} steps, got calls of "
            f"{' and '.join(sorted(called))} alone; try a checkpoint with one network"
        )

    def _check_network(self, name: str, own: Tensor) -> None:
        """Check that the pipeline calls the network that a ``StagedNetwork`` selects at this time."""
        if self.call.boundary is None:
            return
        high, low = networks_of(self.pipeline, self.component)
        if name != (high if float(own) >= self.call.boundary else low):
            raise UserError(
                f"{self.source}: expected {high} from timestep {self.call.boundary:g} on and {low} below it, got "
                f"{name} at {float(own):g}; write an adapter for it (docs/add-a-teacher.md)"
            )

    @torch.no_grad()
    def _output(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        try:
            return self.call(self.network, x, time, cond, None)
        except STOCK_ERRORS as error:
            raise refuse_call(self.source, self.network, tuple(x.shape[1:]), error) from error

    def _times_of_levels(self, recording: Recording) -> Tensor | None:
        """Return the schedule's times at the scheduler's noise levels; None: the timesteps are the levels."""
        schedule = self.spec.schedule
        if len(recording.sigmas) < len(recording.steps):
            return None
        sigmas = torch.tensor(recording.sigmas[: len(recording.steps)], dtype=torch.float64)
        if isinstance(schedule, FlowMatching):
            return schedule.network_time(1 - sigmas if self.spec.inverted else sigmas)
        return schedule.network_time(sigmas / (1 + sigmas)) if isinstance(schedule, VarianceExploding) else None

    def embed(self, prompts: Prompts) -> Conditioning:
        """Return the network's inputs of two or more prompts; the network itself does not run."""
        return self.call.conditions_of(self._first_arguments(prompts), len(prompts))

    def _first_arguments(self, prompts: Prompts) -> dict[str, Any]:
        return self._record(prompts, STEPS, first_only=True).calls[0].arguments

    def _record(self, prompts: Prompts, steps: int, *, first_only: bool = False) -> Recording:
        """Return a run without guidance."""
        return record_prompts(self.pipeline, self.component, self.keywords, prompts, steps, first_only=first_only)

    def _layout(self) -> ArgumentLayout:
        """Compare the arguments of other prompts, in another order and of another number."""
        orders = ((0, 1), (1, 0), (0, 1, 2))
        probes = Probes(*(self._first_arguments(self.samples.some(order)) for order in orders))
        if (joined := self.call.joined) is not None:
            two, swapped, three = (tensor_of(one[self.call.sample]) for one in probes.all)
            check_joined(joined, two, swapped, three, self.source)
        own = (self.call.sample, self.call.time, self.call.second_time or "")
        return read_layout(probes, own, self.source)

    def _sign_of_first_step(self) -> float:
        """Return the factor of the network's output with which our Euler step is the pipeline's.

        What a scheduler is given does not show it: some schedulers step the other way for some of their arguments.

        Raises:
            UserError: if the steps differ for both signs.
        """
        recording, cond = self.recording, self.embed(self.two)
        own = self.pipeline.scheduler
        if (euler := euler_scheduler(own, self.spec.schedule)) is not None:
            self.pipeline.scheduler = euler
            try:
                recording = self._record(self.two, STEPS)
            finally:
                self.pipeline.scheduler = own
        errors = {}
        for sign in (self.call.sign, -self.call.sign):
            call = replace(self.call, sign=sign)
            errors[sign] = step_error(recording, self.spec, call, self.network, cond)
            if errors[sign] < _STEP_TOLERANCE:
                return sign
        if is_changed_between_steps(recording):
            raise UserError(
                f"{self.source}: expected a pipeline that leaves the sample alone between its steps, got "
                f"{type(self.pipeline).__name__}, which changes it there, as the parts of an image that stay are put "
                "back in inpainting; try the base model, whose student inpaints too (docs/image-conditions.md)"
            )
        raise UserError(
            f"{self.source}: expected a first step like that of its pipeline, got one that differs by "
            f"{min(errors.values()):.1e} of its length; write an adapter for it (docs/add-a-teacher.md)"
        )


def _read_schedule(pipeline: Any, recording: Recording, source: str) -> ScheduleSpec:  # noqa: ANN401 a diffusers class
    config = pipeline.scheduler.config
    unshifted = _uses_unshifted_time(recording, config.num_train_timesteps)
    return read_scheduler(pipeline.scheduler, source, shift=_shift(recording, config), uses_unshifted_time=unshifted)


def _uses_unshifted_time(recording: Recording, timesteps: int) -> bool:
    """Return whether the timesteps of a flow model are those before its scheduler's shift."""
    pairs = list(zip(recording.sigmas, recording.steps, strict=False))
    # The first step is left out: shifted and unshifted time are both 1 there.
    # The time of a scheduler with one timestep is the level itself, not rounded.
    tolerance = _ROUNDING if timesteps > 1 else _ROUNDING / 1000
    return bool(pairs) and any(abs(step.timestep - timesteps * sigma) > tolerance for sigma, step in pairs[1:])


def _shift(recording: Recording, config: Any) -> float | None:  # noqa: ANN401 a diffusers configuration
    """Return the shift that a pipeline passes to its scheduler at every call; None: it passes none."""
    if not config.get("use_dynamic_shifting") or recording.mu is None:
        return None
    mu = torch.tensor(float(recording.mu))
    return float(mu if config.get("time_shift_type") == "linear" else mu.exp())
