"""What an evaluation gives: rows of numbers, and how each was measured."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COLUMNS", "Column", "Evaluation", "Row", "choose", "from_json", "is_of_teacher", "table"]

# Names of rows that are no student's; others are those of a student, or what a user called a pipeline.
_OF_TEACHER = (
    "teacher",
    "teacher-ddim",
    "teacher-dpmsolver++",
    "teacher-unipc",
    "teacher-heun",
    "teacher-euler",
)


def is_of_teacher(sampler: str) -> bool:
    """Whether a row is one of the teacher's, to be compared with."""
    return sampler in _OF_TEACHER


@dataclass(frozen=True)
class Column:
    """A quantity of a row.

    Attributes:
        key: the row's field.
        title: for people.
        form: of the number.
        better: "lower" or "higher".
        judged: whether another value means other samples: clocks and memory are the machine's.
    """

    key: str
    title: str
    form: str
    better: str
    judged: bool = True


COLUMNS = (
    Column("endpoint_error", "endpoint error", ".4f", "lower"),
    Column("frechet", "Fréchet", ".3f", "lower"),
    Column("kid", "KID", ".5f", "lower"),
    Column("inception_score", "IS", ".3f", "higher"),
    Column("precision", "precision", ".3f", "higher"),
    Column("recall", "recall", ".3f", "higher"),
    Column("clip_score", "CLIP", ".2f", "higher"),
    Column("seconds_per_image", "s/image", ".5f", "lower", judged=False),
    Column("seconds_ratio", "s ratio", ".4f", "lower", judged=False),
    Column("memory_ratio", "memory ratio", ".3f", "lower", judged=False),
)


@dataclass
class Row:
    """One sampler at one number of steps; None: not measured.

    Attributes:
        frechet: Fréchet distance of the protocol's features; only Inception's is called FID elsewhere.
        kid: kernel distance of the same features.
        memory: bytes of a batch's tensors at most, beside the weights.
        seconds_ratio, memory_ratio: to the reference sampler's.
        errors: standard errors, by the name of the quantity.
    """

    sampler: str
    steps: int
    calls: int
    endpoint_error: float | None
    frechet: float | None
    seconds_per_image: float
    kid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    clip_score: float | None = None
    memory: int | None = None
    seconds_ratio: float | None = None
    memory_ratio: float | None = None
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class Evaluation:
    """How it was measured, and what came out.

    Attributes:
        consistency: of each student, pairs of numbers of steps ("1,4") to the root mean square distance between the
            samples that they make of the same noise.
    """

    protocol: dict[str, Any]
    rows: list[Row]
    consistency: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain keys and values."""
        rows = [asdict(row) for row in self.rows]
        return {"protocol": self.protocol, "rows": rows, "consistency": self.consistency}


def from_json(kept: Mapping[str, Any]) -> Evaluation:
    """What ``to_json`` gave, of this or of an earlier version.

    Raises:
        KeyError: if it has no protocol or no rows.
        TypeError: if its rows are not those of an evaluation.
    """
    return Evaluation(kept["protocol"], [Row(**row) for row in kept["rows"]], kept.get("consistency", {}))


def choose(evaluation: Evaluation, rates: Mapping[str, float]) -> tuple[float, Evaluation]:
    """The moving average of the lowest Fréchet distance, mean over the steps; of endpoint error where none is measured.

    Args:
        rates: the name of the rows of each average to its rate.

    Returns:
        Its rate, and the evaluation with its rows first, as those of the student, and the choice in the protocol.
    """
    measured = all(row.frechet is not None for row in evaluation.rows)
    scores = {
        name: statistics.mean(
            cast("float", row.frechet if measured else row.endpoint_error)
            for row in evaluation.rows
            if row.sampler == name
        )
        for name in rates
    }
    # What is no number is the worst.
    best = min(scores, key=lambda name: (math.isnan(scores[name]), scores[name]))
    first = [replace(row, sampler="student") for row in evaluation.rows if row.sampler == best]
    protocol = evaluation.protocol | {"ema": rates[best]}
    if len(rates) > 1:
        quantity = "Fréchet distance" if measured else "endpoint error"
        others = ", ".join(f"{rates[name]:g}: {score:.4g}" for name, score in scores.items())
        protocol["ema_chosen"] = f"by the lowest mean {quantity} over the steps, on these samples ({others})"
    rest = [row for row in evaluation.rows if row.sampler != best]
    consistency = {"student" if name == best else name: pairs for name, pairs in evaluation.consistency.items()}
    return rates[best], Evaluation(protocol, first + rest, consistency)


def table(evaluation: Evaluation) -> str:
    """The rows as text, with the protocol below; quantities that no row has are left out."""
    shown = [column for column in COLUMNS if any(getattr(row, column.key) is not None for row in evaluation.rows)]
    widths = [max(len(column.title), 9) + 2 for column in shown]
    titles = "".join(f"{column.title:>{width}}" for column, width in zip(shown, widths, strict=True))
    longest = max(20, *(len(row.sampler) + 1 for row in evaluation.rows))
    lines = [f"{'sampler':<{longest}}{'steps':>6}{'calls':>7}{titles}"]
    for row in evaluation.rows:
        numbers = ""
        for column, width in zip(shown, widths, strict=True):
            value = getattr(row, column.key)
            numbers += f"{'-' if value is None else format(value, column.form):>{width}}"
        lines.append(f"{row.sampler:<{longest}}{row.steps:>6}{row.calls:>7}{numbers}")
    for name, pairs in evaluation.consistency.items():
        told = ", ".join(f"{pair.replace(',', ' and ')}: {distance:.4f}" for pair, distance in pairs.items())
        lines.append(f"  distance between the samples of {name} at two numbers of steps: {told}")
    return "\n".join([*lines, *(f"  {key}: {value}" for key, value in evaluation.protocol.items())])
