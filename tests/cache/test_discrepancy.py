"""Equations 1 and 2 against numbers worked out by hand."""

import math

import numpy as np
import pytest

from ddk_cache.discrepancy import gap_factor, initial_factor, update_factor

RATIO_1_2 = math.exp(1) / (math.exp(1) + math.exp(2))  # softmax of (1, 2), first entry: 0.26894...


def test_equation_1_by_hand() -> None:
    factor = initial_factor(np.array([10.0, 40.0]), np.array([10.0, 20.0]))
    np.testing.assert_allclose(factor, [RATIO_1_2, 1 - RATIO_1_2], rtol=1e-12)
    assert factor[0] == pytest.approx(0.2689414213699951)


def test_equation_2_by_hand() -> None:
    factor = update_factor(np.array([0.25, 0.75]), np.array([10.0, 40.0]), np.array([10.0, 20.0]), 0.5)
    psi = 0.25 * math.e / (0.25 * math.e + 0.75 * math.e**2)
    np.testing.assert_allclose(factor, [0.5 * psi + 0.25, 0.5 * (1 - psi) + 0.25], rtol=1e-12)


def test_without_smoothing_the_old_factor_plays_no_part() -> None:
    student, teacher = np.array([12.0, 30.0, 9.0]), np.array([10.0, 20.0, 8.0])
    for factor in ([0.98, 0.01, 0.01], [1 / 3] * 3):
        np.testing.assert_array_equal(
            update_factor(np.array(factor), student, teacher, None), initial_factor(student, teacher)
        )


def test_ratios_of_ten_thousand_do_not_overflow() -> None:
    teacher = np.array([10.0, 10.0, 10.0])
    student = np.array([100_000.0, 100_010.0, 10.0])  # ratios 10,000, 10,001 and 1
    np.testing.assert_allclose(initial_factor(student, teacher), [RATIO_1_2, 1 - RATIO_1_2, 0.0], atol=1e-12)
    factor = update_factor(np.full(3, 1 / 3), student, teacher, 0.5)
    np.testing.assert_allclose(factor, 0.5 * np.array([RATIO_1_2, 1 - RATIO_1_2, 0]) + 1 / 6, rtol=1e-9)


def test_every_domain_keeps_its_floor_and_the_sum_is_one() -> None:
    factor = np.array([1.0, 0.0, 0.0, 0.0])
    for _ in range(50):
        factor = update_factor(factor, np.array([9e5, 1, 1, 1.0]), np.ones(4), 0.7)
        assert factor.sum() == pytest.approx(1)
        assert (factor >= 0.3 / 4 - 1e-12).all()


def test_a_perplexity_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        initial_factor(np.array([np.inf, 1.0]), np.ones(2))


def test_the_gap_shares_out_by_the_ratio_itself() -> None:
    student, teacher = np.array([30.0, 120.0, 10.0]), np.array([10.0, 20.0, 10.0])  # ratios 3, 6 and 1
    np.testing.assert_allclose(gap_factor(student, teacher, 1.0), [0.3, 0.6, 0.1], rtol=1e-12)
    np.testing.assert_allclose(gap_factor(student, teacher, 0.5), [9 / 46, 36 / 46, 1 / 46], rtol=1e-12)


def test_a_gap_of_an_untrained_student_does_not_overflow() -> None:
    factor = gap_factor(np.array([1e300, 1e300, 1.0]), np.array([1e-8, 1e-8, 1.0]), 1e-3)
    np.testing.assert_allclose(factor, [0.5, 0.5, 0])
