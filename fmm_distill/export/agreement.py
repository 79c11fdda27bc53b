"""The difference between a reloaded pipeline and the student, and the part of it that rounding explains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file

from fmm_distill.core.time_axis import expand
from fmm_distill.student.sampling import sample
from fmm_distill.teachers.codec import is_sound
from fmm_distill.teachers.stepped_samples import from_stepped

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.student.strength import Strength
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["IMAGE_TOLERANCE", "ROUNDINGS", "Agreement", "compare", "compare_weights"]

# A jump is A x + B f of the state x and the network's output f. Float32 rounds both terms, each by 2^-23 of its size,
# and the layers of the network add more. This number of roundings is allowed; 36 tiny pipelines differ by 1 to 15.
ROUNDINGS = 256
# An Euler step computes x + (s - t) v: it rounds x and the sum even where A is almost 0.
_OF_STATE = 8
# For images in [0, 1] and sounds in [-1, 1] that are decoded from the same latents: a decoder amplifies nothing.
IMAGE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The jump of a pipeline that differs most from the student's, relative to its tolerance.

    Attributes:
        difference: the largest difference between the samples after the jump, in the teacher's coordinates, unclipped.
        tolerance: the largest difference that rounding explains.
        image: the largest difference between the pipeline's images and the decoded samples; None: it decodes nothing.
        strength: of the changes of the student's weights, where the jumps of the pipeline are not equal.
        samples: the relative difference of the pipeline's samples to those of the student, whose weights follow the
            length of each jump; None: the jumps are equal.
    """

    difference: float
    tolerance: float
    image: float | None = None
    strength: Strength | None = None
    samples: float | None = None

    @property
    def passed(self) -> bool:
        """True if rounding explains every difference; False where a number is NaN."""
        decoded = self.image is None or self.image <= IMAGE_TOLERANCE
        return self.difference <= self.tolerance and decoded

    @property
    def fraction(self) -> float:
        """The difference as a fraction of the tolerance; NaN is the worst."""
        if self.difference == 0:
            return 0.0
        # Weights alone have the tolerance 0.
        fraction = self.difference / self.tolerance if self.tolerance else float("inf")
        return float("inf") if math.isnan(fraction) else fraction

    def to_json(self) -> dict[str, float | None]:
        """Return the entry in ``verification.json``."""
        image: dict[str, float | None] = {}
        if self.image is not None:
            image = {"image_difference": self.image, "image_tolerance": IMAGE_TOLERANCE}
        unequal: dict[str, float | None] = {}
        if self.strength is not None:
            unequal = {**self.strength.to_json(), "samples_difference": self.samples}
        found: dict[str, float | None] = {"difference": self.difference, "tolerance": self.tolerance}
        return found | image | unequal


@torch.no_grad()
def compare(
    student: Student,
    teacher: Teacher,
    recorded: dict[str, Tensor],
    times: Tensor,
    start: tuple[Tensor, Conditioning | None],
    strength: Strength | None = None,
) -> Agreement:
    """Compare each jump of a pipeline with the student's from the same state, so that differences don't add up.

    Args:
        recorded: the tensors of the pipeline: ``states``, ``end`` and, where it decodes, ``images``; see ``reload``.
        times: the times between which the pipeline jumps, data at the end.
        start: the N(0, I) noise of the pipeline's seed, and the condition of its network.
        strength: the length that the student's network is called with in every jump of the pipeline; None: their own.
    """
    noise, cond = start
    if len(recorded["states"]) != len(times) - 1:
        # A pipeline that skips or repeats steps.
        return Agreement(float("inf"), 0.0)
    positions = None if teacher.pipeline is None else teacher.pipeline.positions
    points = [from_stepped(x, tuple(noise.shape[1:]), positions) for x in (*recorded["states"], recorded["end"])]
    found = [_start(student, points[0], noise, times[0])]
    for k, (t, r) in enumerate(pairwise(times)):
        jump = _Jump(points[k], t, r, None if strength is None else strength.value)
        found.append(_compare_jump(student, jump, points[k + 1], cond))
    worst = max(found, key=lambda one: one.fraction)
    image = _image_difference(teacher, points[-1], recorded["images"]) if "images" in recorded else None
    if strength is None or strength.is_exact:
        return replace(worst, image=image)
    own = sample(student, noise, times, cond)
    lost = float((points[-1] - own).norm() / own.norm())
    return replace(worst, image=image, strength=strength, samples=lost)


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


def _rounding(*terms: float) -> float:
    return ROUNDINGS * torch.finfo(torch.float32).eps * sum(terms)


def _start(student: Student, x: Tensor, noise: Tensor, t: Tensor) -> Agreement:
    own = student.parametrization.prior(noise) * student.schedule.scale(t).to(noise)
    return Agreement(_largest(x - own), _rounding(_largest(own)))


@dataclass(frozen=True)
class _Jump:
    """A jump of a pipeline from a state x at time t to time r; ``length``: what the network is called with."""

    x: Tensor
    t: Tensor
    r: Tensor
    length: float | None


def _compare_jump(student: Student, jump: _Jump, after: Tensor, cond: Conditioning | None) -> Agreement:
    x = jump.x
    t, r = (time.double().expand(len(x)) for time in (jump.t, jump.r))
    before, then = (expand(student.schedule.scale(time), x) for time in (t, r))
    h = student.clock.warp(t) - student.clock.warp(r) if jump.length is None else torch.full_like(t, jump.length)
    own = (x / before - expand(t - r, x) * student.mean_velocity_of_jump(x / before, t, h, cond)) * then
    # The term B f of the network is own - A x: its size is at most the sum of theirs.
    state = abs(_factor_of_state(student.parametrization, jump.t, jump.r)) * _largest(x)
    euler = _OF_STATE / ROUNDINGS * _largest(x)
    return Agreement(_largest(own - after), _rounding(2 * state, _largest(own), euler))


def _factor_of_state(parametrization: Parametrization, t: Tensor, r: Tensor) -> float:
    """Return the A of a jump from t to r: 1 / alpha at the start of an epsilon schedule, 1 for a flow model."""
    one = torch.ones(1, 1, dtype=torch.float64)
    t, r = t.double().reshape(1), r.double().reshape(1)
    schedule, zero = parametrization.schedule, replace(parametrization, call=_zero_output)
    x = one / expand(schedule.scale(t), one)
    moved = x - expand(t - r, one) * zero.velocity(cast("Any", None), x, t)
    # The jump is affine in x and f, so with f = 0 and x = 1 it is A.
    return float(moved * expand(schedule.scale(r), one))


def _zero_output(network: nn.Module, x: Tensor, time: Tensor, cond: Conditioning | None, h: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


def _image_difference(teacher: Teacher, end: Float[Tensor, "batch *event"], images: Tensor) -> float:
    """Return the largest difference between the pipeline's images and those decoded from its last samples."""
    codec = teacher.codec
    own = codec.decode(end)
    if is_sound(own):
        # The pipeline pads a length that its blocks can't halve evenly, and cuts the sounds.
        heard = own.clamp(-1, 1)[..., : images.shape[-1]]
        return _largest(heard.reshape(images.shape) - images)
    own = (own / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    each = (own.reshape(images.shape) - images).abs().flatten(1).amax(1)
    quantized = hasattr(codec.autoencoder, "quantize")
    # A latent between two codes may be rounded to either. Most images have none, so the median is compared.
    return float(each.median() if quantized else each.max())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
