"""Where in a picture: the connected regions of an anomaly map above a threshold, with NumPy alone."""

import math
from typing import NamedTuple

import numpy as np


class Region(NamedTuple):
    """The worst region of a map, in pixels: of the map, or after :meth:`in_file` of the picture's own file.

    ``x`` and ``y`` are its leftmost column and its top row, ``width`` and ``height`` count columns and rows; ``area``
    counts the pixels that belong to it. ``regions`` is how many there are, this one included.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    regions: int

    def in_file(self, corner: tuple[float, float], scale: tuple[float, float], size: tuple[int, int]) -> "Region":
        """The smallest box of whole pixels around it in a file of ``size`` (width, height).

        ``corner`` and ``scale`` are what ``Geometry.in_file`` gives for that size.
        """
        x, width = _whole(self.x, self.width, corner[0], scale[0], size[0])
        y, height = _whole(self.y, self.height, corner[1], scale[1], size[1])
        area = min(max(1, round(self.area * scale[0] * scale[1])), width * height)
        return Region(x, y, width, height, area, self.regions)


def _whole(start: int, length: int, corner: float, scale: float, side: int) -> tuple[int, int]:
    """Start and length along one axis in whole pixels of the file, at least one of them and none outside."""
    first = min(max(0, math.floor(corner + start * scale + 1e-6)), side - 1)
    end = min(max(first + 1, math.ceil(corner + (start + length) * scale - 1e-6)), side)
    return first, end - first


def worst_region(anomaly_map: np.ndarray, threshold: float) -> Region | None:
    """The region with the highest value of a map (H, W), in the map's pixels; None if nothing is above the threshold.

    Pixels that touch, if only at a corner, belong together (as for AUPRO in ``utils/metrics.py``).
    """
    values = np.asarray(anomaly_map, np.float64)  # compared as the scores are: in float32 a threshold is rounded
    rows, starts, ends = _runs(values > threshold)
    if not len(rows):
        return None
    names = _components(rows, starts, ends, values.shape[1])
    row, column = np.unravel_index(np.argmax(values), values.shape)
    worst = names == names[(rows == row) & (starts <= column) & (column < ends)]
    x, y = starts[worst].min(), rows[worst].min()
    width, height = ends[worst].max() - x, rows[worst].max() + 1 - y
    area = (ends - starts)[worst].sum()
    return Region(*map(int, (x, y, width, height, area, len(np.unique(names)))))


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, first column and column behind the last of each horizontal run of a mask (H, W), in reading order."""
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    return rows, starts, np.nonzero(steps == -1)[1]


def _components(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, width: int) -> np.ndarray:
    """(n,) for each run the number of the first run that it is connected with."""
    stride = width + 2  # so that runs can be looked up by row and column in one sorted list
    first = np.searchsorted(rows * stride + ends, (rows + 1) * stride + starts)
    behind = np.searchsorted(rows * stride + starts, (rows + 1) * stride + ends, side="right")
    below = np.maximum(behind - first, 0)  # how many runs of the next row each touches
    upper = np.repeat(np.arange(len(rows)), below)
    lower = np.arange(below.sum()) - np.repeat(np.cumsum(below) - below, below) + np.repeat(first, below)
    names = np.arange(len(rows))
    while True:
        # Of two runs that touch, the one that the other is named after takes the lower name; names of names follow.
        previous, lowest = names.copy(), np.minimum(names[upper], names[lower])
        np.minimum.at(names, previous[upper], lowest)
        np.minimum.at(names, previous[lower], lowest)
        names = names[names]
        if (names == previous).all():
            return names
