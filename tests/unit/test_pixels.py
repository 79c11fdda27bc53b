"""Pixels of every kind of image file, exactly."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import load_images
from fmm_distill.errors import UserError
from tests.logs import logged

GRAY, COLOR = (1, 2, 2), (3, 2, 2)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(color_type, values, depth=16, key=None, palette=None):
    """A PNG of 2 x 2 pixels, written by hand: Pillow writes no 16-bit color and no transparent color of gray."""
    lines = np.asarray(values, ">u2" if depth == 16 else "u1").reshape(2, -1)
    content = b"".join(b"\0" + line.tobytes() for line in lines)
    extra = b"" if palette is None else chunk(b"PLTE", bytes(palette))
    extra += b"" if key is None else chunk(b"tRNS", key)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, depth, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def saved(values, mode=None, kind="PNG", **options):
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(values)) if mode is None else Image.fromarray(np.asarray(values, "u1"), mode)
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(folder, content, shape, ending="png", **settings):
    """What is loaded of one file, and the lines that are logged."""
    (folder / f"a.{ending}").write_bytes(content)
    said = []
    with logged(said):
        images = load_images(DataSettings(source=str(folder), **settings), shape)
    return images.pixels[0].movedim(0, -1).squeeze(-1).tolist(), said


DEEP = [[0, 128], [129, 65535]]


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (saved(np.array(DEEP, np.uint16)), "png"),
        (saved(np.array(DEEP, np.uint16), kind="TIFF"), "tif"),
        (saved(np.array(DEEP, ">u2"), kind="TIFF"), "tiff"),
        (saved(np.array(DEEP, np.uint16), kind="PPM"), "pgm"),
    ],
)
def test_gray_of_16_bits_is_scaled_and_rounded(tmp_path, content, ending):
    found, said = pixels(tmp_path, content, GRAY, ending)
    # 128 / 257 is below a half, 129 / 257 above.
    assert found == [[0, 0], [1, 255]]
    assert len(said) == 1
    assert "1 of 1 images have 16 bits per channel and are scaled to 8; the first of them is" in said[0]
    assert pixels(tmp_path, content, COLOR, ending)[0] == [[[0] * 3, [0] * 3], [[1] * 3, [255] * 3]]


def test_16_bits_give_all_256_levels(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found, _ = pixels(tmp_path, saved(ramp), (1, 256, 256))
    exact = ramp.astype(np.float64) / 257
    assert np.array_equal(found, np.round(exact))
    assert len(np.unique(found)) == 256


def test_color_of_16_bits_has_its_upper_bytes(tmp_path):
    values = [[[0, 255, 256], [65535, 65280, 40000]], [[1, 2, 3], [257, 514, 771]]]
    found, said = pixels(tmp_path, raw_png(2, values), COLOR)
    assert found == (np.array(values) >> 8).tolist()
    assert "have 16 bits per channel, of which the upper 8 are used" in said[0]
    # The exact levels are at most one away.
    assert np.abs(np.array(found) - np.array(values) / 257).max() < 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved(np.ones((2, 2), np.float32), kind="TIFF"), r"32-bit floats.*\(mode F\)"),
        (saved(np.ones((2, 2), np.int32), kind="TIFF"), r"32-bit integers.*\(mode I\)"),
        (saved(np.ones((2, 2, 3)), "LAB", "TIFF"), r"L\*a\*b\*.*\(mode LAB\)"),
    ],
)
@pytest.mark.parametrize("in_memory", [2**31, 0])
def test_pixels_without_a_fixed_white_are_refused_by_name(tmp_path, content, reason, in_memory):
    (tmp_path / "b.tif").write_bytes(content)
    # No share of unreadable images hides them.
    settings = DataSettings(source=str(tmp_path), max_corrupt=1.0)
    with pytest.raises(
        UserError, match=f"--data .*b.tif can't be used: its .*{reason}; save it with 8 or 16"
    ) as caught:
        list(load_images(settings, GRAY, in_memory=in_memory).batches(1))
    assert "\n" not in str(caught.value)


# Alpha 0, 51 (a fifth), 204, 255 over a hidden color of 10, 20, 30.
RGBA = [[[10, 20, 30, 0], [10, 20, 30, 51]], [[10, 20, 30, 204], [10, 20, 30, 255]]]
ON_WHITE = [[[255, 255, 255], [206, 208, 210]], [[59, 67, 75], [10, 20, 30]]]
ON_BLACK = [[[0, 0, 0], [2, 4, 6]], [[8, 16, 24], [10, 20, 30]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("background", "wanted"), [("white", ON_WHITE), ("black", ON_BLACK)])
def test_alpha_is_composited(tmp_path, kind, background, wanted):
    found, said = pixels(tmp_path, saved(RGBA, "RGBA", kind), COLOR, kind.lower(), background=background)
    assert found == wanted
    assert len(said) == 1
    assert f"have transparent pixels and are composited on {background} (data.background)" in said[0]


def palette_image(transparency):
    image = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=transparency)
    return file.getvalue()


HIDDEN = [255, 255, 255]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (palette_image(1), [[[10, 20, 30], HIDDEN], [HIDDEN, [70, 80, 90]]]),
        (palette_image(bytes([255, 0, 51])), [[[10, 20, 30], HIDDEN], [HIDDEN, [218, 220, 222]]]),
        # tRNS of gray, of color, and of both in 16 bits.
        (raw_png(0, [[1, 2], [3, 4]], 8, struct.pack(">H", 2)), [[[1] * 3, HIDDEN], [[3] * 3, [4] * 3]]),
        (
            raw_png(2, [[[1, 2, 3], [4, 5, 6]], [[1, 2, 4], [4, 5, 6]]], 8, struct.pack(">HHH", 4, 5, 6)),
            [[[1, 2, 3], HIDDEN], [[1, 2, 4], HIDDEN]],
        ),
        (
            raw_png(0, [[257, 514], [515, 65535]], 16, struct.pack(">H", 514)),
            [[[1] * 3, HIDDEN], [[2] * 3, [255] * 3]],
        ),
        (
            raw_png(
                2, [[[0, 0, 0], [256, 512, 768]], [[512, 512, 768], [0, 0, 0]]], 16, struct.pack(">3H", 256, 512, 768)
            ),
            [[[0] * 3, HIDDEN], [[2, 2, 3], [0] * 3]],
        ),
        # Gray with alpha in 8 and 16 bits; color with alpha in 16.
        (raw_png(4, [[[9, 0], [9, 255]], [[0, 51], [200, 255]]], 8), [[HIDDEN, [9] * 3], [[204] * 3, [200] * 3]]),
        (
            raw_png(4, [[[9, 0], [2304, 65535]], [[0, 65535], [51200, 65535]]]),
            [[HIDDEN, [9] * 3], [[0] * 3, [200] * 3]],
        ),
        (raw_png(6, [[[9, 9, 9, 0]] * 2, [[256, 512, 768, 65535]] * 2]), [[HIDDEN] * 2, [[1, 2, 3]] * 2]),
    ],
)
def test_transparency_of_every_kind_is_composited(tmp_path, content, wanted):
    found, said = pixels(tmp_path, content, COLOR)
    assert found == wanted
    assert sum("composited on white" in line for line in said) == 1


def test_transparency_of_other_containers(tmp_path):
    gif = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    gif.putpalette([10, 20, 30, 40, 50, 60])
    file = io.BytesIO()
    gif.save(file, "GIF", transparency=1)
    assert pixels(tmp_path, file.getvalue(), COLOR, "gif")[0] == [[[10, 20, 30], HIDDEN], [HIDDEN, [10, 20, 30]]]
    (tmp_path / "a.gif").unlink()
    webp = saved(RGBA, "RGBA", "WEBP", lossless=True, exact=True)
    assert pixels(tmp_path, webp, COLOR, "webp")[0] == ON_WHITE


def test_opaque_alpha_changes_nothing_and_is_not_logged(tmp_path):
    opaque = [[[1, 2, 3, 255]] * 2] * 2
    assert pixels(tmp_path, saved(opaque, "RGBA"), COLOR) == ([[[1, 2, 3]] * 2] * 2, [])


def test_color_for_one_channel_is_its_luma_and_logged(tmp_path):
    found, said = pixels(tmp_path, saved([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [7, 7, 7]]], "RGB"), GRAY)
    assert found == [[76, 150], [29, 7]]
    assert "have color; the teacher has one channel" in said[0]
    # Three equal channels hold no color.
    assert pixels(tmp_path, saved([[[5, 5, 5]] * 2] * 2, "RGB"), GRAY) == ([[5, 5]] * 2, [])
    assert pixels(tmp_path, saved([[[9, 0], [9, 255]]] * 2, "LA"), GRAY)[0] == [[255, 9]] * 2


@pytest.mark.parametrize(
    ("content", "ending", "wanted"),
    [
        (saved([[3, 4], [5, 6]], "L"), "png", [[[3] * 3, [4] * 3], [[5] * 3, [6] * 3]]),
        (saved(np.array([[False, True]] * 2)), "png", [[[0] * 3, [255] * 3]] * 2),
        (saved([[[0, 255, 255, 0], [0, 0, 0, 255]]] * 2, "CMYK", "TIFF"), "tif", [[[255, 0, 0], [0, 0, 0]]] * 2),
        (saved([[[128, 128, 128], [90, 128, 128]]] * 2, "YCbCr", "TIFF"), "tif", [[[128] * 3, [90] * 3]] * 2),
    ],
)
def test_other_modes(tmp_path, content, ending, wanted):
    found, _ = pixels(tmp_path, content, COLOR, ending)
    assert found == wanted


@pytest.mark.parametrize(("kind", "ending"), [("GIF", "gif"), ("TIFF", "tif"), ("PNG", "png"), ("WEBP", "webp")])
def test_of_several_frames_the_first_is_used(tmp_path, kind, ending):
    frames = [Image.new("RGB", (2, 2), (level, level, level)) for level in (8, 200)]
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    found, said = pixels(tmp_path, file.getvalue(), COLOR, ending)
    assert found == [[[8] * 3] * 2] * 2
    assert sum("have several frames, of which the first is used" in line for line in said) == 1


@pytest.mark.parametrize(
    "values", [np.array([[0, 257], [514, 65535]], np.uint16), np.array([[0, 1], [2, 255]], np.uint8)]
)
def test_orientation_is_that_of_the_camera(tmp_path, values):
    exif = Image.Exif()
    # 3: upside down.
    exif[0x0112] = 3
    found, _ = pixels(tmp_path, saved(values, kind="PNG", exif=exif), GRAY)
    assert found == [[255, 2], [1, 0]]


def test_each_conversion_is_logged_once_with_its_number(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(saved(RGBA if i else np.zeros((2, 2, 3), np.uint8), "RGBA" if i else None))
    counted, lazy = [], []
    with logged(counted):
        load_images(DataSettings(source=str(tmp_path)), COLOR)
    with logged(lazy):
        images = load_images(DataSettings(source=str(tmp_path)), COLOR, in_memory=0)
        for _ in range(2):
            list(images.batches(2))
    (line,) = counted
    assert line.startswith("data: 4 of 5 images have transparent pixels")
    assert line.endswith("1.png")
    (line,) = lazy
    assert "1.png and perhaps others have transparent pixels" in line


def test_the_background_is_part_of_what_is_stored_under(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(RGBA, "RGBA"))
    lazy = [
        load_images(DataSettings(source=str(tmp_path), background=name), COLOR, in_memory=0).fingerprint
        for name in ("white", "black")
    ]
    assert lazy[0] != lazy[1]
