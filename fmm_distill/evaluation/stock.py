"""Stock pipelines with their own schedulers: the teacher's, which is the reference, and alternatives to a student."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.core.staged import parts_of
from fmm_distill.errors import UserError
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of, places_of
from fmm_distill.evaluation.samplers import Sampler
from fmm_distill.student.scaled_adapters import stock_network
from fmm_distill.teachers.adapter_loading import load_into
from fmm_distill.teachers.codec import decoded_of
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.conditions import Classes, Embeddings
from fmm_distill.teachers.guiders import set_plain_guiders
from fmm_distill.teachers.load import download, find_index
from fmm_distill.teachers.recording import run_pipeline
from fmm_distill.teachers.safety import describe_checkers
from fmm_distill.teachers.stages import network_of
from fmm_distill.teachers.weight_files import check_weight_files

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.evaluation.draws import SampleDraws
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.index import PipelineIndex
    from fmm_distill.teachers.ip_adapter import IpAdapter
    from fmm_distill.teachers.pipeline import StockPipeline

__all__ = ["other_pipeline", "reference_pipeline"]


class _PipelineRun:
    """Runs of a pipeline with its own scheduler and spacing, on the generators of the samples.

    Args:
        options: keywords of the call; those that the pipeline does not accept are left out.
    """

    def __init__(self, pipeline: Any, teacher: Teacher, steps: int, options: dict[str, Any]) -> None:  # noqa: ANN401
        self.pipeline, self.teacher, self.steps = pipeline, teacher, steps
        self.accepted = inspect.signature(pipeline.__call__).parameters
        self.options = {key: value for key, value in options.items() if key in self.accepted}

    def __call__(self, draws: SampleDraws) -> Float[Tensor, "batch channels height width"]:
        """Return decoded images in [-1, 1]."""
        stock = self.teacher.pipeline
        # Their noise is in another layout where a part of the sample is given.
        accepts_noise = "latents" in self.accepted and (stock is None or stock.positions is None)
        options = self.options | self._conditions(draws) | {"num_inference_steps": self.steps, "output_type": "np"}
        # A generator that has drawn the noise already must not draw it again as the noise of an ancestral step.
        options["generator"] = draws.generators(after_noise=accepts_noise)
        if accepts_noise:
            options["latents"] = draws.noise
        return torch.cat([decoded_of(run_pipeline(self.pipeline, call)) for call in self._calls(options)])

    def _calls(self, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the keywords of one call for all samples, or of a call for each if the pipeline takes one prompt."""
        if self.teacher.pipeline is None or not self.teacher.pipeline.one_prompt:
            return [options]
        lists = {name: value for name, value in options.items() if name in self._listed()}
        if "latents" in options:
            lists["latents"] = options["latents"].split(1)
        return [options | dict(zip(lists, each, strict=True)) for each in zip(*lists.values(), strict=True)]

    def _listed(self) -> set[str]:
        """Return the keywords of the call that have one entry per sample."""
        known = self.teacher.conditions
        return {"prompt", "negative_prompt", "generator", *(known.images if isinstance(known, Embeddings) else ())}

    def _conditions(self, draws: SampleDraws) -> dict[str, Any]:
        known, name = self.teacher.conditions, type(self.pipeline).__name__
        given: dict[str, Any] = {"batch_size": len(draws)}
        if isinstance(known, Classes):
            labels = draws.cond.inputs[known.keyword] if draws.cond is not None else torch.empty(0)
            given = {"class_labels": labels.tolist()}
        elif isinstance(known, Embeddings):
            takes_prompt = self.teacher.pipeline is None or self.teacher.pipeline.condition == "prompt"
            given = known.given.some(places_of(known, draws.numbers, draws.seed)).keywords(prompt=takes_prompt)
            if self.options.get("true_cfg_scale", 1) != 1 and "negative_prompt" not in self.options:
                # Without a negative prompt these pipelines ignore the scale.
                given["negative_prompt"] = [""] * len(draws)
        if missing := [keyword for keyword in given if keyword not in self.accepted]:
            raise UserError(f"expected a pipeline that accepts {missing[0]}, as the teacher does; got {name}")
        return given


def reference_pipeline(teacher: Teacher, device: torch.device, steps: int | None = None) -> Sampler:
    """Return the teacher's own pipeline, with its scheduler, spacing and number of steps and the teacher's guidance.

    Args:
        steps: None: the pipeline's default.

    Raises:
        UserError: if the pipeline can't generate images from the evaluation's noises.
    """
    found = find_index(teacher.source, teacher.revision)
    # A teacher that was loaded from a variant has a folder with its weights under the plain names.
    stock = teacher.pipeline
    folder, component = (download(found).folder, "unet") if stock is None else (stock.folder, stock.component)
    pipeline = open_pipeline(folder, **parts_of(stock_network(teacher), component)).to(device)
    call = _guided_call(teacher)
    set_plain_guiders(pipeline, 1.0 if teacher.guidance is None else teacher.guidance.scale)
    run = _PipelineRun(pipeline, teacher, _steps(pipeline, steps), call)
    return _sampler("teacher", run, _unchecked(found))


def other_pipeline(source: str, teacher: Teacher, device: torch.device, steps: tuple[int, ...]) -> list[Sampler]:
    """Return another pipeline on the teacher's noises and prompts, with its own scheduler and its own guidance.

    Args:
        source: a Hub id or a folder; it is opened once for all numbers of steps.

    Raises:
        UserError: if it can't be opened, has fewer timesteps, or generates images of another shape.
    """
    found = download(find_index(source))
    check_weight_files(found)
    pipeline = open_pipeline(found.folder).to(device)
    if teacher.pipeline is not None and teacher.pipeline.ip_adapter is not None:
        _load_adapter(pipeline, teacher.pipeline, source)
        pipeline.to(device)
    most = getattr(pipeline.scheduler.config, "num_train_timesteps", None)
    if most is not None and max(steps) > most:
        raise UserError(f"--also {source}: expected 1 to {most} steps, its number of timesteps; got {max(steps)}")
    call = {} if teacher.pipeline is None else dict(teacher.pipeline.call)
    runs = [_PipelineRun(pipeline, teacher, count, call) for count in steps]
    return [_sampler(source, run, _unchecked(found)) for run in runs]


def _load_adapter(pipeline: Any, stock: StockPipeline, source: str) -> None:  # noqa: ANN401 a diffusers class
    """Load the teacher's IP-Adapter, with its image encoder, into another pipeline.

    Raises:
        UserError: if it does not take it.
    """
    adapter = cast("IpAdapter", stock.ip_adapter)
    if not hasattr(pipeline, "load_ip_adapter"):
        raise UserError(
            f"--also {source}: expected a pipeline that takes the teacher's IP-Adapter, got {type(pipeline).__name__}"
        )
    try:
        load_into(pipeline, stock.folder, adapter)
    except UserError as error:
        raise UserError(f"--also {source}: {error}") from error


def _describe(run: _PipelineRun, unchecked: str | None) -> str:
    names = f"{type(run.pipeline).__name__}, {type(run.pipeline.scheduler).__name__}"
    options = "".join(f", {key}={value!r}" for key, value in run.options.items())
    without = f"; without its {unchecked}" if unchecked else ""
    return f"{names}, {run.steps} steps{options}; seconds include decoding{without}"


def _guided_call(teacher: Teacher) -> dict[str, Any]:
    """Return the keywords of a stock call with the teacher's guidance."""
    guidance = teacher.guidance
    scale, image_scale = (1.0, 1.0) if guidance is None else (guidance.scale, guidance.image_scale)
    # Without guidance by the prompt the pipelines turn off that by the image too, and with a scale below 1 both.
    if image_scale != 1 and (scale <= 1 or image_scale < 1):
        raise UserError(
            f"expected guidance that a stock pipeline supports; got guidance.scale {scale:g} with guidance.image_scale "
            f"{image_scale:g}, at which it does not guide"
        )
    if guidance is not None and (teacher.weaker is not None or guidance.interval != (0.0, 1.0)):
        raise UserError(
            "expected guidance that a stock pipeline supports; got guidance by a weaker teacher or on an interval"
        )
    return {} if teacher.pipeline is None else teacher.pipeline.call | teacher.pipeline.guided(scale, image_scale)


def _unchecked(found: PipelineIndex) -> str | None:
    return describe_checkers(found.pipeline, found.components)


def _steps(pipeline: Any, steps: int | None) -> int:  # noqa: ANN401 a diffusers class
    """Return ``steps``, or the pipeline's default."""
    default = inspect.signature(pipeline.__call__).parameters.get("num_inference_steps")
    # A pipeline without the keyword takes one step.
    return steps or (int(default.default) if default is not None else 1)


def _sampler(name: str, run: _PipelineRun, unchecked: str | None) -> Sampler:
    """Return the sampler of a pipeline after a trial.

    Args:
        unchecked: the safety checkers that the pipeline was opened without.
    """
    pipeline, teacher = run.pipeline, run.teacher
    component = "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"
    network = None if getattr(pipeline, component, None) is None else network_of(pipeline, component)
    if network is None or "output_type" not in run.accepted or "num_inference_steps" not in run.accepted:
        raise UserError(
            f"{name}: expected a pipeline that generates images with a unet or a transformer; "
            f"got {type(pipeline).__name__}"
        )
    # Two steps find a mismatch of shapes or conditions as well as many, and exercise a step after the first.
    trial = _PipelineRun(pipeline, teacher, min(run.steps, 2), run.options)
    draws = draw_samples_of(teacher, range(2), NOISE_SEED, next(network.parameters()).device)
    with torch.no_grad():
        got, expected = tuple(trial(draws).shape[1:]), tuple(teacher.codec.decode(draws.noise[:1]).shape[1:])
    if got != expected:
        raise UserError(f"{name}: expected images of shape {expected}, as the teacher's; got {got}")
    about = _describe(run, unchecked)
    return Sampler(name, run.steps, network, run, makes_images=True, follows_ode=False, about=about)
