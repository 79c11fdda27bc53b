"""Teachers that are told a prompt: any stock pipeline whose network is asked for one sample at one time.

The adapter runs the pipeline a few steps, looks at what its network and scheduler are given (``recording``), and checks
that it can ask the network the same itself.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from fmm_distill.errors import UserError
from fmm_distill.parametrisation import Parametrisation, keywords
from fmm_distill.schedules import FlowMatching
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import PipelineCodec
from fmm_distill.teachers.components import FAULTS, check_weights, open_pipeline
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.embedding import EACH, LENGTHS, cache_file, embed_all, told_apart
from fmm_distill.teachers.keywords import refused_keyword
from fmm_distill.teachers.recording import TIMES, record, tensor_of
from fmm_distill.teachers.scheduler import read_scheduler
from fmm_distill.velocity import Conditioning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from fmm_distill.teachers.components import Found
    from fmm_distill.teachers.guidance import Guidance
    from fmm_distill.teachers.recording import Recording
    from fmm_distill.teachers.scheduler import Levels

__all__ = ["RecordedCall", "load_prompted"]

STEPS = 4
PROBES = ("a red cat on a mat", "dogs")
# Of a network's prediction, against what the pipeline itself got from it.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class RecordedCall:
    """How a pipeline asks its network, found by watching.

    Attributes:
        sample, time: names of the network's two first arguments.
        slope, offset: the time that it is told is ``slope * schedule's time + offset``.
        sign: what its output is multiplied by.
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
        return self.sign * _cut(tensor_of(network(**given)), x)

    def _told(self, time: Tensor) -> Tensor:
        """In the pipeline's own order of operations: a product with 0.001 is rounded otherwise than a quotient."""
        inverse = round(1 / self.slope)
        scaled = time / inverse if inverse * self.slope == 1 else self.slope * time
        return scaled + self.offset if self.offset else scaled


def _cut(output: Tensor, like: Tensor) -> Tensor:
    """The part of an output that is of the sample's shape: the rest is a learned variance, or reference tokens."""
    return output[:, : like.shape[1]] if output.shape[1] > like.shape[1] else output


def _listed(given: dict[str, Any], batch: int) -> dict[str, Any]:
    """Padded rows with their lengths back to lists, and what stands for each sample repeated."""
    lengths = given.pop(LENGTHS, {})
    for name, rows in lengths.items():
        given[name] = [row[: int(length)] for row, length in zip(given[name], rows, strict=True)]
    for name in [name for name in given if name.endswith(EACH)]:
        given[name.removesuffix(EACH)] = [given.pop(name)] * batch
    return given


def load_prompted(
    found: Found, prompts: Sequence[str] = ("",), call: dict[str, Any] | None = None, guidance: Guidance | None = None
) -> Teacher:
    """The teacher in a folder with text encoders.

    Args:
        prompts: what the student is to learn.
        call: keywords of the pipeline's call besides the prompt, such as height and width.
        guidance: of the teacher; a network that is told its guidance is told the scale instead.

    Raises:
        UserError: if the pipeline can't be opened or run, or what its network is given can't be told apart.
    """
    component = "transformer" if "transformer" in found.components else "unet"
    _check_one_network(found, component)
    pipeline = _open(found)
    _check_call(pipeline, call or {}, found.source)
    network = getattr(pipeline, component)
    check_weights(network, found.source)
    keys = _Keys.of(pipeline, call or {}, 1.0 if guidance is None else guidance.scale)
    probe = record(pipeline, component, keys.call(PROBES, STEPS))
    if keys.guidance == "guidance_scale" and _is_told_guidance(probe):
        keys = _Keys(keys.fixed | {"guidance_scale": 1.0 if guidance is None else guidance.scale}, None, 1.0)
        probe = record(pipeline, component, keys.call(PROBES, STEPS))
    shift = _shift(probe, pipeline.scheduler.config)
    levels = read_scheduler(pipeline.scheduler, found.source, shift=shift, told_before=_told_before(probe))
    asked = _ask(probe, levels, found.source)
    conditions = _conditions(pipeline, component, keys, asked, tuple(prompts), found, inverted=levels.inverted)
    _check_prediction(network, asked, probe, pipeline, component, keys, levels, found.source)
    width = tensor_of(probe.asked[0].given[asked.sample]).shape[1:]
    return Teacher(
        network=network.eval().requires_grad_(False),
        parametrisation=Parametrisation(levels.schedule, levels.prediction, asked, levels.sigma_data),
        event_shape=tuple(width),
        source=found.source,
        adapter=f"{type(pipeline).__name__} with {type(network).__name__}, found by running it",
        scheduler_config=levels.config,
        component=component,
        folder=found.folder,
        call=dict(call or {}),
        conditions=conditions,
        guidance=_checked(guidance, conditions, probe),
        codec=PipelineCodec(found.folder, component, network, keys.call(("",), STEPS), keys, tuple(width)),
        revision=found.revision,
        licence=found.licence,
    )


def _is_told_guidance(probe: Recording) -> bool:
    return probe.asked[0].given.get("guidance") is not None


def _checked(guidance: Guidance | None, conditions: Embeddings, probe: Recording) -> Guidance | None:
    """Guidance by two answers, or None where the network is told its guidance or there is none."""
    if guidance is None or (guidance.scale == 1 and guidance.range is None):
        return None
    if _is_told_guidance(probe):
        if guidance.range is not None:
            raise UserError("guidance.range: this network is told its guidance already; wanted one guidance.scale")
        if guidance.interval != (0.0, 1.0):
            raise UserError("guidance.interval: this network is told its guidance, at every time; wanted [0, 1]")
        return None
    # Says why, where there is nothing to be guided away from.
    conditions.null(1)
    return guidance


def _check_one_network(found: Found, component: str) -> None:
    """A pipeline may change to a second network at a time that the few steps of the recording don't reach."""
    kind = found.components[component][1]
    others = [name for name, (_, cls) in found.components.items() if cls == kind and name != component]
    if others:
        raise UserError(
            f"{found.source}: its {others[0]} is a second {kind} for a part of the times; wanted one network for all "
            "of them: choose a checkpoint that has one"
        )


def _open(found: Found) -> Any:  # noqa: ANN401 a diffusers class
    missing = [name for name in found.components if not (found.folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{found.source}: its {missing[0]} is missing (no folder of that name); wanted a whole pipeline as "
            "save_pretrained writes it: fetch or save it again"
        )
    try:
        import transformers  # noqa: F401 only whether it is there
    except ImportError as error:
        raise UserError(f"{found.source} has text encoders: they need `pip install fmm-distill[text]`") from error
    if not hasattr(diffusers, found.pipeline):
        raise UserError(
            f"{found.source}: this diffusers has no {found.pipeline or 'class for it'}; install a newer one"
        )
    try:
        return open_pipeline(found.folder)
    except FAULTS as error:
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"{found.source}: the pipeline does not open ({type(error).__name__}: {lines[0]}); wanted a whole pipeline "
            "as save_pretrained writes it, in safetensors"
        ) from error


def _check_call(pipeline: Any, call: dict[str, Any], source: str) -> None:  # noqa: ANN401 a diffusers class
    taken = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in taken or ("image" in taken and taken["image"].default is inspect.Parameter.empty):
        raise UserError(f"{source}: {type(pipeline).__name__} starts from an image; wanted one that starts from noise")
    if "image" in taken and "Img2Img" in type(pipeline).__name__:
        raise UserError(
            f"{source}: {type(pipeline).__name__} refines an image that another model made; wanted the base model"
        )
    if (refusal := refused_keyword(call)) is not None:
        raise UserError(refusal)
    wrong = [key for key in call if key not in taken]
    if wrong:
        raise UserError(
            f"pipeline.{wrong[0]}: {type(pipeline).__name__} takes no {wrong[0]}; it takes {', '.join(taken)}"
        )


@dataclass(frozen=True)
class _Keys:
    """The keywords of a pipeline's call.

    Attributes:
        fixed: those that never change.
        guidance: the keyword of classifier-free guidance, where there is one.
        off: its value that turns guidance off.
    """

    fixed: dict[str, Any]
    guidance: str | None
    off: float

    @classmethod
    def of(cls, pipeline: Any, call: dict[str, Any], scale: float) -> _Keys:  # noqa: ANN401 a diffusers class
        taken = inspect.signature(pipeline.__call__).parameters
        fixed = {"output_type": "latent"} | call
        if "true_cfg_scale" in taken:
            # guidance_scale is then something that the network itself is told.
            return cls(fixed | {"guidance_scale": scale}, "true_cfg_scale", 1.0)
        if "guidance_scale" not in taken:
            return cls(fixed, None, 1.0)
        # One pipeline adds guidance_scale times the difference to the conditional answer: 0 is off there.
        off = 0.0 if type(pipeline).__name__.startswith("ZImage") else 1.0
        return cls(fixed, "guidance_scale", off)

    def call(self, prompts: Sequence[str], steps: int, guidance: float | None = None) -> dict[str, Any]:
        """The keywords for these prompts."""
        given = {**self.fixed, "prompt": list(prompts), "num_inference_steps": steps}
        given["generator"] = torch.Generator().manual_seed(0)
        if self.guidance:
            given[self.guidance] = self.off if guidance is None else guidance
        return given


def _shift(probe: Recording, config: Any) -> float | None:  # noqa: ANN401 a diffusers configuration
    """The shift that a pipeline gives its scheduler at every call."""
    if not config.get("use_dynamic_shifting") or probe.mu is None:
        return None
    mu = torch.tensor(float(probe.mu))
    return float(mu if config.get("time_shift_type") == "linear" else mu.exp())


def _told_before(probe: Recording) -> bool:
    """Whether a flow model's timesteps are those before its scheduler's shift, not its levels times their number."""
    pairs = list(zip(probe.sigmas, probe.steps, strict=False))
    return bool(pairs) and any(abs(step.timestep - 1000 * sigma) > 1.5 for sigma, step in pairs[1:])


def _ask(probe: Recording, levels: Levels, source: str) -> RecordedCall:
    """How the network was asked: names of sample and time, the time's scale, the output's sign."""
    first = probe.asked[0].given
    names = list(first)
    sample, time = names[0], next((name for name in names if name in TIMES), None)
    if time is None:
        raise UserError(f"{source}: the network is told no time among {', '.join(names)}; wanted one of {TIMES}")
    if any(name in first and first[name] is not None for name in ("timestep_r", "r_timestep")):
        raise UserError(f"{source}: the network is told a second time already; wanted the model it was distilled from")
    told = torch.tensor([float(torch.as_tensor(call.given[time]).flatten()[0]) for call in probe.asked])
    if len(probe.asked) != len(probe.steps):
        raise UserError(
            f"{source}: {len(probe.asked)} calls in {len(probe.steps)} steps; wanted one network call a step"
        )
    slope, offset = _line(_own_times(probe, levels), told.double(), source)
    output, wanted = probe.asked[0].output, probe.steps[0].output
    x = tensor_of(first[sample])
    # Sorted: some pipelines hand their scheduler the same numbers in another layout.
    flat, other = _cut(output, x).flatten().sort().values, wanted.flatten().sort().values
    sign = next((s for s in (1.0, -1.0) if flat.shape == other.shape and _near((s * flat).sort().values, other)), None)
    if sign is None:
        raise UserError(f"{source}: the pipeline changes its network's output in a way that is not known here")
    if levels.inverted:
        sign = -sign
    return RecordedCall(sample, time, slope, offset, sign, isinstance(first[sample], list))


def _own_times(probe: Recording, levels: Levels) -> Tensor:
    """The schedule's times at the recorded steps, as the scheduler counts them."""
    own = torch.tensor([step.timestep for step in probe.steps], dtype=torch.float64)
    return levels.schedule.num_timesteps - own if levels.inverted else own


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def _line(own: Tensor, told: Tensor, source: str) -> tuple[float, float]:
    """The straight line from the scheduler's times to those that the network is told, in plain numbers where it is."""
    for slope, offset in ((1.0, 0.0), (1e-3, 0.0), (-1e-3, 1.0), (-1.0, 1000.0), (-1.0, 0.0)):
        if (slope * own + offset - told).abs().max() <= 1e-6 * told.abs().max():
            return slope, offset
    slope = float((told[0] - told[-1]) / (own[0] - own[-1]))
    offset = float(told[0] - slope * own[0])
    if (slope * own + offset - told).abs().max() > 1e-5 * told.abs().max():
        raise UserError(f"{source}: the network's times {told.tolist()} are no line in the scheduler's {own.tolist()}")
    return slope, offset


def _conditions(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keys: _Keys,
    asked: RecordedCall,
    prompts: tuple[str, ...],
    found: Found,
    *,
    inverted: bool,
) -> Embeddings:
    def embed(some: Sequence[str]) -> Conditioning:
        return _embed(pipeline, component, keys, asked, some)

    place = cache_file(found, prompts, {name: repr(value) for name, value in sorted(keys.fixed.items())})
    rows = embed_all(embed, prompts, place)
    return Embeddings(prompts, rows, *_null(pipeline, component, keys, asked, inverted=inverted))


def _embed(pipeline: Any, component: str, keys: _Keys, asked: RecordedCall, prompts: Sequence[str]) -> Conditioning:  # noqa: ANN401
    """What the network is told of these prompts, two or more; the network itself does not run."""
    several = record(pipeline, component, keys.call(prompts, STEPS), first_only=True).asked[0].given
    single = record(pipeline, component, keys.call(prompts[:1], STEPS), first_only=True).asked[0].given
    return told_apart(several, (asked.sample, asked.time), len(prompts), single)


def _null(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keys: _Keys,
    asked: RecordedCall,
    *,
    inverted: bool,
) -> tuple[Conditioning | None, str]:
    """What the network is told of no prompt, if the pipeline's own guidance is the plain combination with it."""
    kind = type(pipeline).__name__
    if keys.guidance is None:
        return None, f"{kind} has no classifier-free guidance"
    call = keys.call(PROBES, STEPS, guidance=3.0)
    if keys.guidance == "true_cfg_scale":
        call["negative_prompt"] = [""] * len(PROBES)
    seen, count = record(pipeline, component, call), len(PROBES)
    cond = _embed(pipeline, component, keys, asked, PROBES)
    single = record(pipeline, component, keys.call(PROBES[:1], STEPS), first_only=True).asked[0].given
    first = seen.asked[0].given
    x = tensor_of(first[asked.sample])
    if len(seen.asked) > len(seen.steps):
        parts = [call.given for call in seen.asked[:2]]
    elif len(x) == 2 * count:
        parts = [{name: _half(value, count, second) for name, value in first.items()} for second in (False, True)]
    else:
        return None, f"{kind} has no classifier-free guidance"
    told = [told_apart(part, (asked.sample, asked.time), count, single) for part in parts]
    null = told[0] if _same(told[1], cond) else told[1]
    if not _same(told[0], cond) and not _same(told[1], cond):
        return None, f"{kind} is told something else when it is guided"
    if not _combines(pipeline, component, asked, seen, cond, null, inverted=inverted):
        return None, f"{kind} guides by more than a plain combination of two answers"
    return null.rows(torch.tensor([0])), ""


def _half(value: Any, count: int, second: bool) -> Any:  # noqa: ANN401 whatever a network takes
    """One half of what has two rows a sample."""
    if isinstance(value, dict):
        return {key: _half(item, count, second) for key, item in value.items()}
    rows = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)
    if rows and len(value) == 2 * count:
        return value[count:] if second else value[:count]
    return value


def _same(one: Conditioning, other: Conditioning) -> bool:
    return one.inputs.keys() == other.inputs.keys() and all(
        rows.shape == other.inputs[name].shape and torch.allclose(rows, other.inputs[name], rtol=1e-4, atol=1e-5)
        for name, rows in one.inputs.items()
    )


@torch.no_grad()
def _combines(
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    asked: RecordedCall,
    seen: Recording,
    cond: Conditioning,
    null: Conditioning,
    *,
    inverted: bool,
) -> bool:
    """Whether ``null + w (answer - null)`` with one w is what the pipeline hands its scheduler, at two steps."""
    network, per_step, weights = getattr(pipeline, component), len(seen.asked) // len(seen.steps), []
    for i in (0, len(seen.steps) - 1):
        given = seen.asked[i * per_step].given
        x = tensor_of(given[asked.sample])[: len(PROBES)]
        # The time as it was told: back through the line of the call.
        told = torch.as_tensor(given[asked.time]).flatten()[:1].float().expand(len(x))
        time = (told - asked.offset) / asked.slope
        answer, nothing = (asked(network, x, time, about, None).flatten() for about in (cond, null))
        wanted = seen.steps[i].output * (-1 if inverted else 1)
        if wanted.numel() != answer.numel():
            return False
        # The mean does not depend on the layout, the deviation tells the answers apart.
        weight = float((wanted.mean() - nothing.mean()) / (answer.mean() - nothing.mean()))
        weights.append(weight)
        combined = (nothing + weight * (answer - nothing)).sort().values
        if not bool((combined - wanted.flatten().sort().values).abs().max() <= 1e-2 * wanted.abs().max()):
            return False
    return abs(weights[0] - weights[1]) < 1e-2 * abs(weights[0])


def _check_prediction(
    network: nn.Module,
    asked: RecordedCall,
    probe: Recording,
    pipeline: Any,  # noqa: ANN401 a diffusers class
    component: str,
    keys: _Keys,
    levels: Levels,
    source: str,
) -> None:
    """Ask the network as a student will and compare with what the pipeline got."""
    cond = _embed(pipeline, component, keys, asked, PROBES)
    for call, own in zip(probe.asked, _own_times(probe, levels), strict=True):
        x = tensor_of(call.given[asked.sample])
        time = own.float().expand(len(x))
        with torch.no_grad():
            output = asked(network, x, time, cond, None)
        wanted = _cut(call.output, x)
        if not _near(output.abs(), wanted.abs()):
            raise UserError(
                f"{source}: asked as its pipeline asks it, the network answers otherwise "
                f"(by {float((output - wanted).abs().max()):.1e}); write an adapter for it (docs/add-a-teacher.md)"
            )
    if isinstance(levels.schedule, FlowMatching):
        x, sample = tensor_of(probe.asked[0].given[asked.sample]), probe.steps[0].sample
        if not _near(x.flatten().sort().values, sample.flatten().sort().values):
            raise UserError(f"{source}: the pipeline scales what it gives its network; wanted a plain flow model")
