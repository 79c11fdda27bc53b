"""Sounds of every layout are decoded to [batch, channels, length] and drawn as waveforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmm_distill.evaluation.gallery import Gallery
from fmm_distill.evaluation.pictures import plot_samples
from fmm_distill.evaluation.waveforms import waveform_images
from fmm_distill.student.student import Student
from fmm_distill.teachers.codec import decoded_of
from fmm_distill.teachers.load import load_teacher
from tests.tiny import audio, video

PIPELINES = audio.PIPELINES | video.PIPELINES


@pytest.mark.parametrize(
    ("shape", "decoded"),
    [
        ((2, 7), (2, 1, 7)),
        ((2, 1, 7), (2, 1, 7)),
        ((2, 2, 7), (2, 2, 7)),
        ((2, 4, 5, 3), (2, 3, 4, 5)),
        ((2, 6, 4, 5, 3), (2, 3, 6, 4, 5)),
    ],
)
def test_outputs_of_pipelines_have_their_channels_after_the_batch(shape, decoded):
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    made = decoded_of(values)
    assert tuple(made.shape) == decoded
    # Sounds are in [-1, 1] already, images in [0, 1].
    assert float(made.max()) == pytest.approx(float(values.max()) if len(shape) < 4 else 2 * float(values.max()) - 1)


def test_a_column_of_a_waveform_goes_from_its_lowest_to_its_highest_value():
    time = torch.linspace(0, 2 * torch.pi, 128 * 50)
    sounds = torch.stack([torch.stack([time.sin(), 0 * time]), torch.stack([0.5 * time.cos(), 0 * time])])
    images = waveform_images(sounds, sounds)
    assert images.shape == (2, 1, 130, 128)
    assert set(images.unique().tolist()) == {-1.0, 1.0}
    height = torch.arange(65, dtype=torch.float64)[:, None]
    for image, wave in zip(images[:, 0, :65].double(), (time.sin(), 0.5 * time.cos()), strict=True):
        bright = (image + 1) / 2
        middle = 1 - (bright * height).sum(0) / bright.sum(0) / 32
        assert (middle - wave.double().unflatten(0, (128, 50)).mean(1)).abs().max() < 0.04
    # Silence is a line in the middle of its channel.
    assert images[0, 0, 65 + 32].eq(1).all()
    assert images[0, 0, 65:].eq(1).sum() == 128


def test_sounds_that_are_short_loud_or_not_finite():
    sounds = torch.tensor([[[0.0, 1.0, 0.0]], [[5.0, -5.0, 5.0]], [[0.0, float("nan"), 0.0]]])
    images = waveform_images(sounds, sounds[:1])
    assert images.shape == (3, 1, 65, 128)
    assert images[1, 0, 0].eq(1).any()
    assert images[1, 0, -1].eq(1).any()
    assert images[2].eq(-1).all()


@pytest.mark.parametrize(("name", "channels"), [("audioldm2", 1), ("stable-audio", 2)])
def test_sounds_of_a_prompted_teacher_are_drawn(tmp_path, name, channels):
    tiny = PIPELINES[name]
    tiny.build().save_pretrained(tmp_path, safe_serialization=True)
    teacher = load_teacher(str(tmp_path), prompts=("a cat",), call=dict(tiny.call))
    gallery = Gallery(teacher, 2, 2, 0, torch.device("cpu"))
    rows = gallery.rows(Student.from_teacher(teacher), (1,))
    assert {tuple(images.shape) for images in rows.values()} == {(2, 1, 65 * channels, 128)}
    plot_samples(rows, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 1000
