"""Threshold and p-value: against a direct count, and against what they promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.conformal import conformal_threshold, p_values, smallest_rate
from models.errors import InputError

scores = st.lists(st.integers(0, 20), min_size=1, max_size=60).map(lambda values: np.array(values, np.float32))
percent = st.integers(1, 99)


@given(scores, percent)
def test_threshold_is_the_order_statistic_of_the_definition(calibration, rate):
    place = math.ceil((len(calibration) + 1) * (1 - Fraction(rate, 100)))  # exact, unlike floats
    expected = sorted(calibration)[min(place, len(calibration)) - 1]
    assert conformal_threshold(calibration, rate / 100) == expected


@given(scores, st.integers(-1, 21))
def test_p_value_counts_the_scores_that_are_as_high(calibration, score):
    expected = (1 + sum(value >= score for value in calibration)) / (len(calibration) + 1)
    assert p_values(calibration, np.array([score]))[0] == pytest.approx(expected)


@given(scores, st.integers(-1, 21), percent)
def test_a_score_is_above_the_threshold_exactly_if_its_p_value_is_within_the_rate(calibration, score, rate):
    rate = max(rate / 100, smallest_rate(calibration))
    p_value = p_values(calibration, np.array([score]))[0]
    assert (score > conformal_threshold(calibration, rate)) == (p_value <= rate + 1e-9)


def test_good_parts_are_called_defective_at_the_rate_that_was_asked_for():
    rng = np.random.default_rng(0)
    trials, calibration_size, rate = 4000, 59, 0.05  # 60 * 0.05 = 3: the promise is met with equality
    samples = rng.lognormal(size=(trials, calibration_size + 1))
    alarms = sum(row[-1] > conformal_threshold(row[:-1], rate) for row in samples)
    assert abs(alarms / trials - rate) < 4 * math.sqrt(rate * (1 - rate) / trials)


def test_too_few_scores_for_the_rate_give_the_largest_score():
    calibration = np.array([3.0, 1.0, 2.0])
    assert smallest_rate(calibration) == 0.25
    assert conformal_threshold(calibration, 0.01) == conformal_threshold(calibration, 0.25) == 3.0
    assert conformal_threshold(calibration, 0.5) == 2.0


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [1.0, math.inf]])
def test_without_usable_scores_there_is_no_threshold(bad):
    with pytest.raises(InputError, match="no threshold can be set"):
        conformal_threshold(np.array(bad), 0.01)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2])
def test_a_rate_is_a_share(rate):
    with pytest.raises(InputError, match="above 0 and below 1"):
        conformal_threshold(np.array([1.0]), rate)
