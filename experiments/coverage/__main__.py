"""Open, check, distill and export every pipeline class of diffusers' own test suite, on a CPU.

    python -m experiments.coverage --suite diffusers --work runs/coverage --output docs/coverage.md

``--suite`` is a checkout of diffusers. Each finished row is written at once: the same command resumes. ``--only``
selects test classes by a regular expression, ``--again`` opens and distills them a second time. Some tests need further
packages: parameterized, requests_mock, torchsde, beautifulsoup4 and torchvision. An hour on one idle core.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, required=True, help="a checkout of diffusers")
    parser.add_argument("--work", type=Path, default=Path("runs/coverage"), help="folder of pipelines, runs and rows")
    parser.add_argument("--output", type=Path, default=Path("docs/coverage.md"), help="the page")
    parser.add_argument("--rows", type=Path, metavar="JSON", help="write the rows of the page to this file too")
    parser.add_argument("--before", type=Path, metavar="JSON", help="such a file of an earlier run, to compare with")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these test classes")
    parser.add_argument("--stages", default="build,open,distill", help="default: build,open,distill")
    parser.add_argument("--again", action="store_true", help="open and distill finished classes a second time")
    options = parser.parse_args()
    # Before the imports that read them.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from experiments.coverage import rows
    from experiments.coverage.installed import uncovered
    from experiments.coverage.report import Entry, entries_of, markdown
    from experiments.coverage.suite import commit_of

    stages = options.stages.split(",")
    if unknown := [stage for stage in stages if stage not in rows.STAGES]:
        parser.error(f"--stages: expected some of {','.join(rows.STAGES)}, got {unknown[0]}")
    if not (options.suite / "tests" / "pipelines").is_dir():
        parser.error(f"--suite {options.suite}: expected a checkout of diffusers, found no tests/pipelines in it")
    logging.basicConfig(level="INFO", format="%(message)s")
    coverage = rows.Coverage(options.suite.resolve(), options.work.resolve())
    coverage.run(stages, options.only, again=options.again)
    entries = entries_of(coverage.rows.values())
    packages = {name: version(name) for name in ("diffusers", "transformers", "torch")}
    versions = {"commit": commit_of(options.suite), "fmm_distill": version("fmm-distill"), **packages}
    earlier = [] if options.before is None else [Entry(row) for row in json.loads(options.before.read_text())]
    names = {entry["pipeline"] for entry in entries}
    options.output.write_text(markdown(entries, versions, uncovered(names), earlier), encoding="utf-8")
    if options.rows is not None:
        options.rows.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
