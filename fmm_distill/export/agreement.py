"""How far a reloaded pipeline is from the student, and how far rounding alone may take it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file

from fmm_distill.core.time_axis import expand

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["IMAGE_TOLERANCE", "ROUNDINGS", "Agreement", "compare", "compare_weights"]

# A jump is A x + B f of the state x and the network's output f. Float32 rounds both terms, each by 2^-23 of its size,
# and the network's layers add roundings of their own: this many are allowed. Of 36 tiny pipelines all differ by 1 to
# 15 of them.
ROUNDINGS = 256
# An Euler step walks from the state to its end, x + (s - t) v, and rounds x and the sum even where A is almost 0.
_OF_STATE = 8
# Of decoded images in [0, 1], and of sounds in [-1, 1], made of the same latents: a decoder amplifies nothing.
IMAGE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The jump of a pipeline that is furthest from the student's, in parts of what rounding explains.

    Attributes:
        difference: between the samples after the jump, at most, in the teacher's coordinates; not clipped.
        tolerance: the largest difference that rounding explains.
        image: the largest difference between the pipeline's images and the decoded samples; None: it decodes nothing.
    """

    difference: float
    tolerance: float
    image: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the pipeline is the student; not where a number is NaN."""
        decoded = self.image is None or self.image <= IMAGE_TOLERANCE
        return self.difference <= self.tolerance and decoded

    @property
    def fraction(self) -> float:
        """The difference as a fraction of the tolerance; NaN is the worst."""
        if self.difference == 0:
            return 0.0
        fraction = self.difference / self.tolerance if self.tolerance else float("inf")
        return float("inf") if math.isnan(fraction) else fraction

    def to_json(self) -> dict[str, float]:
        """The entry in ``verification.json``."""
        image = {} if self.image is None else {"image_difference": self.image, "image_tolerance": IMAGE_TOLERANCE}
        return {"difference": self.difference, "tolerance": self.tolerance} | image


@torch.no_grad()
def compare(
    student: Student,
    teacher: Teacher,
    made: dict[str, Tensor],
    times: Tensor,
    start: tuple[Tensor, Conditioning | None],
) -> Agreement:
    """A pipeline's jumps with the student's, each from where the pipeline was: a difference is not carried on.

    Args:
        made: of the pipeline ``states``, ``end`` and where it decodes ``images``, see ``reload``.
        times: between which the pipeline jumps, data at the end.
        start: N(0, I) that the pipeline's seed gives, and what the network is conditioned on.
    """
    states, (noise, cond) = made["states"], start
    if len(states) != len(times) - 1:
        # A pipeline that skips or repeats steps.
        return Agreement(float("inf"), 0.0)
    points = [state * _size_inside(student, t) for state, t in zip(states, times[:-1], strict=True)]
    found = [_start(student, points[0], noise, times[0])]
    for k, (t, r) in enumerate(pairwise(times)):
        after = points[k + 1] if k + 1 < len(points) else made["end"]
        found.append(_jump(student, points[k], after.reshape(points[k].shape), (t, r), cond))
    worst = max(found, key=lambda one: one.fraction)
    image = _image_difference(teacher, points[-1], made) if "images" in made else None
    return replace(worst, image=image)


def compare_weights(student: Student, folder: Path) -> Agreement:
    """Compare the weights in a folder with the student's: they are saved in full, so nothing may differ."""
    saved: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        saved |= load_file(file)
    own = student.network.state_dict()
    if saved.keys() != own.keys() or any(saved[name].shape != value.shape for name, value in own.items()):
        return Agreement(float("inf"), 0.0)
    differences = [
        _largest(saved[name].double() - value.double().cpu()) for name, value in own.items() if value.numel()
    ]
    return Agreement(max(differences, default=0.0), 0.0)


def _size_inside(student: Student, t: Tensor) -> float:
    """What a preconditioned network's input is divided by; see ``Parametrization``."""
    spread = student.parametrization.sigma_data
    if spread is None:
        return 1.0
    sigma = student.schedule.alpha_sigma(t)[1]
    return float((sigma.square() + spread**2).sqrt())


def _rounding(*terms: float) -> float:
    return ROUNDINGS * torch.finfo(torch.float32).eps * sum(terms)


def _start(student: Student, x: Tensor, noise: Tensor, t: Tensor) -> Agreement:
    own = student.parametrization.prior(noise) * student.schedule.scale(t).to(noise)
    return Agreement(_largest(x - own), _rounding(_largest(own)))


def _jump(
    student: Student, x: Tensor, after: Tensor, times: tuple[Tensor, Tensor], cond: Conditioning | None
) -> Agreement:
    t, r = (time.double().expand(len(x)) for time in times)
    before, then = (expand(student.schedule.scale(time), x) for time in (t, r))
    own = student(x / before, t, r, cond) * then
    kept = abs(_share_of_state(student.parametrization, *times)) * _largest(x)
    # The network's term is at most what is left: B f = own - A x.
    walked = _OF_STATE / ROUNDINGS * _largest(x)
    return Agreement(_largest(own - after), _rounding(2 * kept, _largest(own), walked))


def _share_of_state(parametrization: Parametrization, t: Tensor, r: Tensor) -> float:
    """The A of a jump from t to r: 1 / alpha at the start of an epsilon schedule, 1 of a flow model."""
    one = torch.ones(1, 1, dtype=torch.float64)
    t, r = t.double().reshape(1), r.double().reshape(1)
    schedule, silent = parametrization.schedule, replace(parametrization, call=_silent)
    x = one / expand(schedule.scale(t), one)
    moved = x - expand(t - r, one) * silent.velocity(cast("Any", None), x, t)
    return float(moved * expand(schedule.scale(r), one))


def _silent(network: nn.Module, x: Tensor, time: Tensor, cond: Conditioning | None, h: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


def _image_difference(teacher: Teacher, like: Float[Tensor, "batch *event"], made: dict[str, Tensor]) -> float:
    """Between the pipeline's images and those of its own last samples, which the same decoder makes."""
    images, codec = made["images"], teacher.codec
    own = codec.decode(made["end"].reshape(like.shape))
    if codec.outputs == "audios":
        # A length that its blocks don't halve evenly is filled up and cut.
        return _largest(own.clamp(-1, 1)[..., : images.shape[-1]] - images)
    own = (own / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    each = (own.reshape(images.shape) - images).abs().flatten(1).amax(1)
    quantized = hasattr(codec.autoencoder, "quantize")
    # A latent between two codes is rounded to one here and to the other there: of most images none is.
    return float(each.median() if quantized else each.max())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
