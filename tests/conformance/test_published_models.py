"""The recipes with images fit pipelines with the published configuration of the models that they are for."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.published import RANK, adapter_parameters, is_guided, rows_of_models
from fmm_distill.config.recipe import load_recipe
from fmm_distill.run.plan import forecast
from tests.tables import check_table
from tests.tiny.image_conditions import picture
from tests.tiny.published import MODELS

ROOT = Path(__file__).parents[2]
TEXTS = ("make it snow", "as a watercolor", "two dogs on a red car, at night")
# What the recipes leave to the machine: bf16 needs an accelerator.
HERE = ["training.precision=fp32"]
# Opened in two seconds.
FAST = ("ltx",)
NEED_TORCHVISION = ("qwen-edit", "qwen-edit-plus")


def mark(name):
    marks = [] if name in FAST else [pytest.mark.slow]
    if name in NEED_TORCHVISION:
        missing = find_spec("torchvision") is None
        marks.append(pytest.mark.skipif(missing, reason="its processor of videos needs torchvision"))
    return pytest.param(name, marks=marks)


def table_of(folder):
    """A table of photographs, with a mask each."""
    rows = []
    for i, text in enumerate(TEXTS):
        picture(i, (96, 128)).save(folder / f"{i}.jpg")
        Image.fromarray((np.arange(128)[None].repeat(96, 0) > 40 + i).astype(np.uint8) * 255).save(folder / f"m{i}.png")
        rows.append({"text": text, "source": f"{i}.jpg", "mask": f"m{i}.png"})
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "table.jsonl"


def recipe_of(name, pipeline, folder):
    model, teacher = MODELS[name], folder / "pipeline"
    pipeline.save_pretrained(teacher, safe_serialization=True)
    changes = [f"prompts.dataset={table_of(folder)}", *HERE, *model.settings, *model.small]
    return load_recipe(model.recipe, changes, teacher=str(teacher))


@pytest.mark.parametrize("name", [mark(name) for name in MODELS])
def test_a_dry_run_of_the_recipe(name, tmp_path):
    pipeline = MODELS[name].build()
    network = pipeline.components.get("transformer") or pipeline.unet
    guided = is_guided(network)
    recipe = recipe_of(name, pipeline, tmp_path)
    lines = forecast(recipe, tmp_path / "run").splitlines()
    described = next(line for line in lines if line.startswith("teacher: ") and "found by running it" in line)
    count, by = sum(p.numel() for p in network.parameters()), f", guided by {recipe.guidance.scale:g}"
    noun = "images" if recipe.prompts.column is None else "prompts and images"
    assert described.endswith(f" {count:,} parameters; 3 {noun}{by if guided else ''})")
    # The number that the table of the published sizes has.
    changes = adapter_parameters(network, RANK, guided=guided)
    assert any(line.endswith(f" {changes:,} parameters of changes of rank {RANK}") for line in lines)
    assert any(line.startswith("memory:  ") for line in lines)
    assert lines[-1] == "nothing was trained (--dry-run)"
    assert not (tmp_path / "run").exists()


def test_the_table_of_sizes_in_the_docs():
    check_table("image-models.md", rows_of_models())


def test_the_documentation_has_the_settings_that_are_tried():
    page = (ROOT / "docs" / "image-models.md").read_text(encoding="utf-8")
    for model in MODELS.values():
        # Values with spaces are quoted.
        sets = " ".join(f"--set '{change}'" if " " in change else f"--set {change}" for change in model.settings)
        assert f"| `{model.recipe}` | {f'`{sets}`' if sets else 'nothing'} |" in page
