"""Components whose packages are not installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from fmm_distill.errors import UserError
from fmm_distill.teachers.load import load_teacher
from tests.tiny.diffusion import PIPELINES


@pytest.mark.skipif(find_spec("torchsde") is not None, reason="the scheduler's package is installed")
def test_a_component_whose_package_is_missing_is_named(tmp_path):
    PIPELINES["sd1"].build().save_pretrained(tmp_path, safe_serialization=True)
    index = tmp_path / "model_index.json"
    entries = json.loads(index.read_text())
    entries["scheduler"] = ["diffusers", "CosineDPMSolverMultistepScheduler"]
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"its scheduler \(Cosine.*\) needs torchsde, .*pip install torchsde"):
        load_teacher(str(tmp_path))
