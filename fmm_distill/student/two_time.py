"""A stock diffusers network with a second time.

The file is saved with every exported student, so it imports torch and diffusers alone.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin  # noqa: F401 see MODULE
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils import logging
from torch import nn

from fmm_distill.student.scaled_layers import Call, Jump, scale_layers

logger = logging.get_logger(__name__)

_IMPORT = "from fmm_distill.student.scaled_layers import Call, Jump, scale_layers\n"


def _read_source() -> str:
    """Return this file with the code of the scaled layers in place of its import: exports have one file per network."""
    source = Path(__file__).read_text(encoding="utf-8")
    if _IMPORT not in source:
        return source
    return source.replace(_IMPORT, f"\n{Path(__file__).with_name('scaled_layers.py').read_text(encoding='utf-8')}\n")


# Read at import: diffusers copies the code of all repositories into one folder, and a later copy may replace this one.
_SOURCE = _read_source()
# Equally named files of two repositories share one namespace in a process. The digest keeps two contents apart.
MODULE = f"two_time_{hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]}"

# Settings of a scheduler that change the noise level of the network's time, for each kind of schedule.
_LEVELS = {
    "discrete": ("num_train_timesteps", "prediction_type"),
    "exploding": ("sigma_min", "sigma_max", "sigma_data", "prediction_type"),
    "flow": ("num_train_timesteps",),
    "angular": ("num_train_timesteps",),
}
# Settings of a flow scheduler that only choose another grid. The student jumps between the points of any grid.
_GRIDS = (
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)

# diffusers looks here for the class, and for its base class, of a network that is passed to ``from_pretrained``.
sys.modules.setdefault(MODULE, sys.modules[__name__])

_locks = weakref.WeakKeyDictionary()


class JumpEmbedding(nn.Module):
    """The embedding ``g(h) - g(0)`` of a jump's length: a low-frequency sinusoid and two linear layers.

    h = 0 adds nothing at any time of the training, and the last layer is zero at the start. The last layer has no bias,
    since the difference would cancel it. ``guided`` adds a second such term for the guidance as a fraction of its
    range.
    """

    # With a base of 100, neighboring frequencies differ by 16 %, so that none of the range is left out.
    num_frequencies = 32

    def __init__(self, width: int, guided: bool = False) -> None:
        super().__init__()
        self.guidance = JumpEmbedding(width) if guided else None
        self.linear_1 = nn.Linear(2 * self.num_frequencies, width)
        self.linear_2 = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear_2.weight)

    def forward(self, h: torch.Tensor, fraction: torch.Tensor | None = None, constant: bool = False) -> torch.Tensor:
        """Return the embedding, shape ``[batch, width]``, of h, shape ``[batch]``, the jump's length in [0, 1].

        ``constant`` is whether the term of the guidance is not trained.
        """
        # The difference before the layer without bias: one product instead of two, and exactly 0 at h = 0.
        jump = self.linear_2(self._hidden(h) - self._hidden(torch.zeros_like(h)))
        if self.guidance is None:
            return jump
        guidance = self.guidance(fraction)
        return jump + (guidance.detach() if constant else guidance)

    def _hidden(self, h: torch.Tensor) -> torch.Tensor:
        # Angular frequencies from 10 down to 0.1 on h in [0, 1]: smooth enough to be differentiated.
        waves = get_timestep_embedding(h, 2 * self.num_frequencies, scale=10.0, max_period=100)
        # Under layerwise casting the weights are stored in a dtype that nothing is computed in.
        return nn.functional.silu(self.linear_1(waves.to(get_parameter_dtype(self.linear_1))))


class Jumping:
    """The state of a network that is conditioned on jumps: a mixin of those of diffusers and of all others.

    A class sets ``call_state``, ``jump_embedding`` and ``changes_weights``: whether it has scaled layers.
    """

    @property
    def jump(self) -> Jump:
        """The condition of the current call."""
        return self.call_state.jump

    @jump.setter
    def jump(self, jump: Jump) -> None:
        self.call_state.jump = jump

    @contextlib.contextmanager
    def jumping(self, jump: Jump) -> Iterator[None]:
        """Condition the calls in the block on this jump."""
        # The outer jump is restored, since gradient checkpointing enters again in the backward pass.
        before, self.jump = self.jump, jump
        try:
            yield
        finally:
            self.jump = before

    def _add_jump(self, index: int, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        h, fraction = self.jump.h, self.jump.fraction
        if h is None:
            return output
        # The regression trains what a scaled student is at h = 0, and nothing after it does.
        constant = self.changes_weights and not self.jump.regression
        jump = self.jump_embedding[index](h, fraction, constant).to(output.dtype)
        # A network that embeds a time for every token or frame has several rows per sample.
        rows = output.numel() // output.shape[-1]
        return output + jump.repeat_interleave(rows // len(jump), 0).reshape(output.shape)


class _TwoTime(Jumping):
    """The mixin that ``two_time`` adds to a stock class."""

    # The file that defines the class. Attributes, since diffusers may replace the globals by those of an edited file.
    module_name, module_source = MODULE, _SOURCE

    def __init__(
        self,
        *args: object,
        jump_hosts: list[str] = (),
        jump_widths: list[int] = (),
        scaled_layers: dict[str, int] | None = None,
        diagonal: bool = False,
        guidance_range: list[float] | None = None,
        flow_map: dict | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        own = {"jump_widths": list(jump_widths), "guidance_range": guidance_range, "flow_map": flow_map}
        own |= {"scaled_layers": scaled_layers, "diagonal": diagonal}
        self.register_to_config(jump_hosts=list(jump_hosts), **own)
        self.jump_embedding = nn.ModuleList([JumpEmbedding(width, guidance_range is not None) for width in jump_widths])
        self.call_state, self.changes_weights = Call(), bool(scaled_layers)
        scale_layers(self, scaled_layers or {}, self.call_state, diagonal=diagonal)
        self._register_jump_hooks()

    def _register_jump_hooks(self) -> None:
        for index, name in enumerate(self.config.jump_hosts):
            host = self.get_submodule(name)
            hooks = [hook for module in host.modules() for hook in module._forward_hooks.values()]
            # Registered once per layer, although every conditioned block calls this.
            if not any(getattr(hook, "func", None) == self._add_jump for hook in hooks):
                host.register_forward_hook(functools.partial(self._add_jump, index))

    @contextlib.contextmanager
    def conditioned(self, keywords_at):
        """Condition the calls in the block on ``keywords_at(time)``, a dictionary of h and, with guidance, w.

        ``time`` is the time that the network is called with. The block runs in one thread at a time.
        """
        names = [name for name in inspect.signature(type(self).__bases__[-1].forward).parameters if name != "self"]
        time_name = next(name for name in names if name in ("timestep", "timesteps", "t"))
        time_index = names.index(time_name)

        # A compiled network calls its hooks outside of the graph, whose inputs h and w become.
        @torch.compiler.disable
        def condition(module, inputs, keywords):
            if "h" in keywords:
                return None
            time = keywords[time_name] if time_name in keywords else inputs[time_index]
            # The inputs' device: with offloading the weights may be on another one.
            device = next(value.device for value in (*inputs, *keywords.values()) if torch.is_tensor(value))
            # One length for all samples, however many times the network is called with.
            jump = keywords_at(torch.as_tensor(time).flatten()[0])
            return inputs, keywords | {name: torch.full((1,), value, device=device) for name, value in jump.items()}

        with self.lock:
            # Quantization, for example, replaces layers and with them their hooks.
            self._register_jump_hooks()
            # The innermost of nested blocks conditions the call.
            hook = self.register_forward_pre_hook(condition, with_kwargs=True, prepend=True)
            try:
                yield
            finally:
                hook.remove()

    @property
    def lock(self) -> threading.RLock:
        """The lock of this network, since two threads would overwrite the attribute that holds a call's jump."""
        # Not an attribute: a lock can't be copied or pickled.
        return _locks.setdefault(self, threading.RLock())

    def guidance_fraction(self, w: torch.Tensor | None) -> torch.Tensor | None:
        """Return the scale of guidance as a fraction of its range."""
        if (w is None) != (self.config.guidance_range is None):
            rule = "takes no w" if w is not None else f"expects w in {self.config.guidance_range} with h"
            raise ValueError(f"{type(self).__name__} {rule}: the scale of guidance, one per sample")
        if w is None:
            return None
        low, high = self.config.guidance_range
        return (w - low) / (high - low)

    def forward(self, *args: object, h: torch.Tensor | None = None, w: torch.Tensor | None = None, **kwargs: object):
        """Call the stock forward, conditioned on the jump.

        Args:
            h: length of the jump as a fraction of the time axis, shape ``[batch]``; None: the stock model.
            w: scale of guidance, shape ``[batch]``, which a network with a ``guidance_range`` takes with h.
        """
        with self.jumping(self.call_state.of(h, None if h is None else self.guidance_fraction(w))):
            return super().forward(*args, **kwargs)

    def student_scheduler(self, scheduler):
        """Return the scheduler that the student was exported with, and warn of settings of ``scheduler`` it ignores.

        A flow student uses the grid of ``scheduler`` if that has the exported class.

        Raises:
            ValueError: if ``scheduler`` has other noise levels, or is for a network with another prediction.
        """
        exported, kind = dict(self.config.flow_map["scheduler"]), self.config.flow_map["kind"]
        stock = getattr(diffusers, exported["_class_name"])
        config, same_class = dict(scheduler.config), isinstance(scheduler, stock)
        own = stock.from_config(exported)
        _check_levels(scheduler, own, _LEVELS[kind])
        free = _GRIDS if kind == "flow" and same_class else ()
        ignored = [
            f"{name}={config[name]!r}"
            for name in inspect.signature(stock.__init__).parameters
            if name in config and name not in free and _differ(config[name], own.config[name])
        ]
        if not same_class:
            _warn_once(f"the steps of {type(scheduler).__name__} are not this student's jumps: {stock.__name__} steps")
        elif ignored:
            _warn_once(f"{', '.join(ignored)}: of no effect on this student's {stock.__name__}")
        return stock.from_config(exported | {name: config[name] for name in free if name in config})

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs: object) -> tuple:
        """Remove ``auto_map``, which is not an argument, so that diffusers does not warn about it."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        """Return the configuration with ``auto_map``, the module that defines the class."""
        config = json.loads(super().to_json_string())
        config["auto_map"] = {"AutoModel": f"{self.module_name}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs: object) -> None:
        """Save the configuration and this file, which defines the class."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{self.module_name}.py").write_text(self.module_source, encoding="utf-8")
        # After this file: the folder may be pushed to the Hub in this call.
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def _check_levels(scheduler, own, names: tuple[str, ...]) -> None:
    """Raise ValueError if the timesteps of a scheduler have other noise levels than those of ``own``."""
    differing = [
        f"{name}={scheduler.config[name]!r} (expected {own.config[name]!r})"
        for name in names
        if name in scheduler.config and name in own.config and _differ(scheduler.config[name], own.config[name])
    ]
    levels, expected = (getattr(one, "alphas_cumprod", None) for one in (scheduler, own))
    both = levels is not None and expected is not None and not differing
    # Schedulers round the level without signal, 0, up to 2**-24.
    if both and (
        len(levels) != len(expected) or not torch.allclose(levels.cpu().double(), expected.double(), atol=1e-6)
    ):
        differing = ["other betas than this student's"]
    if differing:
        raise ValueError(
            f"{type(scheduler).__name__} does not fit this student: {', '.join(differing)}; expected the noise levels "
            f"of the exported {type(own).__name__}, try {type(own).__name__}.from_pretrained(student, "
            'subfolder="scheduler")'
        )


def _differ(one: object, other: object) -> bool:
    """Compare two settings. Tables may be tuples, arrays or, from JSON, lists."""
    one, other = (list(value) if hasattr(value, "__len__") and len(value) else value for value in (one, other))
    return one != other


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@functools.cache
def two_time(stock: type) -> type:
    """Return the class ``TwoTime<stock>``: the stock network also conditioned on the jump, ``model(..., h=h)``.

    Without h it is the stock model. Its configuration has more entries: ``jump_hosts``, the names of the layers to
    whose outputs an embedding of h is added, ``jump_widths``, the numbers of their features, ``scaled_layers``, the
    layers whose weights change with h and the ranks of these changes, ``diagonal``, whether there is a change at h = 0
    too, ``guidance_range``, the range of the scale of guidance that is passed as ``w=w``, and ``flow_map``, the
    scheduler of the student and the measure of h. The state dict is that of the stock class plus ``jump_embedding.*``
    and, in scaled layers, ``jump_*`` and ``diagonal_*``.
    """
    name = f"TwoTime{stock.__name__}"
    made = type(name, (_TwoTime, stock), {"__module__": __name__, "__doc__": two_time.__doc__})
    # diffusers reads a configuration's keys from the signature.
    stock_parameters = [p for p in inspect.signature(stock.__init__).parameters.values() if p.kind != p.VAR_KEYWORD]
    own = [
        inspect.Parameter("jump_hosts", inspect.Parameter.KEYWORD_ONLY, default=()),
        inspect.Parameter("jump_widths", inspect.Parameter.KEYWORD_ONLY, default=()),
        inspect.Parameter("scaled_layers", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("diagonal", inspect.Parameter.KEYWORD_ONLY, default=False),
        inspect.Parameter("guidance_range", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("flow_map", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]

    def __init__(self, *args: object, **kwargs: object) -> None:  # noqa: N807 it becomes the class's own
        super(made, self).__init__(*args, **kwargs)

    __init__.__signature__ = inspect.Signature([*stock_parameters, *own])
    made.__init__ = __init__
    return made


def __getattr__(name: str) -> type:
    """Return ``TwoTime<stock>`` by its name, for diffusers and pickle."""
    stock = getattr(diffusers, name.removeprefix("TwoTime"), None) if name.startswith("TwoTime") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return two_time(stock)


# diffusers executes this file again, in the same namespace, for every repository that it opens. Objects of the first
# execution are in use and may be pickled, so its classes, locks and caches are restored.
_first_run = globals().get("_first_run") or dict(globals())
if _first_run["_SOURCE"] == _SOURCE:
    globals().update(_first_run)
