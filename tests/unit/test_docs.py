"""What the README and the documentation show is what their scripts make of the results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "figures" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def first_screen():
    return script("first_screen")


def test_the_table_of_the_readme_is_made_from_the_results(first_screen):
    table = first_screen.table()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert table in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def test_the_picture_of_all_samplers_is_cut_into_its_rows(first_screen):
    rows = first_screen.bands(np.asarray(Image.open(first_screen.SAMPLES).convert("RGB")))
    assert max(first_screen.ROWS.values()) < len(rows) == 11
    heights = [row.shape[0] for row in rows]
    assert max(heights) - min(heights) <= 2


def test_the_picture_of_the_flow_map_is_drawn_by_its_script():
    module = script("flow_map")
    assert module.PICTURE.read_text(encoding="utf-8") == module.drawing()


def test_the_picture_of_the_flow_map_jumps_along_the_ode():
    module = script("flow_map")
    ends = [module.trajectory(noise, count=480)[-1][1] for noise in (module.START, -module.START)]
    assert ends[0] == pytest.approx(-ends[1])
    # Data at time 0: each trajectory ends at one of the two modes.
    assert abs(abs(ends[0]) - module.MODE) < 4 * module.DEVIATION
