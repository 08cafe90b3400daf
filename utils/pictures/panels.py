"""Pictures made of image panels: what the detector sees in one image, and how corruption changes its maps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils.pictures.figures import save_figure
from utils.pictures.heatmap import REGION

HEAT = "inferno"
OUTLINE = "#19e3ff"  # stands out from every colour of HEAT


@dataclass(frozen=True)
class Streams:
    """One image (H, W, 3) in [0, 1] and what is seen of it.

    ``mask`` (H, W) bool, the ground truth, None if there is none; ``frequency`` and ``semantic`` (h, w), each from 0 to
    1 over the image; ``semantic_counts``, whether the score depends on it; ``region`` (H, W) bool, what is looked at,
    if not all; ``condition`` that the image is judged in, if there are several.
    """

    image: np.ndarray
    mask: np.ndarray | None
    frequency: np.ndarray
    semantic: np.ndarray
    semantic_counts: bool
    region: np.ndarray | None = None
    condition: str | None = None


class Maps(NamedTuple):
    """What one method says of several images: anomaly ``maps`` (N, H, W), ``scores``, and its training threshold."""

    maps: np.ndarray
    scores: Sequence[float]
    threshold: float | None


def colour_scale(maps: np.ndarray, threshold: float | None) -> Normalize:
    """The range of colours of a set of anomaly maps, the threshold within: good parts alone should not look hot."""
    values = [maps.min(), maps.max(), *([] if threshold is None else [threshold])]
    return Normalize(min(values), max(values))


def draw_result(
    path: Path,
    name: str,
    streams: Streams,
    anomaly: np.ndarray,
    scale: Normalize,
    score: float,
    threshold: float | None,
) -> None:
    """Six panels: input, ground truth, frequency map, semantic map, anomaly score, overlay (the paper's Figure 3).

    ``anomaly`` (H, W) is the anomaly map and ``scale`` the range of its colours; ``score`` is the image's.
    """
    height, width = streams.image.shape[:2]
    # Six wide panels in a row would be slits: what is more than twice as wide as high gets three rows of two.
    rows, columns = (3, 2) if width > 2 * height else (1, 6)
    across, down = _panel_size(height, width)
    figure = Figure(figsize=(columns * across, rows * (down + 0.25) + 0.25), layout="constrained")
    condition = "" if streams.condition is None else f"    condition {streams.condition}"
    figure.suptitle(f"{name}{condition}    score {score:.4g}{_verdict(score, threshold)}", fontsize=10)
    axes = figure.subplots(rows, columns).ravel()
    _panel(axes[0], streams.image)
    _panel(axes[1], streams.mask, "no mask", height / width, cmap="gray", vmin=0, vmax=1)
    _panel(axes[2], streams.frequency, cmap="viridis", vmin=0, vmax=1)
    _panel(axes[3], streams.semantic, cmap="viridis", vmin=0, vmax=1)
    _panel(axes[4], anomaly, cmap=HEAT, norm=scale)
    _panel(axes[5], streams.image)
    # The hotter, the less transparent: the part stays visible where nothing is wrong.
    axes[5].imshow(anomaly, cmap=HEAT, norm=scale, alpha=0.85 * scale(anomaly) ** 3)
    if streams.mask is not None and streams.mask.any():
        axes[5].contour(streams.mask, [0.5], colors=OUTLINE, linewidths=1.2)
        axes[5].set_xlabel("outline: ground truth", fontsize=7)
    if streams.region is not None:
        for axis in axes[[0, 5]]:
            _region(axis, streams.region)
        axes[0].set_xlabel("dashed: what is looked at", fontsize=7)
    for axis, counts in zip(axes[2:4], (True, streams.semantic_counts), strict=True):
        axis.set_xlabel("0 to 1 in each image" + ("" if counts else ", not in the score"), fontsize=7)
    axes[4].set_xlabel("one scale for the category", fontsize=7)
    titles = ("input", "ground truth", "frequency map", "semantic map", "anomaly score", "overlay")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
    # Beside the last column: one of several low panels is too short for what is written along the bar.
    _colour_bar(figure, axes[columns - 1 :: columns], scale, threshold, fraction=0.05)
    save_figure(path, figure)


def draw_levels(
    path: Path,
    name: str,
    labels: Sequence[str],
    images: np.ndarray,
    methods: Mapping[str, Maps | None],
    region: np.ndarray | None = None,
) -> None:
    """A row for each level: the original, the corrupted image, each method's anomaly map (None: a grey column).

    ``images`` (N, H, W, 3) in [0, 1], the first one uncorrupted; ``region`` (H, W) bool, what is looked at, if not all.
    One colour scale for each method over all levels.
    """
    height, width = images.shape[1:3]
    across, down = _panel_size(height, width)
    figure = Figure(figsize=(4 * across, (down + 0.1) * len(labels) + 1), layout="constrained")
    figure.suptitle(f"{name}, a good part", fontsize=10)
    axes = figure.subplots(len(labels), 2 + len(methods))
    for row, label, image in zip(axes, labels, images, strict=True):
        _panel(row[0], images[0])
        _panel(row[1], image)
        if region is not None:
            _region(row[1], region)
        row[0].set_ylabel(label, fontsize=9)
    for column, found in zip(axes.T[2:], methods.values(), strict=True):
        if found is None:
            for axis in column:
                _panel(axis, None, "Skipped", height / width)
            column[-1].set_xlabel("no usable memory bank", fontsize=8)
            continue
        scale = colour_scale(found.maps, found.threshold)
        for axis, values, score in zip(column, found.maps, found.scores, strict=True):
            _panel(axis, values, cmap=HEAT, norm=scale)
            axis.set_xlabel(f"score {score:.4g}{_verdict(score, found.threshold)}", fontsize=7)
        _colour_bar(figure, column, scale, found.threshold, location="bottom", fraction=0.02, pad=0.01)
    for axis, title in zip(axes[0], ("original", "corrupted", *methods), strict=True):
        axis.set_title(title, fontsize=9)
    save_figure(path, figure)


def _region(axis: Axes, region: np.ndarray) -> None:
    """The outline of a region (H, W) bool over an image, along the picture's edge too."""
    padded = np.pad(region, 1)
    sides = (np.arange(-1, side + 1) for side in reversed(region.shape))
    limits = axis.axis()
    axis.contour(*sides, padded, [0.5], colors=REGION, linewidths=1, linestyles="dashed")
    axis.axis(limits)


class Framed(NamedTuple):
    """A picture (H, W, 3), a ``box`` in it (x, y, width, height) in its pixels, and what is written above it."""

    image: np.ndarray
    box: tuple[int, int, int, int]
    title: str


def draw_framed(path: Path, title: str, pictures: Sequence[Framed]) -> None:
    """Pictures in a grid, each with its box outlined."""
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    across, down = (
        max(sides) for sides in zip(*(_panel_size(*each.image.shape[:2]) for each in pictures), strict=True)
    )
    figure = Figure(figsize=(columns * across, rows * (down + 0.35) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, each in zip(axes, pictures, strict=False):
        _panel(axis, each.image)
        x, y, width, height = each.box
        # Dark under bright: seen on any part.
        for colour, line in (("black", 3.0), (OUTLINE, 1.5)):
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, linewidth=line))
        axis.set_title(each.title, fontsize=7)
    for axis in axes[len(pictures) :]:
        axis.set_axis_off()
    save_figure(path, figure)


def _panel_size(height: int, width: int) -> tuple[float, float]:
    """Inches across and down for an image of this shape: of all shapes the area is that of a square of 2 inches."""
    stretch = math.sqrt(width / height)
    return 2 * stretch, 2 / stretch


def _panel(
    axis: Axes, values: np.ndarray | None, without: str = "", proportion: float = 1.0, **colours: object
) -> None:
    """An image without ticks; where there is none, a grey field of that ``proportion`` (height by width) that says
    why."""
    axis.set_xticks([])
    axis.set_yticks([])
    if values is not None:
        axis.imshow(values, **colours)
        return
    axis.set_facecolor("0.85")
    axis.set_box_aspect(proportion)
    axis.text(0.5, 0.5, without, transform=axis.transAxes, ha="center", va="center", color="0.35")


def _verdict(score: float, threshold: float | None) -> str:
    if threshold is None:
        return ""
    sign, verdict = (">", "defective") if score > threshold else ("≤", "good")
    return f" {sign} {threshold:.4g}: {verdict}"


def _colour_bar(
    figure: Figure, axes: Axes | np.ndarray, scale: Normalize, threshold: float | None, **place: object
) -> None:
    bar = figure.colorbar(ScalarMappable(scale, HEAT), ax=axes, **place)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("anomaly score", fontsize=7)
    if threshold is not None:
        bar.set_label("anomaly score (line: threshold)", fontsize=7)
        draw_line = bar.ax.axvline if bar.orientation == "horizontal" else bar.ax.axhline
        draw_line(threshold, color=OUTLINE, linewidth=2)
