"""The curves of a run."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from fmm_distill.run.curves import plot_curves, running_mean


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
