"""Every picture that the scripts draw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.atomic import atomic_file

COLOURS = ("#1f6f8b", "#e07a1f", "#7a9e3f", "#a23e48", "#6c5b9e")


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def draw_evaluation(path: Path, rows: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]) -> None:
    """Image AUROC, pixel AUROC and AUPRO of each category, a bar for each ratio; undefined figures leave a gap."""
    rows = [*rows, *means]
    categories = list(dict.fromkeys(row["category"] for row in rows))
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    figures = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO (to 0.3)"}
    figure = Figure(figsize=(max(5, 1.5 + 0.8 * len(categories)), 7.5))
    axes = figure.subplots(len(figures), 1, sharex=True)
    value = {(row["category"], row["ratio"]): row for row in rows}
    width = 0.8 / len(ratios)
    for axis, (column, title) in zip(axes, figures.items(), strict=True):
        drawn = []
        for place, ratio in enumerate(ratios):
            heights = [value.get((name, ratio), {}).get(column) for name in categories]
            heights = [np.nan if height is None else height for height in heights]
            drawn += heights
            offsets = np.arange(len(categories)) + (place - (len(ratios) - 1) / 2) * width
            bars = axis.bar(
                offsets,
                heights,
                width * 0.92,
                color=COLOURS[place % len(COLOURS)],
                label=f"{ratio * 100:g} % of the patches",
            )
            if len(rows) <= 20:
                axis.bar_label(bars, [f"{height:.3f}" if height == height else "" for height in heights], fontsize=7)
        # Not from zero: the differences that matter are small. The axis says so by its numbers.
        lowest = np.nanmin(drawn) if not np.all(np.isnan(drawn)) else 0.5
        axis.set_ylim(max(0, np.floor((lowest - 0.05) * 10) / 10), 1.02)
        axis.set_ylabel(title)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(
        range(len(categories)),
        categories,
        rotation=30 if len(categories) > 4 else 0,
        ha="right" if len(categories) > 4 else "center",
    )
    axes[0].legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(ratios))
    save_figure(path, figure)
