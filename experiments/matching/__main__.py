"""Distribution matching on CIFAR-10 in minutes on a CPU: maps, second stages and FastGen's DMD2 in equal seconds.

    python -m experiments.matching --cifar10 runs/cifar10 --fastgen FastGen --work runs/matching --output matching.json

``--cifar10`` is the work folder of ``experiments.cifar10 --budget cpu``, with its teacher, classifier and images, and
``--fastgen`` a checkout of FastGen. Each finished row is written at once: the same command resumes. ``--only`` selects
cases and ``--render`` prints the tables of such a JSON. The seconds are those of one thread.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from experiments.cifar10.experiment import read
from experiments.matching.cases import BUDGETS, CASES
from experiments.matching.comparison import Comparison
from experiments.matching.report import markdown


def main() -> None:
    logging.basicConfig(level="WARNING", format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", type=Path, help="work folder of experiments.cifar10")
    parser.add_argument("--fastgen", type=Path, help="a checkout of FastGen; default: without its cases")
    parser.add_argument("--work", type=Path, default=Path("runs/matching"), help="folder of students")
    parser.add_argument("--output", type=Path, default=Path("matching.json"))
    parser.add_argument("--budget", choices=list(BUDGETS), default="cpu")
    parser.add_argument("--samples", type=int, help="of a row; default: the budget's")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="only these cases")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--teacher-rows", action="store_true", help="measure the teacher's solvers too")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the tables of a JSON, and stop")
    options = parser.parse_args()
    if options.render is not None:
        print(markdown(read(options.render)))
        return
    if options.cifar10 is None:
        parser.error("--cifar10 is missing: the work folder of python -m experiments.cifar10 --budget cpu")
    torch.set_num_threads(1)
    budget = BUDGETS[options.budget]
    if options.samples:
        budget = replace(budget, samples=options.samples)
    fastgen = options.fastgen and options.fastgen.resolve()
    comparison = Comparison(options.cifar10.resolve(), options.work.resolve(), options.output, budget, fastgen)
    comparison.run(options.only, options.seeds)
    if options.teacher_rows:
        comparison.measure_teacher()
    print(markdown(comparison.results))


if __name__ == "__main__":
    main()
