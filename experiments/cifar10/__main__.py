"""CIFAR-10 on one GPU in minutes: a teacher, a classifier, a student of every loss, and their quality.

    python -m experiments.cifar10 --data DIR --work DIR --minutes 8.5 --output cifar10.json

``--data`` is a folder of parquet files with the columns ``img`` and ``label``, and a split in each file name. Complete
stages are saved in ``--work``: the same command resumes there, with ``--minutes`` more. It ends in time and writes the
JSON and the pictures of all finished stages. ``--budget`` selects one of three sizes; ``--render`` prints the tables of
an existing JSON.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

from experiments.cifar10.budget import BUDGETS
from experiments.cifar10.experiment import Experiment, read
from experiments.cifar10.methods import METHODS
from experiments.cifar10.report import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of parquet files")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="folder of all stages")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--output", type=Path, default=Path("cifar10.json"), help="pictures are written next to it")
    parser.add_argument("--parallel", type=int, help="students that train at the same time")
    parser.add_argument("--peers", type=int, default=0, help="students of other packages on the same device")
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="only these losses")
    parser.add_argument("--gather", action="store_true", help="write the results in --work, and stop")
    parser.add_argument("--budget", choices=list(BUDGETS), default="gpu", help="toy: 20 steps, 64 samples")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the tables of a finished JSON, and stop")
    options = parser.parse_args()
    if options.render is not None:
        print(markdown(read(options.render)))
        return
    if options.data is None:
        parser.error("--data is missing: a folder of parquet files with the columns img and label")
    budget = replace(BUDGETS[options.budget], peers=options.peers)
    if options.parallel:
        budget = replace(budget, parallel=options.parallel)
    paths = [path.resolve() for path in (options.data, options.work, options.output)]
    experiment = Experiment(*paths, budget, options.minutes, options.only)
    if options.gather:
        experiment.write()
        return
    # As for Ctrl-C: stop running processes and write all results.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        experiment.run()
    finally:
        experiment.processes.stop()
        experiment.write()


if __name__ == "__main__":
    main()
