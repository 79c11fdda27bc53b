"""Exporters of students, one per kind of teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["Exporter", "PipelineExporter", "check_steps", "describe_export"]


class Exporter(Protocol):
    """Writes the students of one teacher as folders that can be opened again.

    Attributes:
        teacher: the teacher.
        component: the name of the network's folder in an export.
        not_any_step: the reason why there is no pipeline at all, only weights; None: there is one.
        not_fixed: the reason why there is no stock pipeline for a fixed number of steps; None: there is one.
    """

    teacher: Teacher
    component: str
    not_any_step: str | None
    not_fixed: str | None

    def any_step(self, student: Student, folder: Path, *, linked: bool = False) -> None:
        """Write the student for any number of steps into an empty folder.

        Args:
            linked: link to the unchanged components of the teacher's pipeline instead of copying them.
        """
        ...

    def fixed(self, student: Student, steps: int, folder: Path) -> None:
        """Write the student folded for ``steps`` steps as a stock pipeline into ``folder / "steps-<n>"``.

        Args:
            folder: an export that ``any_step`` has written.

        Raises:
            UserError: if there is no such pipeline (``not_fixed``), or the steps don't fold.
        """
        ...

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return the ``steps + 1`` times between which the any-step pipeline jumps, data at the end."""
        ...

    def shared_bytes(self) -> int:
        """Return the number of bytes of the components that all pipelines of an export share."""
        ...

    def own_modules(self, student: Student) -> Sequence[nn.Module]:
        """Return the modules whose weights each pipeline of an export has for itself."""
        ...


class PipelineExporter(Exporter, Protocol):
    """An exporter whose pipelines are opened and compared with the student after each export."""

    def fixed_grid(self, student: Student, steps: int) -> Float[Tensor, " points"]:
        """Return the ``steps + 1`` times between which the pipeline of a fixed number of steps jumps."""
        ...

    def verification_call(self, count: int) -> dict[str, Any]:
        """Return the keywords by which a pipeline generates ``count`` samples, of the teacher's first conditions."""
        ...

    def any_step_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of the same call of the any-step pipeline."""
        ...

    def start(
        self, call: dict[str, Any], count: int, seed: int
    ) -> tuple[Float[Tensor, "batch *event"], Conditioning | None]:
        """Return the N(0, I) noise that a pipeline starts from with this seed, and the condition of its network."""
        ...


def check_steps(steps: Iterable[int], schedule: Schedule) -> None:
    """Refuse numbers of steps that a stock scheduler can't take in equal parts of the timesteps."""
    wrong = [n for n in steps if not 1 <= n <= schedule.num_timesteps or not schedule.is_uniform(n)]
    if wrong:
        raise UserError(
            f"export.steps: expected divisors of the teacher's {schedule.num_timesteps} timesteps, got "
            f"{', '.join(map(str, wrong))}; the any-step pipeline takes every number"
        )


def describe_export(exporter: Exporter, steps: Sequence[int]) -> str:
    """Return the formats that a student is exported to, in one line."""
    if exporter.not_any_step:
        return f"weights and configuration alone, no pipeline ({exporter.not_any_step})"
    if exporter.not_fixed and steps:
        return f"only the any-step pipeline is written ({exporter.not_fixed})"
    fixed = f", and a stock pipeline for {', '.join(map(str, steps))} steps each" if steps else ""
    return f"a pipeline for any number of steps{fixed}"
