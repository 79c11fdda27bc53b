"""The loss of adapters that were extracted from a student of full rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmm_distill.student.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.extract import Extracted
    from fmm_distill.student.student import Student

__all__ = ["describe_loss", "samples_lost"]


def samples_lost(
    student: Student,
    extracted: Extracted,
    steps: Sequence[int],
    noise: Float[Tensor, "batch *event"],
    cond: Conditioning | None,
) -> dict[str, Any]:
    """Return the relative differences between the samples of the adapters and of the student, as JSON.

    ``samples`` has the difference for each number of steps, and ``samples_without_biases`` the part of it that the
    biases alone make: adapters have none.
    """
    found: dict[str, Any] = {"rank": extracted.rank, "weights": extracted.errors}
    found |= {"samples": {}, "samples_without_biases": {}}
    for n in steps:
        own = sample(student, noise, n, cond)
        for key, other in (("samples", extracted.student), ("samples_without_biases", extracted.without_biases)):
            found[key][str(n)] = float((sample(other, noise, n, cond) - own).norm() / own.norm())
    return found


def describe_loss(found: dict[str, Any]) -> str:
    """Return the result of ``samples_lost`` in one line."""
    weights = ", ".join(f"{value:.1%} of {name}" for name, value in found["weights"].items())
    samples = ", ".join(f"{value:.2%} at {n}" for n, value in found["samples"].items())
    biases = max(found["samples_without_biases"].values(), default=0.0)
    return (
        f"LoRA of rank {found['rank']}: it loses {weights} (Frobenius norm); samples differ from the student's by "
        f"{samples} steps (up to {biases:.2%} by the biases, which adapters do not have)"
    )
