"""Scores of good parts, threshold and p-value: against their definitions, and against what they promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.calibration import held_out_scores
from models.conformal import conformal_threshold, p_values, smallest_rate
from models.coreset import greedy_coreset
from models.errors import InputError
from models.memory_bank import MemoryBank
from models.scoring import AnomalyMap

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


def draw_images(count, seed):
    """(count, 16, 6) features: patches of a place resemble each other from image to image."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(16, 6, generator=torch.Generator().manual_seed(99)) * 4
    return places + torch.randn(count, 16, 6, generator=generator) * 0.5


def held_out_reference(features, rows, folds):
    """The definition, in float64: each fold against the others' vectors and what closes the holes that it leaves."""
    patches = features.flatten(0, 1).double()
    radius = torch.cdist(patches, patches[rows]).amin(dim=1).max()
    images = len(features)
    scores = []
    for fold in range(folds):
        first, last = images * fold // folds, images * (fold + 1) // folds
        image_of = torch.arange(len(patches)) // 16
        inside = (image_of >= first) & (image_of < last)
        bank = [row for row in rows.tolist() if not inside[row]]
        while True:
            distances = torch.cdist(patches, patches[bank]).amin(dim=1)
            outside = torch.where(inside, 0.0, distances)
            if outside.max() <= radius * (1 + 1e-6):
                break
            bank.append(outside.argmax().item())
        scores += [
            AnomalyMap((4, 4), (32, 32))(distances.view(images, 4, 4).float())[i].max() for i in range(first, last)
        ]
    return torch.stack(scores)


def test_held_out_scores_are_those_of_the_definition():
    features = draw_images(23, 0)
    rows = greedy_coreset(features.flatten(0, 1), 30).sort().values
    scores = held_out_scores(features, features.flatten(0, 1)[rows], rows // 16, AnomalyMap((4, 4), (32, 32)))
    torch.testing.assert_close(scores, held_out_reference(features, rows, 10), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 1.0])
def test_held_out_scores_are_distributed_like_those_of_new_images(ratio):
    features, fresh = draw_images(100, 1), draw_images(400, 2)
    patches, anomaly_map = features.flatten(0, 1), AnomalyMap((4, 4), (32, 32))
    rows = greedy_coreset(patches, int(len(patches) * ratio)).sort().values
    calibration = held_out_scores(features, patches[rows], rows // 16, anomaly_map).numpy()
    distances = MemoryBank(patches[rows]).nearest(fresh.flatten(0, 1)).view(-1, 4, 4)
    scores = anomaly_map.predict(distances).scores.numpy()
    assert abs(calibration.mean() - scores.mean()) < 0.25 * scores.std()
    alarms = (scores > conformal_threshold(calibration, 0.1)).mean()
    assert 0.03 < alarms < 0.2  # 0.1, give or take what 100 and 400 images tell
