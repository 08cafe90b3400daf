"""Every picture that the scripts draw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from utils.atomic import atomic_file
from utils.metrics import FALSE_ALARMS

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
    figure = Figure(figsize=(max(5, 1.5 + max(0.8, 0.4 * len(ratios)) * len(categories)), 7.5))
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


def draw_rates(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Defects found and false alarms by the false-alarm rate asked for, a colour for each category and ratio."""
    figure = Figure(figsize=(7, 4.5))
    axis = figure.subplots()
    asked = sorted({row["asked_rate"] for row in rows})
    axis.plot(asked, asked, color="0.5", linestyle=":", label="false alarms as asked")
    for place, (category, ratio) in enumerate(dict.fromkeys((row["category"], row["ratio"]) for row in rows)):
        own = [row for row in rows if (row["category"], row["ratio"]) == (category, ratio)]
        colour, name = COLOURS[place % len(COLOURS)], f"{category}, {ratio * 100:g} % of the patches"
        for column, line, what in (
            ("detection_rate", "-", "defects found"),
            ("false_alarm_rate", "--", "false alarms"),
        ):
            heights = [np.nan if row[column] is None else row[column] for row in own]
            axis.plot(
                [row["asked_rate"] for row in own], heights, line, color=colour, marker="o", label=f"{name}: {what}"
            )
    axis.set_xscale("log")
    axis.set_xticks(asked, [f"{rate * 100:g} %" for rate in asked])
    axis.minorticks_off()
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("false-alarm rate asked for")
    axis.set_ylabel("share of the test images")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    save_figure(path, figure)


def draw_speed(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Images a second of each model, by the paper's protocol and end to end, with the backbone's own rate as a line."""
    figure = Figure(figsize=(8, 1.2 + 0.75 * len(rows)))
    axis = figure.subplots()
    places = np.arange(len(rows))
    bars = {"fps": "features + search (the paper's protocol)", "end_to_end_fps": "end to end, pixels to score"}
    for shift, colour, (column, title) in zip((-0.2, 0.2), COLOURS, bars.items(), strict=False):
        drawn = axis.barh(places + shift, [row[column] for row in rows], 0.36, color=colour, label=title)
        axis.bar_label(drawn, [f"{row[column]:.1f}" for row in rows], padding=4, fontsize=8)
    bounds = [row["backbone_fps"] for row in rows]
    axis.vlines(bounds, places - 0.42, places + 0.42, color="0.2", linewidth=2, label="bound: the backbone alone")
    labels = []
    for row in rows:
        quality = "AUROC undefined" if row["image_auroc"] is None else f"AUROC {row['image_auroc']:.4f}"
        labels.append(f"{row['model']} {row['ratio'] * 100:g} %\n{quality}, {row['bank_mb']:.1f} MB")
    axis.set_yticks(places, labels, fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1.12 * max(bounds))
    axis.set_xlabel("images per second, one at a time")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=3)
    save_figure(path, figure)


def draw_gap(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Score gap, separation and image AUROC of each category, from without to with semantic attention."""
    titles = {"gap": "score gap", "separation": "gap / std of good", "auroc": "image AUROC"}
    rows = sorted(rows, key=lambda row: -row["ratio"])  # the means of a ratio under its categories
    several = rows[0]["ratio"] != rows[-1]["ratio"]
    labels = []
    for row in rows:
        name = f"mean: {row['kind']}" if row["category"] == "mean" else row["category"]
        labels.append(f"{name}, {row['ratio'] * 100:g} %" if several else name)
    figure = Figure(figsize=(9, 1.3 + 0.28 * len(rows)))
    places = np.arange(len(rows))
    means = [place for place, row in zip(places, rows, strict=True) if row["category"] == "mean"]
    for axis, (column, title) in zip(figure.subplots(1, len(titles), sharey=True), titles.items(), strict=True):
        off, on = (np.array([row[f"{column}_{name}"] for row in rows], float) for name in ("off", "on"))
        axis.barh(means, 1, 1, color="0.95", transform=axis.get_yaxis_transform(), zorder=0)
        axis.hlines(places, off, on, color="0.7", linewidth=2, zorder=1)
        axis.scatter(off, places, 36, COLOURS[1], label="without semantic attention", zorder=2)
        axis.scatter(on, places, 36, COLOURS[0], marker="D", label="with", zorder=3)
        axis.set_xlabel(title)
        axis.margins(x=0.15)
        axis.locator_params(axis="x", nbins=5)
        if column != "auroc":  # a difference of AUROCs would not show from zero
            axis.axvline(0, color="0.7", linewidth=1)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_yticks(places, labels)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(
        *axis.get_legend_handles_labels(), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2
    )
    figure.tight_layout()
    save_figure(path, figure)


def draw_robustness(path: Path, title: str, axis_label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Image AUROC over the level of corruption and, beside it, the share of images that are called defective.

    A method without a single figure is left out; columns ``..._auroc_min`` and ``..._auroc_max`` become a band.
    """
    # Ours thinner and on top: where both curves coincide both are seen.
    methods = {"wedge_net": ("WEDGE-Net", COLOURS[0], "o", 5), "patchcore": ("PatchCore", COLOURS[1], "s", 7)}
    curves = {name: np.array([row[name] for row in rows], float) for name in rows[0] if name.startswith(tuple(methods))}
    levels = [row["level"] for row in rows]
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    quality, alarms = figure.subplots(1, 2)
    for name, (label, colour, marker, size) in methods.items():
        style = {"color": colour, "marker": marker, "markersize": size, "linewidth": size / 3, "zorder": 10 - size}
        if not np.isnan(curves[f"{name}_auroc"]).all():
            quality.plot(levels, curves[f"{name}_auroc"], label=label, **style)
        if f"{name}_auroc_min" in curves:
            low, high = curves[f"{name}_auroc_min"], curves[f"{name}_auroc_max"]
            quality.fill_between(levels, low, high, color=colour, alpha=0.2, linewidth=0)
        for column, part, line in (("false_alarm", "good", "-"), ("detection", "defective", "--")):
            if not np.isnan(shares := curves[f"{name}_{column}_rate"]).all():
                alarms.plot(levels, shares, line, label=f"{label}: {part} parts", **style)
    quality.axhline(0.5, color="0.5", linewidth=0.8, linestyle=":")
    quality.annotate("chance", (1, 0.5), (0, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize=8)
    alarms.axhline(FALSE_ALARMS, color="0.5", linewidth=0.8, linestyle=":")
    alarms.annotate(
        f"nominal {FALSE_ALARMS * 100:g} %",
        (1, FALSE_ALARMS),
        (0, 2),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        fontsize=8,
    )
    # From chance to perfect, whatever the curves do: a small difference should look small.
    aurocs = [*curves["wedge_net_auroc"], *curves["patchcore_auroc"]]
    quality.set_ylim(min(0.48, np.nanmin([0.5, *aurocs]) - 0.02), 1.01)
    alarms.set_ylim(-0.02, 1.02)
    band = " (band: range over seeds)" if "wedge_net_auroc_min" in curves else ""
    quality.set_title(f"how well scores part good from defective{band}", fontsize=9)
    alarms.set_title(f"at the threshold set in training for {FALSE_ALARMS * 100:g} % false alarms", fontsize=9)
    quality.set_ylabel("image AUROC")
    alarms.set_ylabel("share called defective")
    for axis in (quality, alarms):
        axis.set_xlabel(axis_label)
        axis.set_xticks(levels)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        else:
            axis.text(0.5, 0.5, "undefined", transform=axis.transAxes, ha="center", va="center", color="0.35")
    save_figure(path, figure)


def draw_conditions(
    path: Path, title: str, centres: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]]
) -> None:
    """How the frequency stream decides: the conditions, and where the images fall among them.

    ``centres`` (2,) by condition, clean at the origin, in standard deviations of the training images; ``rows`` have
    each image's ``axis_1`` and ``axis_2``, ``condition``, ``label`` and ``unfamiliar``.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    places = np.array([[row["axis_1"], row["axis_2"]] for row in rows])
    for number, (name, centre) in enumerate(centres.items()):
        colour = COLOURS[number % len(COLOURS)]
        # 95 % of a condition's training images lie within.
        axis.add_patch(Ellipse(centre, 2 * 2.45, 2 * 2.45, facecolor=colour, alpha=0.15))
        axis.annotate(name, centre, (0, 8), textcoords="offset points", ha="center", fontsize=8, color=colour)
        axis.plot(*centre, "+", color=colour)
        for label, marker in ((0, "o"), (1, "^")):
            own = np.array([row["condition"] == name and row["label"] == label for row in rows])
            axis.scatter(*places[own].T, 14, colour, marker=marker, linewidths=0, alpha=0.7)
    axis.set_aspect("equal", adjustable="datalim")
    strange = np.array([bool(row["unfamiliar"]) for row in rows])
    axis.scatter(*places[strange].T, 60, facecolors="none", edgecolors="0.2", label="unlike anything in training")
    axis.scatter([], [], 14, "0.4", marker="o", label="good test image")
    axis.scatter([], [], 14, "0.4", marker="^", label="defective test image")
    axis.set_title(f"{title}: the condition of each test image, by its light and its wavelet bands", fontsize=10)
    axis.set_xlabel("standard deviations of the training images, from clean (circles: 95 % of them)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    save_figure(path, figure)


def draw_real(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """What benchmarks/real.py found of clean images: image AUROC and AUPRO, a group of bars for each category."""
    clean = [row for row in rows if row["corruption"] == "clean"]
    first = clean[0]
    clean = [row for row in clean if (row["images"], row["ratio"]) == (first["images"], first["ratio"])]
    categories, methods = (list(dict.fromkeys(row[name] for row in clean)) for name in ("category", "method"))
    figure = Figure(figsize=(1.6 + 1.3 * len(categories), 5.5), layout="constrained")
    for axis, (name, label) in zip(
        figure.subplots(2, sharex=True), {"image_auroc": "image AUROC", "aupro": "AUPRO"}.items(), strict=True
    ):
        for number, method in enumerate(methods):
            own = {row["category"]: row[name] for row in clean if row["method"] == method}
            values = [np.nan if own.get(category) is None else own[category] for category in categories]
            places = np.arange(len(categories)) + (number - (len(methods) - 1) / 2) * 0.8 / len(methods)
            drawn = axis.bar(places, values, 0.75 / len(methods), color=COLOURS[number % len(COLOURS)], label=method)
            texts = ["" if np.isnan(value) else f"{100 * value:.0f}" for value in values]
            axis.bar_label(drawn, texts, fontsize=7, padding=1)
        finite = [row[name] for row in clean if row[name] is not None]
        axis.set_ylim(max(0, min(finite, default=0) - 0.1), 1.03)
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xticks(range(len(categories)), categories)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(methods), frameon=False)
    save_figure(path, figure)


def draw_real_images(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """What benchmarks/real.py found for several numbers of training images: means of clean pictures, a line a method.

    False, and no picture, if there is only one number.
    """
    first = rows[0]
    alike = ("backbone", "image_size", "ratio")
    clean = [row for row in rows if row["corruption"] == "clean" and row["category"] == "mean"]
    clean = [row for row in clean if all(row[name] == first[name] for name in alike)]
    counts = sorted({row["images"] for row in clean} - {"all"}) + ["all"] * any(row["images"] == "all" for row in clean)
    if len(counts) < 2:
        return False
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axis, (name, label) in zip(
        figure.subplots(1, 2), {"image_auroc": "image AUROC", "aupro": "AUPRO"}.items(), strict=True
    ):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in clean)):
            own = {row["images"]: row[name] for row in clean if row["method"] == method}
            values = [np.nan if own.get(count) is None else own[count] for count in counts]
            axis.plot(range(len(counts)), values, "o-", color=COLOURS[number % len(COLOURS)], label=method)
        axis.set_xticks(range(len(counts)), counts)
        axis.set_xlabel("training pictures")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save_figure(path, figure)
    return True


def draw_ablation(path: Path, rows: Sequence[Mapping[str, Any]], single: Sequence[Mapping[str, Any]]) -> None:
    """What each change does to image AUROC, in points: a bar for the mean, a dot for each category.

    ``rows`` are the means, the first one what the others are compared with; ``single`` those of the categories.
    """
    first = rows[0]
    shown = [row for row in rows[1:] if row["image_auroc"] is not None and first["image_auroc"] is not None]
    figure = Figure(figsize=(8, 1.7 + 0.32 * len(shown)))
    axis = figure.subplots()
    of_category = {(row["category"], row["part"], row["variant"]): row["image_auroc"] for row in single}
    for place, row in enumerate(shown):
        difference = 100 * (row["image_auroc"] - first["image_auroc"])
        axis.barh(place, difference, 0.7, color=COLOURS[0] if difference >= 0 else COLOURS[1])
        dots = []
        for category in dict.fromkeys(each["category"] for each in single):
            pair = [of_category.get((category, each["part"], each["variant"])) for each in (row, first)]
            dots += [] if None in pair else [100 * (pair[0] - pair[1])]
        if len(dots) > 1:
            axis.scatter(dots, [place] * len(dots), 12, "0.25", zorder=3)
        axis.annotate(
            f"{difference:+.1f}",
            (1, place),
            (6, 0),
            ("axes fraction", "data"),
            "offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    axis.set_yticks(range(len(shown)), [": ".join(filter(None, (row["part"], row["variant"]))) for row in shown])
    axis.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    axis.axvline(0, color="0.3", linewidth=1)
    axis.margins(x=0.1)
    auroc = "undefined" if first["image_auroc"] is None else f"{first['image_auroc']:.4f}"
    axis.set_title(f"one part changed at a time; as configured: image AUROC {auroc}", fontsize=10)
    axis.set_xlabel("change of image AUROC, points (dots: each category)")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)
