"""Arguments of a network's call as rows and shared values, and back."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.conditions import NullInputs
from fmm_distill.teachers.prompted.arguments import Probes, read_layout
from fmm_distill.teachers.prompted.rows import EqualEntries, NumberEntries, Rows, TensorEntries

OWN = ("hidden_states", "timestep")
FRAMES = 3
# The embedding of each prompt, of a width that no number of samples divides, and its length.
EMBEDDINGS = {name: torch.arange(5.0) + 10 * i for i, name in enumerate("ABCDE")}
LENGTHS = {"A": 4, "B": 2, "C": 2, "D": 1, "E": 4}


def arguments(prompts):
    """Those of a call with these prompts, of every kind that pipelines pass."""
    count, rows = len(prompts), torch.stack([EMBEDDINGS[name] for name in prompts])
    return {
        "hidden_states": torch.zeros(count, 2),
        "timestep": torch.ones(count),
        "encoder_hidden_states": rows,
        "mask": rows > 12,
        "by_layer": torch.stack([rows, -rows]),
        "layers": [rows + 1, rows + 2],
        "frames": rows.repeat_interleave(FRAMES, 0),
        "tiles": rows.repeat(FRAMES, 1),
        "captions": [EMBEDDINGS[name].expand(LENGTHS[name], 5) for name in prompts],
        "lengths": [LENGTHS[name] for name in prompts],
        "sizes": [(8, 8)] * count,
        "ids": torch.arange(2),
        "rotations": torch.polar(torch.ones(4), torch.arange(4.0)),
        "scale": torch.tensor(2.0),
        "attention": {"kind": "flash"},
        "added_cond_kwargs": {"text_embeds": rows + 1, "resolution": None, "pair": (rows + 3, "text")},
        "return_dict": True,
    }


def layout_of(make=arguments):
    return read_layout(Probes(make("AB"), make("BA"), make("ABC")), OWN, "here")


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_rows_are_found_by_how_they_follow_the_prompts():
    assert layout_of().rows == {
        "encoder_hidden_states": Rows(0),
        "mask": Rows(0),
        "by_layer": Rows(1),
        "layers.0": Rows(0),
        "layers.1": Rows(0),
        "frames": Rows(0, FRAMES),
        "tiles": Rows(0, FRAMES, tiled=True),
        "captions": TensorEntries(),
        "lengths": NumberEntries(),
        "sizes": EqualEntries(),
        "added_cond_kwargs.text_embeds": Rows(0),
        "added_cond_kwargs.pair.0": Rows(0),
    }


def test_every_row_is_that_of_its_sample():
    cond = layout_of().split(arguments("BDE"), 3)
    assert len(cond) == 3
    for i, name in enumerate("BDE"):
        row = EMBEDDINGS[name]
        assert torch.equal(cond.inputs["by_layer"][i], torch.stack([row, -row]))
        assert torch.equal(cond.inputs["frames"][i], row.expand(FRAMES, 5))
        assert torch.equal(cond.inputs["tiles"][i], row.expand(FRAMES, 5))
        assert torch.equal(cond.inputs["layers.1"][i], row + 2)
    assert not cond.shared["return_dict"]
    assert cond.shared["attention"] == {"kind": "flash"}


@pytest.mark.parametrize("prompts", ["ED", "B", "EABCD"])
def test_joined_arguments_are_those_of_the_prompts(prompts):
    """Rows that are picked from those of all prompts are the arguments of a call with the picked prompts."""
    layout = layout_of()
    index = torch.tensor(["ABCDE".index(name) for name in prompts])
    joined = layout.join(layout.split(arguments("ABCDE"), 5).rows(index), None, len(prompts))
    expected = {name: value for name, value in arguments(prompts).items() if name not in OWN}
    assert equal(joined, expected | {"return_dict": False})


def test_the_length_of_a_jump_and_the_scale_are_passed_with_the_rows():
    layout, h = layout_of(), torch.tensor([0.5, 0.25])
    cond = layout.split(arguments("AB"), 2).guided(3.0)
    joined = layout.join(cond, h, 2)
    assert torch.equal(joined["h"], h)
    assert joined["w"].tolist() == [3.0, 3.0]
    assert "w" not in layout.join(cond, None, 2)
    assert layout.join(None, h, 2).keys() == {"h"}


@pytest.mark.parametrize("count", [2, 3])
def test_as_many_shared_rows_as_samples_are_shared(count):
    def make(prompts):
        return arguments(prompts) | {"ids": torch.arange(count), "layers": [torch.ones(2, 7)] * count}

    layout = layout_of(make)
    assert "ids" not in layout.rows
    assert layout.split(make("AB"), 2).shared["layers"][0].shape == (2, 7)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        # All prompts in one sequence.
        (lambda p: torch.cat([EMBEDDINGS[name][: LENGTHS[name]] for name in p]), "one axis of the network's more"),
        (lambda p: torch.ones(len(p), len(p)), "one axis of the network's more"),
        # The rows of a sample depend on the others: noise of the call, an embedding relative to the first prompt.
        (lambda p: torch.randn(len(p), 3, generator=torch.manual_seed(len(p))), "depend on the other prompts"),
        (lambda p: torch.stack([EMBEDDINGS[name] - EMBEDDINGS[p[0]] for name in p]), "depend on the other prompts"),
        (lambda p: torch.stack([EMBEDDINGS[name] + len(p) for name in p]), "depend on the other prompts"),
        # One value that depends on the prompts.
        (lambda p: EMBEDDINGS[p[0]], "one value of more for all prompts"),
        (lambda p: torch.polar(torch.ones(2), EMBEDDINGS[p[0]][:2]), "one value of more for all prompts"),
        (lambda p: len(p), "one value of more for all prompts"),
        (lambda p: [(name, 8) for name in p], "one value of more for all prompts"),
    ],
)
def test_what_mixes_the_samples_is_refused(more, match):
    with pytest.raises(UserError, match=f"^here: expected .*{match}.*; write an adapter"):
        layout_of(lambda prompts: arguments(prompts) | {"more": more(prompts)})


def test_an_argument_that_only_other_prompts_have_is_refused():
    layout = layout_of()
    with pytest.raises(UserError, match="got weights in addition"):
        layout.split(arguments("DE") | {"weights": torch.ones(2)}, 2)
    with pytest.raises(UserError, match="expected 6 rows of 2 prompts in the network's frames, got 2"):
        layout.split(arguments("DE") | {"frames": torch.ones(2, 5)}, 2)


def test_inputs_of_the_empty_prompt_are_no_arguments_of_a_call():
    layout = layout_of()
    cond, empty = layout.split(arguments("AB"), 2), layout.split(arguments("DE"), 2)
    null = NullInputs(empty.rows(torch.tensor([0])), per_image=frozenset({"encoder_hidden_states"}))
    stored = null.add_to(cond, empty)
    assert equal(layout.join(stored, None, 2), layout.join(cond, None, 2))
    guided = layout.join(null.of(stored), None, 2)
    assert equal(guided["encoder_hidden_states"], arguments("DE")["encoder_hidden_states"])
    # One row for both, where the image changes nothing.
    assert equal(guided["mask"], arguments("DD")["mask"])
