"""The groups of a recipe's settings."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from fmm_distill.core.settings import Settings
from fmm_distill.losses.registry import AnyLoss
from fmm_distill.losses.time_sampling import TimeSampling

__all__ = [
    "FEATURES",
    "PLAIN",
    "DataSettings",
    "EvaluationSettings",
    "ExportSettings",
    "ExtraLoss",
    "GuidanceSettings",
    "LoggingSettings",
    "LoraSettings",
    "PromptSettings",
    "Stage",
    "StudentSettings",
    "TrainingSettings",
    "TrajectorySettings",
]


# Groups of which a plain value is one of their fields.
PLAIN = {"data": "source"}

# Names of features; anything else is a file.
FEATURES = ("digits", "inception", "none")

# Checkpoints are sorted by eight digits of their step, regression and training together.
MOST_STEPS = 40_000_000
# Far above what a process holds: a typing error fails here and not in an allocation.
MOST_SAMPLES = 2**20
# torch seeds its generators with signed 64 bits.
LAST_SEED = 2**63 - 1
# A step of AdamW changes a weight by about the rate: above it float32 overflows at once.
MOST_RATE = 1e30


def _once(steps: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of steps in ascending order: where rows and folders are written the order has no meaning."""
    twice = sorted({number for number in steps if steps.count(number) > 1})
    if twice:
        raise ValueError(f"{', '.join(map(str, twice))} is there twice; expected each number of steps once")
    return tuple(sorted(steps))


Steps = Annotated[tuple[Annotated[int, Field(ge=1, le=100_000)], ...], Field(max_length=64), AfterValidator(_once)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=1000)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class LoraSettings(Settings):
    """Low-rank adapters in place of training every weight."""

    rank: int = Field(default=0, ge=0, le=65536)
    """Of the adapters; 0: every weight is trained."""
    targets: tuple[str, ...] = Field(default=(), max_length=256)
    """Endings of the layers' names that are adapted; none: the attention and feed-forward projections."""


class StudentSettings(Settings):
    """How the student starts."""

    prediction: Literal["teacher", "v_prediction"] = "teacher"
    """What its network predicts: as the teacher's, or v_prediction (better conditioned than epsilon near noise)."""
    regression_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps of regression on the teacher's velocity first; needed when the prediction changes."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters."""


class PromptSettings(Settings):
    """What a teacher of prompts is told."""

    file: str | None = None
    """A text file (UTF-8) with one prompt per line; without it and a dataset: the empty prompt alone."""
    dataset: str | None = None
    """A Hub dataset, or a parquet, CSV, TSV, JSON or JSON-lines file, whose column holds the prompts."""
    column: str = "text"
    """The dataset's column."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.dataset is not None:
            raise ValueError("prompts.file and prompts.dataset are two sources: give one")
        return self


class TrajectorySettings(Settings):
    """Trajectories that the teacher solves before training."""

    count: int = Field(default=4096, ge=1, le=10**8)
    """Trajectories, each from a noise of its own."""
    points: int = Field(default=9, ge=2, le=10_000)
    """Times at which each is kept, from t_max to t_min, equally far apart in the teacher's timesteps."""
    solver_steps: int = Field(default=64, ge=1, le=1_000_000)
    """RK4 steps of each; a multiple of points - 1."""

    @model_validator(mode="after")
    def _steps_end_at_points(self) -> Self:
        if self.solver_steps % (self.points - 1):
            raise ValueError(
                f"solver_steps {self.solver_steps} does not split over the {self.points - 1} stretches between points "
                f"{self.points}: wanted a multiple"
            )
        return self


class DataSettings(Settings):
    """What jumps start from besides noise. A string in its place is the source alone."""

    source: str = "none"
    """none (noise alone), teacher (trajectories), a Hub dataset, a folder of images, parquet, or a table of files."""
    config: str | None = None
    """Configuration of a Hub dataset that has several; none: the one that there is."""
    split: str = "train"
    """Of a Hub dataset or a folder; a slice such as train[:1000] is the start of it."""
    image: str | None = None
    """The column of images; none: the one that there is."""
    condition: str | None = None
    """The column of classes or captions, for a teacher that is told one."""
    fit: Literal["none", "crop"] = "none"
    """Images of another size are refused, or resized (antialiased) to cover the teacher's size and center-cropped."""
    background: Literal["white", "gray", "black"] = "white"
    """Color that images with transparent pixels are composited on."""
    flip: bool = False
    """Mirror each picked image, left and right, with chance 1/2."""
    max_corrupt: float = Field(default=0.01, ge=0, le=1)
    """Share of the images that may be unreadable; they are skipped, and their number is logged."""
    on_policy: float | None = Field(default=None, ge=0, le=1)
    """Share of samples that start from the student's own jump all the same; none: 0 with data, 1 without."""
    trajectories: TrajectorySettings = TrajectorySettings()
    """Of source: teacher."""

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: object) -> object:
        return {PLAIN["data"]: value} if isinstance(value, str | bool) else value

    @field_validator("source", mode="before")
    @classmethod
    def _no_is_none(cls, value: object) -> object:
        if value is False:
            raise ValueError("YAML reads no and off as false; for no data give none")
        return value

    @property
    def has_images(self) -> bool:
        """Whether there are images: something to noise, and to compare with."""
        return self.source not in ("none", "teacher")

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        idle = [
            name
            for name in ("config", "split", "image", "condition", "fit", "background", "flip", "max_corrupt")
            if not self.has_images and getattr(self, name) != type(self).model_fields[name].default
        ]
        if idle:
            raise ValueError(f"{idle[0]} is of images, and source {self.source} has none: leave it out")
        if self.source != "teacher" and self.trajectories != TrajectorySettings():
            raise ValueError("trajectories act with source: teacher only")
        if self.source == "none" and self.on_policy not in (None, 1.0):
            raise ValueError("on_policy below 1 acts with data or source: teacher; without, every jump starts from one")
        return self


class GuidanceSettings(Settings):
    """Classifier-free guidance of the teacher; the student learns the guided velocity."""

    scale: Scale = 1.0
    """v_null + scale (v - v_null); 1: the teacher unguided. A network that is told its guidance is told this."""
    range: tuple[Scale, Scale] | None = None
    """Scales that become an input of the student; scale is then the one that is evaluated and folded."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """Times between which it acts."""
    weaker: str | None = None
    """Autoguidance: a weaker teacher of the same kind, whose velocity takes the place of v_null."""

    weaker_revision: str | None = None
    """Branch, tag or commit of a weaker teacher on the Hub."""

    @model_validator(mode="after")
    def _weaker_acts(self) -> Self:
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"guidance.interval {list(self.interval)}: wanted two times in [0, 1], the smaller first")
        if self.range is not None and not 0 <= self.range[0] <= self.scale <= self.range[1] > self.range[0]:
            raise ValueError(
                f"guidance.range {list(self.range)} with guidance.scale {self.scale:g}: wanted two scales of at least "
                "0, the smaller first, and guidance.scale between them: it is the one that is evaluated and folded"
            )
        if self.weaker is not None and self.scale == 1 and self.range is None:
            raise ValueError("guidance.weaker acts with another guidance.scale than 1")
        if self.weaker_revision is not None and self.weaker is None:
            raise ValueError("guidance.weaker_revision is of guidance.weaker, and there is none: leave it out")
        return self


class ExtraLoss(Settings):
    """A further loss on a fraction of every batch."""

    loss: AnyLoss
    """The loss and its settings."""
    fraction: float = Field(gt=0, lt=1)
    """Fraction of the batch that it is trained on."""
    weight: float = Field(default=1.0, gt=0, le=1e6)
    """Factor of its weighted loss."""
    time_sampling: TimeSampling | None = None
    """Distribution of its times; none: that of the recipe."""


class Stage(Settings):
    """A loss that is trained alone before the main one."""

    loss: AnyLoss
    """The loss and its settings."""
    fraction: float = Field(gt=0, lt=1)
    """Fraction of training.steps that it lasts."""
    time_sampling: TimeSampling | None = None
    """Distribution of its times; none: that of the recipe."""


class TrainingSettings(Settings):
    """The loop."""

    steps: int = Field(default=1000, ge=1, le=MOST_STEPS)
    """Optimizer steps on the loss, after the student's regression steps."""
    batch_size: int = Field(default=64, ge=1, le=MOST_SAMPLES)
    """Samples in one optimizer step, over all processes."""
    accumulation: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    """Parts that a process's share of the batch is split into, to save memory."""
    learning_rate: float = Field(default=1e-3, gt=0, le=MOST_RATE)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """AdamW's decoupled weight decay."""
    betas: tuple[Rate, Rate] = (0.9, 0.99)
    """AdamW's averaging rates."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps over which the learning rate grows from 0."""
    decay: Literal["constant", "cosine"] = "cosine"
    """What the learning rate does after its warm-up."""
    clip: float = Field(default=1.0, gt=0, le=MOST_RATE)
    """Largest norm of the gradient."""
    ema: tuple[Rate, ...] = Field(default=(0.999,), max_length=16)
    """Rate of the exponential moving average that is evaluated and exported, shorter in the first steps; of several
    rates the evaluation chooses one, and targets of an average follow the first."""
    bad_steps: int = Field(default=5, ge=1, le=MOST_STEPS)
    """Steps in a row with a loss or a gradient that is no number, each of which is left out, after which the run goes
    back to its newest checkpoint with half the learning rate; the second time it stops."""
    refresh_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps after which the frozen copy that target: frozen follows becomes the student's average; 0: it stays."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the student's forward pass; derivatives, weights and losses stay in float32."""
    gradient_checkpointing: bool = False
    """Compute the student's blocks again in the backward pass: less memory; derivatives with gradients are central."""
    compile: Literal["none", "inductor", "eager"] = "none"
    """Compile teacher and student with torch.compile (eager: trace them only); derivatives are central then."""
    seed: int = Field(default=0, ge=0, le=LAST_SEED)
    """Every draw is a function of it, the step and the place in the batch."""
    checkpoint_every: int = Field(default=500, ge=1, le=MOST_STEPS)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1, le=MOST_STEPS)
    """Checkpoints that stay on disk."""

    @field_validator("ema", mode="before")
    @classmethod
    def _one_rate(cls, value: object) -> object:
        return (value,) if isinstance(value, int | float | str) else value

    @field_validator("ema")
    @classmethod
    def _rates_differ(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if not rates or len({f"{rate:g}" for rate in rates}) < len(rates):
            raise ValueError(f"{list(rates)}: wanted at least one rate, and rates that differ")
        return rates


class EvaluationSettings(Settings):
    """What is measured at the end, and on the way."""

    every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Optimizer steps after which the first moving average is measured on the way; 0: only at the end."""
    steps: Steps = Field(default=(1, 2, 4, 8), min_length=1)
    """Numbers of student steps."""
    ddim_steps: Steps = (1, 2, 4, 8, 16, 50, 100)
    """Numbers of DDIM steps of the teacher, to compare with."""
    dpmsolver_steps: Steps = (1, 2, 4, 6, 8, 16)
    """Numbers of DPM-Solver++ (2M) steps of the teacher, to compare with."""
    unipc_steps: Steps = ()
    """Numbers of UniPC steps of the teacher, to compare with."""
    heun_steps: Steps = ()
    """Numbers of Heun steps of the teacher, to compare with; each takes two network calls, the last one."""
    samples: int = Field(default=1024, ge=2, le=10**7)
    """Images for the Fréchet distance."""
    endpoint_samples: int = Field(default=256, ge=1, le=10**6)
    """Noises for the endpoint error."""
    endpoint_solver_steps: int = Field(default=64, ge=1, le=100_000)
    """RK4 steps of the teacher's ODE solution; half as many are solved too, and the difference reported."""
    features: str = "none"
    """Features of the Fréchet distance: digits (the built-in classifier), inception (extra `fid`), none (no distance),
    or the path of a TorchScript module (*.pt) from float images in [0, 1], [batch, channels, height, width], to
    [batch, d]."""
    reference: DataSettings | None = None
    """Images to compare with; null: those of data, or with features: digits the built-in ones."""
    clip: str | None = None
    """A CLIP model (Hub id or folder) that scores the images of a teacher of prompts; null: not measured."""
    batch_size: int = Field(default=256, ge=1, le=MOST_SAMPLES)
    """Images at a time."""

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: str) -> str:
        if value not in FEATURES and not value.endswith(".pt"):
            raise ValueError(f"wanted {', '.join(FEATURES)}, or the path of a TorchScript module, which ends in .pt")
        return value

    @model_validator(mode="after")
    def _fits_features(self) -> Self:
        if self.reference is not None and not self.reference.has_images:
            raise ValueError(f"evaluation.reference {self.reference.source}: wanted images, or null")
        if self.reference is not None and self.features == "none":
            raise ValueError("evaluation.reference acts with features, and evaluation.features is none: give features")
        if self.samples < 4 and self.features != "none":
            raise ValueError(f"evaluation.samples {self.samples}: kernel distances take halves of 2; wanted at least 4")
        return self


class ExportSettings(Settings):
    """What is written for others to load."""

    steps: Steps = (1, 2, 4, 8)
    """Folded stock pipelines, one for each number of steps; each must divide the teacher's timesteps."""


class LoggingSettings(Settings):
    """Where the numbers go besides the run folder."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that accelerate starts; none: the JSON lines alone."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(trackers)) < len(trackers):
            raise ValueError(f"{list(trackers)}: expected each tracker once")
        return trackers
