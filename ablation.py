"""What each part of the method is worth: one part changed at a time, everything else as the settings have it.

    python ablation.py
    python ablation.py --category all --sampling-ratio 0.01 --seeds 3
    python ablation.py --category all --corruptions

Every variant is trained anew, in a folder that goes away, for several seeds of the coreset, since results move with its
starting point; PatchCore with the same backbone and ratio is the last row. With --corruptions also the mean image AUROC
and the most false alarms, at the threshold that training set for 5 %, over noise to 40 grey levels, blur to 2 pixels,
colour to factor 1 and 0.4 of the light taken away.

Writes SAVE_DIR/ablation_10pct.csv and .png for each ratio. Settings are in config.py.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import models.threads  # noqa: F401 - before torch

import config
from models.scoring import WEDGE_NET
from models.wedge_net import RECIPE
from utils.console import check_writable, command, for_each
from utils.data.dataset import find_categories
from utils.pictures.figures import draw_ablation
from utils.pictures.tables import category_means, format_table, mean, write_csv
from utils.pipeline.checkpoint import build_net
from utils.pipeline.cluster import workers
from utils.pipeline.experiments import CLEAN, CORRUPTIONS, Variant, few_images, measure_detector, train_variant
from utils.settings import Settings, SettingsParser, positive, ratio_name

FIGURES = ("image_auroc", "image_auroc_spread", "pixel_auroc", "aupro", "bank_mb")
WORSE = tuple(f"{each.kind}_{name}" for each in CORRUPTIONS for name in ("auroc", "false_alarms"))
Row = dict[str, Any]


def variants(settings: Settings) -> Iterator[tuple[str, Variant]]:
    """The part that is changed, and the variant; first the settings as they are."""

    def recipe(name: str, **changes: Any) -> Variant:
        return Variant(name, recipe=dataclasses.replace(RECIPE, **changes))

    yield "", Variant("as configured")
    other = "paper" if settings.form == "wedge" else "wedge"
    yield "form", Variant(other, {"form": other, "use_semantic": other == "paper"})
    semantic = "off" if settings.use_semantic else "on"
    yield "semantic stream", Variant(f"semantic {semantic}", {"use_semantic": not settings.use_semantic})
    yield "coreset", Variant("random patches", {"sampling_method": "random"})
    if settings.form == "wedge":
        yield "coreset", recipe("patches, not means", averaged=False)
        yield "conditions", Variant("clean alone", {"conditions": (CLEAN,)})
        yield "light", recipe("not aligned", align_light=False)
        yield "scales", recipe("layer 2 alone", layers=(2,))
        yield "scales", recipe("layer 3 alone", layers=(3,))
        yield "layer 3", recipe("not centred", centring=0.0)
        yield "layer 3", recipe("centred wholly", centring=1.0)
        for share in (0.0, 1.0):
            taken = f"{share:.0%} taken out" if share else "left in"
            yield "background", recipe(taken, scoring=WEDGE_NET._replace(background=share))
        yield "metric", recipe("Euclidean", shrinkage=1e6)
        for shrinkage in (0.03, 0.3):
            yield "metric", recipe(f"shrinkage {shrinkage:g}", shrinkage=shrinkage)
    yield "method", Variant("PatchCore", patchcore=True)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every variant on every category; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="coresets for each variant: SEED and those after it")
    parser.add_argument("--images", type=positive, help="training images at most (now: all)")
    parser.add_argument("--corruptions", action="store_true", help="noise, blur, colour and darkness too")
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    net = build_net(settings)  # a wrong setting is one message, not one for each category
    rows: list[Row] = []

    def work(category: str) -> list[Row]:
        each = [dataclasses.replace(settings, sampling_ratio=(ratio,)) for ratio in settings.sampling_ratio]
        return [row for own in each for row in measure(own, category, options)]

    with workers(settings, net) as run:
        code = for_each(categories, work, rows.extend, run)
    for ratio in settings.sampling_ratio:
        if own := [row for row in rows if row["ratio"] == ratio]:
            report(settings, ratio, own)
    return code


def measure(settings: Settings, category: str, options: argparse.Namespace) -> list[Row]:
    """A row for each variant of one category."""
    rows = []
    for part, variant in variants(settings):
        found: list[Row] = []
        with few_images(settings, category, options.images) as own:
            for seed in range(settings.seed, settings.seed + options.seeds):
                seeded = dataclasses.replace(own, seed=seed)
                detector, _ = train_variant(variant, seeded, category)
                worse = CORRUPTIONS if options.corruptions and seed == settings.seed else ()
                found += measure_detector(detector, seeded, category, worse)
        rows.append(
            {"category": category, "ratio": settings.sampling_ratio[0], "part": part, "variant": variant.name}
            | summary(found)
            | {"bank_mb": detector.bank_bytes / 1e6, "seeds": options.seeds}
        )
    return rows


def summary(found: Sequence[Row]) -> Row:
    """The figures of one variant's runs: of clean images their mean, of each corruption also the most false alarms."""
    clean = [row for row in found if row["corruption"] == CLEAN]
    aurocs = [row["image_auroc"] for row in clean if row["image_auroc"] is not None]
    figures = {
        "image_auroc": mean(aurocs),
        "image_auroc_spread": (max(aurocs) - min(aurocs)) / 2 if aurocs else None,
        "pixel_auroc": mean([row["pixel_auroc"] for row in clean]),
        "aupro": mean([row["aupro"] for row in clean]),
    }
    for kind in (corruption.kind for corruption in CORRUPTIONS):
        own = [row for row in found if row["corruption"] == kind]
        alarms = [row["false_alarm_rate"] for row in own if row["false_alarm_rate"] is not None]
        figures[f"{kind}_auroc"] = mean([row["image_auroc"] for row in own])
        figures[f"{kind}_false_alarms"] = max(alarms, default=None)
    return figures


def report(settings: Settings, ratio: float, rows: list[Row]) -> None:
    """Means over the categories, the console's table, CSV and picture of one ratio."""
    worse = [name for name in WORSE if any(row[name] is not None for row in rows)]
    means = category_means(rows, ("part", "variant"), (*FIGURES, *WORSE))
    several = len({row["category"] for row in rows}) > 1
    path = settings.save_dir / f"ablation_{ratio_name(ratio)}.csv"
    write_csv(path, rows + means if several else rows)
    shown = means if several else rows
    draw_ablation(path.with_suffix(".png"), shown, rows)
    table = [{name: row[name] for name in ("part", "variant", *FIGURES, *worse)} for row in shown]
    what = f"mean of {len({row['category'] for row in rows})} categories" if several else rows[0]["category"]
    print(f"\n[{what}] {ratio_name(ratio)}, {rows[0]['seeds']} seeds\n{format_table(table)}")
    print(f"written: {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main())
