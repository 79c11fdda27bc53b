"""A stock pipeline whose network is a student flow map. Imports only torch and diffusers: it travels along."""

import functools
import hashlib
import inspect
import json
import math
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import logging

logger = logging.get_logger(__name__)

# Read at import: diffusers copies the code of all repositories into one folder, and a later copy may replace this one.
_SOURCE = Path(__file__).read_text(encoding="utf-8")
# Equally named files of two repositories share one namespace in a process. The digest keeps two contents apart.
MODULE = f"flow_map_{hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]}"


def write_code(folder, module: str = MODULE, source: str = _SOURCE) -> None:
    """Write this file under the name that an index refers to it by."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{module}.py").write_text(source, encoding="utf-8")


def _place(levels: dict, sigma: float) -> float:
    """Where a noise level stands on the student's way, 0 at data."""
    if levels["kind"] == "flow":
        return sigma / (levels["shift"] - (levels["shift"] - 1) * sigma)
    low, high, rho = levels["sigma_min"], levels["sigma_max"], levels["rho"]
    warp = math.log if rho is None else lambda s: s ** (1 / rho)
    return (warp(max(sigma, low)) - warp(low)) / (warp(high) - warp(low))


def _jumps(scheduler, levels: dict) -> list[tuple[float, float]]:
    """Of every step: what the network is told, and the length of the jump."""
    timesteps = [float(timestep) for timestep in scheduler.timesteps]
    told = [levels["slope"] * (levels["flip"] - t if levels["flip"] else t) + levels["offset"] for t in timesteps]
    if levels["kind"] == "angular":
        # The levels of IPNDM are equal steps of what a jump is measured in.
        places = [1 - i / len(timesteps) for i in range(len(timesteps) + 1)]
    elif levels["kind"] == "discrete":
        places = [(t + 1) / levels["total"] for t in timesteps] + [0.0]
    else:
        sigmas = [float(sigma) for sigma in scheduler.sigmas[: len(timesteps) + 1]]
        places = [_place(levels, 1 - sigma if levels["flip"] else sigma) for sigma in sigmas]
    return [(time, places[i] - places[i + 1]) for i, time in enumerate(told)]


class _Jumps:
    """What ``flow_map_scheduler`` mixes into a stock scheduler class."""

    def follow(self, levels: dict, given: dict) -> None:
        """Take the grid of ``levels``, or the starts of jumps in ``given``, which are ``timesteps`` or ``sigmas``."""
        self.given = _checked(given, levels, self.config.num_train_timesteps)
        self.told_before = levels["kind"] == "flow" and levels["told_before"]
        self.told = levels.get("told")
        self.steps_done = 0

    def _index_of(self, timestep) -> int:
        return int((self.timesteps.cpu() - torch.as_tensor(timestep).cpu()).abs().argmin())


class _DiscreteJumps(_Jumps):
    def set_timesteps(self, num_inference_steps=None, device=None):
        """The stock grid of a discrete schedule, or the user's own."""
        super().set_timesteps(num_inference_steps, device)
        if self.given:
            self.timesteps = torch.tensor(self.given["timesteps"], dtype=torch.int64, device=self.timesteps.device)

    def step(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=True, **kwargs):
        """The DDIM step (arXiv 2010.02502, eq. 12, sigma = 0) to the next timestep of the grid, data after the last."""
        index = self._index_of(timestep)
        start = float(self.alphas_cumprod[int(self.timesteps[index])])
        end = float(self.alphas_cumprod[int(self.timesteps[index + 1])]) if index + 1 < len(self.timesteps) else 1.0
        alpha, sigma = start**0.5, (1 - start) ** 0.5
        if self.config.prediction_type == "epsilon":
            eps, x_0 = model_output, (sample - sigma * model_output) / alpha
        elif self.config.prediction_type == "sample":
            eps, x_0 = (sample - alpha * model_output) / sigma, model_output
        else:
            eps, x_0 = sigma * sample + alpha * model_output, alpha * sample - sigma * model_output
        moved = end**0.5 * x_0 + (1 - end) ** 0.5 * eps
        return DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=x_0) if return_dict else (moved, x_0)


class _AngularJumps(_Jumps):
    def step(self, model_output, timestep, sample, return_dict=True):
        """The DDIM step between two levels of ``IPNDMScheduler``, whose own divide by alpha, 0 at first."""
        i = self._index_of(timestep)
        (alpha, sigma), (alpha_end, sigma_end) = ((float(self.alphas[k]), float(self.betas[k])) for k in (i, i + 1))
        eps, x_0 = sigma * sample + alpha * model_output, alpha * sample - sigma * model_output
        moved = alpha_end * x_0 + sigma_end * eps
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)


class _FlowJumps(_Jumps):
    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        """The stock grid of a flow model, from equal steps where the pipeline passes none, or the user's own.

        The user's sigmas are those before the shift, as in stock diffusers; their timesteps are those that the network
        is called with.
        """
        own, total = self.given, self.config.num_train_timesteps
        if own:
            num_inference_steps = None
            sigmas = own.get("sigmas") or [t / total for t in own["timesteps"]]
            timesteps = [sigma * total for sigma in sigmas] if self.told_before else None
        elif sigmas is None and timesteps is None:
            sigmas = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        if "timesteps" in own and not self.told_before:
            # Stock calls the network with these and shifts the levels.
            levels = torch.tensor([*sigmas, 0.0], device=self.sigmas.device)
            self.sigmas = 1 - levels if self.config.invert_sigmas else levels
            self.timesteps = self.sigmas[:-1] * total


class _ExplodingJumps(_Jumps):
    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None):
        """Levels at equal shares of the way from sigma_max to sigma_min, or the user's own, then data."""
        super().set_timesteps(num_inference_steps, device)
        sigmas, levels = self.given.get("sigmas"), self.config
        if sigmas is None:
            warp, back = math.log, math.exp
            if levels.sigma_schedule == "karras":
                warp, back = (lambda s: s ** (1 / levels.rho)), (lambda s: s**levels.rho)
            low, high = warp(levels.sigma_min), warp(levels.sigma_max)
            shares = [1 - i / num_inference_steps for i in range(num_inference_steps)]
            sigmas = [back(low + (high - low) * share) for share in shares]
        sigmas = torch.tensor(sigmas)
        # The stock scheduler has the logarithm; stable audio's own has the angle.
        times = sigmas.atan() * 2 / math.pi if self.told == "atan" else self.precondition_noise(sigmas)
        self.timesteps = times.to(self.timesteps.device)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])


def _counted(step):
    """The same step, counted. With its signature: pipelines look at the parameters."""

    @functools.wraps(step)
    def counted(self, *args, **kwargs):
        self.steps_done += 1
        result = step(self, *args, **kwargs)
        # PixArt takes the prediction of data, the second one, in a single step: the sample after it is that.
        return (*result, result[0]) if isinstance(result, tuple) and len(result) == 1 else result

    return counted


# Pipelines look for these, whichever scheduler they have; each stock class lacks one or two.
_EXPECTED = {
    "init_noise_sigma": 1.0,
    "scale_model_input": lambda self, sample, timestep=None: sample,
}


@functools.cache
def flow_map_scheduler(stock: type, kind: str) -> type:
    """A subclass of the scheduler class ``stock`` whose grid and steps are those of a flow map's jumps."""
    kinds = {"discrete": _DiscreteJumps, "angular": _AngularJumps, "flow": _FlowJumps, "exploding": _ExplodingJumps}
    made = type(f"FlowMap{stock.__name__}", (kinds[kind], stock), {"__module__": __name__})
    made.step = _counted(made.step)
    for name, value in _EXPECTED.items():
        if not hasattr(stock, name):
            setattr(made, name, value)
    return made


def jumping(scheduler, levels: dict, given: dict | None = None):
    """The same scheduler, its grid and steps those of a flow map's jumps.

    ``given``: the starts of the jumps, as ``timesteps`` or ``sigmas``, whatever a pipeline asks of the scheduler.
    """
    made = flow_map_scheduler(type(scheduler), levels["kind"]).from_config(scheduler.config)
    if "variance_type" not in made.config:
        # DeepFloyd's pipeline reads it, and splits the learned variance off unless its scheduler takes it.
        made.register_to_config(variance_type="fixed_small")
    made.follow(levels, given or {})
    return made


def _chosen_guidance(config, levels: dict, given: dict) -> float | None:
    """The scale that a student with a range is told: what the call says, which the stock pipeline then does not see."""
    if config.get("guidance_range") is None:
        return None
    (low, high), name = config["guidance_range"], levels["guidance"]
    scale = given.pop(name, None)
    scale = levels["scale"] if scale is None else scale
    if not low <= scale <= high:
        raise ValueError(f"{name} must be {low:g} to {high:g}, the range that this student has learned, got {scale}")
    return scale


def _ends(levels: dict, name: str, total: int) -> tuple[float, float]:
    """The lowest and the highest time at which a jump can start, of those that a user names so."""
    kind = levels["kind"]
    if (kind, name) == ("discrete", "sigmas"):
        raise ValueError("sigmas: this student's noise schedule is discrete; wanted timesteps")
    if (kind, name) == ("exploding", "timesteps"):
        raise ValueError("timesteps: this student's noise schedule is continuous; wanted sigmas")
    if kind == "discrete":
        return 0, total - 1
    if kind == "exploding":
        return levels["sigma_min"], levels["sigma_max"]
    if name == "sigmas":
        return 1 / total, 1
    first = 1 / total
    if not levels["told_before"]:
        first = levels["shift"] * first / (1 + (levels["shift"] - 1) * first)
    return total * first, total


def _checked(given: dict, levels: dict, total: int) -> dict:
    """The times that a user gave, as numbers; ValueError where no jump can start there."""
    if len(given) > 1:
        raise ValueError("timesteps and sigmas are both given; give one of them")
    checked = {}
    for name, values in given.items():
        low, high = _ends(levels, name, total)
        numbers = [float(value) for value in values]
        wanted = f"numbers that decrease, from at most {high:g} to at least {low:g}"
        right = bool(numbers) and all(before > after for before, after in pairwise(numbers))
        right = right and low <= numbers[-1] and numbers[0] <= high
        if levels["kind"] == "discrete":
            wanted = f"whole {wanted}"
            right = right and all(number.is_integer() for number in numbers)
        if levels["kind"] == "exploding":
            # The pipeline scales its noise to the highest level.
            wanted = f"{wanted}, the first of them {high:g}"
            right = right and numbers[0] == high
        if not right:
            raise ValueError(f"{name}={numbers}: wanted {wanted}")
        checked[name] = numbers
    return checked


def _length(scheduler, levels: dict, time: torch.Tensor) -> float:
    """The length of the jump that starts where the network is told ``time``, of shape ``[]``."""
    told, jumps = float(time), _jumps(scheduler, levels)
    distances = [abs(start - told) for start, _ in jumps]
    # In half precision neighbors are told one time: of those the jump that is next.
    rounding = 2 * torch.finfo(time.dtype).eps * abs(told) if time.is_floating_point() else 0.0
    near = [i for i, distance in enumerate(distances) if distance <= min(distances) + rounding]
    return jumps[min(near, key=lambda i: abs(i - scheduler.steps_done))][1]


def _student(pipeline):
    """The two-time network in a pipeline, which torch.compile, for one, wraps."""
    network = pipeline.transformer if getattr(pipeline, "transformer", None) is not None else pipeline.unet
    found = [module for module in network.modules() if hasattr(type(module), "student_scheduler")]
    if not found:
        raise ValueError(
            f"{type(network).__name__} is no student; expected the TwoTime class that the pipeline was exported with"
        )
    return found[0]


def _bound(stock: type, pipeline, call: tuple, keywords: dict) -> inspect.BoundArguments:
    try:
        return inspect.signature(stock.__call__).bind_partial(pipeline, *call, **keywords)
    except TypeError as error:
        raise TypeError(f"{type(pipeline).__name__}.__call__() {error}") from None


def _check_steps(steps, levels: dict) -> None:
    """Refuse what is no number of jumps: some stock pipelines return noise for it."""
    most = levels.get("total")
    if steps is not None and (not isinstance(steps, Integral) or steps < 1 or (most is not None and steps > most)):
        expected = "an integer from 1" if most is None else f"an integer from 1 to {most}"
        raise ValueError(f"num_inference_steps must be {expected}, got {steps!r}")


def _turn_guidance_off(levels: dict, given: dict) -> None:
    """Set what turns the pipeline's own guidance off, where the call does not turn it on."""
    for name, value in levels["call"].items():
        if name not in given:
            given[name] = value
        elif name == levels["guidance"] and (given[name] or 0.0) > value:
            logger.warning(f"{name}={given[name]}: guidance is in the student's weights, this adds to it")


class _FlowMap:
    """What ``flow_map_pipeline`` mixes into a stock pipeline class."""

    # Attributes: a file of this name that was changed may replace the globals.
    module_name, module_source = MODULE, _SOURCE

    def jump_through(self, stock: type, call: tuple, keywords: dict):
        """Call the stock pipeline, its network conditioned on the jumps of its scheduler."""
        network = _student(self)
        levels = network.config.flow_map
        bound = _bound(stock, self, call, keywords)
        given = bound.arguments
        _check_steps(given.get("num_inference_steps"), levels)
        scale = _chosen_guidance(network.config, levels, given)
        _turn_guidance_off(levels, given)
        # Handed to the scheduler: some stock pipelines refuse them, or call the network with others.
        own = {name: given.pop(name) for name in ("timesteps", "sigmas") if given.get(name) is not None}
        if own:
            given["num_inference_steps"] = len(next(iter(own.values())))

        def keywords_at(time):
            length = {"h": _length(self.scheduler, levels, time)}
            return length if scale is None else length | {"w": scale}

        with network.conditioned(keywords_at):
            before = self.scheduler
            self.scheduler = jumping(network.student_scheduler(before), levels, own)
            try:
                return stock.__call__(*bound.args, **bound.kwargs)
            finally:
                self.scheduler = before

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Take the network over as well, whose class is not the one that diffusers expects."""
        name = "unet" if getattr(pipeline, "transformer", None) is None else "transformer"
        return super().from_pipe(pipeline, **{name: getattr(pipeline, name)} | kwargs)

    def to_json_string(self) -> str:
        """The index, with the modules that pipeline and network are found in."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = [self.module_name, type(self).__name__]
        for name, value in index.items():
            if isinstance(value, list) and ".two_time" in str(value[0]):
                index[name] = [_student(self).module_name, value[1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save the index and this file, which makes the class."""
        write_code(save_directory, self.module_name, self.module_source)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


@functools.cache
def flow_map_pipeline(stock: type) -> type:
    """``FlowMap<stock>``: ``stock`` with a two-time network, everything else is its own; for any number of steps.

    The jump's length is read from the scheduler's grid. Where the stock pipeline takes ``timesteps`` or ``sigmas`` they
    are the starts of the jumps, ValueError where none can start there. The guidance that the student was trained with
    is in its weights: the pipeline's own is off by default, and adds to it with a warning. A student with a range of
    guidance is called with the scale of the call instead. A scheduler of another class is replaced, with a warning, by
    the student's own; of other noise levels it is a ValueError.
    """

    def __call__(self, *args, **kwargs):  # noqa: N807 it becomes the class's own
        return self.jump_through(stock, args, kwargs)

    # Users and other pipelines look at the parameters.
    __call__.__signature__ = inspect.signature(stock.__call__)
    own = {"__module__": __name__, "__doc__": flow_map_pipeline.__doc__, "__call__": __call__}
    return type(f"FlowMap{stock.__name__}", (_FlowMap, stock), own)


def __getattr__(name: str) -> type:
    """``FlowMap<stock>`` by its name, as diffusers and pickle look it up."""
    stock = getattr(diffusers, name.removeprefix("FlowMap"), None) if name.startswith("FlowMap") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return flow_map_pipeline(stock)


# diffusers runs this file again, in the same namespace, whenever it opens a repository that holds it. Objects of the
# first run are in use and may be pickled: their classes, locks and caches stay.
_first_run = globals().get("_first_run") or dict(globals())
if _first_run["_SOURCE"] == _SOURCE:
    globals().update(_first_run)
