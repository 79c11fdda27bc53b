"""The result of an evaluation: rows of numbers and the protocol of the measurement."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COLUMNS", "Column", "Evaluation", "Row", "choose", "from_json", "is_of_teacher", "table"]

# Other names are those of students, or of pipelines as the user named them.
_OF_TEACHER = (
    "teacher",
    "teacher-ddim",
    "teacher-dpmsolver++",
    "teacher-unipc",
    "teacher-heun",
    "teacher-euler",
)


def is_of_teacher(sampler: str) -> bool:
    """Return whether a row is the teacher's, by its own sampler or a solver."""
    return sampler in _OF_TEACHER


@dataclass(frozen=True)
class Column:
    """A quantity of a row.

    Attributes:
        key: the field of the row.
        title: in tables.
        form: the format of the number.
        better: "lower" or "higher".
        judged: it depends on the samples alone; seconds and memory depend on the machine.
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
    Column("seconds_ratio", "time ratio", ".4f", "lower", judged=False),
    Column("memory_ratio", "memory ratio", ".3f", "lower", judged=False),
)


@dataclass
class Row:
    """One sampler at one number of steps; None: not measured.

    Attributes:
        calls: network calls per batch.
        frechet: Fréchet distance of the protocol's features; it is an FID only with those of Inception.
        kid: kernel distance of the same features.
        memory: peak bytes of a batch's tensors, in addition to the weights.
        seconds_ratio, memory_ratio: relative to the reference sampler.
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
    """Rows of numbers and their protocol.

    Attributes:
        protocol: the conditions of the measurement; see ``protocol.protocol_of``.
        consistency: per student, the root mean square distance between the samples of two numbers of steps from the
            same noise, by the pair ("1,4").
    """

    protocol: dict[str, Any]
    rows: list[Row]
    consistency: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain keys and values."""
        rows = [asdict(row) for row in self.rows]
        return {"protocol": self.protocol, "rows": rows, "consistency": self.consistency}


def from_json(stored: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation of ``to_json``, of this or an earlier version.

    Raises:
        KeyError: if it has no protocol or no rows.
        TypeError: if its rows are not those of an evaluation.
    """
    return Evaluation(stored["protocol"], [Row(**row) for row in stored["rows"]], stored.get("consistency", {}))


def choose(evaluation: Evaluation, rates: Mapping[str, float]) -> tuple[float, Evaluation]:
    """Choose the moving average with the lowest mean Fréchet distance over the numbers of steps.

    Without a Fréchet distance, the endpoint error decides.

    Args:
        rates: of each average, by the name of its rows.

    Returns:
        The rate, and the evaluation with the average's rows first, as the student's, and the choice in the protocol.
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
    # NaN is the worst.
    best = min(scores, key=lambda name: (math.isnan(scores[name]), scores[name]))
    # The rows of the chosen average are the student's; the others stay below under their own names.
    first = [replace(row, sampler="student") for row in evaluation.rows if row.sampler == best]
    protocol = evaluation.protocol | {"ema": rates[best]}
    if len(rates) > 1:
        quantity = "Fréchet distance" if measured else "endpoint error"
        others = ", ".join(f"{rates[name]:g}: {score:.4g}" for name, score in scores.items())
        protocol["ema_chosen"] = f"by the lowest mean {quantity} over the numbers of steps, on these samples ({others})"
    rest = [row for row in evaluation.rows if row.sampler != best]
    consistency = {"student" if name == best else name: pairs for name, pairs in evaluation.consistency.items()}
    return rates[best], Evaluation(protocol, first + rest, consistency)


def table(evaluation: Evaluation) -> str:
    """Return the rows as text with the protocol below; quantities that no row has are left out."""
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
        distances = ", ".join(f"{pair.replace(',', ' and ')}: {distance:.4f}" for pair, distance in pairs.items())
        lines.append(f"  distance between samples of {name} at two numbers of steps: {distances}")
    entries = (f"  {key}: {value}" for key, value in evaluation.protocol.items() if value is not None)
    return "\n".join([*lines, *entries])
