"""Evaluate samplers on the same noises and conditions."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fmm_distill.core.solvers import endpoint
from fmm_distill.errors import UserError
from fmm_distill.evaluation.clip import make_clip_scorer
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of
from fmm_distill.evaluation.features import open_features
from fmm_distill.evaluation.generate import GenerationSpec, SampleGenerator
from fmm_distill.evaluation.metrics import (
    ClipScore,
    EndpointError,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    Value,
)
from fmm_distill.evaluation.metrics.precision_recall import MAX_COMPARED, QUICK_COMPARED
from fmm_distill.evaluation.protocol import protocol_of
from fmm_distill.evaluation.reference import compute_reference
from fmm_distill.evaluation.result import Evaluation, Row, is_of_teacher
from fmm_distill.evaluation.samplers import of_students, of_teacher
from fmm_distill.io.cache import cache_key
from fmm_distill.io.hashes import sha256_of_tensors
from fmm_distill.io.lock import locked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.data.samples import Images
    from fmm_distill.evaluation.generate import GeneratedSamples
    from fmm_distill.evaluation.metrics import FeatureMetric
    from fmm_distill.evaluation.reference import Reference
    from fmm_distill.evaluation.samplers import Sampler
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["EvaluationSpec", "Evaluator", "evaluate"]

logger = logging.getLogger(__name__)


def evaluate(
    students: Mapping[str, Student],
    teacher: Teacher,
    settings: EvaluationSettings,
    reference: Images | None,
    device: torch.device,
) -> Evaluation:
    """Evaluate students and the solvers of their teacher on the same noises.

    Args:
        students: by the name of their rows.
        reference: images to compare with; None: no metrics of images.
    """
    evaluator = Evaluator(EvaluationSpec(teacher, settings, reference, device))
    rows = evaluator.rows([*evaluator.samplers_of(students), *of_teacher(teacher, settings)])
    return Evaluation(evaluator.protocol, rows, evaluator.consistency)


@dataclass(frozen=True)
class EvaluationSpec:
    """The teacher, the settings and the images that samplers are evaluated with.

    Attributes:
        images: of the reference; None: no metrics of images.
        quick: endpoint error, Fréchet distance, precision and recall alone, without standard errors: for evaluations
            during training.
        solves_ode: solve the teacher's ODE for the endpoint error.
        decodes: seconds include decoding even if no metric needs images, as those of a pipeline do.
        cache: a folder for generated samples, from which an interrupted call resumes; several processes need it.
        accelerator: of several processes, of which the first alone computes rows.
    """

    teacher: Teacher
    settings: EvaluationSettings
    images: Images | None
    device: torch.device
    quick: bool = False
    solves_ode: bool = True
    decodes: bool = False
    cache: Path | None = None
    accelerator: Accelerator | None = None

    @property
    def is_main(self) -> bool:
        """True in the process that computes the rows."""
        return self.accelerator is None or self.accelerator.is_main_process

    @property
    def most_compared(self) -> int:
        """The largest number of samples that precision and recall compare."""
        return QUICK_COMPARED if self.quick else MAX_COMPARED


class Evaluator:
    """Evaluates samplers with noises, endpoints and a reference that are computed once.

    Attributes:
        protocol: the conditions of the measurement.
        consistency: of each sampler that was evaluated at several numbers of steps; see ``Evaluation``.
        samples: the first samples of each sampler and number of steps.
    """

    @torch.no_grad()
    def __init__(self, spec: EvaluationSpec) -> None:
        self.spec = spec
        self.reference = _reference(spec)
        self.generator = _generator(spec, self.reference)
        endpoints, solver_error = _endpoints(spec) if spec.is_main and spec.solves_ode else (None, None)
        self.endpoint_error = None if endpoints is None else EndpointError(endpoints)
        self.feature_metrics = () if self.reference is None else _feature_metrics(spec, self.reference)
        has_classes = self.reference is not None and self.reference.network.classes > 0
        self.inception_score = InceptionScore() if has_classes and not spec.quick else None
        self.clip_score = ClipScore()
        self.protocol: dict[str, Any] = protocol_of(
            spec.teacher,
            spec.settings,
            self.reference,
            solver_error,
            spec.device,
            decodes=self.generator.decodes,
            most_compared=spec.most_compared,
        )
        if spec.settings.stochasticity and spec.is_main:
            logger.info(
                f"stochasticity {spec.settings.stochasticity:g}: the student's rows have no endpoint error and no "
                "distance between numbers of steps, since their noise does not determine where they end"
            )
        self.consistency: dict[str, dict[str, float]] = {}
        self.samples: dict[tuple[str, int], Tensor] = {}
        self._digests: dict[nn.Module, str] = {}
        self._folders: list[Path] = []

    def rows(self, samplers: Sequence[Sampler], reference: Sampler | None = None) -> list[Row]:
        """Return one row per sampler; none in processes other than the first.

        Args:
            reference: the sampler whose seconds and memory are 1; it is one of ``samplers``.
        """
        main, accelerator = self.spec.is_main, self.spec.accelerator
        total = self.generator.spec.count * sum(sampler.steps for sampler in samplers)
        rows: list[Row] = []
        with tqdm(total=total, unit="step", unit_scale=True, desc="evaluate", leave=False, disable=not main) as bar:
            # The bar of the first process counts the work of all.
            processes = 1 if accelerator is None else accelerator.num_processes
            self.generator.progress = lambda steps: bar.update(steps * processes)
            for sampler in samplers:
                bar.set_postfix_str(f"{sampler.name}, {sampler.steps}")
                generated = self._generate(sampler)
                if main:
                    rows.append(self._row(sampler, generated))
                    self.samples[sampler.name, sampler.steps] = generated.samples
        if main:
            self._compare_steps(samplers)
            _set_ratios(rows, reference)
        return rows

    def samplers_of(self, students: Mapping[str, Student]) -> list[Sampler]:
        """Return one sampler per student and number of steps, with the noise of the settings.

        Args:
            students: by the name of their rows.
        """
        settings = self.spec.settings
        return of_students(students, settings.steps, stochasticity=settings.stochasticity)

    def rows_of_students(self, students: Mapping[str, Student]) -> list[Row]:
        """Return one row per student and number of steps.

        Args:
            students: by the name of their rows.
        """
        return self.rows(self.samplers_of(students))

    def rows_of_teacher(self) -> list[Row]:
        """Return one row per solver of the teacher and number of steps."""
        return self.rows(of_teacher(self.spec.teacher, self.spec.settings))

    def clear_cache(self) -> None:
        """Remove the cached samples of the samplers that were evaluated."""
        for folder in self._folders:
            try:
                # Only under the lock: another process may be reading the files.
                with locked(folder, "an evaluation"):
                    for file in folder.glob("*part-*"):
                        file.unlink(missing_ok=True)
                folder.rmdir()
            except (UserError, OSError):
                # Another evaluation reads these samples, and removes them at its end.
                continue

    def _generate(self, sampler: Sampler) -> GeneratedSamples:
        cache = self.spec.cache
        folder = None if cache is None else cache / self._key(sampler)
        self._folders += [] if folder is None else [folder]
        return self.generator.run(sampler, folder)

    def _key(self, sampler: Sampler) -> str:
        """Return the name of the cache folder, a digest of everything that the samples depend on."""
        network = sampler.network
        # Computed once per network: all numbers of steps have the same weights.
        if network not in self._digests:
            self._digests[network] = sha256_of_tensors(network.state_dict())
        generation, teacher = self.generator.spec, self.spec.teacher
        features, conditions, guidance = generation.features, teacher.conditions, teacher.guidance
        parts = [sampler.name, sampler.steps, self._digests[network], generation.count, generation.stored]
        # The batch size too: it is part of the seconds, and of the rounding.
        parts += [generation.batch_size, generation.seed, self.generator.decodes, self.spec.settings.clip]
        parts += [sampler.stochasticity]
        parts += [None if guidance is None else repr(guidance), None if features is None else features.digest]
        parts += [None if conditions is None else conditions.names, teacher.source]
        # The digests of the images are in it.
        parts += [self.protocol.get("images")]
        parts += [{} if teacher.pipeline is None else teacher.pipeline.call]
        return cache_key(parts)

    def _row(self, sampler: Sampler, generated: GeneratedSamples) -> Row:
        values: dict[str, Value] = {}
        measured = generated.limit(self.spec.settings.samples)
        if sampler.follows_ode and self.endpoint_error is not None:
            values |= self.endpoint_error(measured.samples)
        if measured.features is not None:
            values |= self._image_values(sampler, measured.features, measured.scores)
        if measured.clip is not None:
            values |= self.clip_score(measured.clip)
        numbers = {name: value.value for name, value in values.items()}
        errors = {} if self.spec.quick else {name: v.error for name, v in values.items() if v.error is not None}
        return Row(
            sampler.name,
            sampler.steps,
            generated.cost.calls,
            numbers.pop("endpoint_error", None),
            numbers.pop("frechet", None),
            # The median: other work on the machine slows single batches down.
            generated.seconds.median().item(),
            **numbers,
            memory=generated.cost.memory,
            errors=errors,
        )

    def _image_values(self, sampler: Sampler, features: Tensor, scores: Tensor | None) -> dict[str, Value]:
        metrics = [*self.feature_metrics, *([] if self.inception_score is None else [self.inception_score])]
        finite = features.isfinite().all(1)
        if not finite.all():
            # An eigendecomposition of non-finite values can end the process.
            bad = int((~finite).sum())
            logger.warning(f"{sampler.name}, {sampler.steps} steps: {bad} of {len(features)} samples are non-finite")
            return {name: Value(math.nan, None) for metric in metrics for name in metric.quantities}
        values: dict[str, Value] = {}
        for metric in self.feature_metrics:
            values |= metric(features)
        if self.inception_score is not None and scores is not None:
            values |= self.inception_score(scores)
        return values

    def _compare_steps(self, samplers: Iterable[Sampler]) -> None:
        """Compute the distances between samples of different numbers of steps, except for the teacher's solvers.

        Samples with fresh noise have none: they are other samples at each number of steps.
        """
        compared = [one for one in samplers if not is_of_teacher(one.name) and not one.stochasticity]
        for name in dict.fromkeys(sampler.name for sampler in compared):
            steps = [n for sampler, n in self.samples if sampler == name]
            pairs = {f"{a},{b}": self._distance((name, a), (name, b)) for a, b in combinations(steps, 2)}
            if pairs:
                self.consistency[name] = pairs

    def _distance(self, one: tuple[str, int], other: tuple[str, int]) -> float:
        return (self.samples[one] - self.samples[other]).square().mean().sqrt().item()


def _reference(spec: EvaluationSpec) -> Reference | None:
    settings, images = spec.settings, spec.images
    network = None if images is None else open_features(settings.features, images.shape)
    if images is None or network is None:
        return None
    reference = compute_reference(images, network, settings.batch_size, spec.device)
    network.to(spec.device)
    return reference


def _generator(spec: EvaluationSpec, reference: Reference | None) -> SampleGenerator:
    settings, clip = spec.settings, None
    if settings.clip is not None and not spec.quick:
        clip = make_clip_scorer(settings.clip, spec.teacher, NOISE_SEED, spec.device)
    needs_images = reference is not None or clip is not None
    return SampleGenerator(
        GenerationSpec(
            spec.teacher,
            spec.device,
            count=max(settings.endpoint_samples, settings.samples if needs_images else 0),
            stored=settings.endpoint_samples,
            batch_size=settings.batch_size,
            features=None if reference is None else reference.network,
            clip=clip,
            decodes=spec.decodes,
            accelerator=spec.accelerator,
        )
    )


def _feature_metrics(spec: EvaluationSpec, reference: Reference) -> tuple[FeatureMetric, ...]:
    features, samples = reference.features, spec.settings.samples
    fractions = PrecisionRecall(features, samples, most=spec.most_compared)
    if spec.quick:
        return FrechetDistance(features, samples, with_error=False), fractions
    return FrechetDistance(features, samples), KernelDistance(features, samples), fractions


def _endpoints(spec: EvaluationSpec) -> tuple[Float[Tensor, "batch *event"], float]:
    """Return the endpoints of the teacher's ODE, and their root mean square change with half of the solver's steps."""
    teacher, settings = spec.teacher, spec.settings
    count, size = settings.endpoint_samples, settings.batch_size
    parts = [
        draw_samples_of(teacher, range(i, min(i + size, count)), NOISE_SEED, spec.device) for i in range(0, count, size)
    ]

    def solved(steps: int) -> Tensor:
        velocity, schedule = teacher.velocity, teacher.schedule
        return torch.cat(
            [endpoint(velocity, schedule, teacher.prior(part.noise), steps, part.cond) for part in parts]
        ).cpu()

    # RK4's error falls 16-fold per halving of the step, so the change is an upper estimate of the finer one's error.
    fine = solved(settings.endpoint_solver_steps)
    return fine, (fine - solved(max(1, settings.endpoint_solver_steps // 2))).square().mean().sqrt().item()


def _set_ratios(rows: list[Row], reference: Sampler | None) -> None:
    if reference is None:
        return
    (base,) = [row for row in rows if (row.sampler, row.steps) == (reference.name, reference.steps)]
    for row in rows:
        row.seconds_ratio = row.seconds_per_image / base.seconds_per_image
        row.memory_ratio = row.memory / base.memory if row.memory and base.memory else None
