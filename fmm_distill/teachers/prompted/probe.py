"""A stock pipeline that is run to find out how it calls its network."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.schedules import FlowMatching, VarianceExploding
from fmm_distill.errors import UserError, named
from fmm_distill.teachers.call_errors import refuse_call
from fmm_distill.teachers.components import STOCK_ERRORS
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.guiders import guider_names
from fmm_distill.teachers.prompted.arguments import Probes, is_close, read_layout
from fmm_distill.teachers.prompted.cache import cache_file, embed_all
from fmm_distill.teachers.prompted.call import crop_to, is_near, read_call, scheduler_times
from fmm_distill.teachers.prompted.call_keywords import CallKeywords
from fmm_distill.teachers.prompted.first_step import euler_scheduler, step_error
from fmm_distill.teachers.prompted.runs import record_guided, record_prompts, record_unguided
from fmm_distill.teachers.recording import tensor_of
from fmm_distill.teachers.scheduler import read_scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from fmm_distill.teachers.index import PipelineIndex
    from fmm_distill.teachers.prompted.arguments import ArgumentLayout
    from fmm_distill.teachers.prompted.call import RecordedCall
    from fmm_distill.teachers.recording import Recording
    from fmm_distill.teachers.scheduler import ScheduleSpec

__all__ = ["STEPS", "PipelineProbe"]

# Steps of the recorded run. PNDM needs at least four.
STEPS = 4
# Another number of steps for the check, so that most of its times were not recorded.
_CHECK_STEPS = 5
# Prompts of different lengths: padding shows.
_PROMPTS = ("a red cat on a mat", "dogs")
# Of another number, not longer than the first: the padding is the same.
_THIRD_PROMPT = "a house"
# Error of the first step relative to its length. Schedulers round timesteps; a wrong sign has an error of 2.
_STEP_TOLERANCE = 0.01
# The scale at which the pipeline's own guidance is compared: far from 1, where guidance does nothing.
_SCALE = 3.0
# Differences in timesteps between a scheduler and its noise levels: some schedulers round to integers.
_ROUNDING = 1.5
# Relative difference between the pipeline's guided output and ours: a difference of two outputs times the scale
# amplifies their rounding, and the weight is itself a quotient of such differences.
_GUIDANCE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class PipelineProbe:
    """A pipeline, a recorded run of it, and what the run shows.

    Attributes:
        source: the id or folder of the pipeline, for messages.
        component: the name of the network in the pipeline.
        recording: a run with two prompts, without guidance.
        spec: noise levels and prediction, read from the scheduler.
        call: how the pipeline calls its network.
        turned: the scheduler steps against the velocity that it gets.
    """

    source: str
    pipeline: Any
    component: str
    keywords: CallKeywords
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
    ) -> PipelineProbe:
        """Run a pipeline and read its schedule and its network call.

        Args:
            call: the keywords of the pipeline's call that the user gives.
            scale: the guidance scale of a network that is conditioned on it.

        Raises:
            UserError: if the pipeline does not run, or its run can't be read.
        """
        keywords = CallKeywords.of(pipeline, call, scale)
        keywords, recording = record_unguided(pipeline, component, keywords, _PROMPTS, STEPS, scale)
        # After the run: the shift of some flow models is known only when their pipeline has passed it.
        spec = _read_schedule(pipeline, recording, source)
        probe = cls(source, pipeline, component, keywords, recording, spec, read_call(recording, spec, source))
        probe = replace(probe, call=replace(probe.call, layout=probe._layout()))
        sign = probe._sign_of_first_step()
        return replace(probe, call=replace(probe.call, sign=sign), turned=sign != probe.call.sign)

    @property
    def network(self) -> nn.Module:
        """The network that is distilled."""
        network: nn.Module = getattr(self.pipeline, self.component)
        return network

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample of the network."""
        return tuple(self.call.sample_of(self.recording.calls[0].arguments).shape[1:])

    def conditions(self, prompts: tuple[str, ...], index: PipelineIndex) -> Embeddings:
        """Return the embeddings of prompts, and those of the empty prompt where the pipeline uses it for guidance."""
        fixed = {name: repr(value) for name, value in sorted(self.keywords.fixed.items())}
        rows = embed_all(self._embed, prompts, cache_file(index, prompts, fixed))
        return Embeddings(prompts, rows, *self.null())

    def null(self) -> tuple[Conditioning | None, str]:
        """Return the network's inputs of the empty prompt; or None and the reason.

        There are none if the pipeline's guidance is not the plain combination of two outputs.
        """
        kind = type(self.pipeline).__name__
        if self.keywords.guidance is None and not guider_names(self.pipeline):
            return None, f"{kind} has no classifier-free guidance"
        cond = self._embed(_PROMPTS)
        try:
            found = self._null_of(self._record_guided(), cond)
            takes_prompt = "negative_prompt" in inspect.signature(self.pipeline.__call__).parameters
            if takes_prompt and not (isinstance(found, Conditioning) and self._is_empty_prompt(found, cond)):
                # Some pipelines have a negative prompt of their own, others have one for the complete batch.
                found = self._null_of(self._record_guided(empty=True), cond)
        except UserError as error:
            # Unguided students need no empty prompt, of which some tokenizers make no token.
            cause = error if error.__cause__ is None else error.__cause__
            return None, f"{kind} does not run with guidance by the empty prompt ({named(cause)})"
        return (found, "") if isinstance(found, Conditioning) else (None, f"{kind} {found}")

    def _null_of(self, guided: Recording, cond: Conditioning) -> Conditioning | str:
        """Return the inputs with which a guided run calls its network besides ``cond``; or the reason against them."""
        count, first = len(_PROMPTS), guided.calls[0].arguments
        two_calls = len(guided.calls) > len(guided.steps)
        if not two_calls and len(tensor_of(first[self.call.sample])) != 2 * count:
            return "has no classifier-free guidance"
        others = "passes other inputs to its network with guidance"
        try:
            if two_calls:
                one, other = (self.call.conditions_of(call.arguments, count) for call in guided.calls[:2])
            else:
                both = self.call.conditions_of(first, 2 * count)
                one, other = both.part(0, count), both.part(count, 2 * count)
        except UserError:
            return others
        if not _is_same(one, cond) and not _is_same(other, cond):
            return others
        null = one if _is_same(other, cond) else other
        if not self._combines(guided, cond, null):
            return "guides by more than a plain combination of two outputs"
        # The rows are equal, one per sample; ``Embeddings.null`` repeats the first.
        return null.rows(torch.tensor([0]))

    def _is_empty_prompt(self, null: Conditioning, cond: Conditioning) -> bool:
        """Return whether the inputs are those of the empty prompt, or zeros, which some networks learn instead."""
        if any(not rows.any() and cond.inputs[name].any() for name, rows in null.inputs.items()):
            return True
        return _is_same(null, self._embed(("",) * len(_PROMPTS)).rows(torch.tensor([0])))

    def check(self) -> None:
        """Call the network as a student will and compare with another run of the pipeline, at other times.

        Raises:
            UserError: if times or outputs differ.
        """
        recording = self._record(_PROMPTS, _CHECK_STEPS)
        cond = self._embed(_PROMPTS)
        own_times = scheduler_times(recording, self.spec)
        times = self._times_of_levels(recording)
        for call, own, by_level in zip(recording.calls, own_times, own_times if times is None else times, strict=True):
            self._check_time(own, by_level)
            x = self.call.sample_of(call.arguments)
            # Schedulers round timesteps to integers: the outputs are comparable at the time that the network got.
            time = (own if float(own).is_integer() else by_level).float().expand(len(x))
            output, expected = self._output(x, time, cond), crop_to(call.output, x)
            if not is_near(output.abs(), expected.abs()):
                raise UserError(
                    f"{self.source}: expected the output that its pipeline gets, got one that differs by "
                    f"{float((output - expected).abs().max()):.1e}; write an adapter for it (docs/add-a-teacher.md)"
                )
        if isinstance(self.spec.schedule, FlowMatching):
            x, sample = self.call.sample_of(recording.calls[0].arguments), recording.steps[0].sample
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

    def _embed(self, prompts: Sequence[str]) -> Conditioning:
        """Return the network's inputs of two or more prompts; the network itself does not run."""
        return self.call.conditions_of(self._first_arguments(prompts), len(prompts))

    def _first_arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        return self._record(prompts, STEPS, first_only=True).calls[0].arguments

    def _record(self, prompts: Sequence[str], steps: int, *, first_only: bool = False) -> Recording:
        """Return a run without guidance."""
        return record_prompts(self.pipeline, self.component, self.keywords, prompts, steps, first_only=first_only)

    def _layout(self) -> ArgumentLayout:
        """Compare the arguments of other prompts, in another order and of another number."""
        a, b = _PROMPTS
        probes = Probes(*(self._first_arguments(prompts) for prompts in ((a, b), (b, a), (a, b, _THIRD_PROMPT))))
        own = (self.call.sample, self.call.time, self.call.second_time or "")
        return read_layout(probes, own, self.source)

    def _sign_of_first_step(self) -> float:
        """Return the factor of the network's output with which our Euler step is the pipeline's.

        What a scheduler is given does not show it: some schedulers step the other way for some of their arguments.

        Raises:
            UserError: if the steps differ for both signs.
        """
        recording, cond = self.recording, self._embed(_PROMPTS)
        own = self.pipeline.scheduler
        if (euler := euler_scheduler(own, self.spec.schedule)) is not None:
            self.pipeline.scheduler = euler
            try:
                recording = self._record(_PROMPTS, STEPS)
            finally:
                self.pipeline.scheduler = own
        errors = {}
        for sign in (self.call.sign, -self.call.sign):
            call = replace(self.call, sign=sign)
            errors[sign] = step_error(recording, self.spec, call, self.network, cond)
            if errors[sign] < _STEP_TOLERANCE:
                return sign
        raise UserError(
            f"{self.source}: expected a first step like that of its pipeline, got one that differs by "
            f"{min(errors.values()):.1e} of its length; write an adapter for it (docs/add-a-teacher.md)"
        )

    def _record_guided(self, *, empty: bool = False) -> Recording:
        """Return a run with the pipeline's own guidance.

        Args:
            empty: by the empty prompt, whatever negative prompt the pipeline has by default.
        """
        return record_guided(self.pipeline, self.component, self.keywords, _PROMPTS, STEPS, _SCALE, empty=empty)

    @torch.no_grad()
    def _combines(self, guided: Recording, cond: Conditioning, null: Conditioning) -> bool:
        """Return whether ``null + w (output - null)``, one w at two steps, is what the scheduler gets."""
        calls_per_step, weights = len(guided.calls) // len(guided.steps), []
        for i in (0, len(guided.steps) - 1):
            arguments = guided.calls[i * calls_per_step].arguments
            x = self.call.sample_of(arguments)[: len(_PROMPTS)]
            network_time = torch.as_tensor(arguments[self.call.time]).flatten()[:1].float().expand(len(x))
            time = (network_time - self.call.offset) / self.call.slope
            output, uncond = (self.call(self.network, x, time, each, None).flatten() for each in (cond, null))
            stepped = guided.steps[i].output * (-1 if self.spec.inverted != self.turned else 1)
            # A learned variance is not guided.
            stepped = crop_to(stepped, x) if stepped.ndim == x.ndim else stepped
            if stepped.numel() != output.numel():
                return False
            # The mean does not depend on the layout of the numbers.
            weight = float((stepped.mean() - uncond.mean()) / (output.mean() - uncond.mean()))
            weights.append(weight)
            combined, expected = (uncond + weight * (output - uncond)).sort().values, stepped.flatten().sort().values
            if not bool((combined - expected).abs().max() <= _GUIDANCE_TOLERANCE * stepped.abs().max()):
                return False
        return abs(weights[0] - weights[1]) < _GUIDANCE_TOLERANCE * abs(weights[0])


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


def _is_same(one: Conditioning, other: Conditioning) -> bool:
    # With guidance, text encoders may run on batches of another size.
    return one.inputs.keys() == other.inputs.keys() and all(
        is_close(rows, other.inputs[name]) for name, rows in one.inputs.items()
    )
