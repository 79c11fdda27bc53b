"""The protocol of an evaluation: the conditions that two values must share to be comparable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.evaluation.draws import NOISE_SEED
from fmm_distill.evaluation.generate import WARM_UP
from fmm_distill.evaluation.metrics.frechet import resamples
from fmm_distill.evaluation.metrics.inception_score import SPLITS
from fmm_distill.evaluation.metrics.kernel import SUBSETS, subset_size
from fmm_distill.evaluation.metrics.precision_recall import MAX_COMPARED, NEIGHBORS, compared_samples
from fmm_distill.evaluation.solvers import describe_solvers
from fmm_distill.io.hashes import sha256_of_json
from fmm_distill.teachers.codec import Pixels, Waves
from fmm_distill.teachers.conditions import Embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.evaluation.reference import Reference
    from fmm_distill.teachers.base import Teacher

__all__ = ["differences", "entries", "protocol_of"]

# Entries that the compared values don't depend on: the choice of the run, its files, the machine, the other samplers
# of the evaluation, and results of the measurement itself.
_NOT_COMPARED = (
    "ema",
    "ema_chosen",
    "exported_step",
    "second_stage",
    "reloaded_difference",
    "seconds_per_image",
    "memory",
    "device",
    "ode_solver_error",
    "standard_errors",
    "solvers",
    "reference_sampler",
    "also",
    "student",
)


def protocol_of(
    teacher: Teacher,
    settings: EvaluationSettings,
    reference: Reference | None,
    solver_error: float | None,
    device: torch.device,
    *,
    decodes: bool,
    most_compared: int = MAX_COMPARED,
) -> dict[str, Any]:
    """Return the protocol that is printed and stored with the values and shown in the model card.

    Args:
        reference: None: no metrics of images.
        solver_error: of the ODE's endpoints; None: the ODE is not solved.
        decodes: seconds include decoding.
        most_compared: the largest number of samples that precision and recall compare.
    """
    end = "decoded image" if decodes else "sample"
    return {
        **_ode(teacher, settings, solver_error),
        **(_without_images(settings) if reference is None else _images(settings, reference, most_compared)),
        "clip_score": "not measured (evaluation.clip: null)"
        if settings.clip is None
        else f"{settings.clip}, 100 times the cosine, {settings.samples} samples; rounded to uint8",
        "consistency": f"root mean square over {settings.endpoint_samples} samples and {entries(teacher)} of the "
        "distance between the samples of two numbers of steps from the same noise",
        **_prompts(teacher),
        "noise": "one generator per sample, from the seed and the sample's number",
        "noise_seed": NOISE_SEED,
        **_guidance(teacher),
        # None without noise, as in results of versions that have no such entry.
        "stochasticity": settings.stochasticity or None,
        "solvers": describe_solvers(teacher, settings),
        "arithmetic": "networks in float32, distances in float64",
        "seconds_per_image": f"from noise to the {end}, median over batches of {settings.batch_size} after a warm-up, "
        f"{device.type}, {torch.get_num_threads()} threads, float32",
        "memory": f"peak bytes of tensors for {WARM_UP} samples, in addition to the weights",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _ode(teacher: Teacher, settings: EvaluationSettings, solver_error: float | None) -> dict[str, Any]:
    if solver_error is None:
        return {
            "endpoint_error": "not measured (the teacher's ODE is not solved)",
            "endpoint_samples": settings.endpoint_samples,
        }
    return {
        "endpoint_error": f"root mean square over samples and {entries(teacher)} of the distance to the teacher's "
        "ODE solution from the same noise",
        "endpoint_samples": settings.endpoint_samples,
        "ode_solver": f"RK4, {settings.endpoint_solver_steps} steps, then the stock last step to x0_hat",
        "ode_solver_error": solver_error,
    }


def _guidance(teacher: Teacher) -> dict[str, float]:
    """Return the scale of the guidance, and that of a second one by the image, where it is on."""
    if teacher.guidance is None:
        return {"guidance": 1.0}
    by_image = teacher.guidance.image_scale
    return {"guidance": teacher.guidance.scale} | ({} if by_image == 1 else {"image_guidance": by_image})


def _prompts(teacher: Teacher) -> dict[str, str]:
    """Return the digests of the prompts and their images, if any: samples of other conditions are not comparable."""
    if not isinstance(teacher.conditions, Embeddings):
        return {}
    names, images = teacher.conditions.names, teacher.conditions.images
    entries = {"prompts": f"{len(names)}, sha256 {sha256_of_json(names)}"}
    if images:
        entries["images"] = f"{', '.join(images)}; sha256 {sha256_of_json(teacher.conditions.given.digests())}"
    return entries


def _without_images(settings: EvaluationSettings) -> dict[str, Any]:
    reason = f"not measured (evaluation.features: {settings.features})"
    return {"frechet": reason, "frechet_samples": None, "frechet_reference": None}


def _images(settings: EvaluationSettings, reference: Reference, most_compared: int) -> dict[str, Any]:
    network, images = reference.network, reference.images
    subset = subset_size(settings.samples, len(reference))
    compared = compared_samples(settings.samples, len(reference), most_compared)
    return {
        "frechet": f"{network.description}; images {network.preprocessing}",
        "frechet_samples": settings.samples,
        "frechet_reference": f"{len(reference)} images of {images.source}",
        "reference_split": images.split,
        "reference_resize": "resized with antialiasing and cropped" if images.resized else "as they are",
        "reference_sha256": reference.digest,
        "kid": f"cubic kernel, mean over {SUBSETS} subsets of {subset}, drawn with seed 0",
        "inception_score": f"{SPLITS} splits" if network.classes else "not measured (the features have no classes)",
        "precision_recall": f"neighbor {NEIGHBORS}, {compared} samples and as many images",
        "standard_errors": f"Fréchet: {resamples(network.width)} resamples without a tenth, seed 0; KID: variance of a "
        "U-statistic; inception score: over its splits; others: of a mean or a fraction; the reference is fixed",
    }


def entries(teacher: Teacher) -> str:
    """Return the name of the entries that distances between samples average over."""
    if isinstance(teacher.codec, Waves):
        return "entries of the waves (range -1 to 1)"
    if teacher.has_coordinates:
        return "coordinates"
    return "pixels (range -1 to 1)" if isinstance(teacher.codec, Pixels) else "entries of the latents"


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the entries in which two protocols differ and on which values depend: both values by the key."""
    left_out = set(_NOT_COMPARED)
    if one.get("reference_sha256") is not None and one.get("reference_sha256") == other.get("reference_sha256"):
        # The same images, whatever their source.
        left_out |= {"frechet_reference", "reference_split", "reference_resize"}
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in left_out]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}
