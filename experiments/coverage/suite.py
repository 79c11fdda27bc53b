"""The pipeline tests of a checkout of diffusers: their classes, and the tiny pipelines that these build."""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Case", "commit_of", "find_cases"]

_PIPELINES = "tests/pipelines"
# The attribute of a test class that names what it tests.
_TESTED = "pipeline_class"


@dataclass(frozen=True)
class Case:
    """A test class of a pipeline.

    Attributes:
        file: relative to the checkout.
        name: of the class.
        pipeline: the name of the pipeline class that it tests.
    """

    file: str
    name: str
    pipeline: str

    @property
    def key(self) -> str:
        """The name of its row, as pytest shows it."""
        return f"{self.file}::{self.name}"

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return re.sub(r"\W+", "_", self.key.removeprefix(f"{_PIPELINES}/"))[:110]

    @property
    def module(self) -> str:
        """The name of its module, from the checkout."""
        return self.file.removesuffix(".py").replace("/", ".")


def find_cases(checkout: Path) -> list[Case]:
    """Return the test classes that name a pipeline class, in the order of their files.

    The files are parsed and not imported, since many import packages that are optional.
    """
    files = sorted((checkout / _PIPELINES).rglob("test_*.py"))
    return [Case(str(file.relative_to(checkout)), name, pipeline) for file in files for name, pipeline in _tested(file)]


def _tested(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of test classes and of the pipelines that they test."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            if (value := _assigned(statement)) is not None:
                # A wrapper of the suite has a dummy in the place of another package.
                yield node.name, ast.unparse(value).removesuffix("Wrapper")


def _assigned(statement: ast.stmt) -> ast.expr | None:
    """Return what a statement assigns to the attribute that names the tested class; None: it does not."""
    if isinstance(statement, ast.AnnAssign):
        targets, value = [statement.target], statement.value
    else:
        targets, value = (statement.targets, statement.value) if isinstance(statement, ast.Assign) else ([], None)
    return value if any(isinstance(target, ast.Name) and target.id == _TESTED for target in targets) else None


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout; ``unknown`` for a folder without Git."""
    command = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    top, _, commit = run.stdout.strip().partition("\n")
    # A folder inside of another repository has that repository's commit.
    return commit if commit and Path(top) == checkout.resolve() else "unknown"
