"""How well scores part defective from good: the benchmarks' usual figures, each between 0 and 1."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

from models.conformal import conformal_threshold, scores_needed, smallest_rate

AUPRO_LIMIT = 0.3  # false-positive rate up to which AUPRO integrates
FALSE_ALARMS = 0.05  # nominal rate of the robustness tables: one of 0.01 would show in few test sets
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of false alarms, that a user may choose from


@dataclass(frozen=True)
class Metrics:
    """None where a figure is undefined: no good or no defective image, no masks."""

    image_auroc: float | None
    pixel_auroc: float | None
    aupro: float | None
    f1_max: float | None
    f1_threshold: float | None


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve; ``labels`` 0 or 1. None if only one class is there."""
    if labels.min(initial=1) == labels.max(initial=0):
        return None
    return float(roc_auc_score(labels, scores))


def f1_max(labels: np.ndarray, scores: np.ndarray) -> tuple[float | None, float | None]:
    """The best F1 that any threshold gives, and the lowest score that still counts as defective there."""
    if labels.min(initial=1) == labels.max(initial=0):
        return None, None
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    return float(f1[best]), float(thresholds[best])


def aupro(
    masks: np.ndarray, maps: np.ndarray, limit: float = AUPRO_LIMIT, inside: np.ndarray | None = None
) -> float | None:
    """Area under the per-region-overlap curve up to a false-positive rate of ``limit``, divided by ``limit``.

    Per-region overlap at a threshold is the share of a connected defect region (8 neighbours) that the map marks,
    averaged over all regions of all images, so that a small defect counts as much as a large one (Bergmann et al.,
    "The MVTec Anomaly Detection Dataset", IJCV 2021).

    Args:
        masks: (N, H, W) bool.
        maps: (N, H, W) anomaly maps.
        limit: in (0, 1].
        inside: (H, W) bool, the pixels that count; None for all.
    """
    inside = np.ones(masks.shape[1:], bool) if inside is None else inside
    masks = masks & inside
    if not masks.any() or masks[:, inside].all():
        return None
    weight = np.zeros(masks.shape, np.float64)  # what marking a pixel adds to the mean overlap
    regions = 0
    for mask, share in zip(masks, weight, strict=True):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(labelled.ravel(), minlength=count + 1)
        share[mask] = 1 / sizes[labelled[mask]]
        regions += count
    weight, masks, maps = weight[:, inside], masks[:, inside], maps[:, inside]
    order = np.argsort(maps, axis=None)[::-1]
    scores = maps.ravel()[order]
    last_of_score = np.append(np.flatnonzero(np.diff(scores)), scores.size - 1)  # equal scores are marked together
    overlap = np.cumsum(weight.ravel()[order])[last_of_score] / regions
    normal = np.cumsum(~masks.ravel()[order])[last_of_score]
    rate, overlap = np.append(0, normal / normal[-1]), np.append(0, overlap)
    inside = rate < limit
    at_limit = np.interp(limit, rate, overlap)
    return float(auc(np.append(rate[inside], limit), np.append(overlap[inside], at_limit)) / limit)


def evaluate(
    labels: np.ndarray,
    scores: np.ndarray,
    masks: np.ndarray | None,
    maps: np.ndarray | None,
    inside: np.ndarray | None = None,
) -> Metrics:
    """All figures of one category: image ``labels`` and ``scores`` (N,), ``masks`` and ``maps`` (N, H, W) or None.

    Of the pixels only those count that are ``inside`` (H, W), if that is given.
    """
    best, threshold = f1_max(labels, scores)
    counted = slice(None) if inside is None else inside
    pixel = None if masks is None else auroc(masks[:, counted].ravel().astype(np.uint8), maps[:, counted].ravel())
    overlap = None if masks is None else aupro(masks, maps, inside=inside)
    return Metrics(auroc(labels, scores), pixel, overlap, best, threshold)


def training_threshold(calibration: np.ndarray, rate: float) -> float | None:
    """The score above which a part is called defective at a nominal false-alarm rate.

    ``calibration`` (n,) are scores of good parts that the bank has not seen; None if there are none.
    """
    return conformal_threshold(calibration, rate) if len(calibration) else None


def rates_bought(
    labels: np.ndarray, scores: np.ndarray, calibration: np.ndarray
) -> list[dict[str, float | int | None]]:
    """For each of ``RATES`` what it costs and finds on test images (labels 0 and 1).

    ``calibration`` (n,), n >= 1, are scores of good parts. A rate that n cannot vouch for is kept at the smallest that
    they can, ``kept_rate``; ``pictures_needed`` is how many could.
    """
    rows = []
    for rate in RATES:
        threshold = conformal_threshold(calibration, rate)
        alarms, detections = alarm_rates(labels, scores, threshold)
        row = {"asked_rate": rate, "kept_rate": max(rate, smallest_rate(calibration)), "threshold": threshold}
        row |= {"false_alarm_rate": alarms, "detection_rate": detections}
        rows.append(row | {"training_pictures": len(calibration), "pictures_needed": scores_needed(rate)})
    return rows


def alarm_rates(labels: np.ndarray, scores: np.ndarray, threshold: float | None) -> tuple[float | None, float | None]:
    """Shares of the good and of the defective images (labels 0 and 1) above ``threshold``; None where undefined."""
    groups = (scores[labels == label] for label in (0, 1))
    false_alarms, detections = (
        float((group > threshold).mean()) if threshold is not None and len(group) else None for group in groups
    )
    return false_alarms, detections
