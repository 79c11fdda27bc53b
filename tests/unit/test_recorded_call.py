"""The call of a network as its pipeline makes it: joined parts of the sample, a second time, larger outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.arguments import ArgumentLayout
from fmm_distill.teachers.prompted.call import crop_to, read_call
from fmm_distill.teachers.prompted.joined import find_joined
from fmm_distill.teachers.prompted.rows import Ragged, RaggedRows, Rows
from fmm_distill.teachers.recording import NetworkCall, Recording, SchedulerStep, count_tensors
from fmm_distill.teachers.scheduler import ScheduleSpec

STEPS = 4
SPEC = ScheduleSpec(FlowMatching(), "flow_prediction", {})


def recording(axis, tail, **more):
    """A run with two samples [2, 3, 4, 5], to which the network's argument joins ``tail`` along an axis."""
    made = Recording()
    for i in range(STEPS):
        time = 1000.0 * (1 - i / STEPS)
        x = torch.randn(2, 3, 4, 5, generator=torch.manual_seed(i))
        given = torch.cat((x, tail(i)), axis)
        arguments = {"x": given, "timestep": torch.tensor([time] * 2)}
        arguments |= {name: value(time) for name, value in more.items()}
        made.calls.append(NetworkCall(arguments, given.clone()))
        made.steps.append(SchedulerStep(x.clone(), time, x))
    return made


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("per_sample", [False, True])
def test_what_is_joined_to_the_sample_is_a_condition(axis, per_sample):
    shape = [2, 3, 4, 5]
    shape[axis] = 2
    tail = torch.randn(shape, generator=torch.manual_seed(9)) if per_sample else torch.zeros(shape)
    seen = recording(axis, lambda _: tail)
    call = replace(read_call(seen, SPEC, "here"), layout=ArgumentLayout(("x", "timestep"), {"text": Rows(0)}))
    assert call.joined.per_sample == per_sample
    arguments = seen.calls[0].arguments
    assert torch.equal(call.sample_of(arguments), seen.steps[0].sample)
    cond = call.conditions_of(arguments | {"text": torch.tensor([[1.0], [2.0]])}, 2)

    def network(x, timestep, text, return_dict):
        return (torch.cat((x, text[..., None, None].expand_as(x[:, :1])), 1) if axis == 1 else x,)

    # Another order of the samples: the joined parts follow.
    order = torch.tensor([1, 0])
    x = torch.randn(2, 3, 4, 5, generator=torch.manual_seed(3))
    given = {}

    def spy(**kwargs):
        given.update(kwargs)
        return network(**kwargs)

    made = call(spy, x, torch.tensor([500.0, 250.0]), cond.rows(order), None)
    assert torch.equal(made, x)
    assert torch.equal(given["x"], torch.cat((x, tail[order]), axis))
    assert torch.equal(given["text"], torch.tensor([[2.0], [1.0]]))
    assert given["timestep"].tolist() == [500.0, 250.0]


def test_a_joined_part_that_changes_is_refused():
    with pytest.raises(UserError, match="here: expected the sample alone, or with a part that stays the same"):
        find_joined(recording(1, lambda i: torch.full((2, 1, 4, 5), float(i))), "x", "here")


def test_the_sample_alone_joins_nothing():
    assert find_joined(recording(1, lambda _: torch.empty(2, 0, 4, 5)), "x", "here") is None


def test_a_second_time_is_the_first_or_refused():
    def make(second):
        return recording(1, lambda _: torch.empty(2, 0, 4, 5), timestep_r=second)

    call = read_call(make(lambda time: torch.tensor([time] * 2)), SPEC, "here")
    assert call.second_time == "timestep_r"
    given = {}

    def network(**kwargs):
        given.update(kwargs)
        return (kwargs["x"],)

    call(network, torch.zeros(2, 3, 4, 5), torch.tensor([500.0, 250.0]), None, None)
    assert given["timestep_r"].tolist() == [500.0, 250.0]
    assert read_call(make(lambda _: None), SPEC, "here").second_time is None
    with pytest.raises(UserError, match=r"got one with a second \(timestep_r\), which its pipeline sets to the end"):
        read_call(make(lambda time: torch.tensor([time - 250] * 2)), SPEC, "here")


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 3, 4, 9), (2, 6, 8, 10), (2, 3, 4, 5)])
def test_a_larger_output_is_cut_to_the_sample(shape):
    output = torch.randn(shape)
    assert torch.equal(crop_to(output, torch.zeros(2, 3, 4, 5)), output[:, :3, :4, :5])


def test_a_network_of_two_samples_is_refused():
    """Video and sound: both are stepped, and a map of one of them alone is none of the pipeline."""
    made = recording(1, lambda _: torch.empty(2, 0, 4, 5))
    made.calls[0] = replace(made.calls[0], outputs=2)
    with pytest.raises(UserError, match="here: expected a network of one sample, got one of 2"):
        read_call(made, SPEC, "here")


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (torch.ones(2), 1),
        ((torch.ones(2),), 1),
        ((torch.ones(2), torch.ones(2)), 2),
        ((torch.ones(2), None), 1),
        (Transformer2DModelOutput(sample=torch.ones(2)), 1),
        (AudioVisualModelOutput(sample=torch.ones(2), audio_sample=torch.ones(2)), 2),
    ],
)
def test_the_tensors_that_a_network_returns_are_counted(output, count):
    assert count_tensors(output) == count


def test_rows_of_several_lengths_are_called_in_their_order():
    layout = ArgumentLayout(("x", "timestep"), {"text": RaggedRows()})
    seen = recording(1, lambda _: torch.empty(2, 0, 4, 5))
    call = replace(read_call(seen, SPEC, "here"), layout=layout)
    texts = Ragged((torch.full((3, 2), 1.0), torch.full((5, 2), 10.0)))
    cond = call.conditions_of(seen.calls[0].arguments | {"text": texts}, 2)
    lengths = []

    def network(x, timestep, text, return_dict, h):
        lengths.append(tuple(text.shape))
        return (x + text.sum() + timestep.reshape(-1, 1, 1, 1) + h.reshape(-1, 1, 1, 1),)

    x, h = torch.randn(2, 3, 4, 5, generator=torch.manual_seed(3)), torch.tensor([0.25, 0.5])
    made = call(network, x, torch.tensor([500.0, 250.0]), cond, h)
    assert torch.allclose(made, x + torch.tensor([506.25, 350.5]).reshape(-1, 1, 1, 1))
    assert lengths == [(1, 3, 2), (1, 5, 2)]


@pytest.mark.parametrize("shape", [(6,), (1, 3, 2)])
def test_tokens_of_a_given_frame_have_the_time_0(shape):
    given = torch.ones(shape)
    given.flatten()[:2] = 0
    seen = recording(1, lambda _: torch.empty(2, 0, 4, 5))
    for one in seen.calls:
        time = one.arguments["timestep"]
        one.arguments["timestep"] = time.reshape(-1, *[1] * len(shape)) * given / 1000
    call = read_call(seen, SPEC, "here")
    assert torch.equal(call.timed, given.bool())
    assert float(call.time_of(seen.calls[1].arguments)) == pytest.approx(750.0)
    found = {}

    def network(**kwargs):
        found.update(kwargs)
        return (kwargs["x"],)

    call(network, torch.zeros(2, 3, 4, 5), torch.tensor([500.0, 250.0]), None, None)
    assert torch.allclose(found["timestep"], torch.tensor([0.5, 0.25]).reshape(-1, *[1] * len(shape)) * given)
