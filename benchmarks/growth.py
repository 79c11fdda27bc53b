"""Measure the growth of time and memory of a training step with batch, tokens and parameters.

    OMP_NUM_THREADS=1 python -m benchmarks.growth --output growth.json --picture growth.png
    python -m benchmarks.growth --device cuda --precision bf16 --size large --batches 8 16 32 64 --tokens 256 1024 4096

The steps are those of ``benchmarks/steps.py``: draws, loss, backward, clipping, AdamW, one average; random weights.
Batch and parameters are those of a ``UNet2DModel``, tokens those of a DiT. At each size the losses alternate, in
reverse order in every second repeat; numbers are medians, ratios are taken within a repeat. Memory is the peak of a
step, in addition to weights, moments and averages. The slope of a curve is that of a least-squares line through the
logarithms.

It also compares exact with central derivatives at all sizes, and measures gradient checkpointing and accumulation at
one size. ``benchmarks/training.py`` measures a second process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from benchmarks.growth_report import QUANTITIES, cheaper, count, curve, markdown, plot
from benchmarks.step_cases import CASES, make_dit, make_trainer, make_unet, teacher_of
from benchmarks.steps import measured, peak, timed
from fmm_distill.training.signals import StopRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fmm_distill.teachers.base import Teacher
    from fmm_distill.training.trainer import Trainer

SLOPES = ("lagrangian, target", "lagrangian, teacher")
LOSSES = (("flow_matching", "none"), *((name, engine) for name in SLOPES for engine in ("central", "exact")))
# Options that trade time for memory, for a loss that stores the graph of its derivative.
TRADED = ("lagrangian, teacher", "central")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "accumulation: 2": {"gradient_accumulation_steps": 2},
    "accumulation: 4": {"gradient_accumulation_steps": 4},
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement.

    Attributes:
        channels: of the UNet with growing batches.
        widths: first channels of the UNets with growing parameters, at ``unet_batch``.
        levels: of those UNets; all except the first have twice the width.
        side: height and width of the UNets' images.
        dit: layers, heads and channels per head.
        tokens: of the DiT, at ``dit_batch``.
    """

    channels: tuple[int, ...] = (64, 96, 128, 128)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    widths: tuple[int, ...] = (32, 64, 96, 128, 160)
    levels: int = 4
    side: int = 32
    unet_batch: int = 2
    dit: tuple[int, int, int] = (6, 4, 64)
    tokens: tuple[int, ...] = (64, 144, 256, 576, 1024)
    dit_batch: int = 1
    option_batch: int = 4
    option_tokens: int = 256

    def unet(self, channels: tuple[int, ...]) -> Teacher:
        """Return a UNet with attention at the second level."""
        torch.manual_seed(0)
        return teacher_of(make_unet(channels, 1, 1, self.side))

    def transformer(self, tokens: int) -> Teacher:
        """Return a transformer whose latent images have so many tokens."""
        torch.manual_seed(0)
        return teacher_of(make_dit(*self.dit, size=2 * math.isqrt(tokens)))

    def points(self, axis: str) -> Iterator[tuple[int, Teacher, int]]:
        """Yield the size on an axis, a teacher and a batch."""
        if axis == "batch":
            teacher = self.unet(self.channels)
            yield from ((batch, teacher, batch) for batch in self.batches)
        elif axis == "tokens":
            yield from ((tokens, self.transformer(tokens), self.dit_batch) for tokens in self.tokens)
        else:
            for width in self.widths:
                teacher = self.unet((width, *(2 * width for _ in range(self.levels - 1))))
                yield parameters_of(teacher), teacher, self.unet_batch


SIZES = {
    "tiny": Sizes((8, 16), (1, 2), (8, 16), 2, 8, 2, (2, 2, 8), (4, 16), 2, 4, 4),
    "small": Sizes(),
    "large": Sizes(channels=(128, 256, 256, 256), dit=(12, 12, 64), unet_batch=16, dit_batch=16, option_batch=32),
}


def parameters_of(teacher: Teacher) -> int:
    """Return the number of parameters of its network."""
    return sum(parameter.numel() for parameter in teacher.network.parameters())


def take_turns(calls: Mapping[str, Callable[[int], object]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Return the milliseconds of each call in every repeat, and the peak of its additional bytes."""
    rounds = []
    for step in range(repeats + 1):
        names = list(calls) if step % 2 else list(reversed(calls))
        rounds.append({name: timed(partial(calls[name], step), device) for name in names})
    # The first round is a warm-up.
    milliseconds = {name: [now[name] for now in rounds[1:]] for name in calls}
    return {
        "milliseconds": milliseconds,
        "bytes": {name: peak(partial(call, repeats + 1), device) for name, call in calls.items()},
    }


def step_of(trainer: Trainer) -> Callable[[int], object]:
    """Return a complete step of a trainer."""

    def step(number: int) -> None:
        # accelerate has one number of accumulation steps per process, and the alternating trainers differ in it.
        trainer.accelerator.gradient_accumulation_steps = trainer.recipe.training.gradient_accumulation_steps
        trainer.train_step(number, StopRequest())

    return step


def by(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the ratios within repeats."""
    return measured([a / b for a, b in zip(ours, theirs, strict=True)])


def accelerator_of(given: argparse.Namespace) -> Accelerator:
    """Return an accelerator with the device and the precision of the options."""
    return Accelerator(cpu=given.device == "cpu", mixed_precision={"fp32": "no"}.get(given.precision, given.precision))


def grow(axis: str, sizes: Sizes, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every loss at every size of one axis: its curves, and exact relative to central derivatives."""
    cases = {case.name: case for case in CASES}
    accelerator, at, found = accelerator_of(given), [], []
    for size, teacher, batch in sizes.points(axis):
        calls = {
            title(name, engine): step_of(make_trainer(cases[name], engine, teacher, batch, accelerator, folder))
            for name, engine in LOSSES
        }
        at.append(size)
        found.append(take_turns(calls, given.repeats, accelerator.device))
        middles = {name: measured(values)["median"] for name, values in found[-1]["milliseconds"].items()}
        print(f"{axis} {size:,}: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in middles.items()), flush=True)
        # The accelerator has references to all modules that it has prepared.
        del calls
        accelerator.free_memory()
    names = [title(*loss) for loss in LOSSES]
    values = {
        "milliseconds": {name: [measured(now["milliseconds"][name])["median"] for now in found] for name in names},
        "bytes": {name: [now["bytes"][name] for now in found] for name in names},
    }
    curves = [curve(axis, name, quantity, at, values[quantity][name]) for quantity in QUANTITIES for name in names]
    return {"curves": curves, "exact_by_central": [engines(axis, name, at, found) for name in SLOPES]}


def title(name: str, engine: str) -> str:
    """Return the title of a curve."""
    return name if engine == "none" else f"{name}, {engine}"


def engines(axis: str, name: str, at: Sequence[int], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of exact to central derivatives of a loss at every size."""
    exact, central = title(name, "exact"), title(name, "central")
    time = [by(now["milliseconds"][exact], now["milliseconds"][central]) for now in found]
    memory = [now["bytes"][exact] / now["bytes"][central] for now in found]
    row = {"axis": axis, "loss": name, "at": list(at), "time": time, "memory": memory}
    plain = [{"median": ratio, "high": ratio} for ratio in memory]
    return row | {"time_says": cheaper(at, time), "memory_says": cheaper(at, plain)}


def options(sizes: Sizes, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure checkpointing and accumulation relative to the same step without them, on both networks."""
    case = next(case for case in CASES if case.name == TRADED[0])
    rows: list[dict[str, Any]] = []
    for network, teacher in {
        f"UNet, batch {sizes.option_batch}": sizes.unet(sizes.channels),
        f"DiT, {sizes.option_tokens} tokens, batch {sizes.option_batch}": sizes.transformer(sizes.option_tokens),
    }.items():
        calls, accelerators = {}, []
        for name, training in OPTIONS.items():
            # Each trainer counts its own accumulation steps.
            accelerators.append(accelerator_of(given))
            trainer = make_trainer(
                case, TRADED[1], teacher, sizes.option_batch, accelerators[-1], folder, training=training
            )
            calls[name] = step_of(trainer)
        found = take_turns(calls, given.repeats, accelerators[0].device)
        time, memory = found["milliseconds"], found["bytes"]
        rows += [
            {
                "network": network,
                "option": name,
                "milliseconds": measured(time[name]),
                "bytes": memory[name],
                "time": by(time[name], time["plain"]),
                "memory": memory[name] / memory["plain"],
            }
            for name in calls
        ]
    return rows


def run(given: argparse.Namespace, sizes: Sizes) -> None:
    """Measure everything, and write the results after each axis."""
    torch.set_num_threads(given.threads)
    unet, dit = sizes.unet(sizes.channels), sizes.transformer(sizes.tokens[0])
    axes = {
        "batch": f"batch (UNet, {count(parameters_of(unet))} parameters)",
        "tokens": f"tokens (DiT, {count(parameters_of(dit))} parameters, batch {sizes.dit_batch})",
        "parameters": f"parameters (UNet, batch {sizes.unet_batch})",
    }
    about = {name: getattr(given, name) for name in ("size", "repeats", "precision", "threads")}
    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    about |= {"device": device, "cores": os.cpu_count(), "torch": torch.__version__, "axes": axes}
    found: dict[str, Any] = {"about": about}
    found |= {"curves": [], "exact_by_central": [], "options": []}
    with tempfile.TemporaryDirectory() as folder:
        for axis in axes:
            for name, rows in grow(axis, sizes, given, Path(folder)).items():
                found[name] += rows
            write(found, given.output)
        found["options"] = options(sizes, given, Path(folder))
    write(found, given.output)
    plot(found, given.picture)
    print(f"\n{markdown(found)}")


def write(found: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("growth.json"))
    parser.add_argument("--picture", type=Path, default=Path("growth.png"))
    parser.add_argument(
        "--size", choices=("small", "large", "tiny"), default="small", help="UNet 5M and DiT 7M; 36M, B/2"
    )
    parser.add_argument("--batches", type=int, nargs="+", help="of the UNet [1 2 4 8 16]")
    parser.add_argument("--tokens", type=int, nargs="+", help="of the DiT, square numbers [64 144 256 576 1024]")
    parser.add_argument("--widths", type=int, nargs="+", help="first channels of UNets, by 32 [32 64 96 128 160]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny networks and two repeats, for a trial")
    given = parser.parse_args(arguments)
    if given.quick:
        given.size, given.repeats = "tiny", 2
    lists = {name: tuple(sorted(getattr(given, name) or ())) for name in ("batches", "tokens", "widths")}
    wrong = [count for count in lists["tokens"] if math.isqrt(count) ** 2 != count]
    if wrong:
        parser.error(f"--tokens {wrong[0]}: a square picture has a square number of tokens, such as 1024")
    wrong = [width for width in lists["widths"] if width % min(32, width)]
    if wrong:
        parser.error(f"--widths: expected multiples of 32, such as 192; got {wrong[0]}")
    run(given, replace(SIZES[given.size], **{name: values for name, values in lists.items() if values}))


if __name__ == "__main__":
    main()
