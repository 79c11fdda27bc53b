"""What the student loses and gains against its teacher: endpoint error, Fréchet distance, seconds per image."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DPMSolverMultistepScheduler

from fmm_distill.errors import UserError
from fmm_distill.features import FileFeatures, load_digits_classifier, load_feature_file
from fmm_distill.interpolant import expand
from fmm_distill.sampling import sample
from fmm_distill.schedules import VariancePreserving
from fmm_distill.settings import FEATURES
from fmm_distill.solve import endpoint, solve
from fmm_distill.teachers.codec import Pixels, Waves
from fmm_distill.teachers.load import BUILTIN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Float
    from torch import Tensor, nn
    from torchmetrics.image.fid import FrechetInceptionDistance

    from fmm_distill.data import Images
    from fmm_distill.settings import EvaluationSettings
    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.codec import Codec
    from fmm_distill.velocity import Conditioning

    Sampler = Callable[[Tensor, Conditioning | None], Tensor]

__all__ = [
    "Evaluation",
    "Measure",
    "Row",
    "check_evaluation_steps",
    "check_features",
    "choose",
    "conditions_of",
    "evaluate",
    "image_shape",
    "table",
]

NOISE_SEED = 20_240_607


@dataclass
class Row:
    """One sampler at one number of steps."""

    sampler: str
    steps: int
    calls: int
    endpoint_error: float
    frechet: float | None
    seconds_per_image: float


@dataclass
class Evaluation:
    """How it was measured, and what came out."""

    protocol: dict[str, Any]
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Plain keys and values."""
        return {"protocol": self.protocol, "rows": [asdict(row) for row in self.rows]}


def check_features(settings: EvaluationSettings, teacher: Teacher) -> None:
    """Refuse features that can't be had or don't fit the teacher's images, before anything long starts."""
    if settings.features == "digits" and teacher.event_shape != (1, 8, 8):
        raise UserError(
            f"evaluation.features: digits looks at 1 x 8 x 8 images, the teacher makes "
            f"{' x '.join(map(str, teacher.event_shape))}: take inception, or a TorchScript module of your own (*.pt), "
            "both with --data; or none"
        )
    if settings.features not in FEATURES:
        load_feature_file(settings.features, image_shape(teacher))
    if settings.features == "inception":
        try:
            import torch_fidelity  # noqa: F401 only whether it is there
        except ImportError as error:
            raise UserError(
                "evaluation.features: inception needs `pip install fmm-distill[fid]` and its weights "
                "(fetched at first use); features: none measures the endpoint error without them"
            ) from error


def image_shape(teacher: Teacher) -> tuple[int, ...]:
    """Of one decoded sample: channels, height and width of an image."""
    if isinstance(teacher.codec, Pixels):
        return teacher.event_shape
    return tuple(teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).shape[1:])


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
    """Measure students and their teacher on the same noises.

    Args:
        students: the name of their rows to each.

    The endpoint error is the root mean square, over samples and pixels, of the distance to where the teacher's
    ODE takes the same noise (RK4, see ``solve.endpoint``).
    """
    measure = Measure(teacher, settings, reference, device)
    return Evaluation(measure.protocol, [*measure.of_students(students), *measure.of_teacher()])


class Measure:
    """The noises, their endpoints and the reference that samplers are measured with, made once.

    Attributes:
        protocol: how it is measured.
    """

    @torch.no_grad()
    def __init__(
        self, teacher: Teacher, settings: EvaluationSettings, reference: Images | None, device: torch.device
    ) -> None:
        self.teacher, self.settings, self.device = teacher, settings, device
        count = max(settings.endpoint_samples, settings.samples if settings.features != "none" else 0)
        self.noise = torch.randn(count, *teacher.event_shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        self.cond = conditions_of(teacher, count, NOISE_SEED)
        some = self.noise[: settings.endpoint_samples]
        self.truth, solver_error = _truth(teacher, some, self.cond, settings, device)
        self.metric = _frechet_metric(settings, reference, device)
        features = None if self.metric is None else self.metric.inception
        self.protocol = _protocol(teacher, settings, reference, features, solver_error, device)

    def of_students(self, students: Mapping[str, Student]) -> list[Row]:
        """One row a student and number of steps.

        Args:
            students: the name of their rows to each.
        """
        return [
            self._row(name, steps, _jumps(student, steps), student.network)
            for name, student in students.items()
            for steps in self.settings.steps
        ]

    def of_teacher(self) -> list[Row]:
        """One row a solver of the teacher and number of steps."""
        solvers = _solvers_of(self.teacher, self.settings)
        return [self._row(name, steps, solver, self.teacher.network) for name, steps, solver in solvers]

    @torch.no_grad()
    def _row(self, name: str, steps: int, sampler: Sampler, network: nn.Module) -> Row:
        x, calls, seconds = _run(sampler, self.noise, self.cond, network, self.settings.batch_size, self.device)
        error = (x[: len(self.truth)] - self.truth).square().mean().sqrt().item()
        frechet = _frechet(self.metric, self.teacher.codec, x, self.settings)
        return Row(name, steps, calls, error, frechet, seconds)


def choose(evaluation: Evaluation, rates: Mapping[str, float]) -> tuple[float, Evaluation]:
    """The moving average of the lowest Fréchet distance, mean over the steps; of endpoint error where none is measured.

    Args:
        rates: the name of the rows of each average to its rate.

    Returns:
        Its rate, and the evaluation with its rows first, as those of the student, and the choice in the protocol.
    """
    measured = all(row.frechet is not None for row in evaluation.rows)
    scores = {
        name: statistics.mean(
            cast("float", row.frechet) if measured else row.endpoint_error
            for row in evaluation.rows
            if row.sampler == name
        )
        for name in rates
    }
    best = min(scores, key=lambda name: scores[name])
    first = [replace(row, sampler="student") for row in evaluation.rows if row.sampler == best]
    protocol = evaluation.protocol | {"ema": rates[best]}
    if len(rates) > 1:
        quantity = "Fréchet distance" if measured else "endpoint error"
        others = ", ".join(f"{rates[name]:g}: {score:.4g}" for name, score in scores.items())
        protocol["ema_chosen"] = f"by the lowest mean {quantity} over the steps, on these samples ({others})"
    return rates[best], Evaluation(protocol, first + [row for row in evaluation.rows if row.sampler != best])


def conditions_of(teacher: Teacher, count: int, seed: int) -> Conditioning | None:
    """What ``count`` samples of a conditional teacher are told, drawn from a seed."""
    if teacher.conditions is None:
        return None
    return teacher.told(torch.rand(count, generator=torch.Generator().manual_seed(seed)))


def _jumps(student: Student, steps: int) -> Sampler:
    return lambda noise, cond: sample(student, noise, steps, cond)


def _solvers_of(teacher: Teacher, settings: EvaluationSettings) -> list[tuple[str, int, Sampler]]:
    if not isinstance(teacher.schedule, VariancePreserving):
        return [("teacher-euler", steps, _euler(teacher, steps)) for steps in settings.ddim_steps]
    solvers: list[tuple[str, Any, tuple[int, ...]]] = [("teacher-ddim", DDIMScheduler, settings.ddim_steps)]
    if _has_own_levels(teacher):
        solvers = [("teacher-ddim", CogVideoXDDIMScheduler, settings.ddim_steps)]
    else:
        solvers += [("teacher-dpmsolver++", DPMSolverMultistepScheduler, settings.dpmsolver_steps)]
    return [
        (name, steps, _stock(teacher, teacher.schedule, kind, steps))
        for name, kind, numbers in solvers
        for steps in numbers
    ]


def _has_own_levels(teacher: Teacher) -> bool:
    """Whether only the schedulers of CogVideoX make the teacher's noise levels."""
    return str(teacher.scheduler_config.get("_class_name")).startswith("CogVideoX")


def _euler(teacher: Teacher, steps: int) -> Sampler:
    """Euler's method on the teacher's own grid: what the stock Euler scheduler of its kind does."""

    def run(noise: Tensor, cond: Conditioning | None) -> Tensor:
        times = teacher.schedule.grid(steps).to(noise.device)
        return solve(teacher.velocity, teacher.prior(noise), times, method="euler", cond=cond)

    return run


def _stock(teacher: Teacher, schedule: VariancePreserving, kind: Any, steps: int) -> Sampler:  # noqa: ANN401 a class
    """The teacher under a stock scheduler, as diffusers makes it from the teacher's own configuration."""
    settings: dict[str, Any] = {"clip_sample": _clips(teacher)}
    if kind is DPMSolverMultistepScheduler:
        settings = {"algorithm_type": "dpmsolver++", "solver_order": 2}
    # The guided teacher's denoised sample, whatever its network predicts.
    settings |= {"prediction_type": "sample", "timestep_spacing": "trailing"}

    def run(noise: Tensor, cond: Conditioning | None) -> Tensor:
        scheduler = kind.from_config(teacher.scheduler_config | settings)
        scheduler.set_timesteps(steps, device=noise.device)
        x = noise
        for timestep in scheduler.timesteps:
            t = schedule.time(timestep.long()).to(x.device).expand(len(x))
            on_axis = x / expand(schedule.scale(t), x)
            denoised = on_axis - expand(t, x) * teacher.velocity(on_axis, t, cond)
            x = scheduler.step(denoised, timestep, x).prev_sample
        return x

    return run


def _clips(teacher: Teacher) -> bool:
    """Whether the teacher's own scheduler clips its samples; schedulers that have no such setting don't."""
    return bool(teacher.scheduler_config.get("clip_sample", False))


def _run(
    sampler: Sampler,
    noise: Tensor,
    cond: Conditioning | None,
    network: nn.Module,
    batch: int,
    device: torch.device,
) -> tuple[Float[Tensor, "batch *event"], int, float]:
    """Samples on the CPU, network calls, seconds an image (median over batches, after one warm-up batch)."""
    calls = []
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    parts = _batches(noise, cond, batch, device)
    sampler(*parts[0])
    counted = len(calls)
    hook.remove()
    samples, seconds = [], []
    for part, told in parts:
        started = time.perf_counter()
        samples.append(sampler(part, told).cpu())
        seconds.append((time.perf_counter() - started) / len(part))
    return torch.cat(samples), counted, statistics.median(seconds)


def _batches(
    noise: Tensor, cond: Conditioning | None, size: int, device: torch.device
) -> list[tuple[Tensor, Conditioning | None]]:
    """Noises and what their samples are told, in parts of one size, on ``device``."""
    starts = range(0, len(noise), size)
    return [
        (noise[i : i + size].to(device), None if cond is None else cond.part(i, min(i + size, len(noise))).to(device))
        for i in starts
    ]


def _truth(
    teacher: Teacher, noise: Tensor, cond: Conditioning | None, settings: EvaluationSettings, device: torch.device
) -> tuple[Float[Tensor, "batch *event"], float]:
    """Where the teacher's ODE ends, and the root mean square change when the solver's steps are halved."""

    def solved(steps: int) -> Tensor:
        parts = _batches(noise, cond, settings.batch_size, device)
        velocity, schedule = teacher.velocity, teacher.schedule
        return torch.cat([endpoint(velocity, schedule, teacher.prior(x), steps, told) for x, told in parts]).cpu()

    fine = solved(settings.endpoint_solver_steps)
    return fine, (fine - solved(max(1, settings.endpoint_solver_steps // 2))).square().mean().sqrt().item()


def _frechet_metric(
    settings: EvaluationSettings, reference: Images | None, device: torch.device
) -> FrechetInceptionDistance | None:
    """The metric with the reference images in it; None without features."""
    if settings.features == "none" or reference is None:
        return None
    from torchmetrics.image.fid import FrechetInceptionDistance

    feature: nn.Module | int = 2048
    if settings.features == "digits":
        feature = load_digits_classifier(BUILTIN / "digits")
    elif settings.features not in FEATURES:
        feature = load_feature_file(settings.features, reference.shape)
    metric = FrechetInceptionDistance(feature=feature, normalize=True, reset_real_features=False).to(device)
    if not isinstance(feature, FileFeatures):
        metric.set_dtype(torch.float64)
    for images in reference.batches(settings.batch_size):
        metric.update(_for_features(images.to(device), settings), real=True)
    return metric


def _frechet(
    metric: FrechetInceptionDistance | None, codec: Codec, x: Tensor, settings: EvaluationSettings
) -> float | None:
    if metric is None:
        return None
    metric.reset()
    for part in x[: settings.samples].split(settings.batch_size):
        images = (codec.decode(part) / 2 + 0.5).clamp(0, 1).to(metric.device)
        metric.update(_for_features(images, settings), real=False)
    return float(metric.compute())


def _for_features(images: Tensor, settings: EvaluationSettings) -> Tensor:
    """Inception is shown three channels."""
    return images.expand(-1, 3, -1, -1) if settings.features == "inception" and images.shape[1] == 1 else images


def _protocol(
    teacher: Teacher,
    settings: EvaluationSettings,
    reference: Images | None,
    features: nn.Module | None,
    solver_error: float,
    device: torch.device,
) -> dict[str, Any]:
    measured = settings.features != "none" and reference is not None
    return {
        "endpoint_error": f"root mean square over samples and {_entries(teacher)} of the distance to the teacher's "
        "ODE solution from the same noise",
        "endpoint_samples": settings.endpoint_samples,
        "ode_solver": f"RK4, {settings.endpoint_solver_steps} steps, then the stock last step to x0_hat",
        "ode_solver_error": solver_error,
        "frechet": _features(settings, features),
        "frechet_samples": settings.samples if measured else None,
        "frechet_reference": f"{len(reference)} images of {reference.source}" if measured and reference else None,
        "noise_seed": NOISE_SEED,
        "guidance": 1.0 if teacher.guidance is None else teacher.guidance.scale,
        "solvers": _solvers(teacher),
        "seconds_per_image": f"median over batches of {settings.batch_size}, {device.type}, "
        f"{torch.get_num_threads()} threads, float32",
    }


def _features(settings: EvaluationSettings, network: nn.Module | None) -> str:
    if isinstance(network, FileFeatures):
        return (
            f"{network.num_features} features of {Path(settings.features).name} (TorchScript, sha256 "
            f"{network.sha256}); images clipped to [0, 1], not rounded"
        )
    return {
        "digits": "32 features of the classifier in builtin:digits; images clipped to [0, 1], not rounded",
        "inception": "2048 Inception features (torchmetrics, torch-fidelity weights); rounded to uint8, resized to 299",
        "none": "not measured (evaluation.features: none)",
    }[settings.features]


def _entries(teacher: Teacher) -> str:
    if isinstance(teacher.codec, Waves):
        return "entries of the waves (range -1 to 1)"
    return "pixels (range -1 to 1)" if isinstance(teacher.codec, Pixels) else "entries of the latents"


def _solvers(teacher: Teacher) -> str:
    if not isinstance(teacher.schedule, VariancePreserving):
        return "Euler's method on equal steps of the teacher's own grid; no DPM-Solver++ on this schedule"
    if _has_own_levels(teacher):
        return "diffusers' CogVideoXDDIMScheduler, timestep_spacing=trailing; no DPM-Solver++ makes these noise levels"
    return (
        "diffusers' DDIMScheduler and DPMSolverMultistepScheduler (2M), timestep_spacing=trailing, the rest as in the "
        f"teacher's configuration (clip_sample={_clips(teacher)})"
    )


def table(evaluation: Evaluation) -> str:
    """The rows as text, with the protocol below."""
    lines = [f"{'sampler':<20}{'steps':>6}{'calls':>7}{'endpoint error':>16}{'Fréchet':>10}{'s/image':>11}"]
    for row in evaluation.rows:
        frechet = "-" if row.frechet is None else f"{row.frechet:.3f}"
        lines.append(
            f"{row.sampler:<20}{row.steps:>6}{row.calls:>7}{row.endpoint_error:>16.4f}{frechet:>10}"
            f"{row.seconds_per_image:>11.5f}"
        )
    return "\n".join([*lines, *(f"  {key}: {value}" for key, value in evaluation.protocol.items())])
