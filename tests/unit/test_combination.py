"""How the weight of a pipeline's guidance is read from outputs that hardly differ."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.teachers.prompted.combination import _weight


@pytest.mark.parametrize("turned", [False, True])
def test_the_weight_of_a_large_output_that_the_prompt_hardly_changes(turned):
    generator = torch.Generator().manual_seed(0)
    # As many numbers as a video has, in float32, with a mean that is far above that of the difference.
    uncond = 3 + torch.randn(1, 32, 31, 30, 53, generator=generator)
    output = uncond + 0.01 * torch.randn(uncond.shape, generator=generator) + 2e-5
    stepped = uncond + 3.0 * (output - uncond)
    stepped = stepped.movedim(1, -1) if turned else stepped
    weight = _weight(output.double(), uncond.double(), stepped.double())
    assert weight == pytest.approx(3.0, rel=1e-4)


def test_another_combination_of_outputs_that_hardly_differ_is_seen():
    generator = torch.Generator().manual_seed(0)
    uncond = torch.randn(2, 64, 16, generator=generator, dtype=torch.float64)
    output = uncond + 0.1 * torch.randn(uncond.shape, generator=generator, dtype=torch.float64)
    plain = uncond + 3.0 * (output - uncond)
    assert _weight(output, uncond, plain) == pytest.approx(3.0)
    other = plain * output.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True)
    assert _weight(output, uncond, other) is None
