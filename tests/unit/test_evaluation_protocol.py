"""The classic mistakes of a Fréchet distance: each is refused, or two numbers that differ in it don't compare."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fmm_distill.config.settings import DataSettings, EvaluationSettings
from fmm_distill.data.samples import Images, load_images
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.evaluation.compare import compare
from fmm_distill.evaluation.evaluator import EvaluationSpec, Evaluator
from fmm_distill.evaluation.features import _inception_file, as_bytes, open_features, unit_images
from fmm_distill.evaluation.metrics import FrechetDistance
from fmm_distill.evaluation.protocol import _prompts, differences
from fmm_distill.evaluation.result import Evaluation, Row
from fmm_distill.teachers.conditions import Embeddings

SETTINGS = EvaluationSettings(features="digits", samples=8, endpoint_samples=2, endpoint_solver_steps=2, batch_size=64)
DIGITS = DataSettings(source="builtin:digits")


def protocol(teacher, images=None, settings=SETTINGS):
    images = load_images(DIGITS, (1, 8, 8)) if images is None else images
    return Evaluator(EvaluationSpec(teacher, settings, images, torch.device("cpu"))).protocol


def pictures(folder, suffix, **options):
    """Gray images of 16 x 16 pixels, as files."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}", **options)
    return DataSettings(source=str(folder), fit="crop")


def test_range_and_kind_of_numbers():
    look, images = open_features("digits", (1, 8, 8)), torch.rand(3, 1, 8, 8)
    with pytest.raises(ValueError, match="expected images in the range 0 to 1, got -"):
        look(images * 2 - 1)
    with pytest.raises(ValueError, match="expected images in the range 0 to 1"):
        look(images * 255)
    with pytest.raises(ValueError, match="expected float images in"):
        look((images * 255).byte())
    assert unit_images(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.2])).tolist() == [0, 0, 0.5, 1, 1]


def test_gray_and_color():
    with pytest.raises(ValueError, match=r"expected images of shape \(1, 8, 8\), got \(3, 8, 8\)"):
        open_features("digits", (1, 8, 8))(torch.rand(3, 3, 8, 8))
    with pytest.raises(UserError, match="digits expects 1 x 8 x 8 images, the teacher generates 3 x 8 x 8"):
        open_features("digits", (3, 8, 8))


def test_rounding_is_said_and_is_another_set(teacher):
    exact = load_images(DIGITS, (1, 8, 8))
    coarse = Images((exact.pixels // 4 * 4), exact.source, levels=16)
    found = protocol(teacher)
    assert "not rounded" in found["frechet"]
    assert set(differences(found, protocol(teacher, coarse))) == {"reference_sha256"}


def test_jpeg_is_another_set(teacher, tmp_path):
    png = load_images(pictures(tmp_path / "png", "png"), (1, 8, 8))
    jpeg = load_images(pictures(tmp_path / "jpeg", "jpg", quality=90), (1, 8, 8))
    changed = differences(protocol(teacher, png), protocol(teacher, jpeg))
    assert "reference_sha256" in changed


def test_resizing_is_refused_or_said(teacher, tmp_path):
    resized = pictures(tmp_path / "images", "png")
    with pytest.raises(UserError, match="16 x 16"):
        load_images(resized.model_copy(update={"fit": "none"}), (1, 8, 8))
    images = load_images(resized, (1, 8, 8))
    found = protocol(teacher, images)
    assert found["reference_resize"] == "resized with antialiasing and cropped"
    assert found["reference_split"] == "train"
    # Without antialiasing it would be another set.
    plain = np.stack([np.asarray(Image.open(path))[::2, ::2] for path in sorted((tmp_path / "images").iterdir())])
    nearest = Images(torch.from_numpy(plain[:, None]), resized.source, split="train", resized=True)
    assert set(differences(found, protocol(teacher, nearest))) == {"reference_sha256"}
    assert differences(found, protocol(teacher)).keys() >= {"reference_resize", "frechet_reference"}


def test_other_prompts_are_another_measurement(teacher):
    def told(*prompts):
        return replace(teacher, conditions=Embeddings(prompts, None, None))

    assert _prompts(teacher) == {}
    one, same, other = (_prompts(told(*p)) for p in (("a cat", "a dog"), ("a cat", "a dog"), ("a cat", "two dogs")))
    assert differences(one, same) == {}
    assert set(differences(one, other)) == {"prompts"}


def test_count_of_samples_and_of_images(teacher):
    found = protocol(teacher)
    other = protocol(teacher, settings=SETTINGS.model_copy(update={"samples": 7}))
    assert differences(found, other)["frechet_samples"] == (8, 7)
    images = load_images(DIGITS, (1, 8, 8))
    fewer = Images(images.pixels[:-1], images.source, levels=16)
    assert differences(found, protocol(teacher, fewer))["frechet_reference"] == (
        "1797 images of builtin:digits",
        "1796 images of builtin:digits",
    )
    metric = FrechetDistance(torch.rand(100, 4), 50_000)
    with pytest.raises(FmmDistillError, match=r"expected 50000 samples \(evaluation\.samples\), got 49999"):
        metric(torch.rand(49_999, 4))


def test_numbers_of_different_protocols_are_refused(teacher):
    row = Row("student", 1, 1, 0.5, 3.0, 0.1)
    found = protocol(teacher)
    one, other = Evaluation(found, [row]), Evaluation(found | {"frechet_samples": 9}, [row])
    with pytest.raises(UserError, match="got a difference in frechet_samples: first 8, second 9"):
        compare(one, other)
    assert compare(one, other, across_protocols=True).different == {"frechet_samples": (8, 9)}
    # Clocks, devices and the solver's own error make no other number.
    again = found | {"device": "another", "seconds_per_image": "other threads", "ode_solver_error": 0.5}
    assert not compare(one, Evaluation(again, [row])).different


def test_bytes_are_rounded_not_cut_off():
    levels = torch.arange(256) / 255
    assert as_bytes(levels).tolist() == list(range(256))
    assert as_bytes(levels[:-1] + 0.6 / 255).tolist() == list(range(1, 256))


def test_inception_without_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError) as missing:
        _inception_file()
    told = str(missing.value)
    assert f"download {name} from https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{name}" in told
    assert f" into {tmp_path / 'hub' / 'checkpoints'}" in told
    assert "features: none measures endpoint error, consistency" in told
    assert "TorchScript module of your own" in told
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(b"half of it")
    with pytest.raises(UserError, match="expected torch-fidelity's file"):
        _inception_file()


def test_inception_without_its_package():
    if importlib.util.find_spec("torch_fidelity") is not None:
        pytest.skip("torch-fidelity is here")
    with pytest.raises(UserError, match=r"needs `pip install fmm-distill\[fid\]`; alternatives: "):
        open_features("inception", (3, 32, 32))
