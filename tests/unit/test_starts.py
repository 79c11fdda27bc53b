from __future__ import annotations

from itertools import combinations

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError

from fmm_distill.core.draws import Draws, draw
from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.core.time_axis import expand
from fmm_distill.data.samples import ImageBatch
from fmm_distill.data.starting_points import StartingPoints, interpolant_velocity, teacher_jump
from fmm_distill.losses.time_sampling import TimeSampling, sample_diagonal_times, sample_times
from fmm_distill.teachers.load import load_teacher

NAMES = ("noise", "first", "second", "kind", "image", "uniform", "condition", "guidance", "flip", "policy")
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
MANY = draw(3, 7, 20000, (1,))


def schedule_of(beta_schedule):
    return VariancePreserving(DDPMScheduler(beta_schedule=beta_schedule).alphas_cumprod)


def equal(a: Draws, b: Draws) -> dict[str, bool]:
    return {name: torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES}


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].abs()


def test_draws_are_a_function_of_seed_and_step():
    torch.manual_seed(0)
    first = draw(1, 2, 16, (1, 8, 8))
    torch.manual_seed(1)
    torch.rand(5)
    assert all(equal(first, draw(1, 2, 16, (1, 8, 8))).values())


@pytest.mark.parametrize(("seed", "step"), [(1, 3), (2, 2), (2, 1), (12, 2), (1, 22)])
def test_other_seeds_and_steps_draw_other_numbers(seed, step):
    assert not any(equal(draw(1, 2, 16, (1, 8, 8)), draw(seed, step, 16, (1, 8, 8))).values())


def test_numbers_written_side_by_side_are_told_apart():
    # "1" and "23" against "12" and "3".
    assert not any(equal(draw(1, 23, 8, (4,)), draw(12, 3, 8, (4,))).values())


def test_drawing_leaves_the_global_stream_alone():
    before = torch.random.get_rng_state()
    draw(0, 0, 8, (4,))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_sample_depends_on_its_place_alone():
    few, many = draw(0, 5, 6, (1, 8, 8)), draw(0, 5, 32, (1, 8, 8))
    assert all(equal(few, many.part(0, 6, "cpu")).values())


def test_times_do_not_depend_on_the_event():
    few, many = draw(0, 5, 16, (2,)), draw(0, 5, 16, (3, 16, 16))
    same = equal(few, many)
    assert not same.pop("noise")
    assert all(same.values())


@pytest.mark.parametrize(("one", "other"), list(combinations(NAMES, 2)))
def test_every_stream_is_its_own(one, other):
    # Six standard deviations of 20000 draws.
    assert correlation(getattr(MANY, one).flatten(), getattr(MANY, other).flatten()) < 0.042


def test_distributions():
    assert MANY.noise.mean().abs() < 0.03
    assert MANY.noise.std() == pytest.approx(1, abs=0.03)
    for name in NAMES[1:]:
        values = getattr(MANY, name)
        assert values.dtype == torch.float64
        assert values.min() >= 0
        assert values.max() < 1
        assert values.mean() == pytest.approx(0.5, abs=0.01)
        assert values.var() == pytest.approx(1 / 12, abs=0.003)


def test_part_slices_every_field():
    whole = draw(0, 0, 12, (1, 4, 4))
    part = whole.part(4, 8, "cpu")
    for name in NAMES:
        assert torch.equal(getattr(part, name), getattr(whole, name)[4:8])
    pieces = [whole.part(i, i + 4, "cpu") for i in (0, 4, 8)]
    assert torch.equal(torch.cat([piece.noise for piece in pieces]), whole.noise)


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["timestep", "time"])
@pytest.mark.parametrize(("prior", "diagonal"), [(0, 0), (0.5, 0), (1, 0), (0, 1), (0.3, 0.5), (0.7, 0.3)])
def test_pairs(beta_schedule, spacing, prior, diagonal):
    schedule = schedule_of(beta_schedule)
    t, r = sample_times(TimeSampling(prior=prior, diagonal=diagonal, spacing=spacing), schedule, MANY, 0)
    assert t.dtype == r.dtype == torch.float64
    assert (t >= r).all()
    assert r.min() >= schedule.t_min
    assert t.max() <= schedule.t_max
    assert (t == schedule.t_max).double().mean() == pytest.approx(prior, abs=0.015)
    assert (t == r).double().mean() == pytest.approx(diagonal, abs=0.015)
    assert not ((t == schedule.t_max) & (t == r)).any()


@pytest.mark.parametrize("spacing", ["timestep", "time"])
def test_what_pairs_are_uniform_in(spacing):
    schedule = schedule_of("linear")
    t, r = sample_times(TimeSampling(prior=0, spacing=spacing), schedule, MANY, 0)
    if spacing == "timestep":
        t, r = schedule.timestep(t) / 999, schedule.timestep(r) / 999
    else:
        t, r = ((time - schedule.t_min) / (schedule.t_max - schedule.t_min) for time in (t, r))
    # Maximum and minimum of two uniforms.
    for quantile in (0.1, 0.5, 0.9):
        assert (t < quantile).double().mean() == pytest.approx(quantile**2, abs=0.02)
        assert (r < quantile).double().mean() == pytest.approx(1 - (1 - quantile) ** 2, abs=0.02)


def test_ends_of_jumps_from_noise_are_uniform():
    schedule = schedule_of("linear")
    _, r = sample_times(TimeSampling(prior=1), schedule, MANY, 0)
    shares = schedule.timestep(r) / 999
    for quantile in (0.1, 0.5, 0.9):
        assert (shares < quantile).double().mean() == pytest.approx(quantile, abs=0.02)


def test_start_and_length_are_not_one_number():
    # One uniform used for both would make every jump from a time equally long.
    t, r = sample_times(TimeSampling(prior=0), schedule_of("linear"), MANY, 0)
    assert 0.1 < correlation(t, t - r) < 0.9
    assert correlation(t, r) < 0.9


@pytest.mark.parametrize("spacing", ["timestep", "time"])
def test_times_of_the_diagonal_are_even_over_the_way(spacing):
    schedule = schedule_of("linear")
    t = sample_diagonal_times(TimeSampling(prior=0.5, spacing=spacing), schedule, MANY)
    whole = schedule.t_max - schedule.t_min
    share = schedule.timestep(t) / 999 if spacing == "timestep" else (t - schedule.t_min) / whole
    levels = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(share.quantile(levels), levels, rtol=0, atol=0.02)


def test_noise_says_nothing_about_times():
    t, r = sample_times(TimeSampling(prior=0), schedule_of("linear"), MANY, 0)
    assert correlation(MANY.noise.flatten(), t) < 0.042
    assert correlation(MANY.noise.flatten(), t - r) < 0.042


def test_jumps_to_data_end_at_t_min():
    schedule = schedule_of("linear")
    t, r = sample_times(TimeSampling(prior=0.2, data=0.5), schedule, MANY, 0)
    assert (r == schedule.t_min).double().mean() == pytest.approx(0.5, abs=0.015)
    assert (t == schedule.t_max).double().mean() == pytest.approx(0.2, abs=0.015)
    shares = schedule.timestep(t[r == schedule.t_min]) / 999
    for quantile in (0.1, 0.5, 0.9):
        assert (shares < quantile).double().mean() == pytest.approx(quantile, abs=0.03)


def test_dyadic_jumps_start_at_multiples_of_their_length():
    schedule = schedule_of("linear")
    t, r = sample_times(TimeSampling(prior=0, dyadic=3, spacing="time"), schedule, MANY, 0)
    span = schedule.t_max - schedule.t_min
    length, end = (t - r) / span, (r - schedule.t_min) / span
    levels, counts = (1 / length).round().unique(return_counts=True)
    assert levels.tolist() == [1, 2, 4, 8]
    assert (counts / 20000 - 0.25).abs().max() < 0.02
    torch.testing.assert_close(end / length, (end / length).round(), rtol=0, atol=1e-9)
    assert {int(i) for i in (end / length)[length < 0.2].round()} == set(range(8))


def test_the_band_grows_to_the_whole_triangle():
    schedule = schedule_of("linear")
    sampling = TimeSampling(prior=0.5, band_steps=100, spacing="time")
    lengths = [
        (lambda t, r: (t - r).max().item())(*sample_times(sampling, schedule, MANY, step)) for step in (0, 50, 100)
    ]
    span = schedule.t_max - schedule.t_min
    assert lengths == pytest.approx([0.1 * span, 0.55 * span, span], rel=0.01)
    grown, whole = (
        sample_times(sampling, schedule, MANY, 100),
        sample_times(TimeSampling(prior=0.5, spacing="time"), schedule, MANY, 0),
    )
    assert torch.equal(grown[1], whole[1])


def test_terms_get_their_share_of_every_part_of_a_batch():
    for part in (MANY.part(0, 64, "cpu"), MANY.part(64, 128, "cpu")):
        assert (part.position < 0.25).double().mean() == pytest.approx(0.25, abs=0.02)
    assert correlation(MANY.position, MANY.first) < 0.03


def test_points_on_the_path_of_their_own_image(teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    draws = draw(0, 0, 6, teacher.event_shape)
    images = torch.rand(6, *teacher.event_shape)
    t = torch.full((6,), teacher.schedule.t_max, dtype=torch.float64)
    x = StartingPoints(teacher, teacher_jump(teacher), ImageBatch(images), on_path=True)(draws, t)
    v = interpolant_velocity(draws.noise, images)(x, t)
    torch.testing.assert_close(x - float(t[0]) * v, images, rtol=0, atol=1e-5)
    from_prior = StartingPoints(teacher, teacher_jump(teacher), ImageBatch(images))(draws, t)
    assert torch.equal(from_prior, teacher.prior(draws.noise))


@pytest.mark.parametrize(
    "change",
    [
        {"dyadic": 2},
        {"prior": 0, "dyadic": 2, "band_steps": 5},
        {"prior": 0.6, "data": 0.5},
        {"prior": 0.7, "diagonal": 0.4},
        {"prior": -0.1},
        {"diagonal": 1.1},
        {"other": 1},
    ],
)
def test_impossible_pairs(change):
    with pytest.raises(ValidationError):
        TimeSampling(**change)


@pytest.fixture
def draws(teacher):
    return draw(0, 0, 6, teacher.event_shape)


def never(x, t, r, cond=None):
    raise AssertionError("no jump was needed")


def shift(x, t, r, cond=None):
    """A mover that shows what it was asked."""
    return x + expand(10 * t + r, x)


def test_points_at_the_start_are_the_prior(teacher, draws):
    t = torch.full((6,), teacher.schedule.t_max, dtype=torch.float64)
    expected = teacher.prior(draws.noise)
    assert torch.equal(StartingPoints(teacher, never)(draws, t), expected)
    images = torch.ones(6, *teacher.event_shape)
    assert torch.equal(StartingPoints(teacher, never, ImageBatch(images))(draws, t), expected)


def test_points_from_images_are_the_interpolant(teacher, draws):
    t = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.02, teacher.schedule.t_max], dtype=torch.float64)
    images = torch.rand(6, *teacher.event_shape)
    x = StartingPoints(teacher, never, ImageBatch(images))(draws, t)
    s = expand(t, images)
    torch.testing.assert_close(x[:5], ((1 - s) * images + s * draws.noise)[:5])
    assert torch.equal(x[5], teacher.prior(draws.noise)[5])


def test_points_without_images_are_jumps_from_the_prior(teacher, draws):
    t_max = teacher.schedule.t_max
    t = torch.tensor([0.1, t_max, 0.9, 0.3, t_max, 0.5], dtype=torch.float64)
    prior = teacher.prior(draws.noise)
    x = StartingPoints(teacher, shift)(draws, t)
    assert torch.equal(x[[1, 4]], prior[[1, 4]])
    rest = torch.tensor([0, 2, 3, 5])
    torch.testing.assert_close(x[rest], prior[rest] + expand(10 * t_max + t[rest], prior))


def test_points_carry_no_graph(teacher, draws):
    weight = torch.ones((), requires_grad=True)
    t = torch.full((6,), 0.5, dtype=torch.float64)
    assert not StartingPoints(teacher, lambda x, t, r, cond: weight * x)(draws, t).requires_grad


def test_teacher_jump_is_its_ode(teacher, draws):
    prior = teacher.prior(draws.noise)
    t = torch.full((6,), teacher.schedule.t_max, dtype=torch.float64)
    r = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    with torch.no_grad():
        few, more, most = (teacher_jump(teacher, steps)(prior, t, r) for steps in (2, 8, 64))
        one = teacher_jump(teacher, 1)(prior, t, r)
        torch.testing.assert_close(one, prior - expand(t - r, prior) * teacher.velocity(prior, t))
    assert (more - most).norm() < (few - most).norm()


def test_logit_normal_times_are_drawn_before_they_are_sorted():
    schedule = schedule_of("linear")
    sampling = TimeSampling(
        prior=0.2, data=0.2, spacing="time", distribution="logit_normal", logit_mean=-0.4, logit_std=1.5
    )
    t, r = sample_times(sampling, schedule, MANY, 0)
    shares = torch.stack([t, r])
    shares = (shares - schedule.t_min) / (schedule.t_max - schedule.t_min)
    inside = (t < schedule.t_max) & (r > schedule.t_min)
    normal = torch.distributions.Normal(-0.4, 1.5)
    for quantile in (0.1, 0.5, 0.9):
        # Maximum and minimum of two draws; the draw itself where the other end is fixed.
        at = torch.sigmoid(normal.icdf(torch.tensor(quantile, dtype=torch.float64)))
        assert (shares[0][inside] < at).double().mean() == pytest.approx(quantile**2, abs=0.02)
        assert (shares[1][inside] < at).double().mean() == pytest.approx(1 - (1 - quantile) ** 2, abs=0.02)
        assert (shares[1][t == schedule.t_max] < at).double().mean() == pytest.approx(quantile, abs=0.03)
        assert (shares[0][r == schedule.t_min] < at).double().mean() == pytest.approx(quantile, abs=0.03)


@pytest.mark.parametrize("spacing", ["timestep", "time"])
def test_jumps_on_a_grid_cover_the_jumps_they_come_from(spacing):
    schedule = schedule_of("linear")
    free = sample_times(TimeSampling(prior=0.2, data=0.2, diagonal=0.1, spacing=spacing), schedule, MANY, 0)
    sampling = TimeSampling(prior=0.2, data=0.2, diagonal=0.1, spacing=spacing, grid=9)
    t, r = sample_times(sampling, schedule, MANY, 0)
    points = sample_times(sampling, schedule, MANY.rows((MANY.kind < 0.9).nonzero()[:, 0]), 0)
    grid = schedule.time_at(torch.linspace(0, 1, 10, dtype=torch.float64))
    if spacing == "time":
        grid = torch.linspace(schedule.t_min, schedule.t_max, 10, dtype=torch.float64)
    assert (torch.cat(points)[:, None] - grid).abs().min(1).values.max() < 1e-12
    assert (points[0] > points[1]).all()
    jumps = t > r
    assert (t >= free[0] - 1e-12)[jumps].all()
    assert (r <= free[1] + 1e-12)[jumps].all()
    assert jumps.double().mean() == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize(
    "values",
    [
        {"prior": 0, "dyadic": 3, "grid": 8},
        {"prior": 0, "dyadic": 3, "distribution": "logit_normal"},
        {"logit_mean": -0.4},
        {"logit_std": 2.0},
        {"distribution": "logit_normal", "logit_std": 0},
    ],
    ids=str,
)
def test_settings_of_pairs_that_do_nothing_or_clash(values):
    with pytest.raises(ValidationError):
        TimeSampling(**values)
