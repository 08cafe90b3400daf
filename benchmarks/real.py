"""How good the defaults are on real photographs: WEDGE-Net, the paper's own form and PatchCore at the same ratio.

    python -m benchmarks.real --data-path DATA --category all --center-crop false --backbone efficientnet_lite0
    python -m benchmarks.real ... --sampling-ratio 0.1 --images 10,40 --seeds 2
    python -m benchmarks.real ... --corruptions

One backbone for all of them, banks of SAMPLING_RATIO (the first, if there are several), coresets from several seeds, no
more than so many training images. With --corruptions also noise to 40 grey levels, blur to 2 pixels, colour to factor 1
and up to 0.4 of the light taken away. Rates are at the threshold that training set for 5 % false alarms. Megabytes are
all that a category has beside the backbone: banks, metric and lenses. FPS is of one image at a time, from a tensor to
score and map, methods in turn.

A run that was cut off goes on where it stopped: rows that are in the CSV with the same settings are not measured again.
Writes ``SAVE_DIR/real.csv``, a row a run and level, ``real_summary.csv``, ``real.png`` and, of several numbers of
images, ``real_images.png``, which the report shows.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models.threads  # noqa: F401 - before torch

import config
from benchmarks.common import alternate, median_and_spread
from models.errors import InputError
from utils.console import check_writable, command, for_each
from utils.data.dataset import batches, evenly, find_categories, test_samples
from utils.pictures.figures import draw_real, draw_real_images
from utils.pictures.tables import format_table, mean, read_results, write_csv
from utils.pipeline.checkpoint import build_net
from utils.pipeline.cluster import workers
from utils.pipeline.experiments import CORRUPTIONS, Variant, few_images, measure_detector, train_variant
from utils.pipeline.timing import describe_machine, describe_versions
from utils.settings import Settings, SettingsParser, positive

METHODS = (
    Variant("WEDGE-Net"),
    Variant("the paper's form", {"form": "paper", "use_semantic": True}),
    Variant("PatchCore", patchcore=True),
)
FIGURES = ("image_auroc", "pixel_auroc", "aupro", "false_alarm_rate", "detection_rate", "mb", "fps", "train_s")
KEYS = ("category", "method", "backbone", "image_size", "center_crop", "ratio", "images", "seed")
Row = dict[str, Any]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="coresets: SEED and those after it (now: 3)")
    parser.add_argument("--images", type=_counts, default=(None,), metavar="LIST", help="training images: 10,40,all")
    parser.add_argument("--corruptions", action="store_true", help="noise, blur, colour and darkness too")
    parser.add_argument("--methods", metavar="LIST", help="a comma list of " + ", ".join(each.name for each in METHODS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="the CSV (now: SAVE_DIR/real.csv)")
    settings, options = parser.read(argv)
    options.out = options.out or settings.save_dir / "real.csv"
    check_writable(options.out.parent, "the folder of --out")
    methods = _methods(options.methods)
    print(describe_machine())
    print(describe_versions("torch", "onnxruntime"))
    rows: list[Row] = read_results(options.out)
    tasks = {
        f"{category}, {images or 'all'} images, seed {seed}": (category, images, seed)
        for category in find_categories(settings)
        for images in options.images
        for seed in range(settings.seed, settings.seed + options.seeds)
    }

    def gather(found: list[Row]) -> None:
        if found:
            new = [[str(row[key]) for key in KEYS] for row in found]
            rows[:] = [row for row in rows if [str(row[key]) for key in KEYS] not in new] + found
            write_csv(options.out, rows)

    with workers(settings, build_net(settings)) as run:
        code = for_each(list(tasks), lambda name: measure(settings, *tasks[name], methods, options, rows), gather, run)
    if rows:
        report(options.out, rows)
    return code


def measure(
    settings: Settings,
    category: str,
    images: int | None,
    seed: int,
    methods: Sequence[Variant],
    options: argparse.Namespace,
    rows: Sequence[Row],
) -> list[Row]:
    """The rows of every method that are not all there yet."""
    keys = {
        "category": category,
        "method": "",
        "backbone": settings.backbone,
        "image_size": "x".join(map(str, settings.image_size)),
        "center_crop": str(settings.center_crop),
        "ratio": settings.sampling_ratio[0],
        "images": "all" if images is None else images,
        "seed": seed,
    }
    corruptions = CORRUPTIONS if options.corruptions else ()
    levels = 1 + sum(len(corruption.levels) for corruption in corruptions)
    missing = []
    for method in methods:
        own = keys | {"method": method.name}
        there = [row for row in rows if all(str(row[key]) == str(own[key]) for key in KEYS)]
        if len(there) < levels:
            missing.append(method)
    if not missing:
        return []
    found = []
    with few_images(settings, category, images) as own:
        own = dataclasses.replace(own, seed=seed, sampling_ratio=settings.sampling_ratio[:1])
        trained = {method.name: train_variant(method, own, category) for method in missing}
        some = [image[None] for batch in batches(evenly(test_samples(own, category), 8), own) for image in batch.images]
        calls = {
            name: lambda detector=detector: [detector.predict(image) for image in some]
            for name, (detector, _) in trained.items()
        }
        seconds = alternate(calls, repeats=5, device=own.device)
        for name, (detector, training) in trained.items():
            cost = {
                "mb": detector.bank_bytes / 1e6,
                "fps": len(some) / median_and_spread(seconds[name])[0],
                "train_s": training,
            }
            found += [
                keys | {"method": name} | row | cost for row in measure_detector(detector, own, category, corruptions)
            ]
    return found


def report(path: Path, rows: Sequence[Row]) -> None:
    """Print and save the means over categories and seeds, and each category's; draw them."""
    groups = dict.fromkeys(
        (row["backbone"], row["image_size"], row["ratio"], row["images"], row["corruption"], row["level"])
        for row in rows
    )
    summary = []
    for backbone, size, ratio, images, corruption, level in groups:
        own = [
            row
            for row in rows
            if (row["backbone"], row["image_size"], row["ratio"], row["images"], row["corruption"], row["level"])
            == (backbone, size, ratio, images, corruption, level)
        ]
        categories = list(dict.fromkeys(row["category"] for row in own))
        for method in dict.fromkeys(row["method"] for row in own):
            each = {
                category: {
                    name: mean([row[name] for row in own if (row["category"], row["method"]) == (category, method)])
                    for name in FIGURES
                }
                for category in categories
            }
            total = {name: mean([figures[name] for figures in each.values()]) for name in FIGURES}
            for category, figures in {"mean": total, **each}.items():
                what = {"images": images, "ratio": ratio, "corruption": corruption, "level": level, "method": method}
                summary.append({"backbone": backbone, "image_size": size, **what, "category": category, **figures})
    write_csv(path.with_name(path.stem + "_summary.csv"), summary)
    shown = [row for row in summary if row["category"] == "mean"]
    keep = ("images", "ratio", "corruption", "level", "method", *FIGURES)
    print("\n" + format_table([{name: row[name] for name in keep} for row in shown]))
    draw_real(path.with_suffix(".png"), summary)
    curves = path.with_name(path.stem + "_images.png")
    more = f", {curves.name}" if draw_real_images(curves, summary) else ""
    print(f"written: {path}, {path.stem}_summary.csv, {path.stem}.png{more}")


def _counts(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if part.strip() == "all" else positive(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be numbers or 'all', such as 10,40,all, not {text!r}") from None


def _methods(text: str | None) -> list[Variant]:
    names = [each.name for each in METHODS] if text is None else [name.strip() for name in text.split(",")]
    known = {each.name: each for each in METHODS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--methods {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    return [known[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
