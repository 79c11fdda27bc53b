"""The Wasserstein bounds of arXiv 2406.07507 hold at every point of a training run, and the true map attains 0."""

from __future__ import annotations

import pytest

from experiments.bounds import LOSSES, TRUTH, Affine, constant, distance, loss_on_its_line, run


@pytest.mark.parametrize("name", LOSSES)
def test_the_bound_holds_along_a_training_run(name):
    record = run(name, steps=150)
    assert len(record) == 16
    for _, reached, bound in record:
        assert reached <= bound
    first, last = record[0], record[-1]
    assert last[1] < first[1] / 50
    assert last[2] < first[2] / 10


@pytest.mark.parametrize("name", LOSSES)
def test_both_sides_are_zero_at_the_truth(name):
    assert distance(TRUTH) < 1e-20
    assert loss_on_its_line(TRUTH, name) < 1e-20
    assert distance(Affine()) > 0.1


def test_the_lagrangian_constant_carries_the_lipschitz_factor():
    assert constant("lagrangian") > 3 * constant("eulerian")
