"""The report's sections on what changes when something is changed: the pictures, or a part of the method.

Each function returns its section as HTML parts, an empty list where the script that it shows has not run.
"""

from collections.abc import Sequence
from typing import Any

from utils.metrics import FALSE_ALARMS
from utils.pictures.report import drawn, grid, paragraph, percent, table
from utils.pictures.tables import averages, mean, read_results
from utils.settings import Settings, ratio_name


def noise(settings: Settings, categories: Sequence[str]) -> list[str]:
    """The tables and figures of eval_noise_robustness.py and visualize_noise_robustness.py."""
    csv, curve = "full_noise_comparison_smoothed_{}_{}.csv", "figure5_noise_robustness_{}_{}.png"
    about = "Gaussian noise is added to the test images; sigma is in grey levels of 255."
    return robustness(settings, categories, csv, curve, "Figure_Noise_Robustness_{}.png", "Sigma", about)


def blur(settings: Settings, categories: Sequence[str]) -> list[str]:
    """eval_blur_robustness.py's tables and figures."""
    csv, curve = "full_blur_comparison_{}_{}.csv", "figure_blur_robustness_{}_{}.png"
    about = "The test images are blurred by a Gaussian; sigma is in pixels."
    return robustness(settings, categories, csv, curve, None, "Sigma", about)


def colour(settings: Settings, categories: Sequence[str]) -> list[str]:
    """The tables and figures of eval_color_robustness.py and visualize_color_robustness.py."""
    csv, curve = "final_color_comparison_{}_{}.csv", "figure6_color_robustness_{}_{}.png"
    about = (
        "With factor f, brightness is multiplied by 1 + 0.3 f, contrast by 1 + 0.5 f and saturation by 1 + 0.5 f, "
        "and the hue is turned by min(0.1 f, 0.5), in this order."
    )
    return robustness(settings, categories, csv, curve, "Figure_Color_Robustness_{}_Final.png", "Factor", about)


def robustness(
    settings: Settings, categories: Sequence[str], csv: str, curve: str, tile: str | None, level: str, about: str
) -> list[str]:
    """The section of one corruption, from its files' names with {} for category and ratio, and its levels' title.

    ``tile``, with {} for the category, is None where no picture of a good part at each level is drawn.
    """
    rows, curves, tiles = [], [], []
    for category in categories:
        ratios = [ratio_name(ratio) for ratio in settings.sampling_ratio]
        for ratio in ratios:
            rows += read_results(settings.save_dir / csv.format(category, ratio))
            caption = (
                f"{category} ({ratio}). Left: image AUROC at each level. Right: the shares of good (solid) and of "
                "defective parts (dashed) that the threshold from training calls defective."
            )
            curves += drawn(settings.save_dir / curve.format(category, ratio), caption, wide=True)
        if tile is None:
            continue
        names = [settings.save_dir / tile.format(name) for name in (category, *(f"{category}_{r}" for r in ratios))]
        caption = f"{category}: a good part, level by level, and the anomaly maps of both methods, each in one scale."
        tiles += next((drawn(name, caption) for name in names if name.is_file()), [])
    if not rows and not tiles:
        return []
    methods = {"wedge_net": "WEDGE-Net", "patchcore": "PatchCore"}
    figures = {"auroc": "Image AUROC", "false_alarm_rate": "False alarms", "detection_rate": "Detected"}
    columns = {"ratio": "Memory", "level": level}
    columns |= {f"{method}_{name}": title for method in methods for name, title in figures.items()}
    groups = [(title, len(figures)) for title in methods.values()]
    parts = [paragraph(about)]
    if rows and len(categories) > 1:
        parts += ["<h3>Mean of the categories</h3>", table(level_means(rows), columns, [("", 2), *groups])]
        parts += ["<h3>Each category</h3>"]
    if rows:
        rows.sort(key=lambda row: -row["ratio"])
        parts.append(table(rows, {"category": "Category"} | columns, [("", 3), *groups]))
        note = (
            "False alarms and detections: shares of good and of defective images above the threshold that training "
            f"images set for {FALSE_ALARMS * 100:g} % false alarms."
        )
        parts.append(paragraph(note, "note"))
    return [*parts, *curves, grid(tiles)]


def level_means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each ratio and level the mean of every figure, over the categories where it is defined."""
    means = []
    for ratio, level in dict.fromkeys((row["ratio"], row["level"]) for row in rows):
        own = [row for row in rows if (row["ratio"], row["level"]) == (ratio, level)]
        names = [name for name in own[0] if name not in ("category", "ratio", "level")]
        means.append({"ratio": ratio, "level": level} | {name: mean([row.get(name) for row in own]) for name in names})
    return means


def gap(settings: Settings) -> list[str]:
    """eval_gap_score.py's table and figure."""
    path = settings.semanticon_dir / "result_gap_via_sem_onoff.csv"
    rows = read_results(path)
    columns = {
        "category": "Category", "kind": "Kind", "ratio": "Memory",
        "gap_off": "without", "gap_on": "with", "improvement_percent": "gain, %",
        "separation_off": "without", "separation_on": "with", "auroc_off": "without", "auroc_on": "with",
    }  # fmt: skip
    groups = (("", 3), ("Score gap", 3), ("Gap / std of good", 2), ("Image AUROC", 2))
    about = (
        "The gap is the mean score of defective images minus that of good ones, without and with the semantic stream. "
        "It grows with the scale of the scores, which the stream changes. Whether the stream helps is seen in the gap "
        "over the good images' standard deviation, and in AUROC."
    )
    caption = (
        "From without (orange) to with semantic attention (blue): score gap, gap over the good images' standard "
        "deviation, and image AUROC, whose axis does not start at zero. Shaded: means."
    )
    return rows and [paragraph(about), *drawn(path.with_suffix(".png"), caption), table(rows, columns, groups)]


def beside_patchcore(settings: Settings) -> list[str]:
    """The table and figure of benchmarks/real.py."""
    path = settings.save_dir / "real.csv"
    rows = read_results(path.with_name("real_summary.csv"))
    columns = {
        "images": "Training images", "ratio": "Memory", "corruption": "Pictures", "level": "Level", "method": "Method",
        "category": "Category", "image_auroc": "Image AUROC", "pixel_auroc": "Pixel AUROC", "aupro": "AUPRO",
        "false_alarm_rate": "False alarms", "detection_rate": "Detected", "mb": "MB", "fps": "FPS",
        "train_s": "Training, s",
    }  # fmt: skip
    about = (
        "One backbone and the same pictures for all methods; means over the seeds. False alarms and detections are at "
        f"the threshold that training images set for {FALSE_ALARMS * 100:g} % false alarms. MB are all that a category "
        "has beside the backbone. FPS is of one image at a time, from a tensor to score and map."
    )
    caption = "Image AUROC and AUPRO of clean pictures, in per cent, for each category and their mean."
    curves = drawn(path.with_name("real_images.png"), "The means by the number of training pictures.")
    return rows and [paragraph(about), *drawn(path.with_suffix(".png"), caption), *curves, table(rows, columns)]


def parts(settings: Settings) -> list[str]:
    """ablation.py's tables and figures."""
    found = []
    for ratio in settings.sampling_ratio:
        path = settings.save_dir / f"ablation_{ratio_name(ratio)}.csv"
        rows = averages(read_results(path))
        columns = {
            "part": "Part", "variant": "Changed to", "image_auroc": "Image AUROC", "image_auroc_spread": "+/-",
            "pixel_auroc": "Pixel AUROC", "aupro": "AUPRO", "bank_mb": "Bank, MB",
            "noise_auroc": "noise", "blur_auroc": "blur", "colour_auroc": "colour", "dark_auroc": "dark",
        }  # fmt: skip
        caption = (
            f"Change of image AUROC, in points, when one part is changed ({percent(ratio)} of the patches): bars for "
            "the mean, dots for each category."
        )
        if rows:
            rows = [row | {"part": row["part"] or "all"} for row in rows]
            found += [*drawn(path.with_suffix(".png"), caption), table(rows, columns)]
    about = (
        "One part is changed at a time, the rest is as the settings have it. Image AUROC is the mean over several "
        "seeds of the coreset, +/- half its range: differences smaller than that mean little."
    )
    return found and [paragraph(about), *found]
