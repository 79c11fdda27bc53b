"""Metrics against independent computations on the same features, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fmm_distill.errors import FmmDistillError
from fmm_distill.evaluation.metrics import (
    ClipScore,
    EndpointError,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    precision_recall,
)
from fmm_distill.evaluation.metrics.kernel import SUBSETS, kernel_distance


def drawn(count, width, scale=1.0, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, width, generator=generator) @ mixing * scale + shift


REFERENCE, SAMPLES = drawn(700, 24), drawn(600, 24, 1.1, 0.2, seed=1)


def test_frechet_distance_against_scipy():
    a, b = SAMPLES.double().numpy(), REFERENCE.double().numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    theirs = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    metric = FrechetDistance(REFERENCE, len(SAMPLES))
    assert metric(SAMPLES)["frechet"].value == pytest.approx(theirs, rel=1e-6)
    # The form that is used for its error is the same distance.
    assert float(metric.closed_form(SAMPLES.double())) == pytest.approx(theirs, rel=1e-6)


def test_the_frechet_distance_of_a_set_to_itself_is_nothing():
    metric = FrechetDistance(REFERENCE, len(REFERENCE))
    assert metric(REFERENCE)["frechet"].value == pytest.approx(0, abs=1e-6)
    # The samples are forgotten, the reference is not.
    assert metric(SAMPLES[torch.arange(700) % 600])["frechet"].value > 1
    assert metric(REFERENCE)["frechet"].value == pytest.approx(0, abs=1e-6)


def test_batches_are_one_set():
    for kind in (FrechetDistance, KernelDistance, PrecisionRecall):
        metric = kind(REFERENCE, len(SAMPLES))
        complete = metric(SAMPLES)
        metric.reset()
        for batch in SAMPLES.split(70):
            metric.update(batch)
        assert metric.compute() == complete
        assert tuple(complete) == metric.quantities


def direct_mmd(x, y):
    """Squared maximum mean discrepancy, unbiased, sum by sum; kernel (x.y / d + 1)^3."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    among_x = (kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1))
    among_y = (kernel(y, y).sum() - np.trace(kernel(y, y))) / (m * (m - 1))
    return among_x + among_y - 2 * kernel(x, y).mean()


def test_kernel_distance_against_direct_sums():
    # A subset of all is the set: no draw is left.
    whole = kernel_distance(REFERENCE[:600].double(), SAMPLES.double(), 1, 600)
    assert whole == pytest.approx(direct_mmd(REFERENCE[:600].double().numpy(), SAMPLES.double().numpy()), rel=1e-6)
    metric = KernelDistance(REFERENCE, len(SAMPLES))
    # The same draws again, written down.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = []
        for _ in range(SUBSETS):
            real = REFERENCE[torch.randperm(700)[: metric.subset]].double().numpy()
            fake = SAMPLES[torch.randperm(600)[: metric.subset]].double().numpy()
            values.append(direct_mmd(real, fake))
    assert metric.subset == 300
    assert metric(SAMPLES)["kid"].value == pytest.approx(np.mean(values), rel=1e-6)


def test_precision_and_recall_against_loops():
    reference, samples = drawn(41, 3), drawn(37, 3, 1.5, seed=1)
    precision, recall = PrecisionRecall(reference, 37)(samples).values()
    index = [round(i * 40 / 36) for i in range(37)]
    real, fake = reference[index].double().numpy(), samples.double().numpy()

    def share(points, centers):
        inside = 0
        for point in points:
            for center in centers:
                others = sorted(np.linalg.norm(center - other) for other in centers)
                # The first of these is the center itself.
                if np.linalg.norm(point - center) <= others[3]:
                    inside += 1
                    break
        return inside / len(points)

    assert precision.value == pytest.approx(share(fake, real))
    assert recall.value == pytest.approx(share(real, fake))
    assert 0 < precision.value < 1
    assert precision.error == pytest.approx(math.sqrt(precision.value * (1 - precision.value) / 37))


def test_precision_and_recall_know_what_is_missing():
    left, right = drawn(200, 2), drawn(200, 2, shift=50.0, seed=1)
    both = torch.stack([left, right], 1).flatten(0, 1)
    precision, recall = PrecisionRecall(both, 200)(left).values()
    assert precision.value > 0.9
    assert recall.value < 0.6
    precision, recall = PrecisionRecall(left, 200)(both[:200]).values()
    assert precision.value < 0.6
    assert recall.value > 0.8


def test_a_smaller_number_is_compared_as_if_there_were_no_more_samples():
    few = PrecisionRecall(REFERENCE, len(SAMPLES), most=20)(SAMPLES)
    index = torch.linspace(0, len(REFERENCE) - 1, 20, dtype=torch.float64).round().long()
    assert few == PrecisionRecall(REFERENCE[index], 20)(SAMPLES[:20])
    assert few != PrecisionRecall(REFERENCE, len(SAMPLES))(SAMPLES)


def test_chunks_change_nothing(monkeypatch):
    complete = PrecisionRecall(REFERENCE, len(SAMPLES))(SAMPLES)
    monkeypatch.setattr(precision_recall, "_BLOCK", 17)
    assert PrecisionRecall(REFERENCE, len(SAMPLES))(SAMPLES) == complete


def test_inception_score_against_its_formula():
    scores = drawn(300, 6, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shuffled = scores[torch.randperm(300)].double()
    values = []
    for part in shuffled.chunk(10):
        p = part.softmax(1)
        values.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    found = InceptionScore()(scores)["inception_score"]
    assert found.value == pytest.approx(np.mean(values), rel=1e-6)
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(10), rel=1e-6)


def test_draws_of_metrics_leave_the_global_generator():
    state = torch.get_rng_state()
    metrics = KernelDistance(REFERENCE, len(SAMPLES)), FrechetDistance(REFERENCE, len(SAMPLES)), InceptionScore()
    one = [metric(SAMPLES) for metric in metrics]
    torch.rand(3)
    assert [metric(SAMPLES) for metric in metrics] == one
    torch.set_rng_state(state)


@pytest.mark.parametrize("count", [599, 601])
def test_another_count_than_asked_is_refused(count):
    samples = drawn(count, 24)
    for kind in (FrechetDistance, KernelDistance, PrecisionRecall):
        with pytest.raises(FmmDistillError, match=rf"expected 600 samples \(evaluation.samples\), got {count}"):
            kind(REFERENCE, 600)(samples)


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_standard_errors_are_the_spread_over_other_samples(kind):
    metric = kind(drawn(500, 8), 400)
    (quantity,) = metric.quantities
    found = [metric(drawn(400, 8, 1.2, seed=seed))[quantity] for seed in range(24)]
    spread = torch.tensor([value.value for value in found]).std()
    told = torch.tensor([value.error for value in found]).mean()
    assert 0.6 * spread < told < 2 * spread


def test_root_mean_square_and_its_error():
    distances = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5
    # Samples of one entry each, whose squared distances to 0 are these.
    samples = distances.double().sqrt()[:, None]
    found = EndpointError(torch.zeros_like(samples))(samples)["endpoint_error"]
    assert found.value == pytest.approx(float(distances.mean().sqrt()))
    # By leaving out each in turn.
    parts = torch.stack([(distances.sum() - d) / 49 for d in distances]).sqrt()
    jackknife = float(((parts - parts.mean()).square().sum() * 49 / 50).sqrt())
    assert found.error == pytest.approx(jackknife, rel=2e-2)
    assert EndpointError(samples[:1] * 0)(samples[:1])["endpoint_error"].error is None
    assert ClipScore()(distances)["clip_score"].error == pytest.approx(float(distances.std()) / math.sqrt(50))
