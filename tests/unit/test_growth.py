"""The benchmarks of growth and of start-up: their arithmetic, and that they run. No time is asserted."""

from __future__ import annotations

import json

import pytest

from benchmarks import growth, startup
from benchmarks.growth_report import cheaper, curve, slope
from benchmarks.startup import import_times

AT = [1, 2, 4, 8, 16]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_slope_of_a_power_law_is_its_power(power):
    found = curve("batch", "loss", "bytes", AT, [3 * x**power for x in AT])
    assert found["slope"] == pytest.approx(power)
    assert found["slope_upper_half"] == pytest.approx(power)


def test_what_does_not_grow_counts_less_in_the_upper_half():
    found = curve("batch", "loss", "bytes", AT, [5 + x for x in AT])
    assert found["slope"] < found["slope_upper_half"] < 1
    assert found["slope_upper_half"] == pytest.approx(slope([4, 8, 16], [9, 13, 21]))
    assert slope([4], [9]) is None


def test_where_an_engine_is_cheaper():
    def ratios(*middles):
        return [{"median": middle, "high": middle + 0.05} for middle in middles]

    assert cheaper([1, 2000], ratios(0.8, 0.9)) == "everywhere in this range (0.80 to 0.90 of central)"
    assert cheaper([1, 2000], ratios(1.2, 0.9)) == "at 2,000 (0.90 to 1.20 of central)"
    # The middle half has to be below 1, not the median alone.
    assert cheaper([1, 2000], ratios(1.2, 0.97)) == "never in this range (0.97 to 1.20 of central)"


@pytest.mark.slow
def test_growth_runs(tmp_path, capsys):
    output, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    growth.main(["--quick", "--output", str(output), "--picture", str(picture)])
    found = json.loads(output.read_text())
    curves = {(entry["axis"], entry["loss"], entry["quantity"]): entry for entry in found["curves"]}
    losses = [growth.title(*loss) for loss in growth.LOSSES]
    assert len(curves) == len(found["curves"]) == 3 * len(losses) * 2
    for entry in curves.values():
        assert len(entry["values"]) == len(entry["at"]) == 2
        assert slope(entry["at"], entry["values"]) == entry["slope"]
    assert curves["tokens", "flow_matching", "bytes"]["at"] == [4, 16]
    # Bytes are counted, not clocked. Gradients are of both samples, so that two hold less than twice as much.
    assert all(0 < curves["batch", loss, "bytes"]["slope"] < 1.2 for loss in losses)
    assert curves["batch", losses[-1], "bytes"]["values"][0] > curves["batch", losses[0], "bytes"]["values"][0]
    assert [(row["axis"], row["loss"]) for row in found["exact_by_central"]] == [
        (axis, loss) for axis in ("batch", "tokens", "parameters") for loss in growth.SLOPES
    ]
    memory = {row["option"]: row["memory"] for row in found["options"] if row["network"].startswith("UNet")}
    assert memory["plain"] == 1
    assert memory["gradient_checkpointing"] < 0.9
    assert memory["accumulation: 4"] < memory["accumulation: 2"] < 0.9
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("| lagrangian, teacher, exact |") == 7


def test_tokens_fill_a_square(capsys):
    with pytest.raises(SystemExit, match="2"):
        growth.main(["--tokens", "64", "100", "120"])
    assert "--tokens 120: a square picture" in capsys.readouterr().err


LOG = """import time: self [us] | cumulative | imported package
import time:       200 |        200 |     _io
import time:      1000 |       1200 |   torch._C
import time:      3000 |       4200 | torch
a line of somebody else
import time:      7000 |      11200 |   diffusers.utils
"""


def test_the_log_of_imports():
    # Python's own first package has an underscore; torch._C is torch's.
    assert import_times(LOG) == pytest.approx({"diffusers": 7e-3, "torch": 4e-3, "Python's own": 2e-4})
    assert list(import_times(LOG)) == ["diffusers", "torch", "Python's own"]


@pytest.mark.slow
def test_startup_runs(tmp_path, capsys):
    output = tmp_path / "startup.json"
    startup.main(["--quick", "--output", str(output)])
    found = json.loads(output.read_text())
    seconds = {name: value["median"] for name, value in found["commands"].items()}
    assert list(seconds) == ["first step, cold", "first step, warm", *startup.COMMANDS]
    parts = {name: value["median"] for name, value in found["parts"].items()}
    assert sum(list(parts.values())[:-1]) == pytest.approx(parts["sum"])
    assert set(startup.PARTS.values()) | {startup.STEP} <= set(parts)
    assert {"torch", "diffusers", "fmm_distill"} <= set(found["imports"]) & set(found["packages"])
    assert "matplotlib" not in found["packages"]
    assert capsys.readouterr().out.count("| first step, ") == 2
