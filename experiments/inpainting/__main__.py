"""Inpainting on CIFAR-10 at 16 x 16: a teacher that is given an image and a mask, its student, and their quality.

    python -m experiments.inpainting --data DIR --work runs/inpainting --output inpainting.json

``--data`` is a folder of parquet files with the columns ``img`` and ``label``, and a split in each file name. Each
finished stage is stored in ``--work``: the same command resumes. ``--only`` selects the kinds of students, and
``--render`` prints the table of an existing JSON. docs/results/inpainting.md has hardware, time and result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.cifar10.experiment import read
from experiments.inpainting.budget import BUDGETS
from experiments.inpainting.experiment import STUDENTS, Experiment
from experiments.inpainting.report import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of parquet files")
    parser.add_argument("--work", type=Path, default=Path("runs/inpainting"), help="folder of all stages")
    parser.add_argument("--output", type=Path, default=Path("inpainting.json"), help="pictures are written next to it")
    parser.add_argument("--budget", choices=list(BUDGETS), default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(STUDENTS), default=["scaled"], help="only these students")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the table of a finished JSON, and stop")
    options = parser.parse_args()
    if options.render is not None:
        print(markdown(read(options.render)))
        return
    if options.data is None:
        parser.error("--data is missing: a folder of parquet files with the columns img and label")
    paths = [path.resolve() for path in (options.data, options.work, options.output)]
    experiment = Experiment(*paths, BUDGETS[options.budget], options.budget)
    experiment.run(options.only)
    print(markdown(experiment.results()))


if __name__ == "__main__":
    main()
