"""Features of the reference are computed once, and what is read is what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from fmm_distill.data.samples import Images
from fmm_distill.errors import UserError
from fmm_distill.evaluation.features import open_features
from fmm_distill.evaluation.reference import compute_reference
from tests.logs import logged


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path / "fmm_distill"


def images(seed=0, count=20):
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 17, (count, 1, 8, 8), generator=generator, dtype=torch.uint8), "made", levels=16)


def counted():
    """The digits' features, and how many images they have seen."""
    features, seen = open_features("digits", (1, 8, 8)), []
    return replace(features, forward=lambda part: seen.append(len(part)) or features.forward(part)), seen


def get(some, features, lines=None):
    with logged([] if lines is None else lines):
        return compute_reference(some, features, 8, torch.device("cpu"))


def test_computed_once_for_the_same_images_and_features(place):
    features, seen = counted()
    first = get(images(), features)
    assert sum(seen) == 20
    again = get(images(), features)
    assert sum(seen) == 20
    assert torch.equal(first.features, again.features)
    assert first.digest == again.digest
    direct = features(torch.cat(list(images().batches(20)))).features
    torch.testing.assert_close(first.features, direct)
    other = get(images(seed=1), features)
    assert sum(seen) == 20 + 20 + 20
    assert other.digest != first.digest
    get(images(), replace(features, digest="another network"))
    assert len(list(place.iterdir())) == 3


@pytest.mark.parametrize("damage", ["byte", "cut", "manifest"])
def test_damage_is_said_and_mended(place, damage):
    features, seen = counted()
    first = get(images(), features)
    (folder,) = place.iterdir()
    file = folder / ("manifest.json" if damage == "manifest" else "features.safetensors")
    content = bytearray(Path(file).read_bytes())
    if damage == "byte":
        content[-3] ^= 1
    file.write_bytes(content[:-40] if damage == "cut" else content if damage == "byte" else b"{}")
    lines, before = [], sum(seen)
    assert torch.equal(get(images(), features, lines).features, first.features)
    assert sum(seen) == before + 20
    assert f"{folder} is damaged" in lines[0]
    get(images(), features, lines)
    assert len(lines) == 1


def test_three_images_are_no_reference(place):
    with pytest.raises(UserError, match="expected at least 4 reference images, got 3"):
        get(images(count=3), counted()[0])
