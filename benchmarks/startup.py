"""Measure the seconds from the command line to the first training step, and their parts.

    OMP_NUM_THREADS=1 python -m benchmarks.startup --output startup.json

Runs of the recipe ``digits`` are started and ended when ``steps.jsonl`` has its first line. Cold: no module has cached
bytecode (``PYTHONPYCACHEPREFIX`` is an empty folder; files may be in the system's cache). Warm: all have. Cold and warm
runs and the other commands alternate, in reverse order in every second repeat; numbers are medians with their
interquartile range.

Further results are the parts of a warm start, timed inside the command with its imports done one by one beforehand; the
imports of each package (``-X importtime``: its own modules, without those that they import); and the packages that are
loaded at the first step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.cli import command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# Seconds without a first step after which a run has failed.
PATIENCE = 600
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "import fmm_distill": ("-c", "import fmm_distill"),
    "--help": ("-m", "fmm_distill", "--help"),
    "losses": ("-m", "fmm_distill", "losses"),
    "inspect builtin:digits": ("-m", "fmm_distill", "inspect", "builtin:digits"),
}
# In the order of their dependencies.
IMPORTS = ("torch", "accelerate", "diffusers", "diffusers.models.unets.unet_2d", "fmm_distill.run.distill")
# Functions and the modules that call them, in the order of a run.
PARTS = {
    ("run", "make_accelerator"): "set up accelerate",
    ("plan", "open_teacher"): "open the teacher",
    ("plan", "open_reference"): "open the reference",
    ("plan", "open_student"): "make the student",
    ("run", "make_folder"): "write the run folder",
    ("run", "prepare_samples"): "prepare the samples",
    ("run", "Trainer"): "make the trainer",
}
STEP = "first step"


def recipe_arguments(folder: Path) -> list[str]:
    """Return the arguments of the run."""
    return ["--recipe", "digits", "--set", "training.steps=1", "--set", "matching=null", "--output", str(folder)]


def first_line(arguments: Sequence[str], folder: Path, bytecode: Path, errors: Path | None = None) -> float:
    """Return the seconds from the start of a process to the first line of ``steps.jsonl``, and end the process.

    Args:
        arguments: of Python.
        folder: of the run, as in the arguments.
        bytecode: the folder of cached bytecode.
        errors: the file for stderr of the process.

    Raises:
        RuntimeError: if the process ends before, or takes too long.
    """
    log, target = folder / "steps.jsonl", errors or folder.with_suffix(".txt")
    started = time.perf_counter()
    with target.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment(bytecode), stdout=subprocess.DEVNULL, stderr=file
        )
        try:
            while not (log.is_file() and b"\n" in log.read_bytes()):
                if process.poll() is not None or time.perf_counter() - started > PATIENCE:
                    raise RuntimeError(f"no first step:\n{target.read_text(encoding='utf-8')[-2000:]}")
                time.sleep(0.005)
            return time.perf_counter() - started
        finally:
            process.kill()
            process.wait()


def command_seconds(arguments: Sequence[str], bytecode: Path) -> float:
    """Return the seconds of a command to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment(bytecode), check=True, capture_output=True)
    return time.perf_counter() - started


def environment(bytecode: Path) -> dict[str, str]:
    """Return an environment with a folder for bytecode."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return variables | {"PYTHONPYCACHEPREFIX": str(bytecode)}


def starts(repeats: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of every command, warm, and of runs to their first step, cold and warm."""
    bytecode = folder / "bytecode"
    number = iter(range(10**6))

    def start(bytecode: Path) -> float:
        run = folder / f"run-{next(number)}"
        return first_line(["-m", "fmm_distill", *recipe_arguments(run)], run, bytecode)

    calls: dict[str, Callable[[], float]] = {
        "first step, cold": lambda: start(folder / f"empty-{next(number)}"),
        "first step, warm": lambda: start(bytecode),
    }
    calls |= {
        name: lambda arguments=arguments: command_seconds(arguments, bytecode) for name, arguments in COMMANDS.items()
    }
    # All modules have cached bytecode after these.
    for name in list(calls)[1:]:
        calls[name]()
    rounds = []
    for repeat in range(repeats):
        names = list(calls) if repeat % 2 == 0 else list(reversed(calls))
        rounds.append({name: calls[name]() for name in names})
        print(", ".join(f"{name} {rounds[-1][name]:.2f} s" for name in calls), flush=True)
    return {name: spread([now[name] for now in rounds]) for name in calls}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and interquartile range."""
    from benchmarks.steps import measured

    return measured(values) if len(values) > 1 else {"median": values[0], "low": values[0], "high": values[0]}


def parts(repeats: int, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the seconds of the parts of a warm start, and the loaded packages with their numbers of modules."""
    rounds, packages = [], {}
    for repeat in range(repeats):
        arguments = ["-m", "benchmarks.startup", "--worker", str(folder / f"parts-{repeat}"), str(time.time())]
        variables = environment(folder / "bytecode")
        done = subprocess.run([sys.executable, *arguments], env=variables, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rounds.append(found["seconds"])
        packages = found["packages"]
    return {name: spread([now[name] for now in rounds]) for name in rounds[0]}, packages


class FirstStepError(Exception):
    """Ends a run after its first step."""


def work(folder: Path, started: float) -> None:
    """Run the command with its parts timed, in one process of ``parts``."""
    seconds = {"start Python, import fmm_distill.cli": time.time() - started}
    for name in IMPORTS:
        with lap(seconds, f"import {name}"):
            importlib.import_module(name)
    from fmm_distill.training.trainer import Trainer

    for (module, name), title in PARTS.items():
        caller = importlib.import_module(f"fmm_distill.{module}")
        setattr(caller, name, timed_call(seconds, title, getattr(caller, name)))
    step = timed_call(seconds, STEP, Trainer.train_step)

    def one_step(*given: Any) -> None:
        step(*given)
        raise FirstStepError

    Trainer.train_step = one_step
    before, timed = time.perf_counter(), sum(seconds.values())
    try:
        command(recipe_arguments(folder), standalone_mode=False)
    except FirstStepError:
        total = time.perf_counter() - before
    seconds["everything else"] = total - (sum(seconds.values()) - timed)
    seconds["sum"] = sum(seconds.values())
    print("\n" + json.dumps({"seconds": seconds, "packages": loaded()}))


@contextmanager
def lap(seconds: dict[str, float], title: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[title] = seconds.get(title, 0.0) + time.perf_counter() - started


def timed_call(seconds: dict[str, float], title: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        with lap(seconds, title):
            return call(*given, **named)

    return timed


def loaded() -> dict[str, int]:
    """Return the loaded packages outside Python with their numbers of modules, the largest first."""
    counts: dict[str, int] = {}
    for name in tuple(sys.modules):
        package = name.split(".")[0]
        if package not in sys.stdlib_module_names and package != "__main__":
            counts[package] = counts.get(package, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def import_times(text: str) -> dict[str, float]:
    """Return the seconds of the modules of each package by themselves, the largest first.

    Args:
        text: the output of ``-X importtime``.
    """
    seconds: dict[str, float] = {}
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", text, flags=re.MULTILINE):
        package = name.split(".")[0]
        package = "Python's own" if package in sys.stdlib_module_names or package.startswith("_") else package
        seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def imports(folder: Path) -> dict[str, float]:
    """Return the imports of one warm run up to its first step; logging them makes it slower."""
    run, log = folder / "imports", folder / "imports.txt"
    first_line(["-X", "importtime", "-m", "fmm_distill", *recipe_arguments(run)], run, folder / "bytecode", log)
    return import_times(log.read_text(encoding="utf-8", errors="replace"))


def markdown(found: Mapping[str, Any]) -> str:
    """Return all tables."""
    lines = ["| command | seconds |", "|---|---:|"]
    lines += [f"| {name} | {_shown(value)} |" for name, value in found["commands"].items()]
    lines += ["", "| part of a warm start | seconds |", "|---|---:|"]
    lines += [f"| {name} | {_shown(value)} |" for name, value in found["parts"].items()]
    lines += ["", "| package | modules at the first step | seconds of its own imports |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {found['packages'].get(name, '')} | {seconds:.2f} |"
        for name, seconds in list(found["imports"].items())[:15]
    ]
    return "\n".join(lines)


def _shown(value: Mapping[str, float]) -> str:
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("startup.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat, for a trial")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "STARTED"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        work(Path(given.worker[0]), float(given.worker[1]))
        return
    repeats = 1 if given.quick else given.repeats
    with tempfile.TemporaryDirectory() as folder:
        commands = starts(repeats, Path(folder))
        seconds, packages = parts(repeats, Path(folder))
        found = {
            "about": {
                "repeats": repeats,
                "device": platform.machine(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            },
            "commands": commands,
            "parts": seconds,
            "imports": imports(Path(folder)),
            "packages": packages,
        }
    given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"\n{markdown(found)}")


if __name__ == "__main__":
    main()
