"""How a number was measured: all that another number must share to stand beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.evaluation import metrics
from fmm_distill.evaluation.draws import NOISE_SEED
from fmm_distill.evaluation.generate import WARM_UP
from fmm_distill.evaluation.samplers import about_solvers
from fmm_distill.io.hashes import sha256_of_json
from fmm_distill.teachers.codec import Pixels, Waves
from fmm_distill.teachers.conditions import Embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.data.samples import Images
    from fmm_distill.evaluation.features import Features
    from fmm_distill.evaluation.metrics import ImageMetrics
    from fmm_distill.evaluation.reference import Reference
    from fmm_distill.teachers.base import Teacher

__all__ = ["differences", "entries", "protocol_of"]

# What says nothing about the numbers that are compared: the run's own choice, its files, the clock's surroundings,
# which samplers stand beside, and a result of the measurement.
_NOT_COMPARED = (
    "ema",
    "ema_chosen",
    "reloaded_difference",
    "seconds_per_image",
    "memory",
    "device",
    "ode_solver_error",
    "standard_errors",
    "solvers",
    "reference_sampler",
    "also",
    "of",
)


def protocol_of(
    teacher: Teacher,
    settings: EvaluationSettings,
    solver_error: float | None,
    device: torch.device,
    *,
    features: Features | None,
    images: Images | None,
    reference: Reference | None,
    image_metrics: ImageMetrics | None,
    decodes: bool,
) -> dict[str, Any]:
    """What is printed with the numbers, kept with them and shown in the card."""
    end = "decoded image" if decodes else "sample"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}"
    ode = {
        "endpoint_error": f"root mean square over samples and {entries(teacher)} of the distance to the teacher's "
        "ODE solution from the same noise",
        "endpoint_samples": settings.endpoint_samples,
        "ode_solver": f"RK4, {settings.endpoint_solver_steps} steps, then the stock last step to x0_hat",
        "ode_solver_error": solver_error,
    }
    if solver_error is None:
        ode = {
            "endpoint_error": "not measured (the teacher is not asked)",
            "endpoint_samples": settings.endpoint_samples,
        }
    return {
        **ode,
        **_of_images(settings, features, images, reference, image_metrics),
        "clip_score": "not measured (evaluation.clip: null)"
        if settings.clip is None
        else f"{settings.clip}, 100 times the cosine, {settings.samples} samples; rounded to uint8",
        "consistency": f"root mean square over {settings.endpoint_samples} samples and {entries(teacher)} of the "
        "distance between what two numbers of steps make of the same noise",
        **_prompts(teacher),
        "noise": "a generator a sample, from the seed and the sample's number",
        "noise_seed": NOISE_SEED,
        "guidance": 1.0 if teacher.guidance is None else teacher.guidance.scale,
        "solvers": about_solvers(teacher, settings),
        "arithmetic": "networks in float32, distances in float64",
        "seconds_per_image": f"from noise to the {end}, median over batches of {settings.batch_size} after a warm-up, "
        f"{device.type}, {torch.get_num_threads()} threads, float32",
        "memory": f"bytes of tensors at most for {WARM_UP} samples, beside the weights",
        "device": where,
    }


def _prompts(teacher: Teacher) -> dict[str, str]:
    """What the samples are told, if it has prompts: others are other samples."""
    if not isinstance(teacher.conditions, Embeddings):
        return {}
    names = teacher.conditions.names
    return {"prompts": f"{len(names)}, sha256 {sha256_of_json(names)}"}


def _of_images(
    settings: EvaluationSettings,
    features: Features | None,
    images: Images | None,
    reference: Reference | None,
    image_metrics: ImageMetrics | None,
) -> dict[str, Any]:
    """Of the metrics that look at images."""
    if features is None or images is None or reference is None or image_metrics is None:
        none = f"not measured (evaluation.features: {settings.features})"
        return {"frechet": none, "frechet_samples": None, "frechet_reference": None}
    scores = (
        f"{metrics.SPLITS} splits" if features.classes else "not measured (these features come without class scores)"
    )
    return {
        "frechet": f"{features.about}; images {features.pixels}",
        "frechet_samples": settings.samples,
        "frechet_reference": f"{len(reference)} images of {images.source}",
        "reference_split": images.split,
        "reference_resize": "resized with antialiasing and cropped" if images.resized else "as they are",
        "reference_sha256": reference.digest,
        "kid": f"cubic kernel, mean over {metrics.SUBSETS} subsets of {image_metrics.subset}, drawn with seed 0",
        "inception_score": scores,
        "precision_recall": f"neighbor {metrics.NEIGHBORS}, {image_metrics.neighbors} samples and as many images",
        "standard_errors": f"Fréchet: {image_metrics.resamples} resamples without a tenth, seed 0; KID: variance of a "
        "U-statistic; inception score: its splits; the rest: of a mean or a share; the reference is fixed",
    }


def entries(teacher: Teacher) -> str:
    """What the distances between samples are over."""
    if isinstance(teacher.codec, Waves):
        return "entries of the waves (range -1 to 1)"
    return "pixels (range -1 to 1)" if isinstance(teacher.codec, Pixels) else "entries of the latents"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two protocols don't share of what their numbers depend on: each key with both its values."""
    left_out = set(_NOT_COMPARED)
    if one.get("reference_sha256") is not None and one.get("reference_sha256") == other.get("reference_sha256"):
        # The same images from another place.
        left_out |= {"frechet_reference", "reference_split", "reference_resize"}
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in left_out]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}
