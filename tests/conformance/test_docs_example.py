"""The adapter of a network of one's own, as docs/add-a-teacher.md shows it, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import nn

from fmm_distill.core.time_axis import expand

PAGE = Path(__file__).parents[2] / "docs" / "add-a-teacher.md"


class Mine(nn.Module):
    """No network of diffusers: it wants its time first and has no configuration."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 3))
        self.mix = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, time, x):
        shift = self.embed(time[:, None].float() / 1000)[:, :, None, None]
        return self.mix(x) + shift


def example():
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    code = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    return block, code


@torch.no_grad()
def test_the_example_is_one_stock_step_and_short():
    block, code = example()
    assert len(code) <= 30
    torch.manual_seed(0)
    network = Mine()
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.9, 0.5], dtype=torch.float64)
    names = {"my_network": network, "x": x, "t": t}
    exec(compile(block, str(PAGE), "exec"), names)
    teacher = names["teacher"]
    assert names["v"].shape == x.shape
    stock = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    stock.set_timesteps(10)
    k, after = stock.timesteps[3], stock.timesteps[4]
    theirs = stock.step(network(k.expand(2), x), k, x).prev_sample
    start, end = (teacher.schedule.time(m.expand(2)) for m in (k, after))
    on_axis = x / expand(teacher.schedule.scale(start), x)
    moved = on_axis - expand(start - end, x) * teacher.velocity(on_axis, start)
    assert (moved * expand(teacher.schedule.scale(end), x) - theirs).abs().max() < 1e-5
