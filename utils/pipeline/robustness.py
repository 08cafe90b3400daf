"""What corruption of the images does to WEDGE-Net and to PatchCore: one loop for noise, blur, colour and light."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.detector import Detector
from models.errors import InputError
from utils.console import check_writable, for_each
from utils.data.corruptions import corrupt
from utils.data.dataset import Batch, Sample, batches, find_categories, test_samples
from utils.metrics import FALSE_ALARMS, alarm_rates, auroc, training_threshold
from utils.pictures.figures import draw_robustness
from utils.pictures.panels import Maps, draw_levels
from utils.pictures.tables import format_table, write_csv
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.cluster import workers
from utils.pipeline.inference import Alteration, at_depth_of, score_samples
from utils.pipeline.patchcore import find_patchcore, load_patchcore
from utils.settings import Settings, ratio_name

FIGURES = ("auroc", "false_alarm_rate", "detection_rate", "unfamiliar_rate")


@dataclass(frozen=True)
class Corruption:
    """A way to make images worse by degrees. Level 0 leaves them as they are.

    ``kind`` as ``utils.data.corruptions.corrupt`` calls it; ``levels`` are measured and ``shown`` are drawn;
    ``symbol`` is what a level is called, ``axis`` that with its unit.
    """

    kind: str
    symbol: str
    axis: str
    levels: tuple[float, ...]
    shown: tuple[float, ...]

    def hook(self, settings: Settings, level: float, seed: int) -> Alteration:
        """What ``score_samples`` calls. An image's name is its path below DATA_PATH: the data may lie anywhere."""

        def alter(batch: Batch) -> Tensor:
            names = [sample.path.relative_to(settings.data_path).as_posix() for sample in batch.samples]
            return corrupt(batch.images, self.kind, level, names, seed)

        return alter


NOISE = Corruption(
    kind="noise",
    symbol="sigma",
    axis="Gaussian noise: sigma, in grey levels of 255",
    levels=(0, 10, 20, 30, 40),
    shown=(0, 10, 20, 40),
)
BLUR = Corruption(
    kind="blur",
    symbol="sigma",
    axis="Gaussian blur: sigma, in pixels",
    levels=(0, 1, 1.5, 2, 3),
    shown=(0, 1, 2, 3),
)
COLOUR = Corruption(
    kind="colour",
    symbol="factor",
    axis="colour jitter: factor",
    levels=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
    shown=(0.0, 1.0, 2.0, 3.0),
)


DARK = Corruption(
    kind="dark",
    symbol="share",
    axis="less light: share taken away",
    levels=(0, 0.2, 0.4, 0.6),
    shown=(0, 0.2, 0.4, 0.6),
)


def add_levels(parser: argparse.ArgumentParser, corruption: Corruption) -> None:
    """Give a script the flag ``--levels``."""
    usual = ",".join(f"{level:g}" for level in corruption.levels)
    help = f"levels to measure, a comma list (now: {usual})"
    parser.add_argument("--levels", type=_levels, default=corruption.levels, metavar="LIST", help=help)


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = sorted({float(part) for part in text.split(",")})
    except ValueError:
        levels = []
    if not levels or not 0 <= levels[0] <= levels[-1] <= 255:
        raise argparse.ArgumentTypeError(f"must be numbers from 0 to 255, such as 0,5,10, not {text!r}")
    return tuple(levels)


def measure_robustness(settings: Settings, corruption: Corruption, csv: str, png: str, seeds: int = 1) -> int:
    """Write a table and a figure for every category and ratio that the settings ask for; returns the exit code.

    ``csv`` and ``png`` are names in SAVE_DIR, with {} for category and ratio. The corruption is drawn with ``seeds``
    seeds: SEED and those that follow it.
    """

    def work(category: str, ours: Sequence[Detector], baseline: Detector | None) -> None:
        samples = test_samples(settings, category)
        if len({sample.label for sample in samples}) < 2:
            print(f"[{category}] image-level AUROC: undefined: it takes good and defective test images")
        curves = measure(ours, samples, settings, corruption, seeds, f"{category}, WEDGE-Net")
        (reference,) = measure([baseline], samples, settings, corruption, seeds, f"{category}, PatchCore")
        for ratio, curve in zip(settings.sampling_ratio, curves, strict=True):
            rows = to_rows(category, ratio, corruption, {"wedge_net": curve, "patchcore": reference})
            table, figure = (settings.save_dir / name.format(category, ratio_name(ratio)) for name in (csv, png))
            write_csv(table, rows)
            names = [f"WEDGE-Net ({ratio * 100:g} % of the patches)"]
            names += [] if baseline is None else [_baseline_name(settings, category)]
            draw_robustness(figure, f"{category}: {', '.join(names)}", corruption.axis, rows)
            rates = f"rates at the training threshold for {FALSE_ALARMS * 100:g} % false alarms"
            print(f"\n[{category}] {corruption.axis}, {ratio_name(ratio)}; {rates}\n{describe(rows)}")
            print(f"written: {table} and {figure}")

    return _compare(settings, work)


def show_robustness(settings: Settings, corruption: Corruption, png: str) -> int:
    """Draw the first good test image of every category at the levels that are shown; returns the exit code.

    ``png`` is a name in SAVE_DIR with {} for the category, and for the ratio too if the settings ask for several.
    """

    def work(category: str, ours: Sequence[Detector], baseline: Detector | None) -> None:
        good = [sample for sample in test_samples(settings, category) if not sample.label]
        if not good:
            raise InputError(f"{category} has no good test image (test/good) to draw")
        batch = next(batches(good[:1], at_depth_of(ours, settings)))
        images = torch.cat([corruption.hook(settings, level, settings.seed)(batch) for level in corruption.shown])
        reference = None if baseline is None else _maps(settings, baseline, images)
        for ratio, detector in zip(settings.sampling_ratio, ours, strict=True):
            name = category if len(ours) == 1 else f"{category}_{ratio_name(ratio)}"
            path = settings.save_dir / png.format(name)
            draw_levels(
                path,
                f"{category}/{good[0].defect}/{good[0].path.name}",
                [f"{corruption.symbol} = {level:g}" for level in corruption.shown],
                images.permute(0, 2, 3, 1).numpy(),
                {
                    _baseline_name(settings, category): reference,
                    f"WEDGE-Net ({ratio * 100:g} %)": _maps(settings, detector, images),
                },
                detector.inside,
            )
            print(f"[{category}] written: {path}")

    return _compare(settings, work)


def _compare(settings: Settings, work: Callable[[str, Sequence[Detector], Detector | None], None]) -> int:
    """Do ``work`` for each category with WEDGE-Net's detectors, one for each ratio, and PatchCore's.

    Without a PatchCore bank there is None in its place. So there is where it cannot be used, but then the category has
    failed: what was asked for is a comparison.
    """
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    if without := [category for category in categories if find_patchcore(settings, category) is None]:
        print(
            f"note: PatchCore is left out for {', '.join(without)}: {settings.patchcore_dir} holds no bank; "
            "train_patchcore.py makes one",
            file=sys.stderr,
        )
    net = build_net(settings)

    def one(category: str) -> None:
        ours = [load_detector(settings, category, ratio, net)[0] for ratio in settings.sampling_ratio]
        failure = None
        try:
            baseline = load_patchcore(settings, category)
        except InputError as error:
            baseline, failure = None, error
        work(category, ours, baseline)
        if failure is not None:
            raise failure

    with workers(settings, net) as run:
        return for_each(categories, one, run=run)


def measure(
    detectors: Sequence[Detector | None],
    samples: Sequence[Sample],
    settings: Settings,
    corruption: Corruption,
    seeds: int,
    what: str,
) -> np.ndarray:
    """FIGURES of detectors of one embedding: (detectors, levels, seeds, 4), NaN where undefined or no detector is."""
    figures = np.full((len(detectors), len(corruption.levels), seeds, len(FIGURES)), np.nan)
    if None in detectors:
        return figures
    thresholds = [training_threshold(detector.calibration_scores.numpy(), FALSE_ALARMS) for detector in detectors]
    for place, level in enumerate(corruption.levels):
        for draw in range(seeds if level else 1):
            hook = corruption.hook(settings, level, settings.seed + draw)
            progress = f"{what}, {corruption.symbol} {level:g}"
            results = score_samples(detectors, samples, settings, progress, hook)
            for own, result, threshold in zip(figures, results, thresholds, strict=True):
                rates = alarm_rates(result.labels, result.scores, threshold)
                unfamiliar = None if result.unfamiliar is None else result.unfamiliar.mean()
                own[place, draw] = np.array([auroc(result.labels, result.scores), *rates, unfamiliar], float)
        if not level:
            figures[:, place] = figures[:, place, :1]  # the image itself is the same for every seed
    return figures


def to_rows(category: str, ratio: float, corruption: Corruption, curves: Mapping[str, np.ndarray]) -> list[dict]:
    """A row for each level from each method's (levels, seeds, 4) figures: means, and the AUROCs' range over seeds."""
    rows = []
    for place, level in enumerate(corruption.levels):
        means = {name: curve[place].mean(axis=0) for name, curve in curves.items()}
        row = {"category": category, "ratio": ratio, "level": level}
        row |= {f"{name}_auroc": figures[0] for name, figures in means.items()}
        for name, figures in means.items():
            row |= {f"{name}_{figure}": value for figure, value in zip(FIGURES[1:3], figures[1:3], strict=True)}
        row["wedge_net_unfamiliar_rate"] = means["wedge_net"][3]  # the baseline knows of no conditions
        if curves["wedge_net"].shape[1] > 1:
            for name, curve in curves.items():
                aurocs = curve[place, :, 0]
                row |= {f"{name}_auroc_min": aurocs.min(), f"{name}_auroc_max": aurocs.max()}
        rows.append({name: cell(value) for name, value in row.items()})
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table narrow enough for a terminal: without what is the same in all, or empty."""
    shown = [
        name for name in rows[0] if name not in ("category", "ratio") and any(row[name] is not None for row in rows)
    ]
    return format_table([{name: row[name] for name in shown} for row in rows])


def cell(value: Any) -> Any:
    """NaN as an empty cell, NumPy's numbers as Python's."""
    if not isinstance(value, np.floating):
        return value
    return None if np.isnan(value) else float(value)


def _baseline_name(settings: Settings, category: str) -> str:
    """PatchCore with the share of the patches that its bank keeps, if there is one."""
    found = find_patchcore(settings, category)
    return "PatchCore" if found is None else f"PatchCore ({found[1] * 100:g} %)"


def _maps(settings: Settings, detector: Detector, images: Tensor) -> Maps:
    prediction = detector.predict(images)
    threshold = training_threshold(detector.calibration_scores.numpy(), settings.false_alarm_rate)
    return Maps(prediction.maps.cpu().numpy(), prediction.scores.tolist(), threshold)
