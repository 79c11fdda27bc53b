"""A stock pipeline has one strength of a scaled student's change: its jumps are equal, or the loss is logged."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fmm_distill.config.recipe import parse
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.strengths import check_strengths
from fmm_distill.export.verify import Exported, summary, verify
from fmm_distill.run.trial import try_export
from fmm_distill.student.fold import fold
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.strength import LARGEST_ERROR, strength_of
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES
from tests.conformance.test_prompted_export import opened
from tests.conformance.test_teachers import saved
from tests.tiny.randomized import randomized

STEPS = (1, 2, 3, 4, 8)
# Mochi's grid has two parts of different steps. CogView 4 passes timesteps of its own, the last of which is almost
# empty. Flux 2 shifts by a number that depends on the number of steps. ACE-Step shifts the levels before its scheduler.
UNEQUAL = ("mochi", "cogview4", "flux2", "flux2-klein", "ace-step")


def scaled(teacher, rank=0):
    return randomized(Student.from_teacher(teacher, scaled=ScaledWeights(rank)))


@pytest.mark.parametrize("shift", [0.3, 1.0, 1.73, 3.0, 7.0, 16.0])
def test_the_stock_grid_of_a_shift_has_equal_jumps(tmp_path, shift):
    saved(tmp_path, "FlowMatchEulerDiscreteScheduler", shift=shift)
    teacher = load_teacher(str(tmp_path))
    student, exporter = Student.from_teacher(teacher), exporter_of(teacher)
    for n in (*STEPS, 16):
        times = exporter.fixed_grid(student, n)
        positions = FlowMatching(shift).warp(times)
        expected = torch.arange(n, -1, -1, dtype=torch.float64) / n
        assert (positions - expected).abs().max() < 1e-5, n


def test_a_shift_without_equal_jumps_is_stretched_to_the_last_one(tmp_path):
    saved(tmp_path, "FlowMatchEulerDiscreteScheduler", shift=100.0)
    teacher = load_teacher(str(tmp_path))
    student, exporter = Student.from_teacher(teacher), exporter_of(teacher)
    times = exporter.fixed_grid(student, 64)
    assert float(student.clock.warp(times[-2:-1])) == pytest.approx(1 / 64, rel=1e-4)
    with pytest.raises(UserError, match=r"export\.steps: .* nearly one length, got 64"):
        fold(scaled(teacher), teacher, times)


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    """The families whose schedule is a flow, with the strengths of their grids."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        pipeline = FAMILIES[name].build()
        flow = isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
        if not flow and not pipeline.scheduler.config.get("use_flow_sigmas"):
            continue
        teacher = opened(name, folder)
        student, exporter = Student.from_teacher(teacher), exporter_of(teacher)
        numbers = STEPS[1:] if name == "mochi" else STEPS
        found[name] = {n: strength_of(student, exporter.fixed_grid(student, n)) for n in numbers}
    return found


def test_families_have_equal_jumps(flows):
    equal = {name: of for name, of in flows.items() if name not in UNEQUAL}
    assert len(equal) > 10
    for name, of in equal.items():
        for n, strength in of.items():
            assert strength.is_exact, (name, n)
            assert strength.value == pytest.approx(1 / n, rel=1e-5), (name, n)


def test_families_with_other_jumps(flows):
    for n in (2, 3, 4, 8):
        # One of its jumps is almost empty.
        assert flows["cogview4"][n].value == pytest.approx(1 / (n - 1), rel=0.02)
        assert flows["cogview4"][n].error < 0.01
        for name in ("flux2", "flux2-klein"):
            assert flows[name][n].value == pytest.approx(1 / n, rel=0.03)
            assert flows[name][n].error < 0.02
    assert not flows["cogview4"][4].is_exact
    assert not flows["flux2"][8].is_exact
    for name in ("mochi", "ace-step"):
        assert min(flows[name][4].error, flows[name][8].error) > LARGEST_ERROR


def test_the_strength_minimizes_the_squares(tmp_path):
    saved(tmp_path, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    student = Student.from_teacher(load_teacher(str(tmp_path)))
    positions = torch.tensor([1.0, 0.5, 0.3, 0.05, 0.0], dtype=torch.float64)
    strength = strength_of(student, FlowMatching(3.0)._shifted(positions))
    h, values = positions[:-1] - positions[1:], torch.linspace(0, 1, 10001, dtype=torch.float64)
    errors = (h * (h - values[:, None])).square().sum(1)
    assert strength.value == pytest.approx(float(values[errors.argmin()]), abs=1e-4)
    assert (strength.shortest, strength.longest) == (pytest.approx(0.05), pytest.approx(0.5))


def test_a_number_of_steps_that_loses_too_much_is_refused_before_training(tmp_path):
    teacher = opened("mochi", tmp_path / "teacher")
    student = Student.from_teacher(teacher, scaled=ScaledWeights())
    with pytest.raises(UserError, match=r"export\.steps: expected .*, got 4, whose jumps are 0\.01\d to 0\.73 of"):
        check_strengths(student, exporter_of(teacher), (2, 4))
    recipe = parse({"teacher": str(tmp_path / "teacher"), "export": {"steps": [2, 8]}}, "here")
    with pytest.raises(UserError, match=r"the trial before training failed \(export\.steps: expected .*, got 8, "):
        try_export(recipe, student, teacher, tmp_path / "run")


@pytest.mark.parametrize(("name", "rank"), [("cogview4", 0), ("flux2", 2)])
def test_a_pipeline_of_unequal_jumps_is_compared_at_its_strength(tmp_path, name, rank):
    teacher = opened(name, tmp_path / "teacher")
    student = scaled(teacher, rank)
    folder = export_pipeline(student, teacher, tmp_path / "student", (3, 8))
    agreements = verify(Exported(student, exporter_of(teacher), folder, (3, 8)))
    assert all(one.passed for one in agreements.values())
    assert agreements["any-8"].strength is None
    report = json.loads((folder / "verification.json").read_text())["pipelines"]["folded-8"]
    strength = strength_of(student, exporter_of(teacher).fixed_grid(student, 8))
    assert report["strength"] == strength.value
    assert report["grid_error"] == strength.error > 1e-4
    # The samples differ by a fraction of the student's change, which is a fraction of the samples.
    assert 0 < report["samples_difference"] < 10 * strength.error
    assert "the jumps of 8 steps are not equal, so that the samples of their pipeline, at the strength " in summary(
        agreements
    )
