"""Samplers measured on the same noises, prompts and count."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fmm_distill.core.solvers import endpoint
from fmm_distill.errors import UserError
from fmm_distill.evaluation import features as feature_networks
from fmm_distill.evaluation.clip import clip_scores
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of
from fmm_distill.evaluation.generate import Generator
from fmm_distill.evaluation.metrics import ImageMetrics, Value, inception_score, mean_value, rms_error
from fmm_distill.evaluation.protocol import protocol_of
from fmm_distill.evaluation.reference import reference_of
from fmm_distill.evaluation.result import Evaluation, Row, is_of_teacher
from fmm_distill.evaluation.samplers import of_students, of_teacher
from fmm_distill.io.lock import locked
from fmm_distill.teachers.codec import Pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.data.samples import Images
    from fmm_distill.evaluation.generate import Made
    from fmm_distill.evaluation.samplers import Sampler
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["Measure", "check_evaluation", "check_evaluation_steps", "evaluate", "image_shape"]

logger = logging.getLogger(__name__)


def image_shape(teacher: Teacher) -> tuple[int, ...]:
    """Of one decoded sample: channels, height and width of an image."""
    if isinstance(teacher.codec, Pixels):
        return teacher.event_shape
    return tuple(teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).shape[1:])


def check_evaluation(settings: EvaluationSettings, teacher: Teacher) -> None:
    """Refuse what can't be measured of this teacher on this machine, before anything long starts.

    Raises:
        UserError: on features or a CLIP model that can't be had or don't fit, and on steps that no grid has.
    """
    if settings.features != "none":
        feature_networks.check_features(settings.features, image_shape(teacher))
    if settings.clip is not None:
        clip_scores(settings.clip, teacher, NOISE_SEED, torch.device("cpu"))
    for name in ("steps", "ddim_steps", "dpmsolver_steps", "unipc_steps", "heun_steps"):
        check_evaluation_steps(f"evaluation.{name}", getattr(settings, name), teacher)


def check_evaluation_steps(name: str, steps: tuple[int, ...], teacher: Teacher) -> None:
    """Refuse numbers of steps that no grid of this teacher has."""
    wrong = [n for n in steps if not 1 <= n <= teacher.schedule.num_timesteps]
    if wrong:
        raise UserError(
            f"{name} {', '.join(map(str, wrong))}: wanted 1 to {teacher.schedule.num_timesteps}, "
            "the teacher's number of timesteps"
        )


def evaluate(
    students: Mapping[str, Student],
    teacher: Teacher,
    settings: EvaluationSettings,
    reference: Images | None,
    device: torch.device,
) -> Evaluation:
    """Measure students and their teacher's solvers on the same noises.

    Args:
        students: the name of their rows to each.
        reference: images to compare with; None: there are none.

    The endpoint error is the root mean square, over samples and pixels, of the distance to where the teacher's
    ODE takes the same noise (RK4, see ``solve.endpoint``).
    """
    measure = Measure(teacher, settings, reference, device)
    rows = measure.of([*of_students(students, settings.steps), *of_teacher(teacher, settings)])
    return Evaluation(measure.protocol, rows, measure.consistency)


class Measure:
    """The noises, their endpoints and the reference that samplers are measured with, made once.

    Args:
        quick: endpoint error and Fréchet distance alone, without their errors: for measuring on the way.
        knows_ode: the teacher's ODE is solved for the endpoint error.
        decodes: seconds are to the decoded image even if nothing looks at it, as those of a pipeline are.
        keep: a folder for what is made until all of it is there; several processes share the work through it.
        accelerator: of several processes the first alone gets rows.

    Attributes:
        protocol: how it is measured.
        consistency: of each sampler that was measured at several numbers of steps; see ``Evaluation``.
        samples: the first samples of each sampler and number of steps that was measured.
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: Teacher,
        settings: EvaluationSettings,
        reference: Images | None,
        device: torch.device,
        *,
        quick: bool = False,
        knows_ode: bool = True,
        decodes: bool = False,
        keep: Path | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.teacher, self.settings, self.device, self.quick = teacher, settings, device, quick
        self.keep, self.accelerator = keep, accelerator
        images = None if settings.features == "none" else reference
        features = None if images is None else feature_networks.open_features(settings.features, images.shape)
        kept = None
        if images is not None and features is not None:
            kept = reference_of(images, features, settings.batch_size, device)
            features.to(device)
        self.metrics = None if kept is None else ImageMetrics(kept.features, settings.samples)
        self.features = features
        clip = None if settings.clip is None or quick else clip_scores(settings.clip, teacher, NOISE_SEED, device)
        looks = features is not None or clip is not None
        self.generator = Generator(
            teacher,
            count=max(settings.endpoint_samples, settings.samples if looks else 0),
            first=settings.endpoint_samples,
            batch=settings.batch_size,
            seed=NOISE_SEED,
            device=device,
            features=features,
            clip=clip,
            decodes=decodes,
            accelerator=accelerator,
        )
        first = accelerator is None or accelerator.is_main_process
        self.truth: Tensor | None
        solver_error: float | None
        self.truth, solver_error = _truth(teacher, settings, device) if first and knows_ode else (None, None)
        self.protocol: dict[str, Any] = protocol_of(
            teacher,
            settings,
            solver_error,
            device,
            features=features,
            images=images,
            reference=kept,
            image_metrics=self.metrics,
            decodes=self.generator.decodes,
        )
        self._digests: dict[nn.Module, str] = {}
        self._folders: list[Path] = []
        self.consistency: dict[str, dict[str, float]] = {}
        self.samples: dict[tuple[str, int], Tensor] = {}

    def of(self, samplers: Sequence[Sampler], reference: Sampler | None = None) -> list[Row]:
        """One row a sampler.

        Args:
            reference: the one whose seconds and memory are 1; it is among the samplers.
        """
        first = self.accelerator is None or self.accelerator.is_main_process
        total = self.generator.count * sum(sampler.steps for sampler in samplers)
        rows: list[Row] = []
        with tqdm(total=total, unit="step", unit_scale=True, desc="evaluate", leave=False, disable=not first) as bar:
            share = 1 if self.accelerator is None else self.accelerator.num_processes
            for sampler in samplers:
                bar.set_postfix_str(f"{sampler.name}, {sampler.steps}")
                made = self._made(sampler, lambda calls: bar.update(calls * share))
                if first:
                    rows.append(self._row(sampler, made))
                    self.samples[sampler.name, sampler.steps] = made.samples
        if first:
            self._compare_steps(samplers)
            self._take_ratios(rows, reference)
        return rows

    def of_students(self, students: Mapping[str, Student]) -> list[Row]:
        """One row a student and number of steps.

        Args:
            students: the name of their rows to each.
        """
        return self.of(of_students(students, self.settings.steps))

    def of_teacher(self) -> list[Row]:
        """One row a solver of the teacher and number of steps."""
        return self.of(of_teacher(self.teacher, self.settings))

    def _made(self, sampler: Sampler, progress: Callable[[int], Any]) -> Made:
        self.generator.progress = progress
        folder = None if self.keep is None else self.keep / self._key(sampler)
        self._folders += [] if folder is None else [folder]
        return self.generator.run(sampler, folder)

    def _key(self, sampler: Sampler) -> str:
        """Tells what a sampler makes from what others, other weights or other settings make."""
        network = sampler.network
        if network not in self._digests:
            self._digests[network] = _weights_digest(network)
        generator, conditions, guidance = self.generator, self.teacher.conditions, self.teacher.guidance
        about = [sampler.name, sampler.steps, self._digests[network], generator.count, generator.first, generator.batch]
        about += [generator.seed, generator.decodes, self.settings.clip, None if guidance is None else repr(guidance)]
        about += [None if self.features is None else self.features.digest]
        about += [None if conditions is None else conditions.names, self.teacher.source, self.teacher.call]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]

    def remove_kept(self) -> None:
        """Remove what was kept on the disk of the samplers that were measured."""
        for folder in self._folders:
            try:
                with locked(folder, "an evaluation"):
                    for file in folder.glob("*part-*"):
                        file.unlink(missing_ok=True)
                folder.rmdir()
            except (UserError, OSError):
                # Another evaluation takes its samples from there, and removes them.
                continue

    def _row(self, sampler: Sampler, made: Made) -> Row:
        values: dict[str, Value] = {}
        if sampler.follows_ode and self.truth is not None:
            values["endpoint_error"] = rms_error((made.samples - self.truth).square().flatten(1).mean(1))
        if self.metrics is not None and made.features is not None:
            seen = made.features[: self.settings.samples]
            if seen.isfinite().all():
                values |= self._of_images(self.metrics, made)
            else:
                # Eigenvalues of these would end the process.
                bad = int((~seen.isfinite().all(1)).sum())
                logger.warning(
                    f"{sampler.name}, {sampler.steps} steps: {bad} of {len(seen)} samples are no numbers: nan"
                )
                values |= dict.fromkeys(self._names(made), Value(math.nan, None))
        if made.clip is not None:
            values["clip_score"] = mean_value(made.clip[: self.settings.samples])
        numbers = {name: value.value for name, value in values.items()}
        errors = {} if self.quick else {name: v.error for name, v in values.items() if v.error is not None}
        return Row(
            sampler.name,
            sampler.steps,
            made.cost.calls,
            numbers.pop("endpoint_error", None),
            numbers.pop("frechet", None),
            made.seconds.median().item(),
            **numbers,
            memory=made.cost.memory,
            errors=errors,
        )

    def _of_images(self, metrics: ImageMetrics, made: Made) -> dict[str, Value]:
        features = made.features[: self.settings.samples] if made.features is not None else torch.empty(0)
        if self.quick:
            return {"frechet": metrics.frechet(features, with_error=False)}
        precision, recall = metrics.precision_recall(features)
        values = {"frechet": metrics.frechet(features), "kid": metrics.kernel(features)}
        if made.scores is not None:
            values["inception_score"] = inception_score(made.scores[: self.settings.samples])
        return values | {"precision": precision, "recall": recall}

    def _names(self, made: Made) -> tuple[str, ...]:
        """What ``_of_images`` gives."""
        if self.quick:
            return ("frechet",)
        scored = () if made.scores is None else ("inception_score",)
        return ("frechet", "kid", *scored, "precision", "recall")

    def _compare_steps(self, samplers: Iterable[Sampler]) -> None:
        """How far apart the samples of two numbers of steps are; of pipelines of images too."""
        for name in dict.fromkeys(sampler.name for sampler in samplers if not is_of_teacher(sampler.name)):
            steps = [n for sampler, n in self.samples if sampler == name]
            pairs = {f"{a},{b}": self._distance((name, a), (name, b)) for a, b in combinations(steps, 2)}
            if pairs:
                self.consistency[name] = pairs

    def _distance(self, one: tuple[str, int], other: tuple[str, int]) -> float:
        return (self.samples[one] - self.samples[other]).square().mean().sqrt().item()

    @staticmethod
    def _take_ratios(rows: list[Row], reference: Sampler | None) -> None:
        if reference is None:
            return
        (base,) = [row for row in rows if (row.sampler, row.steps) == (reference.name, reference.steps)]
        for row in rows:
            row.seconds_ratio = row.seconds_per_image / base.seconds_per_image
            row.memory_ratio = row.memory / base.memory if row.memory and base.memory else None


def _weights_digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _truth(
    teacher: Teacher, settings: EvaluationSettings, device: torch.device
) -> tuple[Float[Tensor, "batch *event"], float]:
    """Where the teacher's ODE ends, and the root mean square change when the solver's steps are halved."""
    count, size = settings.endpoint_samples, settings.batch_size
    parts = [
        draw_samples_of(teacher, range(i, min(i + size, count)), NOISE_SEED, device) for i in range(0, count, size)
    ]

    def solved(steps: int) -> Tensor:
        velocity, schedule = teacher.velocity, teacher.schedule
        return torch.cat(
            [endpoint(velocity, schedule, teacher.prior(part.noise), steps, part.cond) for part in parts]
        ).cpu()

    fine = solved(settings.endpoint_solver_steps)
    return fine, (fine - solved(max(1, settings.endpoint_solver_steps // 2))).square().mean().sqrt().item()
