"""Runs with one prompt each are joined to what a batch gives, and other guidance has a value that turns it off."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import LTX2Pipeline, Lumina2Pipeline, StableDiffusionPipeline, StableDiffusionXLPAGPipeline

from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.call_keywords import CallKeywords
from fmm_distill.teachers.prompted.neutral import neutral_keywords
from fmm_distill.teachers.prompted.one_by_one import join_recordings
from fmm_distill.teachers.prompted.rows import Ragged, RaggedRows
from fmm_distill.teachers.prompted.runs import record_guided, record_prompts
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.recording import NetworkCall, Recording, SchedulerStep
from fmm_distill.teachers.side_networks import SideCall
from tests.tiny import diffusion

PROMPTS = ("a cat", "two dogs in the snow")


def run_of(**arguments):
    output = torch.zeros(1, 2)
    return Recording([NetworkCall(arguments, output)], [SchedulerStep(output, 1.0, output)])


@pytest.mark.parametrize("guided", [False, True])
def test_joined_runs_are_those_of_a_batch(guided):
    """Rows of embeddings, nested arguments of SDXL, and the order of guided rows; the noise is another one."""
    pipeline, call = diffusion.PIPELINES["sdxl"].build(), dict(diffusion.PIPELINES["sdxl"].call)
    batch, single = (CallKeywords.of(pipeline, call, 1.0) for _ in range(2))
    object.__setattr__(single, "one_prompt", True)
    given = (pipeline, "unet")
    prompts = Prompts(PROMPTS)
    found = [
        record_guided(*given, keywords, prompts, 2, 3.0) if guided else record_prompts(*given, keywords, prompts, 2)
        for keywords in (batch, single)
    ]
    for one, other in zip(*(recording.calls for recording in found), strict=True):
        assert one.arguments.keys() == other.arguments.keys()
        assert one.output.shape == other.output.shape
        for name in ("text_embeds", "time_ids"):
            torch.testing.assert_close(*(each.arguments["added_cond_kwargs"][name] for each in (one, other)))
        torch.testing.assert_close(*(each.arguments["encoder_hidden_states"] for each in (one, other)))
    assert [step.sample.shape for step in found[0].steps] == [step.sample.shape for step in found[1].steps]
    assert not torch.equal(*found[1].steps[0].sample)


@pytest.mark.parametrize("rows", [1, 2])
def test_frames_of_videos_are_rows_of_the_network_before_the_main_one(rows):
    """A ControlNet gets the frames of all rows one after the other, as a batch has them."""
    frames, runs = 3, []
    batch = torch.arange(2.0 * rows * frames).reshape(rows, 2, frames)
    for number in range(2):
        run = run_of(x=batch[:, number])
        given = batch[:, number].reshape(-1, 1)
        run.calls[0] = NetworkCall(
            run.calls[0].arguments, torch.zeros(rows, 2), sides={"net": SideCall({}, ("x", "t"), given, 1.0, None)}
        )
        runs.append(run)
    assert torch.equal(join_recordings(runs).calls[0].sides["net"].sample, batch.reshape(-1, 1))


def test_a_list_of_a_network_before_the_main_one_has_an_entry_per_network():
    """One ControlNet of several is called with lists of one image, next to lists with an entry for each sample."""
    runs = []
    for number in range(2):
        image = torch.full((1, 4), float(number))
        run = run_of(x=[image], net={"images": [image], "scale": [1.0]})
        side = SideCall({}, ("x", "t"), image, 1.0, None)
        run.calls[0] = NetworkCall(run.calls[0].arguments, run.calls[0].output, sides={"net": side})
        runs.append(run)
    arguments = join_recordings(runs).calls[0].arguments
    assert len(arguments["x"]) == 2
    assert arguments["net"]["scale"] == [1.0]
    (images,) = arguments["net"]["images"]
    assert images[:, 0].tolist() == [0.0, 1.0]


def test_one_value_for_all_is_kept_and_a_value_of_each_is_refused():
    ids, rows = torch.arange(6).reshape(3, 2), [torch.ones(1, 4), 2 * torch.ones(1, 4)]
    runs = [run_of(ids=ids, rows=row, scale=2.0, names=[row]) for row in rows]
    arguments = join_recordings(runs).calls[0].arguments
    assert torch.equal(arguments["ids"], ids)
    assert torch.equal(arguments["rows"], torch.cat(rows))
    assert arguments["scale"] == 2.0
    assert [len(row) for row in arguments["names"]] == [1, 1]
    # Several rows of each, such as the embeddings of two images.
    several = join_recordings([run_of(ids=ids), run_of(ids=ids + 1)]).calls[0].arguments["ids"]
    assert torch.equal(several, torch.cat((ids, ids + 1)))
    for own, other in ((torch.tensor(1.0), torch.tensor(2.0)), (ids, ids[:2])):
        with pytest.raises(UserError, match="got others in ids"):
            join_recordings([run_of(ids=own), run_of(ids=other)])


def test_rows_of_several_lengths_are_called_one_by_one():
    rows = [torch.full((1, length, 3), float(length)) for length in (4, 2)]
    joined = join_recordings([run_of(rows=one) for one in rows]).calls[0].arguments["rows"]
    assert isinstance(joined, Ragged)
    layout = RaggedRows()
    stored = layout.split("rows", joined, 2)
    assert stored["rows"].shape == (2, 4, 3)
    for i, own in enumerate(rows):
        assert torch.equal(layout.join("rows", {name: value[i : i + 1] for name, value in stored.items()}), own)
    with pytest.raises(UserError, match="got several in rows; try prompts of one length"):
        join_recordings([run_of(rows=torch.ones(1, 4, 2)), run_of(rows=torch.ones(1, 5, 3))])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (StableDiffusionPipeline, {}),
        (StableDiffusionXLPAGPipeline, {"pag_scale": 0.0}),
        (Lumina2Pipeline, {"cfg_normalization": False}),
    ],
)
def test_keywords_that_are_on_by_default_are_turned_off(kind, expected):
    assert neutral_keywords(inspect.signature(kind.__call__).parameters) == expected


def test_every_neutral_keyword_is_one_of_the_call():
    parameters = inspect.signature(LTX2Pipeline.__call__).parameters
    found = neutral_keywords(parameters)
    assert {"stg_scale", "modality_scale", "guidance_rescale"} <= found.keys() <= parameters.keys()
    assert all(parameters[name].default != value for name, value in found.items())
