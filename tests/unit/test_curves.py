"""The curves of a run."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fmm_distill.run.curves import StageSteps, _of_teacher, _plot_run, _plot_stage, plot_curves, running_mean


def test_running_mean():
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, np.nan])
    expected = [1, 2, 2, 4, 5, 5, np.nan]
    np.testing.assert_allclose(running_mean(values, 3), expected)
    np.testing.assert_allclose(running_mean(values[:2], 1), [1, 3])


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [None, None], [1e-6, None, 1e3, 5.0], [0.5, 0.6, 0.7]])
def test_every_log_can_be_drawn(tmp_path, losses):
    records = [
        {
            "step": step,
            "phase": "regression" if step < 2 else "eulerian",
            "loss": loss,
            "gradient_norm": loss,
            "learning_rate": 1e-3,
            "images_per_second": 5.0,
        }
        for step, loss in enumerate(losses)
    ]
    row = {"sampler": "student", "steps": 1, "calls": 1, "endpoint_error": 0.1, "frechet": None}
    teacher = row | {"sampler": "teacher-ddim", "steps": 4, "endpoint_error": 0.05}
    plot_curves(records, [], 10, tmp_path / "plain.png")
    plot_curves(records, [{"step": 1, "rows": [row, teacher]}], 10, tmp_path / "evaluated.png")
    plain, evaluated = imread(tmp_path / "plain.png"), imread(tmp_path / "evaluated.png")
    # One more panel, and something in every one.
    assert evaluated.shape[0] > plain.shape[0] * 1.2
    assert plain.std() > 0.02


def stage_records(critic: float) -> list[dict]:
    """Ten steps of a map, six of the critic alone and eight of the matching, each with losses of its own scale."""
    plain = {"gradient_norm": 1.0, "learning_rate": 1e-3, "images_per_second": 5.0}
    own = {"teacher_loss": 0.5}
    found = [{"phase": "lagrangian", "loss": 0.1} | plain for _ in range(10)]
    found += [{"phase": "critic", "loss": 0.8 - 0.1 * i} | plain | own for i in range(6)]
    found += [{"phase": "matched", "loss": 90.0, "critic_loss": critic} | plain | own for _ in range(8)]
    return [record | {"step": step} for step, record in enumerate(found)]


def stage_evaluations() -> list[dict]:
    row = {"sampler": "student", "steps": 1, "calls": 1}
    teacher = {"sampler": "teacher-ddim", "steps": 4, "calls": 4, "recall": 0.8, "frechet": 0.1}
    first = {"step": 5, "rows": [row | {"recall": 0.2, "frechet": 0.9}, teacher, teacher | {"steps": 2, "recall": 0.7}]}
    later = [(10, 0.5, 0.5), (20, 0.6, 0.3), (24, 0.4, 0.2)]
    return [first, *({"step": s, "rows": [row | {"recall": r, "frechet": f}]} for s, r, f in later)]


STAGE = StageSteps(start=10, first=16, steps=8, name="matched", best=20, ended=True)


def test_no_line_connects_two_phases():
    figure = Figure()
    _plot_run(figure, stage_records(0.3), [], 24)
    loss = figure.axes[0]
    values = [set(line.get_ydata()) for line in loss.lines if len(line.get_ydata()) > 2]
    assert len(values) == 6
    assert all(
        len({record["phase"] for record in stage_records(0.3) if record["loss"] in found}) == 1 for found in values
    )


def test_the_panels_of_a_second_stage():
    figure = Figure()
    records = stage_records(0.3)[10:]
    _plot_stage(figure, records, [*_of_teacher(stage_evaluations()[:1]), *stage_evaluations()[1:]], STAGE)
    health, loss, frechet, recall = (axis for axis in figure.axes if axis.axison)
    lines = {line.get_label(): line for line in health.lines}
    assert lines["critic"].get_xdata()[[0, -1]].tolist() == [-5, 8], "the critic's own steps are before 0"
    assert lines["critic"].get_ydata()[-1] < lines["teacher"].get_ydata()[-1] == 0.5
    assert lines["critic"].get_ydata()[0] == 0.8, "its loss in its own steps is the same error"
    assert {90.0} == {value for line in loss.lines for value in line.get_ydata()}
    for axis, values in ((frechet, [0.5, 0.3, 0.2]), (recall, [0.5, 0.6, 0.4])):
        shown = {line.get_label(): line for line in axis.lines}
        assert shown["1 step"].get_xdata() == pytest.approx([0, 4, 8]), "from the values of the map"
        if axis is recall:
            assert shown["1 step"].get_ydata() == pytest.approx(values)
            # The teacher's best recall is its highest.
            assert shown["teacher, DDIM, 4"].get_ydata()[0] == 0.8
        assert shown["exported"].get_xdata() == [4, 4]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1 step", "teacher's best", "exported"]


def test_a_second_stage_is_plotted_below_the_run(tmp_path):
    records = stage_records(0.3)
    plot_curves(records, stage_evaluations(), 24, tmp_path / "plain.png")
    plot_curves(records, stage_evaluations(), 24, tmp_path / "stage.png", STAGE)
    # Before its first step, and with its evaluations alone.
    plot_curves(records[:10], stage_evaluations()[:1], 24, tmp_path / "before.png", STAGE)
    plot_curves(records[:12], stage_evaluations()[1:2], 24, tmp_path / "warmup.png", STAGE)
    heights = {name: imread(tmp_path / f"{name}.png").shape[0] for name in ("plain", "stage", "before", "warmup")}
    assert heights["stage"] > heights["plain"] + 500
    assert heights["before"] == heights["plain"]
    assert heights["warmup"] < heights["stage"]
