"""The code of docs/add-a-teacher.md, pasted from the page: trained two steps, exported, loaded again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from fmm_distill.core.time_axis import expand

PAGE = Path(__file__).parents[2] / "docs" / "add-a-teacher.md"
# Numbers of the page that a test makes smaller: each is on the page, or the test fails.
SMALL = {
    '"steps": 2000': '"steps": 2',
    '"batch_size": 64': '"batch_size": 4',
    '"endpoint_samples": 64': '"endpoint_samples": 2',
}
SAMPLES = {"teacher_folder": (1, 8, 8), "network_teacher": (1, 8, 8), "velocity_teacher": (2,)}


def blocks():
    """The page's complete scripts, by the name that the text gives them."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"`(\w+)\.py`[^`]*:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == text.count("```python") == len(SAMPLES)
    return dict(found)


def run(name, folder, monkeypatch):
    code = blocks()[name]
    for number, small in SMALL.items():
        assert number in code
        code = code.replace(number, small)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names = {"__name__": name}
    exec(compile(code, f"{PAGE}: {name}", "exec"), names)
    return names


@pytest.mark.parametrize("name", SAMPLES)
def test_the_code_of_the_page_trains_exports_and_reloads(name, tmp_path, monkeypatch):
    names = run(name, tmp_path, monkeypatch)
    made = names["student"].generate(torch.randn(3, *SAMPLES[name]), steps=2)
    assert made.shape == (3, *SAMPLES[name])
    assert made.isfinite().all()
    (folder,) = (tmp_path / "runs").iterdir()
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 2
    pipelines = sorted(path.parent.name for path in folder.rglob("model_index.json"))
    assert pipelines == (["steps-1", "steps-2", "student"] if name == "teacher_folder" else [])
    if pipelines:
        stock = DiffusionPipeline.from_pretrained(folder / "student" / "steps-2")
        assert type(stock).__module__.startswith("diffusers.")


@torch.no_grad()
def test_the_network_of_the_page_steps_as_stock_diffusers(tmp_path, monkeypatch):
    names = run("network_teacher", tmp_path, monkeypatch)
    teacher, network = names["teacher"], names["teacher"].network
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    stock.set_timesteps(10)
    k, after = stock.timesteps[3], stock.timesteps[4]
    theirs = stock.step(network(k.expand(2), x), k, x).prev_sample
    start, end = (teacher.schedule.time(m.expand(2)) for m in (k, after))
    on_axis = x / expand(teacher.schedule.scale(start), x)
    moved = on_axis - expand(start - end, x) * teacher.velocity(on_axis, start)
    assert (moved * expand(teacher.schedule.scale(end), x) - theirs).abs().max() < 1e-5
