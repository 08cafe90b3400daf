import itertools

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import f1_score, roc_auc_score

from utils.metrics import aupro, auroc, evaluate, f1_max


def slow_aupro(masks, maps, limit=0.3):
    """Threshold by threshold, region by region."""
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        marked = maps >= threshold
        rate = (marked & ~masks).sum() / (~masks).sum()
        overlaps = []
        for mask, found in zip(masks, marked, strict=True):
            labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
            overlaps += [found[labelled == region].mean() for region in range(1, count + 1)]
        points.append((rate, np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@pytest.mark.parametrize("levels", [5, 30, 10_000])
def test_aupro_equals_a_slow_reference(levels):
    rng = np.random.default_rng(levels)
    masks = ndimage.binary_dilation(rng.random((4, 24, 24)) > 0.99, structure=np.ones((1, 3, 3)))
    masks[3] = False
    maps = np.round((rng.random(masks.shape) + 0.4 * masks) * levels) / levels
    assert aupro(masks, maps) == pytest.approx(slow_aupro(masks, maps), abs=1e-9)


def test_aupro_of_a_perfect_and_of_an_inverted_map():
    masks = np.zeros((1, 10, 10), bool)
    masks[0, 2:4, 2:4] = masks[0, 7, 7] = True
    assert aupro(masks, masks.astype(float)) == pytest.approx(1)
    assert aupro(masks, -masks.astype(float)) == pytest.approx(0)
    assert aupro(np.zeros_like(masks), masks.astype(float)) is None


def test_auroc_is_scikit_learns_and_undefined_for_one_class():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 50), rng.random(50)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert auroc(np.ones(4, int), rng.random(4)) is None
    assert auroc(np.zeros(4, int), rng.random(4)) is None


def test_f1_max_is_the_best_over_all_thresholds():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    scores = np.round(labels * 0.4 + rng.random(60), 1)
    best, threshold = f1_max(labels, scores)
    assert best == pytest.approx(max(f1_score(labels, scores >= t) for t in np.unique(scores)))
    assert f1_score(labels, scores >= threshold) == pytest.approx(best)


def test_evaluate_without_masks_leaves_pixel_figures_out():
    metrics = evaluate(np.array([0, 1]), np.array([0.1, 0.2]), None, None)
    assert metrics.image_auroc == 1
    assert metrics.pixel_auroc is None
    assert metrics.aupro is None
