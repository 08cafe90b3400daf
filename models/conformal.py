"""From the scores of good parts to a threshold with a chosen false-alarm rate. NumPy alone, for edge devices.

Split conformal prediction: if a good part's score is as likely to take any place among n held-out scores as any other,
it exceeds the k-th smallest with probability (n + 1 - k) / (n + 1) at most, whatever the scores' distribution.
"""

import math

import numpy as np

from models.errors import InputError


def smallest_rate(scores: np.ndarray) -> float:
    """The smallest false-alarm rate that n calibration scores can vouch for: 1 / (n + 1)."""
    return 1 / (len(scores) + 1)


def scores_needed(rate: float) -> int:
    """The fewest calibration scores that can vouch for a false-alarm rate: 99 for 0.01."""
    return math.ceil(1 / rate - 1e-9) - 1


def conformal_threshold(scores: np.ndarray, rate: float) -> float:
    """The score above which a part is called defective: the ceil((n + 1)(1 - rate))-th smallest of n scores.

    Args:
        scores: (n,) of good parts that the detector has not seen, in any order.
        rate: share of good parts, above 0 and below 1, that may be called defective. One below ``smallest_rate`` cannot
            be had from so few scores: the largest score is the threshold then.

    Raises:
        InputError: there are no scores, or some are not finite, or the rate is out of range.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not 0 < rate < 1:
        raise InputError(f"a false-alarm rate is above 0 and below 1, not {rate}")
    if not scores.size:
        raise InputError(describe_rate(scores, rate))
    if not np.isfinite(scores).all():
        raise InputError("no threshold can be set: the model's calibration scores are not finite; train it again")
    allowed = math.floor((len(scores) + 1) * rate + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return float(np.sort(scores)[len(scores) - min(max(allowed, 1), len(scores))])


def describe_rate(scores: np.ndarray, rate: float) -> str:
    """The rate that a threshold keeps, and why if it is not the one asked for."""
    if not len(scores):
        return "no threshold can be set: training had too few images to hold any back; train with more"
    smallest = smallest_rate(scores)
    if rate >= smallest:
        return f"false-alarm rate {rate:g} ({len(scores)} good parts)"
    return (
        f"false-alarm rate {smallest:.3g}, the smallest that {len(scores)} good parts can vouch for "
        f"({rate:g} asked, which takes {scores_needed(rate)})"
    )


def p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How likely a good part scores as high or higher: (1 + how many of n calibration scores do) / (n + 1).

    ``calibration`` (n,), ``scores`` (N,) -> (N,) in 1 / (n + 1) to 1. At most ``rate`` for exactly those above
    ``conformal_threshold(calibration, rate)``.
    """
    calibration = np.sort(np.asarray(calibration, dtype=np.float64))
    below = np.searchsorted(calibration, np.asarray(scores, dtype=np.float64), side="left")
    return (1 + len(calibration) - below) / (1 + len(calibration))
