"""Every loss on the checkerboard with one teacher, one network and the same samples: KL and endpoint error.

    python -m experiments.checkerboard --output runs/checkerboard

Trains the teacher by flow matching, then a student by each loss and seed with the package's own trainer, measures each
and writes ``checkerboard.md``, ``checkerboard.json`` and ``checkerboard.png``. The same command resumes after an
interruption.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

from experiments.checkerboard.experiment import METHODS, QUICK, Budget, pictures, run_experiment
from experiments.checkerboard.report import markdown
from fmm_distill.io.files import write_text


def main() -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/checkerboard"), help="folder of runs and results")
    parser.add_argument("--quick", action="store_true", help="a narrower network and fewer steps: ten minutes")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        help="only these losses, printed and not written",
    )
    arguments = parser.parse_args()
    folder, started = arguments.output, time.perf_counter()
    results = run_experiment(QUICK if arguments.quick else Budget(), folder, arguments.only)
    results["minutes"] = (time.perf_counter() - started) / 60
    print(markdown(results))
    print(f"{results['minutes']:.1f} minutes in this call")
    if set(arguments.only) != set(METHODS):
        print("tables and pictures are written for all losses together: they are unchanged")
        return
    write_text(folder / "checkerboard.json", json.dumps(results, indent=1))
    write_text(folder / "checkerboard.md", markdown(results))
    pictures(results, folder)
    print(f"tables and pictures in {folder}")


if __name__ == "__main__":
    main()
