from __future__ import annotations

import pytest
import torch

from fmm_distill.config.recipe import parse
from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError
from fmm_distill.run.given import Given
from fmm_distill.run.plan import open_teacher
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.guidance import Guidance
from tests.conftest import save_teacher, tiny_unet


@pytest.fixture
def two(tmp_path):
    """A teacher and a weaker one: the same network with its last layer halved."""
    network = tiny_unet()
    save_teacher(tmp_path / "strong", network)
    with torch.no_grad():
        network.conv_out.weight /= 2
    save_teacher(tmp_path / "weak", network)
    return str(tmp_path / "strong"), str(tmp_path / "weak")


def opened(strong, **guidance):
    return open_teacher(parse({"teacher": strong, "guidance": guidance}, "here"))


@torch.no_grad()
def test_autoguidance_is_the_difference_to_a_weaker_teacher(two):
    strong, weak = two
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    better, worse = opened(strong).velocity(x, t), opened(weak).velocity(x, t)
    guided = opened(strong, scale=2.5, weaker=weak, interval=(0.4, 1.0)).velocity(x, t)
    torch.testing.assert_close(guided[1:], (worse + 2.5 * (better - worse))[1:])
    assert torch.equal(guided[0], better[0])
    assert (guided[1:] - better[1:]).abs().max() > 1e-3


def test_a_weaker_teacher_of_another_shape(two, tmp_path):
    save_teacher(tmp_path / "large", tiny_unet(sample_size=16))
    with pytest.raises(
        UserError, match=r"guidance\.weaker .*large: expected the teacher's shape and range of time .*got .*16"
    ):
        opened(two[0], scale=2.0, weaker=str(tmp_path / "large"))


def test_a_weaker_teacher_without_a_scale(two):
    with pytest.raises(UserError, match=r"guidance\.weaker: expected a guidance\.scale other than 1"):
        opened(two[0], weaker=two[1])


def test_outside_the_interval_the_null_answer_is_not_asked_for():
    v, t = torch.ones(2, 3), torch.tensor([0.1, 0.2])

    def never():
        raise AssertionError("not needed")

    assert Guidance(3.0, (0.5, 1.0)).guided(v, never, t) is v
    assert Guidance(1.0).guided(v, never, t) is v
    guided = Guidance(3.0, (0.15, 1.0)).guided(v, lambda: torch.zeros(2, 3), t)
    assert guided.tolist() == [[1, 1, 1], [3, 3, 3]]


class Instructions(Classes):
    """Three conditions: prompt and image, the image alone, neither."""

    def __init__(self):
        super().__init__(("both", "image", "none"), 1)

    def check_without_image(self):
        pass

    def without_image(self, cond):
        return Conditioning({"class_labels": torch.full_like(cond.inputs["class_labels"], 2)})


class Gaussians:
    """The flow of a Gaussian in each dimension; its mean is a function of the condition, its deviation is not."""

    event_shape = (3,)

    def __init__(self, conditions, means):
        self.conditions, self.means = conditions, means.double()

    def velocity(self, x, t, cond=None):
        t, deviation = t[:, None], torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        mean = self.means[torch.zeros(len(x), dtype=torch.long) if cond is None else cond.inputs["class_labels"]]
        spread = (1 - t) ** 2 * deviation**2 + t**2
        normed = (x.double() - (1 - t) * mean) / spread
        return t * normed - mean - deviation**2 * (1 - t) * normed


@torch.no_grad()
def test_guidance_by_the_image_too_moves_the_mean_of_a_gaussian():
    means = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    field, x = Gaussians(Instructions(), means), torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).double()
    t, cond = torch.tensor([0.3, 0.8], dtype=torch.float64), Conditioning({"class_labels": torch.zeros(2).long()})
    for scale, image_scale in ((7.5, 1.5), (3.0, 1.0), (1.0, 2.0), (4.0, 0.5)):
        settings = {"scale": scale, "image_scale": image_scale}
        teacher = Given(teacher=field).open_teacher(parse({"teacher": "builtin:digits", "guidance": settings}, "here"))
        # The velocity is affine in the mean: eq. 3 of arXiv 2211.09800 for means is that for velocities.
        both, image, none = means
        mean = none + image_scale * (image - none) + scale * (both - image)
        expected = Gaussians(None, mean[None]).velocity(x, t)
        torch.testing.assert_close(teacher.velocity(x, t, cond), expected, atol=1e-12, rtol=1e-12)
        assert teacher.guidance.calls == (2 if image_scale == 1 else 3)
    # With a range each sample has its own scale, and the image has one.
    settings = {"scale": 4.0, "image_scale": 1.5, "range": [1.0, 8.0], "interval": [0.5, 1.0]}
    teacher = Given(teacher=field).open_teacher(parse({"teacher": "builtin:digits", "guidance": settings}, "here"))
    mean = none + 1.5 * (image - none) + 2.0 * (both - image)
    expected = torch.stack(
        [Gaussians(None, m[None]).velocity(x[i : i + 1], t[i : i + 1])[0] for i, m in enumerate((both, mean))]
    )
    scales = torch.tensor([8.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(teacher.velocity(x, t, cond.guided(scales)), expected, atol=1e-12, rtol=1e-12)


def test_an_image_scale_where_there_is_no_such_guidance(two, tmp_path):
    classes = save_teacher(tmp_path / "classes", tiny_unet(num_class_embeds=3))
    with pytest.raises(UserError, match=r"guidance\.image_scale 1\.5 for an unconditional teacher; expected 1"):
        opened(two[0], image_scale=1.5)
    with pytest.raises(UserError, match=r"expected a label for no class"):
        opened(str(classes), image_scale=1.5)
    field = Gaussians(Classes(("both", "image", "none"), 2), torch.zeros(3, 3))
    recipe = parse({"teacher": "builtin:digits", "guidance": {"image_scale": 1.5}}, "here")
    with pytest.raises(UserError, match=r"guidance\.image_scale: expected 1 for a teacher of classes, got 1\.5"):
        Given(teacher=field).open_teacher(recipe)
    with pytest.raises(UserError, match=r"guidance\.image_scale: expected 1 with guidance\.weaker"):
        opened(two[0], scale=2.0, image_scale=1.5, weaker=two[1])


def test_a_guided_velocity_has_the_norms_of_the_unguided_one_along_an_axis():
    v, null = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    plain = Guidance(4.0).guided(v, lambda: null, t)
    for axis in (1, 2):
        guided = Guidance(4.0, norm_axis=axis).guided(v, lambda: null, t)
        torch.testing.assert_close(guided.norm(dim=axis), v.norm(dim=axis))
        # Guidance turns each vector, in the plane of both velocities.
        cosine = torch.nn.functional.cosine_similarity(guided, plain, dim=axis)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    # One scale per sample, and a vector of zeros.
    v[1] = 0
    guided = Guidance(4.0, (0.0, 1.0), (1.0, 4.0), norm_axis=2).guided(v, lambda: null, t, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(guided, v)
    assert guided.isfinite().all()
