"""Stock pipelines as they are: the teacher's own, which is the reference, and others that one would take instead."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.errors import UserError
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of, prompts_of
from fmm_distill.evaluation.samplers import Sampler
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.load import fetched, find
from fmm_distill.teachers.recording import run_pipeline
from fmm_distill.teachers.safety import about_checkers
from fmm_distill.teachers.weight_files import check_weight_files

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.evaluation.draws import SampleDraws
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.components import PipelineIndex

__all__ = ["about_sampler", "other_pipeline", "reference_pipeline"]


class _Stock:
    """A pipeline with its own scheduler and spacing, on the samples' own generators.

    Args:
        unchecked: the checkers that it was opened without.
    """

    def __init__(
        self,
        pipeline: Any,  # noqa: ANN401 a diffusers class
        teacher: Teacher,
        steps: int,
        given: dict[str, Any],
        unchecked: str | None = None,
    ) -> None:
        self.unchecked = unchecked
        self.pipeline, self.teacher, self.steps = pipeline, teacher, steps
        self.taken = inspect.signature(pipeline.__call__).parameters
        self.given = {key: value for key, value in given.items() if key in self.taken}

    def __call__(self, draws: SampleDraws) -> Float[Tensor, "batch channels height width"]:
        """Decoded images, in [-1, 1]."""
        takes_noise = "latents" in self.taken
        given = self.given | self._told(draws) | {"num_inference_steps": self.steps, "output_type": "np"}
        # Generators that have given the noise already would give it again as the first noise of an ancestral step.
        given["generator"] = draws.generators(after_noise=takes_noise)
        if takes_noise:
            given["latents"] = draws.noise
        images = torch.from_numpy(run_pipeline(self.pipeline, given)[0])
        return images.movedim(-1, 1).float() * 2 - 1

    def _told(self, draws: SampleDraws) -> dict[str, Any]:
        known, name = self.teacher.conditions, type(self.pipeline).__name__
        keyword, told = "batch_size", cast("Any", len(draws))
        if isinstance(known, Classes):
            labels = draws.cond.inputs[known.keyword] if draws.cond is not None else torch.empty(0)
            keyword, told = "class_labels", labels.tolist()
        elif known is not None:
            keyword, told = "prompt", prompts_of(known, draws.numbers, draws.seed)
        if keyword not in self.taken:
            raise UserError(f"{name} takes no {keyword}, which is what the samples are told; wanted one that does")
        return {keyword: told}


def reference_pipeline(teacher: Teacher, device: torch.device, steps: int | None = None) -> Sampler:
    """The teacher as its own pipeline samples it: its scheduler, spacing and number of steps, the teacher's guidance.

    Args:
        steps: another number of steps.

    Raises:
        UserError: if that pipeline can't make images of the noises that it is compared on.
    """
    found = find(teacher.source, teacher.revision)
    # A teacher of a variant has its weights under the plain names in a folder of its own.
    folder = fetched(found).folder if teacher.folder is None else teacher.folder
    pipeline = open_pipeline(folder, **{teacher.component: teacher.network}).to(device)
    run = _Stock(pipeline, teacher, _steps(pipeline, steps), teacher.call | _guidance(teacher), _unchecked(found))
    return _sampler("teacher", run)


def other_pipeline(source: str, teacher: Teacher, device: torch.device, steps: tuple[int, ...]) -> list[Sampler]:
    """Another pipeline on the teacher's noises and prompts, with its own scheduler and its own guidance.

    Args:
        source: a Hub id or a folder; it is opened once for all numbers of steps.

    Raises:
        UserError: if it can't be opened, has fewer timesteps, or makes other images than the teacher.
    """
    found = fetched(find(source))
    check_weight_files(found)
    pipeline = open_pipeline(found.folder).to(device)
    most = getattr(pipeline.scheduler.config, "num_train_timesteps", None)
    if most is not None and max(steps) > most:
        raise UserError(f"--also {source}: {max(steps)} steps; wanted 1 to {most}, its number of timesteps")
    runs = [_Stock(pipeline, teacher, count, dict(teacher.call), _unchecked(found)) for count in steps]
    return [_sampler(source, run) for run in runs]


def about_sampler(sampler: Sampler) -> str:
    """Pipeline, scheduler and number of steps."""
    stock = sampler.run
    if not isinstance(stock, _Stock):
        return f"{sampler.name}, {sampler.steps} steps"
    names = f"{type(stock.pipeline).__name__}, {type(stock.pipeline.scheduler).__name__}"
    checked = f"; without its {stock.unchecked}" if stock.unchecked else ""
    return f"{names}, {sampler.steps} steps{_shown(stock.given)}; seconds are to the decoded image{checked}"


def _shown(given: dict[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in given.items())


def _guidance(teacher: Teacher) -> dict[str, Any]:
    """The keywords of a stock call that guide as the teacher is guided."""
    scale = 1.0 if teacher.guidance is None else teacher.guidance.scale
    if teacher.guidance is not None and (teacher.weaker is not None or teacher.guidance.interval != (0.0, 1.0)):
        raise UserError("guidance by a weaker teacher or on an interval is none that a stock pipeline has")
    keys = getattr(teacher.codec, "keys", None)
    if keys is None:
        return {"guidance_scale": scale}
    # Where the keyword counts from 0, off is 0.
    told = {} if keys.guidance is None else {keys.guidance: keys.off + scale - 1}
    return {key: value for key, value in keys.fixed.items() if key != "output_type"} | told


def _unchecked(found: PipelineIndex) -> str | None:
    return about_checkers(found.pipeline, found.components)


def _steps(pipeline: Any, steps: int | None) -> int:  # noqa: ANN401 a diffusers class
    """A number of steps, or the one that the pipeline takes unless it is given one."""
    default = inspect.signature(pipeline.__call__).parameters.get("num_inference_steps")
    return steps or (int(default.default) if default is not None else 1)


def _sampler(name: str, run: _Stock) -> Sampler:
    pipeline, teacher = run.pipeline, run.teacher
    component = "transformer" if getattr(pipeline, "transformer", None) is not None else "unet"
    network = getattr(pipeline, component, None)
    if network is None or "output_type" not in run.taken or "num_inference_steps" not in run.taken:
        raise UserError(f"{name}: {type(pipeline).__name__} is no pipeline of images by a unet or a transformer")
    # Few steps show what is wrong as well as many.
    trial = _Stock(pipeline, teacher, min(run.steps, 2), run.given)
    draws = draw_samples_of(teacher, range(2), NOISE_SEED, next(network.parameters()).device)
    with torch.no_grad():
        made, wanted = tuple(trial(draws).shape[1:]), tuple(teacher.codec.decode(draws.noise[:1]).shape[1:])
    if made != wanted:
        raise UserError(f"{name} makes images of shape {made}, the teacher {wanted}; wanted the same")
    return Sampler(name, run.steps, network, run, makes_images=True, follows_ode=False)
