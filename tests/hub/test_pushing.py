"""``push_to_hub`` of an any-step pipeline and of its network, and back without this package."""

from __future__ import annotations

import pytest

from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.student.student import Student
from tests.hub import pushing
from tests.hub.alone import alone


@pytest.fixture
def pushed(teacher, tmp_path):
    folder = export_pipeline(Student.from_teacher(teacher), teacher, tmp_path / "student", ())
    return alone(tmp_path / "home", (pushing.push_by_diffusers, (folder,)))["push_by_diffusers"]


def test_what_is_pushed_opens_from_the_hub(pushed):
    made = pushed["made"]
    for repo in ("tester/pushed", "tester/saved", "tester/network"):
        assert made[repo] == pytest.approx(made["expected"], abs=1e-6)
    code = {repo: [name for name in names if name.endswith(".py")] for repo, names in pushed["names"].items()}
    assert [name.partition("_")[0] for name in code["tester/pushed"]] == ["flow", "unet/two"]
    assert code["tester/saved"] == code["tester/pushed"]
    assert [name.partition("_")[0] for name in code["tester/network"]] == ["two"]
