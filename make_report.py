"""One page with every table and figure that is there, the settings, and the paper's own figures beside ours.

    python make_report.py --category all --sampling-ratio all

Collects what the other scripts wrote with the same settings; measures nothing itself. What is missing is named, with
the command that makes it (``make paper`` runs them all).

Writes SAVE_DIR/report.html, which needs no other file. Settings are in config.py.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import config
from utils.atomic import atomic_file
from utils.console import check_writable, command
from utils.data.dataset import evenly, find_categories
from utils.data.sample_data import is_rendered
from utils.metrics import FALSE_ALARMS
from utils.pictures.report import grid, page, paragraph, picture, table, text
from utils.pictures.tables import mean, read_csv
from utils.pipeline.timing import describe_machine, describe_versions
from utils.settings import CONSTANTS, Settings, SettingsParser, ratio_name

# Image AUROC and FPS as the paper states them, by method and share of the patches.
PAPER = {("PatchCore", 1.0): ("0.992", 37), ("WEDGE-Net", 0.1): ("0.991", 265), ("WEDGE-Net", 0.01): ("0.985", 687)}
PAPER_SETUP = "the paper: RTX 4090, MVTec AD"
PACKAGES = ("torch", "torchvision", "onnxruntime", "timm", "numpy", "scipy", "scikit-learn", "pywavelets", "pillow")
PICTURES = 3  # of test.py, from each category
Row = dict[str, Any]
Section = Callable[[Settings, Sequence[str]], list[str]]  # settings, categories -> HTML parts, none if nothing is there


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of the categories and ratios that the settings ask for; returns the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    flags = shlex.join(sys.argv[1:] if argv is None else argv)
    sections = {
        title: section(settings, categories) or [missing(scripts, flags)]
        for title, (section, scripts) in SECTIONS.items()
    }
    sections["How it was made"] = making(settings, flags)
    data = settings.data_path.resolve().name
    what = ", ".join(categories) if len(categories) <= 4 else f"{len(categories)} categories of {data}"
    path = settings.save_dir / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(page(f"WEDGE-Net on {what}", opening(settings, categories), sections), encoding="utf-8")
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB, open it in a browser)")
    return 0


def opening(settings: Settings, categories: Sequence[str]) -> list[str]:
    """What was looked at, and whether it was real."""
    ratios = ", ".join(percent(ratio) for ratio in settings.sampling_ratio)
    lead = (
        f"Trained on good parts of {text(', '.join(categories))}, with {text(settings.backbone)} and memory banks of "
        f"{ratios} of the training patches. AUROC, AUPRO and rates lie between 0 and 1. A dash stands for what was not "
        "measured, or is undefined for want of good or of defective test images."
    )
    parts = [paragraph(lead, "lead")]
    if rendered := [category for category in categories if is_rendered(settings.data_path, category)]:
        which = "These images" if len(rendered) == len(categories) else f"The images of {', '.join(rendered)}"
        warning = (
            f"<strong>{text(which)} are rendered.</strong> They are computed, not photographed: the figures show that "
            "the programs work, not how well the method detects defects."
        )
        parts.append(paragraph(warning, "notice"))
    if settings.backbone_weights == "random":
        parts.append(paragraph("<strong>The backbone has random weights.</strong> This is a dry run.", "notice"))
    return parts


def beside_the_paper(settings: Settings, categories: Sequence[str]) -> list[str]:
    """AUROC, speed and memory of each method, ours and as the paper states them."""
    speed, quality = averages(read(speed_path(settings))), averages(read(detection_path(settings)))
    here = {("WEDGE-Net", row["ratio"]): row for row in quality} | {(row["model"], row["ratio"]): row for row in speed}
    if not here:
        return []
    baseline_fps = PAPER["PatchCore", 1.0][1]
    rows = []
    for method, ratio in sorted({*here, *PAPER}, key=lambda key: (key[0], -key[1])):
        row = {"method": method, "ratio": ratio, **here.get((method, ratio), {}), "category": None}
        if (method, ratio) in PAPER:
            auroc, fps = PAPER[method, ratio]
            row |= {"paper_auroc": Decimal(auroc), "paper_fps": fps}
            row |= {"paper_speed_up": Decimal(f"{fps / baseline_fps:.1f}")}
        rows.append(row)
    columns = {
        "method": "Method", "ratio": "Memory", "image_auroc": "Image AUROC", "fps": "FPS", "speed_up": "Speed-up",
        "bank_mb": "Bank, MB", "paper_auroc": "Image AUROC", "paper_fps": "FPS", "paper_speed_up": "Speed-up",
    }  # fmt: skip
    machine = speed[0]["machine"] if speed else describe_machine(settings.device)
    covered = speed[0]["categories"] if speed else len(categories)
    note = (
        f"Left: {text(settings.data_path)}, {'mean of ' if covered > 1 else ''}{covered} "
        f"{'categories' if covered > 1 else 'category'}, on {text(machine)}. Right: what the paper states for its own "
        "machine and data. The two sides compare only where machine, data and backbone are the same."
    )
    setup = f"here: {settings.backbone}, {settings.device.type.upper()}"
    return [table(rows, columns, (("", 2), (setup, 4), (PAPER_SETUP, 3))), paragraph(note, "note")]


def detection(settings: Settings, categories: Sequence[str]) -> list[str]:
    """evaluation.py's table and figure."""
    path = detection_path(settings)
    rows = read(path)
    columns = {
        "category": "Category", "ratio": "Memory", "image_auroc": "Image AUROC", "pixel_auroc": "Pixel AUROC",
        "aupro": "AUPRO", "f1_max": "F1-max", "f1_threshold": "at", "threshold": "score",
        "false_alarm_rate": "false alarms", "detection_rate": "detected", "unfamiliar_rate": "unfamiliar",
        "training_images": "training",
        "test_good": "good", "test_defective": "defective", "bank_vectors": "vectors", "bank_mb": "MB",
    }  # fmt: skip
    groups = (("", 2), ("Detection", 5), ("Threshold of training", 4), ("Images", 3), ("Bank", 2))
    caption = (
        "Image AUROC, pixel AUROC and AUPRO (up to 30 % false positives) of each category, a bar for each share of the "
        "patches that is kept. The axes do not start at zero."
    )
    about = (
        "An image scores as high as its worst patch is far from the memory bank of good patches. F1-max is at the "
        "score that suits the test images best. The threshold of training knows good training images only; "
        f"{settings.false_alarm_rate * 100:g} % false alarms were asked of it."
    )
    return rows and [paragraph(about), *drawn(path.with_suffix(".png"), caption), table(rows, columns, groups)]


def conditions(settings: Settings, categories: Sequence[str]) -> list[str]:
    """evaluation.py's pictures of the frequency stream."""
    if settings.frequency_stream != "condition":
        return [paragraph(f"All images are searched in one bank: FREQUENCY_STREAM is '{settings.frequency_stream}'.")]
    found = []
    for category in categories:
        path = settings.save_dir / f"conditions_{category}.csv"
        rows = read_csv(path) if path.is_file() else []
        counts = Counter(row["condition"] for row in rows)
        strange = sum(row["unfamiliar"] for row in rows)
        caption = f"{category}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())
        caption += f"; {strange} unlike anything in training." if strange else "."
        found += drawn(path.with_suffix(".png"), caption, wide=True)
    about = (
        "The frequency stream measures each picture: five figures of its light and the medians of nine wavelet bands "
        "tell its condition, and it is searched in the memory bank of that condition alone. A dot is a test image, in "
        "the plane in which the conditions lie farthest apart; a circle holds about 95 % of the training images that "
        "were put in that condition."
    )
    return found and [paragraph(about), *found]


def speed(settings: Settings, categories: Sequence[str]) -> list[str]:
    """benchmark_fps.py's table and figure."""
    path = speed_path(settings)
    rows = read(path)
    if not rows:
        return []
    columns = {
        "category": "Category", "model": "Method", "ratio": "Memory", "image_auroc": "Image AUROC",
        "bank_mb": "Bank, MB", "fps": "FPS", "speed_up": "Speed-up", "p50_ms": "p50, ms", "p95_ms": "p95, ms",
        "end_to_end_fps": "FPS", "end_to_end_p50_ms": "p50, ms", "end_to_end_p95_ms": "p95, ms",
        "backbone_fps": "FPS",
    }  # fmt: skip
    groups = (("", 5), ("features + search", 4), ("end to end", 3), ("backbone", 1))
    about = (
        "One image at a time. The paper's protocol counts features and search; end to end begins with decoded pixels "
        "and ends with the image's score. The backbone alone is the bound: no search makes a row faster than that."
    )
    caption = (
        "Images per second of each method by the paper's protocol (blue) and end to end (orange). The black line is "
        "what the backbone alone would reach. Beside the names: image AUROC and the size of the bank."
    )
    first = rows[0]
    ways = dict.fromkeys(
        f"{r['model']} with {r['backbone']} by {r['engine']}, {r['dtype']}, bank in {r['bank_dtype']}" for r in rows
    )
    note = (
        f"{first['machine']}; device {first['device']}; {first['versions']}; {'; '.join(ways)}. {first['calls']} timed "
        "calls of each kind and category, in turn, after a warm-up. p50 and p95 are the median and the 95th "
        f"percentile, FPS is 1000 / p50. Speed-up is against {first['model']} {percent(first['ratio'])}."
    )
    figure = drawn(path.with_suffix(".png"), caption)
    return [paragraph(about), *figure, table(rows, columns, groups), paragraph(text(note), "note")]


def pictures(settings: Settings, categories: Sequence[str]) -> list[str]:
    """A few of test.py's pictures for each category, with the largest bank that has any."""
    parts = []
    for category in categories:
        folders = [settings.save_dir / ratio_name(ratio) / "results" / category for ratio in settings.sampling_ratio]
        files = next((files for folder in folders if (files := sorted(folder.glob("*.png")))), [])
        for file in evenly(files, PICTURES):
            memory = file.parts[-4]
            parts.append(picture(file, f"{category}: {file.stem} ({memory})", wide=True))
    about = (
        "From left to right: the image, the true defect, where it has detail, what the semantic stream weighs, the "
        "anomaly score, and that over the image with the defect's outline. Colours of the score have one scale for "
        "each category. All pictures are in <code>SAVE_DIR/&lt;memory&gt;/results</code>."
    )
    return parts and [paragraph(about), *parts]


def robustness(csv: str, curve: str, tile: str | None, level: str, about: str) -> Section:
    """The section of one corruption, from its files' names with {} for category and ratio, and its levels' title.

    ``tile`` is None where no picture of a good part at each level is drawn.
    """

    def section(settings: Settings, categories: Sequence[str]) -> list[str]:
        rows, curves, tiles = [], [], []
        for category in categories:
            ratios = [ratio_name(ratio) for ratio in settings.sampling_ratio]
            for ratio in ratios:
                rows += read(settings.save_dir / csv.format(category, ratio))
                caption = (
                    f"{category} ({ratio}). Left: image AUROC at each level. Right: the shares of good (solid) and of "
                    "defective parts (dashed) that the threshold from training calls defective."
                )
                curves += drawn(settings.save_dir / curve.format(category, ratio), caption, wide=True)
            if tile is None:
                continue
            names = [settings.save_dir / tile.format(name) for name in (category, *(f"{category}_{r}" for r in ratios))]
            caption = (
                f"{category}: a good part, level by level, and the anomaly maps of both methods, each in one scale."
            )
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

    return section


def level_means(rows: Sequence[Row]) -> list[Row]:
    """For each ratio and level the mean of every figure, over the categories where it is defined."""
    means = []
    for ratio, level in dict.fromkeys((row["ratio"], row["level"]) for row in rows):
        own = [row for row in rows if (row["ratio"], row["level"]) == (ratio, level)]
        names = [name for name in own[0] if name not in ("category", "ratio", "level")]
        means.append({"ratio": ratio, "level": level} | {name: mean([row.get(name) for row in own]) for name in names})
    return means


def gap(settings: Settings, categories: Sequence[str]) -> list[str]:
    """eval_gap_score.py's table and figure."""
    path = settings.semanticon_dir / "result_gap_via_sem_onoff.csv"
    rows = read(path)
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


def parts(settings: Settings, categories: Sequence[str]) -> list[str]:
    """ablation.py's tables and figures."""
    found = []
    for ratio in settings.sampling_ratio:
        path = settings.save_dir / f"ablation_{ratio_name(ratio)}.csv"
        rows = averages(read(path))
        columns = {
            "part": "Part", "variant": "Changed to", "image_auroc": "Image AUROC", "image_auroc_spread": "+/-",
            "pixel_auroc": "Pixel AUROC", "aupro": "AUPRO", "bank_mb": "Bank, MB",
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


def streams(settings: Settings, categories: Sequence[str]) -> list[str]:
    """ablation_frequency.py's tables and figures."""
    found = []
    for ratio in settings.sampling_ratio:
        path = settings.save_dir / f"ablation_frequency_{ratio_name(ratio)}.csv"
        rows = averages(read(path.with_name(f"{path.stem}_summary.csv")))
        columns = {
            "variant": "Variant", "clean_auroc": "clean", "noise_auroc": "noise", "blur_auroc": "blur",
            "colour_auroc": "colour", "dark_auroc": "dark", "noise_false_alarm_rate": "noise",
            "blur_false_alarm_rate": "blur", "colour_false_alarm_rate": "colour", "dark_false_alarm_rate": "dark",
            "bank_mb": "Banks, MB", "train_s": "Training, s", "fps": "FPS",
        }  # fmt: skip
        groups = (("", 1), ("Image AUROC, mean over levels", 5), ("False alarms, the most", 4), ("", 3))
        caption = f"Image AUROC and false alarms over the level of each corruption ({percent(ratio)} of the patches)."
        if rows:
            found += [*drawn(path.with_suffix(".png"), caption, wide=True), table(rows, columns, groups)]
    about = (
        "The frequency stream's parts switched on and off, everything else as the settings have it, beside PatchCore. "
        f"False alarms are those at the training threshold for {FALSE_ALARMS * 100:g} %, at the worst of noise to 40 "
        "grey levels, blur to 2 pixels, colour to factor 1 and 0.4 of the light taken away. Shrinkage takes the noise "
        "out of each image by its wavelet coefficients. With equal memory all banks together take the bytes "
        "of PatchCore's one, half of them clean's, without the semantic stream."
    )
    return found and [paragraph(about), *found]


def making(settings: Settings, flags: str) -> list[str]:
    """Settings, versions, machine, and when each table was written."""
    values = [
        {"name": name, "value": written(getattr(settings, field.name)), "meaning": field.metadata["meaning"]}
        for name, field in CONSTANTS.items()
    ]
    files = [
        {"name": str(path), "written": f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"}
        for folder in dict.fromkeys((settings.save_dir, settings.semanticon_dir))
        for path in sorted(folder.glob("*.csv"))
    ]
    about = (
        f"Collected on {datetime.now():%Y-%m-%d at %H:%M} by <code>python make_report.py {text(flags)}</code> on "
        f"{text(describe_machine(settings.device))}, with {text(describe_versions(*PACKAGES))}."
    )
    parts = [paragraph(about), "<h3>Settings</h3>"]
    parts.append(table(values, {"name": "Setting", "value": "Value", "meaning": "Meaning"}))
    if files:
        parts += ["<h3>Tables</h3>", table(files, {"name": "File", "written": "Written"})]
    return parts


SECTIONS: dict[str, tuple[Section, tuple[str, ...]]] = {
    "Beside the paper": (beside_the_paper, ("benchmark_fps.py",)),
    "Detection": (detection, ("evaluation.py",)),
    "Speed and memory": (speed, ("benchmark_fps.py",)),
    "What it sees": (pictures, ("test.py",)),
    "Which condition": (conditions, ("evaluation.py",)),
    "Sensor noise": (
        robustness(
            "full_noise_comparison_smoothed_{}_{}.csv",
            "figure5_noise_robustness_{}_{}.png",
            "Figure_Noise_Robustness_{}.png",
            "Sigma",
            "Gaussian noise is added to the test images; sigma is in grey levels of 255.",
        ),
        ("eval_noise_robustness.py", "visualize_noise_robustness.py"),
    ),
    "Focus": (
        robustness(
            "full_blur_comparison_{}_{}.csv",
            "figure_blur_robustness_{}_{}.png",
            None,
            "Sigma",
            "The test images are blurred by a Gaussian; sigma is in pixels.",
        ),
        ("eval_blur_robustness.py",),
    ),
    "Light and colour": (
        robustness(
            "final_color_comparison_{}_{}.csv",
            "figure6_color_robustness_{}_{}.png",
            "Figure_Color_Robustness_{}_Final.png",
            "Factor",
            "With factor f, brightness is multiplied by 1 + 0.3 f, contrast by 1 + 0.5 f and saturation by 1 + 0.5 f, "
            "and the hue is turned by min(0.1 f, 0.5), in this order.",
        ),
        ("eval_color_robustness.py", "visualize_color_robustness.py"),
    ),
    "Semantic attention": (gap, ("eval_gap_score.py",)),
    "What each part is worth": (parts, ("ablation.py",)),
    "What the frequency stream is worth": (streams, ("ablation_frequency.py",)),
}


def missing(scripts: Sequence[str], flags: str) -> str:
    """What to run for a section that is not there."""
    commands = " and ".join(f"<code>python {script} {text(flags)}</code>" for script in scripts)
    return paragraph(f"Not made yet. <code>make paper</code> makes everything, {commands} this section.", "missing")


def speed_path(settings: Settings) -> Path:
    """Where benchmark_fps.py writes."""
    return settings.save_dir / f"benchmark_fps_results_{ratio_name(settings.sampling_ratio[0])}.csv"


def detection_path(settings: Settings) -> Path:
    """Where evaluation.py writes."""
    return settings.save_dir / "final_evaluation_results.csv"


def read(path: Path) -> list[Row]:
    """A table's rows, means first: a long table scrolls. None if it is not there."""
    rows = read_csv(path) if path.is_file() else []
    return sorted(rows, key=lambda row: row["category"] != "mean")


def drawn(path: Path, caption: str, wide: bool = False) -> list[str]:
    """The figure at ``path``; none if it is not there."""
    return [picture(path, caption, wide)] if path.is_file() else []


def averages(rows: Sequence[Row]) -> list[Row]:
    """The means over categories, or the only category's rows."""
    return [row for row in rows if row["category"] == "mean"] or list(rows)


def percent(ratio: float) -> str:
    """0.1 -> '10 %'"""
    return f"{ratio * 100:g}\N{NO-BREAK SPACE}%"


def written(value: object) -> str:
    """A setting's value, ratios as a list."""
    return (
        ", ".join(item if isinstance(item, str) else f"{item:g}" for item in value)
        if isinstance(value, tuple)
        else str(value)
    )


if __name__ == "__main__":
    sys.exit(main())
