"""Prompts embedded in parts are what each is on its own."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.cache import CHUNK, embed_all
from fmm_distill.teachers.prompts import Prompts
from tests.conformance.test_prompted import FAMILIES

MANY = tuple(
    f"{count} {what}" for count in ("one", "two", "three", "several") for what in ("cats", "dogs") for _ in range(9)
)
LONG = "a very long prompt with many words that no other prompt here has and then some more of them"


@pytest.fixture(scope="module", params=["sd1", "z-image", "cogview4", "qwen-image"])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param].build().save_pretrained(folder, safe_serialization=True)
    return str(folder), dict(FAMILIES[request.param].call)


@torch.no_grad()
def test_a_prompt_of_many_says_what_it_says_beside_the_longest(family):
    """Two parts, the longest prompt in the second: every prompt is padded as it would be beside that one."""
    folder, call = family
    prompts = (*MANY, LONG)
    assert len(prompts) > CHUNK
    many, two = (
        load_teacher(folder, prompts=prompts, call=call),
        load_teacher(folder, prompts=("one cats", LONG), call=call),
    )
    assert len(many.conditions.names) == len(prompts) == len(many.conditions.prompts)
    x = torch.randn(2, *two.event_shape, generator=torch.Generator().manual_seed(0))
    t = two.schedule.time_at(torch.tensor([0.6, 0.9], dtype=torch.float64))
    ends = torch.tensor([0, len(prompts) - 1])
    ours, theirs = many.velocity(x, t, many.conditions.prompts.rows(ends)), two.velocity(x, t, two.conditions.prompts)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    again = load_teacher(folder, prompts=prompts, call=call)
    assert torch.equal(again.velocity(x, t, again.conditions.prompts.rows(ends)), ours)


class Counted:
    """An embedder that pads to the longest prompt of a call."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts):
        self.calls.append(prompts.texts)
        width = max(map(len, prompts.texts))
        rows = torch.zeros(len(prompts), width)
        for row, prompt in zip(rows, prompts.texts, strict=True):
            row[: len(prompt)] = torch.tensor([float(ord(letter)) for letter in prompt])
        return Conditioning({"text": rows}, {"width": width})


def test_a_second_start_embeds_two_prompts_only(tmp_path):
    prompts = Prompts((*("abc"[: 1 + i % 2] for i in range(CHUNK)), "abcdef"))
    first, second = Counted(), Counted()
    rows = embed_all(first, prompts, tmp_path / "x.safetensors")
    assert rows.inputs["text"].shape == (CHUNK + 1, 6)
    assert rows.shared == {"width": 6}
    again = embed_all(second, prompts, tmp_path / "x.safetensors")
    assert second.calls == [("a", "abcdef")]
    assert torch.equal(again.inputs["text"], rows.inputs["text"])
    assert again.shared == rows.shared
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_parts_that_do_not_fit_together(tmp_path):
    def odd(prompts):
        return Conditioning({"text": torch.zeros(len(prompts), len(prompts))})

    with pytest.raises(UserError, match="prompts: expected embeddings of one shape, got several"):
        embed_all(odd, Prompts((*("ab" * CHUNK), "c")), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
