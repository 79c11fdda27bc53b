"""The grids of a stock pipeline come from as few runs of it as possible, and are those that it sets itself."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fmm_distill.export.choose import exporter_of
from fmm_distill.export.verify import Exported, verify
from fmm_distill.student.student import Student
from tests.conformance.test_prompted_export import moved, opened

STEPS = (1, 2, 4, 8)
# Of the pipelines: equal steps by the scheduler, by the pipeline with and without a shift of its own, timesteps of its
# own, levels that are changed after they were set, a shift that depends on the number of steps, a grid of two parts.
FAMILIES = ("sd3", "flux", "z-image", "bria", "cogview4", "ltx", "sana", "flux2", "mochi")


@contextmanager
def runs_of(teacher):
    """The number of times that the pipeline embeds its prompts: once per run."""
    pipeline, seen = teacher.codec.opened(), []
    encoder = next(part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part)
    hook = encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        yield seen
    finally:
        hook.remove()


def test_an_export_and_its_verification_run_the_pipeline_three_times(tmp_path):
    teacher = opened("sd3", tmp_path / "teacher")
    student, exporter = moved(Student.from_teacher(teacher)), exporter_of(teacher)
    folder = tmp_path / "student"
    folder.mkdir()
    with runs_of(teacher) as runs:
        exporter.any_step(student, folder)
        for n in STEPS:
            exporter.fixed(student, n, folder)
        assert len(runs) == 2
        # The verification embeds its prompts: the grids are known.
        agreements = verify(Exported(student, exporter, folder, STEPS))
        assert len(runs) == 3
    assert len(agreements) == 2 * len(STEPS)
    assert all(one.passed for one in agreements.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_grids_are_those_of_a_run_with_that_scheduler_and_number_of_steps(tmp_path, name):
    teacher = opened(name, tmp_path)
    student, exporter = Student.from_teacher(teacher), exporter_of(teacher)
    # One pipeline fails at one step.
    steps = (2, 4, 8, 3, 6) if name == "mochi" else (1, 2, 4, 8, 3, 6)
    found = {n: (exporter.grid(n), exporter.fixed_grid(student, n)) for n in steps}
    for n in steps:
        any_step, fixed = exporter_of(teacher).grid(n), exporter_of(teacher).fixed_grid(student, n)
        assert torch.equal(found[n][0], any_step), n
        assert torch.equal(found[n][1], fixed), n
        assert any_step.shape == fixed.shape == (n + 1,)
