"""The score gap with and without semantic attention (the paper's Table 7).

    python train.py --category all                                                      # banks in SemanticOFF_DIR
    python train.py --category all --use-semantic True --save-dir WEDGE-Net_Sem_ON      # banks in SemanticON_DIR
    python eval_gap_score.py --category all

The gap is the mean image score of defective parts minus that of good ones. It grows with the scale of the scores,
which the module changes; so the separation stands beside it (the gap over the good parts' standard deviation), and the
image AUROC. Averages are taken of the figures, and an average's improvement of the averaged gaps.

Writes SemanticON_DIR/result_gap_via_sem_onoff.csv and .png. Settings are in config.py.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import config
from models.errors import InputError
from models.wedge_net import WedgeNet
from utils.console import check_writable, command, for_each
from utils.data.dataset import find_categories, test_samples
from utils.data.mvtec import MVTEC_CATEGORIES, TEXTURES
from utils.metrics import auroc
from utils.pictures.figures import draw_gap
from utils.pictures.tables import format_table, mean, write_csv
from utils.pipeline.checkpoint import bank_path, build_net, load_detector
from utils.pipeline.cluster import workers
from utils.pipeline.inference import score_samples
from utils.settings import Settings, SettingsParser

COLUMNS = (
    "category", "kind", "ratio", "gap_off", "gap_on", "improvement_percent",
    "separation_off", "separation_on", "auroc_off", "auroc_on",
)  # fmt: skip
Row = dict[str, Any]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compare both kinds of bank for every category and ratio that the settings ask for; returns the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    categories = find_categories(settings)
    check_writable(settings.semanticon_dir, "SemanticON_DIR")
    variants = {
        "off": dataclasses.replace(settings, use_semantic=False, save_dir=settings.semanticoff_dir),
        "on": dataclasses.replace(settings, use_semantic=True, save_dir=settings.semanticon_dir),
    }
    nets = {name: build_net(variant) for name, variant in variants.items()}
    rows: list[Row] = []
    with workers(settings, *nets.values()) as run:
        code = for_each(categories, lambda category: compare(category, variants, nets), rows.extend, run)
    if rows:
        rows.sort(key=lambda row: -row["ratio"])
        if len(categories) > 1:
            rows += averages(rows)
        path = settings.semanticon_dir / "result_gap_via_sem_onoff.csv"
        write_csv(path, rows)
        draw_gap(path.with_suffix(".png"), rows)
        print("\n" + format_table(rows) + f"\n\nwritten: {path} and {path.with_suffix('.png')}")
    return code


def compare(category: str, variants: dict[str, Settings], nets: dict[str, WedgeNet]) -> list[Row]:
    """One row for each ratio: the figures of the bank without and of the bank with the semantic stream."""
    ratios = variants["on"].sampling_ratio
    samples = test_samples(variants["on"], category)
    for variant in variants.values():
        for path in (bank_path(variant.save_dir, category, ratio) for ratio in ratios):
            if not path.exists():
                how = f"train.py --use-semantic {variant.use_semantic} --save-dir {variant.save_dir}"
                raise InputError(f"memory bank {path} is missing: make it with {how}")
    detectors = {
        name: [load_detector(variant, category, ratio, nets[name])[0] for ratio in ratios]
        for name, variant in variants.items()
    }
    rows = [dict.fromkeys(COLUMNS) | {"category": category, "kind": kind(category), "ratio": ratio} for ratio in ratios]
    for name, variant in variants.items():
        scored = score_samples(detectors[name], samples, variant, f"{category}, semantic {name}")
        for row, result in zip(rows, scored, strict=True):
            row |= {f"{figure}_{name}": value for figure, value in measure(result.labels, result.scores).items()}
    for row in rows:
        row["improvement_percent"] = improvement(row)
    if rows[0]["gap_on"] is None:
        print(f"[{category}] score gap: undefined: it takes good and defective test images")
    return rows


def kind(category: str) -> str:
    """'texture' or 'object' as MVTec AD's authors have it, 'other' for a category that is not theirs."""
    return "texture" if category in TEXTURES else "object" if category in MVTEC_CATEGORIES else "other"


def measure(labels: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Gap, separation and AUROC of scores (N,) with labels 0 and 1; None where a class or a spread is missing."""
    good, defective = scores[labels == 0], scores[labels == 1]
    gap = float(defective.mean() - good.mean()) if len(good) and len(defective) else None
    spread = float(good.std(ddof=1)) if len(good) > 1 else 0.0
    return {
        "gap": gap,
        "separation": gap / spread if gap is not None and spread else None,
        "auroc": auroc(labels, scores),
    }


def improvement(row: Row) -> float | None:
    """By how many % of itself the gap grows with semantic attention; None if there is no positive gap without it."""
    off, on = row["gap_off"], row["gap_on"]
    return None if off is None or on is None or off <= 0 else 100 * (on / off - 1)


def averages(rows: Sequence[Row]) -> list[Row]:
    """For each ratio the means of the textures, the objects, the others, and of all if there are several kinds."""
    means = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        own = [row for row in rows if row["ratio"] == ratio]
        groups = {name: [row for row in own if row["kind"] == name] for name in ("texture", "object", "other")}
        groups = {name: members for name, members in groups.items() if members}
        if len(groups) > 1:
            groups["all"] = own
        for name, members in groups.items():
            row = dict.fromkeys(COLUMNS) | {"category": "mean", "kind": name, "ratio": ratio}
            for figure in COLUMNS[3:]:
                row[figure] = mean([member[figure] for member in members])
            means.append(row | {"improvement_percent": improvement(row)})
    return means


if __name__ == "__main__":
    sys.exit(main())
