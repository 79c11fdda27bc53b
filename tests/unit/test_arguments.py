"""Arguments of a network's call as rows and shared values, and back."""

from __future__ import annotations

import torch

from fmm_distill.teachers.prompted.arguments import join_arguments, split_arguments


def arguments(count):
    """Those of a call with as many samples as given, of every kind that pipelines pass."""
    rows = torch.arange(12.0).reshape(3, 4)[:count]
    return {
        "hidden_states": torch.zeros(count, 2),
        "timestep": torch.ones(count),
        "encoder_hidden_states": rows,
        "mask": rows > 3 if count > 1 else None,
        "captions": [torch.ones(2 + i, 4) for i in range(count)],
        "sizes": [(8, 8)] * count,
        "ids": torch.arange(5),
        "scale": torch.tensor(2.0),
        "added_cond_kwargs": {"text_embeds": rows + 1, "resolution": None},
        "return_dict": True,
    }


def test_rows_are_split_from_shared_values():
    given = arguments(3)
    cond = split_arguments(given, ("hidden_states", "timestep"), 3, arguments(1))
    assert len(cond) == 3
    assert {name for name in cond.inputs if "." not in name} == {"encoder_hidden_states", "mask", "captions"}
    assert torch.equal(cond.inputs["added_cond_kwargs.text_embeds"], given["added_cond_kwargs"]["text_embeds"])
    assert not cond.shared["return_dict"]
    assert torch.equal(cond.shared["ids"], given["ids"])
    assert torch.equal(cond.shared["scale"], given["scale"])


def test_joined_arguments_are_those_that_were_split():
    given = arguments(3)
    cond = split_arguments(given, ("hidden_states", "timestep"), 3, arguments(1))
    index = torch.tensor([2, 0])
    joined = join_arguments(cond.rows(index), None, 2)
    assert joined.keys() == given.keys() - {"hidden_states", "timestep"}
    for name in ("encoder_hidden_states", "mask"):
        assert torch.equal(joined[name], given[name][index])
    assert [len(row) for row in joined["captions"]] == [4, 2]
    assert joined["sizes"] == [(8, 8)] * 2
    assert torch.equal(joined["added_cond_kwargs"]["text_embeds"], given["added_cond_kwargs"]["text_embeds"][index])
    assert joined["added_cond_kwargs"]["resolution"] is None


def test_as_many_shared_rows_as_samples_are_shared():
    # Five position ids and five samples: one sample has five ids as well.
    several, single = ({"ids": torch.arange(5), "x": torch.zeros(n), "t": torch.zeros(n)} for n in (5, 1))
    cond = split_arguments(several, ("x", "t"), 5, single)
    assert not cond.inputs
    assert torch.equal(cond.shared["ids"], torch.arange(5))
