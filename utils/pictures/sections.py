"""The report's sections on the data set as it is: detection, speed, pictures, conditions, and how all was made.

Each function returns its section as HTML parts, an empty list where the script that it shows has not run.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path

from utils.data.dataset import evenly
from utils.data.sample_data import is_rendered
from utils.pictures.report import drawn, paragraph, percent, picture, table, text
from utils.pictures.tables import averages, read_csv, read_results
from utils.settings import CONSTANTS, Settings, ratio_name

# Image AUROC and FPS as the paper states them, by method and share of the patches.
PAPER = {("PatchCore", 1.0): ("0.992", 37), ("WEDGE-Net", 0.1): ("0.991", 265), ("WEDGE-Net", 0.01): ("0.985", 687)}
PAPER_SETUP = "the paper: RTX 4090, MVTec AD"
PICTURES = 3  # of test.py, from each category


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


def odd_images(settings: Settings, categories: Sequence[str]) -> list[str]:
    """train.py's training pictures that are unlike the others, or that there are none."""
    parts, quiet = [], []
    for category in categories:
        names = [ratio_name(ratio) for ratio in settings.sampling_ratio]
        paths = [settings.save_dir / name / f"odd_images_{category}_{name}.csv" for name in names]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            continue
        rows = read_csv(path)
        if not rows:
            quiet.append(category)
            continue
        columns = {"file": "File", "score": "Score", "limit": "Limit"}
        columns |= {"box_x": "x", "box_y": "y", "box_width": "width", "box_height": "height"}
        caption = f"{category}: training pictures that the others do not vouch for, their worst place outlined."
        parts += [f"<h3>{text(category)}</h3>", *drawn(path.with_suffix(".png"), caption)]
        parts.append(table(rows, columns, (("", 3), ("Worst place, pixels", 4))))
    about = (
        "Each training picture was scored against the memory of the others. These lie beyond what the spread of good "
        "pictures allows: a defect among them, another part, another light. One of them can set the threshold for all. "
        "Nothing was left out by itself: <code>train.py --without FILE...</code> or a line in "
        "<code>DATA_PATH/&lt;category&gt;/exclude.txt</code> does."
    )
    if quiet:
        parts.append(paragraph(f"No training picture of {text(', '.join(quiet))} is unlike the others.", "note"))
    return parts and [paragraph(about), *parts]


def beside_the_paper(settings: Settings, categories: Sequence[str], machine: str) -> list[str]:
    """AUROC, speed and memory of each method, ours (on ``machine``) and as the paper states them."""
    speed, quality = averages(read_results(speed_path(settings))), averages(read_results(detection_path(settings)))
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
    machine = speed[0]["machine"] if speed else machine
    covered = speed[0]["categories"] if speed else len(categories)
    note = (
        f"Left: {text(settings.data_path)}, {'mean of ' if covered > 1 else ''}{covered} "
        f"{'categories' if covered > 1 else 'category'}, on {text(machine)}. Right: what the paper states for its own "
        "machine and data. The two sides compare only where machine, data and backbone are the same."
    )
    setup = f"here: {settings.backbone}, {settings.device.type.upper()}"
    return [table(rows, columns, (("", 2), (setup, 4), (PAPER_SETUP, 3))), paragraph(note, "note")]


def detection(settings: Settings) -> list[str]:
    """evaluation.py's table and figure."""
    path = detection_path(settings)
    rows = read_results(path)
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
    parts = [paragraph(about), *drawn(path.with_suffix(".png"), caption), table(rows, columns, groups)]
    return rows and [*parts, *_rates(settings)]


def _rates(settings: Settings) -> list[str]:
    """evaluation.py's table and curve of what each false-alarm rate buys; of several categories their means."""
    path = rates_path(settings)
    rows = averages(read_results(path))
    columns = {
        "category": "Category", "ratio": "Memory", "asked_rate": "asked", "kept_rate": "kept", "threshold": "score",
        "false_alarm_rate": "false alarms", "detection_rate": "detected", "training_pictures": "there are",
        "pictures_needed": "it takes",
    }  # fmt: skip
    groups = (("", 2), ("Rate", 2), ("Threshold", 1), ("On the test images", 2), ("Training pictures", 2))
    about = (
        "A threshold follows from the rate of false alarms that one allows. Few good pictures cannot vouch for a small "
        "one: what they keep is the smallest that they can, and the last column says how many it takes."
    )
    caption = "Defects found and false alarms on the test images, by the false-alarm rate that was asked for."
    return rows and [
        "<h3>What each false-alarm rate buys</h3>",
        paragraph(about),
        *drawn(path.with_suffix(".png"), caption),
        table(rows, columns, groups),
    ]


def conditions(settings: Settings, categories: Sequence[str]) -> list[str]:
    """evaluation.py's pictures of the frequency stream."""
    if settings.form != "wedge":
        return [paragraph(f"FORM is '{settings.form}': it knows no conditions.")]
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
        "The frequency stream measures each picture: five figures of its light and two quantiles of nine wavelet bands "
        "tell its condition. A lens for each condition brings its features to where those of clean pictures lie, so "
        "that one memory serves all. A dot is a test image, in "
        "the plane in which the conditions lie farthest apart; a circle holds about 95 % of the training images that "
        "were put in that condition."
    )
    return found and [paragraph(about), *found]


def speed(settings: Settings) -> list[str]:
    """benchmark_fps.py's table and figure."""
    path = speed_path(settings)
    rows = read_results(path)
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


def making(settings: Settings, flags: str, machine: str, versions: str) -> list[str]:
    """The command line's ``flags``, machine, versions and settings, and when each table was written."""
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
        f"{text(machine)}, with {text(versions)}."
    )
    parts = [paragraph(about), "<h3>Settings</h3>"]
    parts.append(table(values, {"name": "Setting", "value": "Value", "meaning": "Meaning"}))
    if files:
        parts += ["<h3>Tables</h3>", table(files, {"name": "File", "written": "Written"})]
    return parts


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


def rates_path(settings: Settings) -> Path:
    """Where evaluation.py writes what each false-alarm rate buys."""
    return settings.save_dir / "false_alarm_rates.csv"


def written(value: object) -> str:
    """A setting's value, ratios as a list."""
    return (
        ", ".join(item if isinstance(item, str) else f"{item:g}" for item in value)
        if isinstance(value, tuple)
        else str(value)
    )
