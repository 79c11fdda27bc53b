"""Measure on a GPU that is available for minutes: one stage per call.

    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --stage steps --minutes 8 --work W --output O
    python -m benchmarks.gpu --render O

A stage prints its plan, measures rows in the order of their importance and is complete within its minutes, start and
installation included. Results are written after every row: after an interruption, the same command resumes. ``--list``
shows which results in docs/results are of the current code.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import machine
from benchmarks.gpu.budget import Deadline
from benchmarks.gpu.record import Record
from benchmarks.gpu.render import listing, render
from benchmarks.gpu.stage import STAGES, Job, Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.stage import Stage

RESULTS = machine.ROOT / "docs" / "results"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    act = made.add_mutually_exclusive_group(required=True)
    act.add_argument("--stage", choices=list(STAGES), help="the measurement")
    act.add_argument("--list", action="store_true", help="the stages, their results and whether the code has changed")
    act.add_argument("--render", type=Path, metavar="O", help="print the tables of the JSON files in this folder")
    made.add_argument("--minutes", type=float, default=8.0, help="of this call [8]")
    made.add_argument("--work", type=Path, default=Path("gpu-work"), help="folder of large files [gpu-work]")
    made.add_argument("--output", type=Path, default=Path("gpu-output"), help="folder of results [gpu-output]")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="networks of a few thousand weights, for a trial")
    made.add_argument("--data", type=Path, help="cifar10: folder of parquet files with the columns img and label")
    made.add_argument("--fastgen", type=Path, help="steps, cifar10: checkout of https://github.com/NVlabs/FastGen")
    made.add_argument("--stored", type=Path, help="cifar10: folder with the teacher of an earlier call (stored-*.bin)")
    made.add_argument("--wheels", type=Path, help="folder of wheels; missing packages are installed from it")
    made.add_argument("--only", nargs="+", default=[], help="cifar10: only these students")
    made.add_argument("--commit", help="recorded where the files are a copy without git's history")
    return made


def prepare(stage: Stage, wheels: Path | None, work: Path) -> None:
    """Make the stage's packages importable, or exit with the command that installs them."""
    site = work / "site"
    site.mkdir(parents=True, exist_ok=True)
    machine.use(site)
    if wheels is not None:
        installed = machine.install(wheels, site)
        print(f"installed from {wheels}: {', '.join(installed) or 'nothing is missing'}", flush=True)
    if absent := machine.missing(stage.modules):
        sys.exit(f"missing packages: pip install {' '.join(absent)}  (or --wheels DIR on a machine without network)")


def run(given: argparse.Namespace) -> None:
    """Run one stage to the end of its minutes."""
    deadline, stage = Deadline(60 * given.minutes), STAGES[given.stage]
    for name in stage.inputs:
        if getattr(given, name) is None:
            sys.exit(f"--stage {stage.name} needs --{name}; see --help")
    # Child processes have another working directory.
    paths = {name: None if (path := getattr(given, name)) is None else path.resolve() for name in PATHS}
    for name in ("data", "fastgen", "stored", "wheels"):
        if paths[name] is not None and not paths[name].exists():
            sys.exit(f"--{name} {paths[name]}: no such folder")
    wheels = paths.pop("wheels")
    prepare(stage, wheels, paths["work"])
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a GPU that torch can use; try --device cpu --tiny for a trial")
    about = {"stage": stage.name, "goal": stage.goal, "tiny": given.tiny, "minutes": given.minutes}
    about |= machine.about_machine(given.device) | machine.about_code(stage.sources, given.commit)
    chosen = {"tiny": given.tiny, "minutes": given.minutes, "only": tuple(given.only)}
    options = Options(device=given.device, **chosen, **paths)
    record = Record(options.output / f"gpu-{stage.name}.json", about)
    job = Job(options, record, deadline, stage)
    print(f"{job.plan()}\n{about['device']}, torch {about['torch']}, commit {about['commit']}", flush=True)
    # As for Ctrl-C: stop running processes and write all results.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    stage.run(job)
    record.set(seconds=round(60 * given.minutes - deadline.remaining(), 1))
    print(render([record.path]), flush=True)


PATHS = ("work", "output", "data", "fastgen", "stored", "wheels")


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    given = parser().parse_args(arguments)
    if given.list:
        print(listing(RESULTS))
    elif given.render is not None:
        print(render(sorted(given.render.glob("gpu-*.json"))))
    else:
        # Without this, fragments of earlier rows prevent the allocation of a large row.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        run(given)


if __name__ == "__main__":
    main()
