"""The parts of a teacher with images: prompts, given frames, layouts of the scheduler, other networks, null inputs."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError
from fmm_distill.export.call_files import images_to_files
from fmm_distill.teachers.conditions import WITHOUT, Embeddings, NullInputs
from fmm_distill.teachers.prompted.encoding import encoding_by_mode
from fmm_distill.teachers.prompted.joined import JoinedPart, check_joined, find_joined
from fmm_distill.teachers.prompts import Prompts, pictures_like
from fmm_distill.teachers.recording import NetworkCall, Recording, SchedulerStep
from fmm_distill.teachers.side_networks import SideCall, SideNetwork, take_results
from fmm_distill.teachers.stepped_samples import find_positions, from_stepped, to_stepped
from tests.tiny.diffusion import image_vae
from tests.tiny.image_conditions import picture

IMAGES = tuple(picture(i, (6, 4)) for i in range(3))


def test_prompts_are_keywords_of_a_call():
    prompts = Prompts(("a", "b", "c"), {"image": IMAGES})
    some = prompts.some((2, 0))
    assert some.keywords() == {"prompt": ["c", "a"], "image": [IMAGES[2], IMAGES[0]]}
    assert some.keywords(one=True, prompt=False) == {"image": IMAGES[2]}
    assert prompts.with_texts("").keywords()["prompt"] == ["", "", ""]
    with pytest.raises(UserError, match="expected one image per prompt in image, got 3 for 1"):
        Prompts(("a",), {"image": IMAGES})


def test_digests_are_those_of_pixels_and_keywords():
    def digest(images):
        return Prompts(("a",), images).digests()[0]

    one = digest({"image": (IMAGES[0],)})
    assert one == digest({"image": (IMAGES[0].copy(),)})
    others = [
        digest({"image": (IMAGES[1],)}),
        digest({"image": (IMAGES[0].convert("L"),)}),
        digest({"image": (IMAGES[0].rotate(90, expand=True),)}),
        digest({"image": ([IMAGES[0], IMAGES[1]],)}),
    ]
    assert len({one, *others}) == 5
    assert Prompts(("a", "b")).digests() == ["", ""]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pictures_have_size_and_mode_and_differ(mode):
    made = pictures_like(IMAGES[0].convert(mode), 3)
    assert {(one.size, one.mode) for one in made} == {((4, 6), mode)}
    assert len({one.tobytes() for one in made}) == 3
    frames = pictures_like([IMAGES[0], IMAGES[1]], 3)
    assert [len(one) for one in frames] == [2, 2, 2]
    assert len({frame.tobytes() for one in frames for frame in one}) == 6


def test_images_are_encoded_to_their_mode_inside_the_context_alone():
    vae = image_vae()
    pipeline = SimpleNamespace(components={"vae": vae, "tokenizer": object()})
    x = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(0))

    def drawn():
        torch.manual_seed(5)
        return [vae.encode(x).latent_dist.sample(), vae.encode(x, return_dict=False)[0].sample(generator=None)]

    with torch.no_grad():
        mode = vae.encode(x).latent_dist.mode()
        with encoding_by_mode(pipeline, Prompts(("a",), {"image": IMAGES[:1]})):
            assert all(torch.equal(one, mode) for one in drawn())
        assert not any(torch.allclose(one, mode) for one in drawn())
        with encoding_by_mode(pipeline, Prompts(("a",))):
            assert not any(torch.allclose(one, mode) for one in drawn())


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_sample_between_joined_parts(start):
    part = JoinedPart(axis=1, start=start, size=2, total=5, per_sample=True)
    given = torch.randn(2, 5, 3, generator=torch.manual_seed(0))
    x, cond = part.sample_in(given), part.add_to(Conditioning({}), given)
    assert torch.equal(x, given[:, start : start + 2])
    assert torch.equal(part.join(x, dict(cond.inputs)), given)


def test_parts_along_two_axes():
    """A first frame, and channels of all frames, as in Kandinsky 5."""
    generator = torch.manual_seed(0)
    image, mask = torch.randn(2, 1, 3, 7, generator=generator), torch.randn(1, 4, 3, 3, generator=generator)

    def call_with(x):
        later = torch.cat((x, mask.expand(2, -1, -1, -1)), 3)
        return NetworkCall({"x": torch.cat((image, later), 1)}, torch.empty(0))

    xs = [torch.randn(2, 4, 3, 4, generator=generator) for _ in range(3)]
    calls = [call_with(x) for x in xs]
    part = find_joined(Recording(calls, [SchedulerStep(xs[0], 1.0, xs[0])]), "x", "here")
    given = calls[1].arguments["x"]
    assert torch.equal(part.sample_in(given), xs[1])
    cond = part.add_to(Conditioning({}), given)
    # Each sample has its own frame, and all samples share the channels.
    assert [rows.shape for rows in cond.inputs.values()] == [image.shape]
    assert [rows.shape for rows in cond.shared.values()] == [mask.shape]
    arguments = {**cond.inputs, **cond.shared}
    assert torch.equal(part.join(xs[2], arguments), calls[2].arguments["x"])
    assert arguments == {}
    # An output may have the first frame without the channels, or neither.
    for output in (given, given[..., :4], xs[1]):
        assert torch.equal(part.sample_of_output(output), xs[1])
    other = given.roll(1, -1)
    with pytest.raises(UserError, match="a function"):
        check_joined(part, given, other.flip(0), given, "here")


def test_a_joined_part_with_noise_is_refused():
    part = JoinedPart(axis=1, start=0, size=1, total=2, per_sample=True)
    rows = torch.randn(3, 2, 4, generator=torch.manual_seed(0))
    check_joined(part, rows[:2], rows[:2].flip(0), rows, "here")
    noisy = rows + torch.randn(3, 2, 4, generator=torch.manual_seed(1))
    for three in ((rows[:2], noisy[:2].flip(0), rows), (rows[:2], rows[:2].flip(0), noisy)):
        with pytest.raises(UserError, match="here: expected a part joined to the sample that is a function"):
            check_joined(part, *three, "here")


def test_a_joined_part_that_grows_with_the_samples_is_refused():
    part = JoinedPart(axis=1, start=0, size=1, total=3, per_sample=False)
    two, three = torch.ones(2, 3, 4), torch.ones(3, 4, 4)
    with pytest.raises(UserError, match="here: expected a part joined to the sample of one size"):
        check_joined(part, two, two, three, "here")


def test_numbers_are_found_in_the_layout_of_the_scheduler():
    stepped = torch.randn(2, 3, 4, 2, generator=torch.manual_seed(0))
    # Packed as tokens, and without the first frame.
    packed = stepped.permute(0, 2, 3, 1).reshape(2, 8, 3)
    later = stepped[:, :, 1:]
    for x in (packed, later):
        positions = find_positions(x, stepped)
        event = tuple(x.shape[1:])
        assert torch.equal(from_stepped(stepped, event, positions), x)
        assert torch.equal(from_stepped(to_stepped(x, stepped.shape, positions), event, positions), x)
    assert torch.equal(to_stepped(later, stepped.shape, find_positions(later, stepped))[:, :, 1:], later)
    assert not to_stepped(later, stepped.shape, find_positions(later, stepped))[:, :, 0].any()
    # Plain layouts, and other numbers.
    assert find_positions(stepped, stepped) is None
    assert find_positions(stepped.reshape(2, 12, 2), stepped) is None
    assert find_positions(later + 1, stepped) is None


class Side(nn.Module):
    def forward(self, x, timestep, hint, scale=1.0, return_dict=True):
        return [x * hint, x + timestep.reshape(-1, *[1] * (x.ndim - 1))], x - hint


def seen(given, results=None):
    output = Side()(given, torch.tensor([3.0, 3.0]), 2.0)
    return SideCall({"hint": 2.0}, ("x", "timestep"), given, torch.tensor(3.0), output, results or {})


def test_the_outputs_of_another_network_are_made_anew():
    x = torch.randn(2, 4, generator=torch.manual_seed(0))
    call = seen(x)
    # A pipeline may pass a list in the place of a tuple, of the same tensors.
    arguments = {"sample": x, "down": [*call.output[0]], "mid": call.output[1], "text": torch.ones(2)}
    copies = copy.copy(arguments)
    call = take_results(call, copies, arguments)
    assert call.results == {"down": 0, "mid": 1}
    assert set(copies) == {"sample", "text"}
    side = SideNetwork.of("side", Side(), call, x, x)
    other, time = torch.ones(2, 4), torch.tensor([1.0, 2.0])
    made = side({"side": {"hint": 5.0}, "text": torch.ones(2)}, other, other, time)
    assert set(made) == {"text", "down", "mid"}
    assert torch.equal(made["mid"], other - 5)
    assert torch.equal(made["down"][1], other + time[:, None])
    assert copy.deepcopy(side) is side


class Weighted(Side):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, timestep, hint, scale=1.0, return_dict=True):
        return super().forward(x * self.weight, timestep, hint, scale, return_dict)


def test_another_network_follows_the_samples_to_their_device():
    """The student may be moved alone."""
    x = torch.randn(2, 4, generator=torch.manual_seed(0))
    call = SideCall({"hint": 2.0}, ("x", "timestep"), x, torch.tensor(3.0), None, {"mid": 1})
    side, there = SideNetwork.of("side", Weighted(), call, x, x), torch.empty(2, 4, device="meta")
    made = side({"side": {"hint": 5.0}}, there, there, torch.empty(2, device="meta"))
    assert made["mid"].device.type == side.network.weight.device.type == "meta"


def test_another_network_gets_the_frames_of_videos():
    videos = torch.randn(2, 3, 4, 5, 6, generator=torch.manual_seed(0))
    frames = torch.cat([video.transpose(0, 1) for video in videos])
    call = SideCall({"hint": 2.0}, ("x", "timestep"), frames, torch.tensor(3.0), None, {"mid": 1})
    side = SideNetwork.of("side", Side(), call, videos, videos)
    assert side.frames
    made = side({"side": {"hint": 5.0}}, videos, videos, torch.tensor([1.0, 2.0]))
    assert torch.equal(made["mid"], frames - 5)
    with pytest.raises(UserError, match="expected a Side"):
        SideNetwork.of("side", Side(), replace(call, sample=frames.flip(0)), videos, videos)


def test_another_network_gets_the_sample_with_or_without_what_is_joined():
    given = torch.randn(2, 6, generator=torch.manual_seed(0))
    x = given[:, :4]
    for own, joined in ((x, False), (given, True)):
        call = replace(seen(own), results={"mid": 1})
        assert SideNetwork.of("side", Side(), call, given, x).joined == joined
    for call in (replace(seen(x), results={"mid": 1}, sample=x + 1), seen(x)):
        with pytest.raises(UserError, match="expected a Side"):
            SideNetwork.of("side", Side(), call, given, x)


def test_null_inputs_have_three_origins():
    row = Conditioning({"text": torch.zeros(1, 3), "image": torch.zeros(1, 2), "both": torch.zeros(1, 2)}, {"size": 4})
    null = NullInputs(row, frozenset({"image"}), frozenset({"both"}))
    cond = Conditioning({name: torch.randn(4, 3 if name == "text" else 2) for name in row.inputs})
    empty = Conditioning({name: rows + 1 for name, rows in cond.inputs.items()})
    known = Embeddings(tuple("abcd"), null.add_to(cond, empty), null)
    order = torch.tensor([2, 0])
    found = known.null(known.prompts.rows(order))
    assert not found.inputs["text"].any()
    assert torch.equal(found.inputs["image"], cond.inputs["image"][order])
    assert torch.equal(found.inputs["both"], empty.inputs["both"][order])
    assert found.shared == {"size": 4}
    assert [name for name in known.prompts.inputs if name.startswith(WITHOUT)] == [f"{WITHOUT}both"]
    with pytest.raises(UserError, match=r"guidance: no; try guidance\.scale 1"):
        Embeddings(("a",), cond, None, "no").null(cond)


def test_a_call_is_itself_in_the_process_that_verifies_exports(tmp_path, monkeypatch):
    """Its images and sizes go through files: some pipelines refuse a list of two numbers as a size."""
    call = {"image": [IMAGES[0], [IMAGES[1]]], "original_size": (8, 8), "prompt": ["a", "b"], "nothing": []}
    # The script blocks the package in its process.
    monkeypatch.setitem(sys.modules, "fmm_distill", sys.modules["fmm_distill"])
    opened = runpy.run_path(str(files("fmm_distill") / "export" / "reload.py"))["opened"]
    given = {name: opened(value) for name, value in json.loads(json.dumps(images_to_files(call, tmp_path))).items()}
    assert (given["original_size"], given["prompt"], given["nothing"]) == ((8, 8), ["a", "b"], [])
    assert [given["image"][0].tobytes(), given["image"][1][0].tobytes()] == [one.tobytes() for one in IMAGES[:2]]
