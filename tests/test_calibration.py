"""Distances of good parts, units, threshold and p-value: against their definitions, and against what they promise."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.calibration import calibration_images, held_out_from_the_metric
from models.cells import Cells
from models.conformal import conformal_threshold, p_values, smallest_rate
from models.coreset import greedy_coreset
from models.errors import InputError
from models.scoring import WEDGE_NET, AnomalyMap
from models.whitening import fit_whitening
from tests.test_cells import draw_images, held_out, memory_by_loops
from utils.pipeline.shards import InMemory
from utils.pipeline.training import calibrate

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


def test_each_of_a_few_images_is_measured_by_a_metric_made_without_it():
    features = draw_images(6, 0)
    patches = features.flatten(0, 1)
    rows = greedy_coreset(patches, 20).sort().values
    found = held_out_from_the_metric(features, rows, 0.1, averaged=True)
    for image in range(6):
        mapped = fit_whitening(features[torch.arange(6) != image].flatten(0, 1), 0.1)(features)
        memory = memory_by_loops(mapped, torch.arange(6), rows, True, [image])
        expected = torch.cdist(mapped[image].double(), memory).amin(dim=1).float()
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-4)


def test_a_few_images_lie_as_far_as_new_ones_do():
    """In many dimensions few patches lie too near by a metric that they made themselves."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.randn(60, 60, generator=generator)

    def draw(count):
        return torch.randn(count, 16, 60, generator=generator) @ shape

    found = []
    for _ in range(20):
        features = draw(10)
        patches, owners = features.flatten(0, 1), torch.arange(160) // 16
        metric = fit_whitening(patches, 0.01)
        found.append(
            [
                held_out(metric(features), torch.arange(10), 10, metric(patches), owners)[0].mean(),
                held_out_from_the_metric(features, torch.arange(160), 0.01, averaged=True).mean(),
                torch.cdist(metric(draw(10).flatten(0, 1)), metric(patches)).amin(dim=1).mean(),
            ]
        )
    nearer, honest, new = torch.tensor(found).mean(dim=0)
    assert nearer < 0.93 * new < 0.97 * new < honest < 1.05 * new


def test_as_many_images_are_held_out_as_time_allows():
    assert calibration_images(30, [(784, 100, 40)]).tolist() == list(range(30))
    assert len(calibration_images(5000, [(784, 10, 40), (196, 10, 112)])) == 2000
    few = calibration_images(5000, [(784, 400_000, 200)])
    assert len(few) == 31  # 2e12 multiply-adds
    assert (few[0], few[-1]) == (0, 4999) and few.diff().float().std() < 1
    assert len(calibration_images(5000, [(784, 4_000_000, 200)])) == 20
    assert calibration_images(1, [(784, 78, 40)]).tolist() == [0]


GRIDS = [(4, 4), (2, 2)]


def calibrated(count, spreads=(0.5, 0.6, 0.8)):
    """``calibrate`` of ``count`` images at two scales, seen in three conditions, and what it is given."""
    scales = [draw_images(count, 3)[:, : rows * columns] * (10**place) for place, (rows, columns) in enumerate(GRIDS)]
    altered = [
        [
            scale + (spread - 0.4) * torch.randn(scale.shape, generator=torch.Generator().manual_seed(5))
            for scale in scales
        ]
        for spread in spreads[1:]
    ]
    memories = []
    for scale in scales:
        rows = greedy_coreset(scale.flatten(0, 1), max(1, count)).sort().values
        chosen = scale.flatten(0, 1)[rows]
        memories.append(Cells(scale, torch.arange(count), count, chosen, rows // scale.shape[1], averaged=True))
    net = SimpleNamespace(conditions=spreads, scoring=WEDGE_NET, region=None, grids=lambda image_size: GRIDS)
    settings = SimpleNamespace(image_size=(32, 32))
    calibration = calibrate(net, settings, memories, InMemory(scales, settings), count, altered)
    return calibration, memories, scales, altered


def scores_by_loops(distances, units, offset):
    """Image scores of distances (n, h*w) at each scale: both maps, each in its unit, added, and their maximum.

    Half of the lower quartile of an image's distances is taken out of them.
    """
    maps = [
        AnomalyMap(grid, (32, 32))((own - own.sort().values[:, own.shape[1] // 4 - 1, None] / 2).view(-1, *grid)) * unit
        for own, grid, unit in zip(distances, GRIDS, units, strict=True)
    ]
    return (sum(maps) + offset).amax(dim=(1, 2))


def test_units_and_offsets_make_good_parts_alike_at_every_scale_and_in_every_condition():
    (units, offsets, scores, judged, distances), memories, scales, altered = calibrated(30)
    images = torch.arange(30)
    conditions = [
        [memory.distances(images, own)[0] for own, memory in zip(parts, memories, strict=True)]
        for parts in (scales, *altered)
    ]
    assert torch.equal(judged, images)
    assert all(map(torch.equal, distances, conditions[0]))
    for own, unit in zip(conditions[0], units[0], strict=True):
        assert (own * unit).square().mean().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(scores, scores_by_loops(conditions[0], units[0], 0), rtol=1e-4, atol=1e-4)
    assert offsets[0] == 0
    for own, unit, offset in zip(conditions, units, offsets, strict=True):
        alike = scores_by_loops(own, unit, offset)
        assert alike.mean().item() == pytest.approx(scores.mean().item(), rel=1e-4)
        assert alike.std().item() == pytest.approx(scores.std().item(), rel=1e-3)
    torch.testing.assert_close(units[1] / units[1, 0], units[0] / units[0, 0])  # scales weigh alike in all conditions
    assert units[0, 0] > units[1, 0] > units[2, 0]


def test_of_one_or_two_images_units_are_known_all_the_same():
    (units, offsets, scores, *_), _, scales, _ = calibrated(1)
    assert len(scores) == 0 and not offsets.any()
    for unit, scale in zip(units.T, scales, strict=True):
        expected = 1 / scale.square().sum(dim=2).mean().sqrt()
        torch.testing.assert_close(unit, expected.expand(3))
    (units, offsets, scores, *_), *_ = calibrated(2)
    assert units.isfinite().all() and offsets.isfinite().all() and scores.isfinite().all()
