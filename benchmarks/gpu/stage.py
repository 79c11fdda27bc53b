"""The stages: their parts with fractions of the time, required modules, and measured code."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.budget import Deadline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu.record import Record

__all__ = ["STAGES", "Job", "Options", "Part", "Stage"]

BASE = (
    *("torch", "numpy", "diffusers", "accelerate", "huggingface_hub", "safetensors", "pydantic", "yaml"),
    *("jaxtyping", "torchmetrics", "tqdm", "click", "matplotlib"),
)
TEXT = ("transformers", "tokenizers", "peft", "sentencepiece")
# The command line, the reports and the Hub don't change the cost of a step.
STEP_PACKAGES = ("core", "losses", "teachers", "student", "config", "data", "training")
STEP = tuple(f"fmm_distill/{name}/**/*.py" for name in STEP_PACKAGES)
ALL = ("fmm_distill/**/*.py",)


@dataclass(frozen=True)
class Part:
    """A part of a stage and its fraction of the time; unused time goes to the next parts."""

    name: str
    fraction: float


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        title: one line for ``--list``.
        goal: the thresholds of its numbers.
        parts: in the order in which they run.
        measures: patterns of files; a result is current while none of them changes.
        needs: modules in addition to those that every stage imports.
        inputs: required options.
    """

    name: str
    title: str
    goal: str
    parts: tuple[Part, ...]
    measures: tuple[str, ...]
    needs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """All required modules."""
        return BASE + self.needs

    @property
    def sources(self) -> tuple[str, ...]:
        """Patterns of the files that the numbers depend on."""
        return (*self.measures, f"benchmarks/gpu/{self.name}*.py")

    def run(self, job: Job) -> None:
        """Run the module of the stage, which is imported here because it imports torch."""
        importlib.import_module(f"benchmarks.gpu.{self.name}").run(job)


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    work: Path
    output: Path
    device: str
    tiny: bool
    minutes: float
    data: Path | None = None
    fastgen: Path | None = None
    stored: Path | None = None
    only: tuple[str, ...] = ()


@dataclass
class Job:
    """A running stage.

    Attributes:
        deadline: of the complete stage, pictures included.
    """

    options: Options
    record: Record
    deadline: Deadline
    stage: Stage
    _seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self._seconds = self.deadline.remaining()

    def parts(self) -> Iterator[tuple[str, Deadline]]:
        """Yield the parts with their deadlines; unused time goes to the next part."""
        done = 0.0
        for part in self.stage.parts:
            done += part.fraction
            spent = self._seconds - self.deadline.remaining()
            yield part.name, self.deadline.within(done * self._seconds - spent)

    def plan(self) -> str:
        """Return the plan of the stage, with seconds."""
        lines = [f"{part.fraction * self._seconds:6.0f} s  {part.name}" for part in self.stage.parts]
        return "\n".join([f"{self.stage.name}: {self.stage.title}", f"goal: {self.stage.goal}", *lines])


_STAGES = (
    Stage(
        "steps",
        "a training step of every loss, by both engines, against its floor, flow matching and FastGen's steps",
        "at most 1.10 of the floor and 0.85 of FastGen's step",
        (
            Part("first case of every loss: UNet and DiT, bf16 and fp32, eager", 0.55),
            Part("attention with and without a fused kernel", 0.07),
            Part("compiled", 0.23),
            Part("further cases of the losses", 0.13),
        ),
        (*STEP, "benchmarks/steps.py", "benchmarks/step_*.py"),
    ),
    Stage(
        "large",
        "SD 1.5, SDXL and a flow transformer of 2B parameters with random weights: steps, memory, FSDP to the end",
        "measured memory within 15 % of the estimate; FSDP 2 resumes, exports and reloads",
        (
            Part("SD 1.5: build it; LoRA and full student, estimates at the same time on the CPU", 0.25),
            Part("FSDP 2 through accelerate launch: kill, resume, export, reload", 0.25),
            Part("flow transformer of 2B: build it; LoRA and full student", 0.22),
            Part("SDXL: build it; LoRA and full student", 0.24),
        ),
        ALL,
        TEXT,
    ),
    Stage(
        "cifar10",
        "students of every loss and of FastGen's sCM, mean flow and ECT from one teacher, 1 to 16 calls",
        "ahead of every peer at every number of calls",
        (Part("teacher, classifier, our students", 0.74), Part("FastGen's students, measuring, pictures", 0.22)),
        (*STEP, "experiments/cifar10/*.py", "benchmarks/step_peers.py", "examples/train_teacher.py"),
        ("datasets", "pyarrow", "PIL"),
        ("data",),
    ),
    Stage(
        "checkerboard",
        "one Lagrangian student of the exact checkerboard: KL at 1 to 16 steps against samples seen",
        "at most 0.086, 0.077, 0.071, 0.070, 0.071 at 1, 2, 4, 8, 16 steps (arXiv 2505.18825)",
        (Part("speed, then one run whose rate falls to zero at the end", 0.94),),
        (*STEP, "experiments/plane.py", "experiments/checkerboard/experiment.py", "recipes/checkerboard.yaml"),
    ),
    Stage(
        "sampling",
        "an exported any-step pipeline against the calls of its network alone, and those as a CUDA graph",
        "1.05 of the calls alone",
        (Part("pipelines of 36M parameters, bf16 and fp32, 1 to 16 steps, batch 1 to 64", 0.94),),
        (*ALL, "benchmarks/sampling.py"),
    ),
    Stage(
        "startup",
        "seconds from the command line to the first training step",
        "no goal on a GPU",
        (Part("runs of the recipe digits, cold and warm; parts; imports", 0.94),),
        (*ALL, "benchmarks/startup.py"),
    ),
    Stage(
        "growth",
        "time and memory of a step against batch, tokens and parameters; checkpointing and accumulation",
        "no goal: slopes",
        (Part("batch, tokens, parameters, options; bf16", 0.92),),
        (*STEP, "benchmarks/growth*.py", "benchmarks/step_cases.py"),
    ),
)
STAGES = {stage.name: stage for stage in _STAGES}
