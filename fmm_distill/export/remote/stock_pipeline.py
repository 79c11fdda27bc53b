"""The any-step pipeline of a stock class. Imports torch and diffusers alone: exports have a copy of it."""

import contextlib
import functools
import hashlib
import inspect
import json
import re
from numbers import Integral
from pathlib import Path

import diffusers
from diffusers.utils import logging

from fmm_distill.export.remote.scheduler import FlowMapScheduler

logger = logging.get_logger(__name__)

# In this order: the second one is in the code of the first.
_IMPORTS = {
    "scheduler.py": "from fmm_distill.export.remote.scheduler import FlowMapScheduler\n",
    "fresh_noise.py": "from fmm_distill.export.remote.fresh_noise import FreshNoise, discrete_position\n",
}


def _read_source() -> str:
    """Return this file with the code of its two parts in place of their imports.

    diffusers fetches one file of code per pipeline from the Hub. A file of its own in ``scheduler/`` would not be
    opened where the caller passes another scheduler, which the pipeline replaces by the student's.
    """
    source = Path(__file__).read_text(encoding="utf-8")
    for name, line in _IMPORTS.items():
        if line in source:
            source = source.replace(line, f"\n{Path(__file__).with_name(name).read_text(encoding='utf-8')}\n")
    return source


# Read at import: diffusers copies the code of all repositories into one folder, and a later copy may replace this one.
_SOURCE = _read_source()
# Equally named files of two repositories share one namespace in a process. The digest keeps two contents apart.
MODULE = f"flow_map_{hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]}"


def write_code(folder, module: str = MODULE, source: str = _SOURCE) -> None:
    """Write this file under the name by which an index refers to it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{module}.py").write_text(source, encoding="utf-8")


def _chosen_guidance(config, levels: dict, given: dict) -> float | None:
    """Return the scale that a student with a range is conditioned on, and remove it from the call of the pipeline."""
    if config.get("guidance_range") is None:
        return None
    (low, high), name = config["guidance_range"], levels["guidance"]
    scale = given.pop(name, None)
    scale = levels["scale"] if scale is None else scale
    if not low <= scale <= high:
        raise ValueError(f"{name} must be {low:g} to {high:g}, the range that this student has learned, got {scale}")
    return scale


def _network_names(pipeline) -> list:
    """Return the names of the networks that a pipeline calls, two where it has one for low noise levels."""
    name = "unet" if getattr(pipeline, "transformer", None) is None else "transformer"
    second = f"{name}_2"
    staged = pipeline.config.get("boundary_ratio") is not None and getattr(pipeline, second, None) is not None
    return [name, second] if staged else [name]


def _student(network):
    """Return a two-time network, which may be wrapped, for example by torch.compile."""
    found = [module for module in network.modules() if hasattr(type(module), "student_scheduler")]
    if not found:
        raise ValueError(
            f"{type(network).__name__} is no student; expected the TwoTime class that the pipeline was exported with"
        )
    return found[0]


def _bound(stock: type, pipeline, call: tuple, keywords: dict) -> inspect.BoundArguments:
    try:
        # Partial: the stock call itself reports arguments that are missing.
        return inspect.signature(stock.__call__).bind_partial(pipeline, *call, **keywords)
    except TypeError as error:
        raise TypeError(f"{type(pipeline).__name__}.__call__() {error}") from None


def _check_steps(steps, levels: dict) -> None:
    """Refuse a number of steps below 1 or above the timesteps: some stock pipelines return noise for it."""
    most = levels.get("total")
    if steps is not None and (not isinstance(steps, Integral) or steps < 1 or (most is not None and steps > most)):
        expected = "an integer from 1" if most is None else f"an integer from 1 to {most}"
        raise ValueError(f"num_inference_steps must be {expected}, got {steps!r}")


def _turn_guidance_off(levels: dict, given: dict) -> None:
    """Turn the pipeline's own guidance off, unless the call turns it on, and add the other keywords of training."""
    for name, value in levels["call"].items():
        if name not in given:
            # Sizes are tuples in diffusers, and lists in JSON.
            numbers = isinstance(value, list) and value and all(isinstance(each, (int, float)) for each in value)
            given[name] = tuple(value) if numbers else value
        elif name == levels["guidance"] and (given[name] or 0.0) > value:
            logger.warning(f"{name}={given[name]}: guidance is in the student's weights, this adds to it")


class _FlowMap:
    """The part of an any-step pipeline that is the same for every stock class."""

    # Attributes, since diffusers may replace the globals by those of an edited file.
    module_name, module_source = MODULE, _SOURCE

    def jump_through(self, stock: type, call: tuple, keywords: dict):
        """Call the stock pipeline, its network conditioned on the jumps of its scheduler."""
        stochasticity = keywords.pop("stochasticity", 0.0)
        networks = [_student(getattr(self, name)) for name in _network_names(self)]
        network = networks[0]
        levels = network.config.flow_map
        bound = _bound(stock, self, call, keywords)
        given = bound.arguments
        _check_steps(given.get("num_inference_steps"), levels)
        scale = _chosen_guidance(network.config, levels, given)
        _turn_guidance_off(levels, given)
        # They go to the scheduler alone: some stock pipelines refuse them, or call the network at other times.
        own = {name: given.pop(name) for name in ("timesteps", "sigmas") if given.get(name) is not None}
        if own:
            # One jump per start; a number in the call would contradict it.
            given["num_inference_steps"] = len(next(iter(own.values())))

        def keywords_at(time):
            length = {"h": self.scheduler.jump_length(time)}
            return length if scale is None else length | {"w": scale}

        with contextlib.ExitStack() as stack:
            for each in networks:
                stack.enter_context(each.conditioned(keywords_at))
            before = self.scheduler
            self.scheduler = FlowMapScheduler.from_stock(
                network.student_scheduler(before),
                levels,
                own,
                stochasticity,
                given.get("generator"),
            )
            try:
                return stock.__call__(*bound.args, **bound.kwargs)
            finally:
                self.scheduler = before

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Pass the networks on, whose class is not the one that diffusers expects."""
        own = {name: getattr(pipeline, name) for name in _network_names(pipeline)}
        return super().from_pipe(pipeline, **own | kwargs)

    def image_to_image(self):
        """Return the image-to-image pipeline of this one, with the same components: it takes image and strength.

        Sampling starts between noise and data, on the grid of ``num_inference_steps``, of which it makes a fraction.
        """
        return _of_task(self, "Img2Img")

    def inpaint(self):
        """Return the inpainting pipeline of this one, with the same components: it takes image and mask_image."""
        return _of_task(self, "Inpaint(ing)?")

    def video_to_video(self):
        """Return the video-to-video pipeline of this one, with the same components: it takes video and strength."""
        return _of_task(self, "VideoToVideo")

    def to_json_string(self) -> str:
        """Return the index, with the modules of pipeline and network."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = [self.module_name, type(self).__name__]
        for name, value in index.items():
            if isinstance(value, list) and ".two_time" in str(value[0]):
                index[name] = [_student(getattr(self, name)).module_name, value[1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save the index and this file, which defines the class."""
        write_code(save_directory, self.module_name, self.module_source)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def _of_task(pipeline, words: str):
    """Return the pipeline of another task with the same components.

    Args:
        words: a pattern of the task in the names of the classes in diffusers, which are otherwise those of their bases.
    """
    own, bases = type(pipeline).__mro__[2].__name__, {}
    for name in dir(diffusers):
        if name.endswith("Pipeline") and re.search(words, name):
            bases |= {re.sub(words, instead, name, count=1): name for instead in ("TextToVideo", "")}
    if own not in bases:
        families = ", ".join(sorted(name for name in bases if hasattr(diffusers, name)))
        raise ValueError(f"diffusers has no pipeline of this task for {own}; expected one of {families}")
    stock = getattr(diffusers, bases[own])
    taken = inspect.signature(stock.__init__).parameters
    if missing := [name for name in _network_names(pipeline) if name not in taken]:
        raise ValueError(f"{stock.__name__} has no {missing[0]}; expected a student with one network for this task")
    network = _student(getattr(pipeline, _network_names(pipeline)[0]))
    settings = network.config.flow_map.get("task", {})
    own_settings = {name: value for name, value in settings.items() if name in taken}
    return flow_map_pipeline(stock).from_pipe(pipeline, **own_settings)


def _with_stochasticity(signature: inspect.Signature) -> inspect.Signature:
    own = inspect.Parameter("stochasticity", inspect.Parameter.KEYWORD_ONLY, default=0.0)
    parameters = list(signature.parameters.values())
    # Keywords of any name come last.
    last = parameters.pop() if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else None
    return signature.replace(parameters=[*parameters, own, *([] if last is None else [last])])


@functools.cache
def flow_map_pipeline(stock: type) -> type:
    """Return ``FlowMap<stock>``: the stock pipeline class with a two-time network, for any number of steps.

    The length of a jump is read from the scheduler's grid. Where the stock pipeline takes ``timesteps`` or ``sigmas``,
    they are the starts of the jumps. The guidance that the student was trained with is in its weights: the pipeline's
    own is off by default, and adds to it with a warning. A student with a range of guidance is conditioned on the scale
    of the call instead. A scheduler of another class is replaced, with a warning, by the student's own.

    The call has one keyword more, ``stochasticity``, at least 0: the strength of the fresh noise in each step.

    Raises:
        ValueError: on starts from which the student has no jump, or a scheduler of other noise levels.
    """

    def __call__(self, *args, **kwargs):  # noqa: N807 it becomes the class's own
        return self.jump_through(stock, args, kwargs)

    # Users and other pipelines read the signature.
    __call__.__signature__ = _with_stochasticity(inspect.signature(stock.__call__))
    own = {"__module__": __name__, "__doc__": flow_map_pipeline.__doc__, "__call__": __call__}
    return type(f"FlowMap{stock.__name__}", (_FlowMap, stock), own)


def __getattr__(name: str) -> type:
    """Return ``FlowMap<stock>`` by its name, as diffusers and pickle look it up."""
    stock = getattr(diffusers, name.removeprefix("FlowMap"), None) if name.startswith("FlowMap") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return flow_map_pipeline(stock)


# diffusers executes this file again, in the same namespace, for every repository that it opens. Objects of the first
# execution are in use and may be pickled, so its classes, locks and caches are restored.
_first_run = globals().get("_first_run") or dict(globals())
if _first_run["_SOURCE"] == _SOURCE:
    globals().update(_first_run)
