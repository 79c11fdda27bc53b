"""Groups of recipe settings."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from fmm_distill.losses.registry import AnyLoss
from fmm_distill.losses.settings import Settings
from fmm_distill.losses.time_sampling import TimeSampling

__all__ = [
    "FEATURES",
    "PLAIN",
    "DataSettings",
    "EvaluationSettings",
    "ExportSettings",
    "ExtraLoss",
    "GuidanceSettings",
    "IpAdapterSettings",
    "LoggingSettings",
    "LoraSettings",
    "OptimizerSettings",
    "PromptSettings",
    "Stage",
    "StudentSettings",
    "TrainingSettings",
    "TrajectorySettings",
]


# A plain value in place of one of these groups sets this field.
PLAIN = {"data": "source"}

# Built-in features; any other value is the path of a TorchScript module.
FEATURES = ("digits", "inception", "none")

# Regression and training together: folders of checkpoints are named by eight digits of the step.
MOST_STEPS = 40_000_000
BETAS = (0.9, 0.99)
# Far more than fits into memory: a typing error fails here and not in an allocation.
MOST_SAMPLES = 2**20
# torch seeds its generators with signed 64 bits.
LAST_SEED = 2**63 - 1
# AdamW changes a weight by about the learning rate per step: a larger one overflows float32 in a few steps.
MOST_RATE = 1e30


def _once(steps: tuple[int, ...]) -> tuple[int, ...]:
    """Sort numbers of steps, which name rows and folders, and refuse duplicates."""
    twice = sorted({number for number in steps if steps.count(number) > 1})
    if twice:
        raise ValueError(f"expected each number of steps once, not {', '.join(map(str, twice))} twice")
    return tuple(sorted(steps))


Steps = Annotated[tuple[Annotated[int, Field(ge=1, le=100_000)], ...], Field(max_length=64), AfterValidator(_once)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(ge=0, le=1000)]
Rate = Annotated[float, Field(ge=0, lt=1)]
ImageSide = Annotated[int, Field(ge=1, le=65_536)]


class LoraSettings(Settings):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the network's own weights are not trained."""

    rank: int = Field(default=0, ge=0, le=65536)
    """Rank of the adapters; 0 trains every weight, or changes of any rank with kind: scaled."""
    targets: tuple[str, ...] = Field(default=(), max_length=256)
    """Name endings of the layers that get adapters; empty: the attention and feed-forward projections, or with kind:
    scaled every linear layer and convolution."""


class StudentSettings(Settings):
    """The student: its kind, its prediction type, its start and its adapters."""

    kind: Literal["auto", "scaled", "embedded"] = "auto"
    """Dependence on the length h of the jump: scaled (weights W + h dW, the teacher's at h = 0) or embedded (h is an
    input next to the time, every weight is trained); auto: scaled where teacher and losses allow it."""
    prediction: Literal["teacher", "v_prediction"] = "teacher"
    """Prediction type of the network: the teacher's, or v_prediction, which is better conditioned near noise than
    epsilon."""
    regression_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps of regression on the teacher's velocity before the loss; required if the prediction type changes."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters."""
    init: str | None = None
    """Earlier student whose weights the student starts with: a run folder, an exported folder or a Hub id; null: it
    starts as the teacher."""
    init_revision: str | None = None
    """Branch, tag or commit of the earlier student on the Hub."""

    @model_validator(mode="after")
    def _revision_acts(self) -> Self:
        if self.init_revision is not None and self.init is None:
            raise ValueError("student.init_revision: expected student.init with it, got none; leave it out")
        return self


class PromptSettings(Settings):
    """Prompts that condition the teacher."""

    file: str | None = None
    """UTF-8 text file with one prompt per line. Without a file and a dataset, the empty prompt is the only one."""
    dataset: str | None = None
    """Hub dataset, or Parquet, CSV, TSV, JSON or JSON Lines file, with a column of prompts."""
    column: str | None = "text"
    """Column of the dataset that has the prompts; null: the empty prompt with each image."""
    images: dict[str, str] = Field(default_factory=dict)
    """Columns of the dataset that have images, by keyword of the pipeline's call, such as ``image: source``."""
    image_size: tuple[ImageSide, ImageSide] | None = None
    """Height and width that images are resized and cropped to; null: the images of a column are of one size."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.dataset is not None:
            raise ValueError("expected one source of prompts, got prompts.file and prompts.dataset; leave one out")
        return self

    @model_validator(mode="after")
    def _images_have_a_source(self) -> Self:
        if self.images and self.dataset is None:
            raise ValueError(
                "prompts.images: expected prompts.dataset with it, got none; name the table that has the columns "
                f"{', '.join(self.images.values())}"
            )
        if "prompt" in self.images:
            raise ValueError("prompts.images: expected keywords of images, got prompt; try prompts.column")
        if self.images:
            return self
        if self.image_size is not None:
            raise ValueError("prompts.image_size: expected prompts.images with it, got none; leave it out")
        if self.column is None:
            raise ValueError("prompts.column: expected a column without prompts.images, got null; leave it out")
        return self


class IpAdapterSettings(Settings):
    """IP-Adapter of the teacher (arXiv 2308.06721), as load_ip_adapter of its pipeline takes it. It is not trained."""

    source: str | None = None
    """Hub id or folder; null: none. Its images are prompts.images.ip_adapter_image."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    subfolder: str | None = None
    """Folder of the file in source; null: source itself."""
    weight_name: str | None = None
    """File of the weights, in safetensors."""
    image_encoder_folder: str = "image_encoder"
    """Folder of the image encoder: in subfolder, or, with a slash, in source. Not opened if the pipeline has one."""
    scale: float = Field(default=1.0, gt=0, le=100)
    """Scale of the attention to the image."""

    @model_validator(mode="after")
    def _has_a_file(self) -> Self:
        if self.source is not None and not self.weight_name:
            raise ValueError(
                "ip_adapter.weight_name: expected the name of a file with ip_adapter.source, got none; try "
                "ip-adapter_sd15.safetensors with h94/IP-Adapter and ip_adapter.subfolder: models"
            )
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.source is None and given:
            raise ValueError(f"ip_adapter.{given[0]}: expected ip_adapter.source with it, got none; leave it out")
        return self


class TrajectorySettings(Settings):
    """Teacher trajectories, solved before training."""

    count: int = Field(default=4096, ge=1, le=10**8)
    """Number of trajectories; each starts from its own noise."""
    points: int = Field(default=9, ge=2, le=10_000)
    """Stored points per trajectory, from t_max to t_min, at equal distances in the teacher's timesteps."""
    solver_steps: int = Field(default=64, ge=1, le=1_000_000)
    """RK4 steps per trajectory; a multiple of points - 1."""

    @model_validator(mode="after")
    def _steps_end_at_points(self) -> Self:
        if self.solver_steps % (self.points - 1):
            raise ValueError(
                f"solver_steps: expected a multiple of {self.points - 1}, the number of intervals between "
                f"points: {self.points}, got {self.solver_steps}"
            )
        return self


class DataSettings(Settings):
    """Data that jumps may start from, in addition to noise. A plain string sets the source."""

    source: str = "none"
    """none (noise alone), teacher (trajectories), a Hub dataset, a folder of images, a Parquet file, or a table with a
    column of image files."""
    config: str | None = None
    """Configuration of a Hub dataset; null if the dataset has one only."""
    split: str = "train"
    """Split of a Hub dataset or a folder; train[:1000] takes the first 1000 rows."""
    image: str | None = None
    """Column of images; null if the table has one only."""
    condition: str | None = None
    """Column of classes or captions, for a conditional teacher."""
    fit: Literal["none", "crop"] = "none"
    """Treatment of images of another size: none refuses them; crop resizes them (with antialiasing) until they cover
    the teacher's size, and crops the center."""
    background: Literal["white", "gray", "black"] = "white"
    """Background color of images with transparent pixels."""
    flip: bool = False
    """Flip each image horizontally with probability 1/2."""
    max_corrupt: float = Field(default=0.01, ge=0, le=1)
    """Largest fraction of unreadable images, which are skipped; their number is logged."""
    on_policy: float | None = Field(default=None, ge=0, le=1)
    """Fraction of samples whose jump starts at a point that the student itself reaches from noise; null: 0 with data,
    1 without."""
    trajectories: TrajectorySettings = TrajectorySettings()
    """Trajectories of source: teacher."""

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: object) -> object:
        # YAML reads no and off as false, which the validator of source refuses with advice.
        return {PLAIN["data"]: value} if isinstance(value, str | bool) else value

    @field_validator("source", mode="before")
    @classmethod
    def _no_is_none(cls, value: object) -> object:
        if value is False:
            raise ValueError("expected text, and YAML reads no and off as false; try none for no data")
        return value

    @property
    def has_images(self) -> bool:
        """True if the source has images, which can be noised and compared with."""
        return self.source not in ("none", "teacher")

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        idle = [
            name
            for name in ("config", "split", "image", "condition", "fit", "background", "flip", "max_corrupt")
            if not self.has_images and getattr(self, name) != type(self).model_fields[name].default
        ]
        if idle:
            raise ValueError(f"{idle[0]}: expected a source of images, got source: {self.source}; leave {idle[0]} out")
        if self.source != "teacher" and self.trajectories != TrajectorySettings():
            raise ValueError(f"trajectories: expected source: teacher, got source: {self.source}; leave them out")
        if self.source == "none" and self.on_policy not in (None, 1.0):
            raise ValueError(f"on_policy: expected 1 or null without data, got {self.on_policy:g}; leave it out")
        return self


class GuidanceSettings(Settings):
    """Classifier-free guidance of the teacher (arXiv 2207.12598); the student learns the guided velocity."""

    scale: Scale = 1.0
    """Scale in v_null + scale (v - v_null); 1 is the unguided teacher. A network with a guidance input gets it."""
    range: tuple[Scale, Scale] | None = None
    """Smallest and largest scale, for a student with a guidance input, which is evaluated and folded at scale."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times between which guidance is applied (arXiv 2404.07724)."""
    image_scale: Scale = 1.0
    """Scale of the second guidance, by the image, of pipelines like InstructPix2Pix (arXiv 2211.09800, eq. 3)."""
    weaker: str | None = None
    """Weaker teacher of the same kind for autoguidance (arXiv 2406.02507): its velocity replaces v_null."""
    weaker_revision: str | None = None
    """Branch, tag or commit of the weaker teacher on the Hub."""

    @model_validator(mode="after")
    def _weaker_acts(self) -> Self:
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"guidance.interval: expected two increasing times in [0, 1], got {list(self.interval)}")
        if self.range is not None and not 0 <= self.range[0] <= self.scale <= self.range[1] > self.range[0]:
            raise ValueError(
                "guidance.range: expected two increasing scales of at least 0, with guidance.scale between them, "
                f"got {list(self.range)} with guidance.scale: {self.scale:g}"
            )
        if self.weaker is not None and self.scale == 1 and self.range is None:
            raise ValueError(
                "guidance.weaker: expected a guidance.scale other than 1, at which it has no effect, got 1"
            )
        if self.weaker is not None and self.image_scale != 1:
            raise ValueError(
                f"guidance.image_scale: expected 1 with guidance.weaker, which replaces the velocity without the "
                f"prompt, got {self.image_scale:g}; leave it out"
            )
        if self.weaker_revision is not None and self.weaker is None:
            raise ValueError("guidance.weaker_revision: expected guidance.weaker with it, got none; leave it out")
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


class OptimizerSettings(Settings):
    """The optimizer: any dense first-order optimizer of torch.optim."""

    name: str = "AdamW"
    """Class name in torch.optim, such as AdamW, Adam, NAdam, SGD, RMSprop or Adafactor."""
    lr: float = Field(default=1e-3, gt=0, le=MOST_RATE)
    """Peak learning rate, which training.warmup_steps and training.lr_schedule scale."""
    betas: tuple[Rate, Rate] = BETAS
    """Decay rates of the running averages of the gradient and its square, for optimizers with the argument betas;
    with others the default is ignored and any other value is refused."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """Weight decay, as the optimizer defines it: decoupled in AdamW, an L2 penalty in Adam and SGD."""
    options: dict[str, bool | int | float | str | list[float] | None] = Field(default_factory=dict, max_length=32)
    """Further keyword arguments of the optimizer, such as {momentum: 0.9} of SGD."""

    @field_validator("options", mode="before")
    @classmethod
    def _numbers_in_text(cls, options: object) -> object:
        if not isinstance(options, dict):
            return options
        # YAML reads 1e-8, without a point, as text.
        number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}")
        return {
            key: float(value) if isinstance(value, str) and number.fullmatch(value) else value
            for key, value in options.items()
        }

    @field_validator("options")
    @classmethod
    def _options_are_no_fields(cls, options: dict[str, object]) -> dict[str, object]:
        if fields := sorted(options.keys() & {*cls.model_fields, "params"}):
            raise ValueError(f"expected keyword arguments other than {', '.join(fields)}")
        return options


class TrainingSettings(Settings):
    """The training loop."""

    steps: int = Field(default=1000, ge=0, le=MOST_STEPS)
    """Optimizer steps on the loss, after the student's regression steps; 0 with student.init and matching alone."""
    batch_size: int = Field(default=64, ge=1, le=MOST_SAMPLES)
    """Samples per optimizer step, over all processes."""
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=MOST_SAMPLES)
    """Forward and backward passes per optimizer step; each process splits its samples over them, which saves memory."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps of linear learning rate warm-up."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or half a cosine that would reach 0 one step after the last."""
    max_grad_norm: float = Field(default=1.0, gt=0, le=MOST_RATE)
    """Largest gradient norm; a larger gradient is scaled down to it."""
    ema: tuple[Rate, ...] = Field(default=(0.999,), max_length=16)
    """Decay of the exponential moving average of the weights, which is evaluated and exported; smaller in the first
    steps. If several are given, the evaluation chooses one, and losses with an average as target use the first."""
    max_non_finite_steps: int = Field(default=5, ge=1, le=MOST_STEPS)
    """Consecutive steps with a non-finite loss or gradient, which update nothing, before the run returns to its newest
    checkpoint and halves the learning rate; at the second time it stops."""
    target_update_every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps between updates of the frozen target network (target: frozen) to the student's average; 0: none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the student's forward pass; derivatives, weights and losses are in float32."""
    gradient_checkpointing: bool = False
    """Recompute the student's blocks in the backward pass, to save memory; derivatives with a graph become central."""
    compile: Literal["none", "inductor", "eager"] = "none"
    """Backend of torch.compile for teacher and student (eager traces only); derivatives become central."""
    seed: int = Field(default=0, ge=0, le=LAST_SEED)
    """Seed of all random draws, each a function of seed, step and index in the batch."""
    checkpoint_every: int = Field(default=500, ge=1, le=MOST_STEPS)
    """Steps between checkpoints."""
    checkpoints_total_limit: int = Field(default=2, ge=1, le=MOST_STEPS)
    """Number of checkpoints on disk; older ones are removed."""

    @field_validator("ema", mode="before")
    @classmethod
    def _one_rate(cls, value: object) -> object:
        # Text too: YAML reads 1e-1 as text, and the numeric field converts it.
        return (value,) if isinstance(value, int | float | str) else value

    @field_validator("ema")
    @classmethod
    def _rates_differ(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        # As text, which names the file of an average in a checkpoint.
        if not rates or len({f"{rate:g}" for rate in rates}) < len(rates):
            raise ValueError("expected one or more different rates")
        return rates


class EvaluationSettings(Settings):
    """Evaluation at the end of training and during it."""

    every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Optimizer steps between evaluations of the first moving average; 0: only at the end."""
    steps: Steps = Field(default=(1, 2, 4, 8), min_length=1)
    """Numbers of student steps."""
    stochasticity: float = Field(default=0.0, ge=0, le=1e6)
    """Strength of the fresh noise in the student's steps; 0: none. Rows with noise have no endpoint error, so that it
    needs features."""
    ddim_steps: Steps = (1, 2, 4, 8, 16, 50, 100)
    """Numbers of DDIM steps of the teacher, as baselines; of Euler steps if it is a flow or a velocity field."""
    dpmsolver_steps: Steps = (1, 2, 4, 6, 8, 16)
    """Numbers of DPM-Solver++ (2M) steps of the teacher, as baselines."""
    unipc_steps: Steps = ()
    """Numbers of UniPC steps of the teacher, as baselines."""
    heun_steps: Steps = ()
    """Numbers of Heun steps of the teacher, as baselines; two network calls per step, one in the last."""
    samples: int = Field(default=1024, ge=2, le=10**7)
    """Images per row of the Fréchet distance."""
    endpoint_samples: int = Field(default=256, ge=1, le=10**6)
    """Samples of the endpoint error."""
    endpoint_solver_steps: int = Field(default=64, ge=1, le=100_000)
    """RK4 steps of the reference solution of the teacher's ODE. Its error is estimated from half as many steps."""
    features: str = "none"
    """Features of the Fréchet distance: digits (the built-in classifier), inception (extra `fid`), none (no distance),
    or the path of a TorchScript module (*.pt) that maps float images in [0, 1], [batch, channels, height, width], to
    features, [batch, d]."""
    reference: DataSettings | None = None
    """Reference images; null: the images of data, or the built-in digits with features: digits."""
    clip: str | None = None
    """CLIP model (Hub id or folder) that scores images against their prompts; null: no score."""
    batch_size: int = Field(default=256, ge=1, le=MOST_SAMPLES)
    """Images per network call."""

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: str) -> str:
        if value not in FEATURES and not value.endswith(".pt"):
            raise ValueError(f"expected {', '.join(FEATURES)}, or the path of a TorchScript module, which ends in .pt")
        return value

    @model_validator(mode="after")
    def _fits_features(self) -> Self:
        if self.reference is not None and not self.reference.has_images:
            raise ValueError(f"evaluation.reference: expected a source of images, or null, got {self.reference.source}")
        if self.reference is not None and self.features == "none":
            raise ValueError("evaluation.reference: expected evaluation.features with it, got none; try inception")
        if self.stochasticity and self.features == "none":
            raise ValueError(
                f"evaluation.stochasticity: expected evaluation.features with it, as samples with fresh noise have no "
                f"endpoint error, got {self.stochasticity:g} with features: none"
            )
        # Precision and recall need a third neighbor of each sample.
        if self.samples < 4 and self.features != "none":
            raise ValueError(f"evaluation.samples: expected at least 4 with features, got {self.samples}")
        return self


class ExportSettings(Settings):
    """The exported pipelines."""

    steps: Steps = (1, 2, 4, 8)
    """Numbers of steps of the folded stock pipelines, one pipeline each; divisors of the teacher's timesteps."""
    lora_rank: int = Field(default=0, ge=0, le=65536)
    """Rank of the LoRA files that are extracted from a scaled student of full rank; 0: none."""


class LoggingSettings(Settings):
    """Experiment trackers, in addition to the run folder."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that accelerate starts; steps.jsonl is written in any case."""

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("expected each tracker once")
        return trackers
