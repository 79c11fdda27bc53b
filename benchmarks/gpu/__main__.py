"""Measure on a GPU that is at hand for minutes: one call, one stage.

    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --stage steps --minutes 8 --work W --output O
    python -m benchmarks.gpu --render O

A stage prints its plan, measures rows in the order of their importance and is complete within its minutes, start and
installation included. What is measured is written after every row: a call that is killed leaves it, and the same call
continues there. ``--list`` says which results in docs/results are of today's code.
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
    act.add_argument("--stage", choices=list(STAGES), help="what is measured")
    act.add_argument("--list", action="store_true", help="the stages, their results and for which code those are")
    act.add_argument("--render", type=Path, metavar="O", help="print the tables of the JSON files in this folder")
    made.add_argument("--minutes", type=float, default=8.0, help="of this call [8]")
    made.add_argument("--work", type=Path, default=Path("gpu-work"), help="folder of what is large [gpu-work]")
    made.add_argument("--output", type=Path, default=Path("gpu-output"), help="folder of results [gpu-output]")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="networks of a few thousand weights: to see that it runs")
    made.add_argument("--data", type=Path, help="cifar10: folder of parquet files with the columns img and label")
    made.add_argument("--fastgen", type=Path, help="steps, cifar10: checkout of https://github.com/NVlabs/FastGen")
    made.add_argument("--kept", type=Path, help="cifar10: folder with the teacher of an earlier call (kept-*.bin)")
    made.add_argument("--wheels", type=Path, help="folder of wheels, of which those that are missing are installed")
    made.add_argument("--commit", help="recorded where the files are a copy without git's history")
    return made


def prepare(stage: Stage, wheels: Path | None, work: Path) -> None:
    """Make the stage's packages importable, or end with the one command that does."""
    site = work / "site"
    site.mkdir(parents=True, exist_ok=True)
    machine.use(site)
    if wheels is not None:
        installed = machine.install(wheels, site)
        print(f"installed from {wheels}: {', '.join(installed) or 'nothing, all of it is there'}", flush=True)
    if absent := machine.missing(stage.modules):
        sys.exit(f"missing packages: pip install {' '.join(absent)}  (or --wheels DIR on a machine without network)")


def run(given: argparse.Namespace) -> None:
    """One stage, to the end of its minutes."""
    deadline, stage = Deadline(60 * given.minutes), STAGES[given.stage]
    for name in stage.inputs:
        if getattr(given, name) is None:
            sys.exit(f"--stage {stage.name} needs --{name}; see --help")
    # Children run elsewhere.
    places = {name: None if (path := getattr(given, name)) is None else path.resolve() for name in PLACES}
    for name in ("data", "fastgen", "kept", "wheels"):
        if places[name] is not None and not places[name].exists():
            sys.exit(f"--{name} {places[name]}: there is no such folder")
    wheels = places.pop("wheels")
    prepare(stage, wheels, places["work"])
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; --device cpu --tiny shows that a stage runs")
    about = {"stage": stage.name, "goal": stage.goal, "tiny": given.tiny, "minutes": given.minutes}
    about |= machine.about_machine(given.device) | machine.about_code(stage.sources, given.commit)
    options = Options(device=given.device, tiny=given.tiny, minutes=given.minutes, **places)
    record = Record(options.output / f"gpu-{stage.name}.json", about)
    job = Job(options, record, deadline, stage)
    print(f"{job.plan()}\n{about['device']}, torch {about['torch']}, commit {about['commit']}", flush=True)
    # As Ctrl-C: what is running is stopped; what is measured is written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    stage.run(job)
    record.set(seconds=round(60 * given.minutes - deadline.remaining(), 1))
    print(render([record.path]), flush=True)


PLACES = ("work", "output", "data", "fastgen", "kept", "wheels")


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    given = parser().parse_args(arguments)
    if given.list:
        print(listing(RESULTS))
    elif given.render is not None:
        print(render(sorted(given.render.glob("gpu-*.json"))))
    else:
        # Fragments of earlier rows would keep a large row from fitting.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        run(given)


if __name__ == "__main__":
    main()
