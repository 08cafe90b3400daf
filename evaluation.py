"""Evaluate WEDGE-Net: score a category's test images against its memory bank.

    python evaluation.py
    python evaluation.py --category all --sampling-ratio all

Prints image-level AUROC with the pixel figures beside it; writes SAVE_DIR/final_evaluation_results.csv and .png, and
with FORM = 'wedge' SAVE_DIR/conditions_tile.csv and .png: the condition that each test image was judged in. What each
false-alarm rate buys is in SAVE_DIR/false_alarm_rates.csv and .png. Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import models.threads  # noqa: F401 - before torch

import config
from models.wedge_net import WedgeNet
from utils.console import check_writable, command, for_each
from utils.data.dataset import find_categories, test_samples
from utils.metrics import rates_bought
from utils.pipeline.checkpoint import build_net, load_detector
from utils.pipeline.cluster import workers
from utils.pipeline.evaluating import Row, figures, tell_conditions, tell_figures, write_figures, write_rates
from utils.pipeline.inference import score_samples
from utils.settings import Settings, SettingsParser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate every category and ratio that the settings ask for; returns the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    net = build_net(settings)
    rows: list[Row] = []
    bought: list[Row] = []

    def gather(found: tuple[list[Row], list[Row]]) -> None:
        rows.extend(found[0])
        bought.extend(found[1])

    with workers(settings, net) as run:
        code = for_each(categories, lambda category: evaluate_category(settings, category, net), gather, run)
    write_figures(settings, rows, averaged=len(categories) > 1)
    write_rates(settings, bought, averaged=len(categories) > 1)
    return code


def evaluate_category(settings: Settings, category: str, net: WedgeNet) -> tuple[list[Row], list[Row]]:
    """A row of figures for each ratio, and for each ratio what each false-alarm rate buys."""
    loaded = [load_detector(settings, category, ratio, net) for ratio in settings.sampling_ratio]
    detectors = [detector for detector, _ in loaded]
    scores = score_samples(detectors, test_samples(settings, category), settings, category)
    rows, bought = [], []
    for ratio, (detector, checkpoint), scored in zip(settings.sampling_ratio, loaded, scores, strict=True):
        about = {"category": category, "ratio": ratio}
        row = about | figures(detector, checkpoint, scored, settings.false_alarm_rate)
        calibration = checkpoint.calibration_scores.numpy()
        tell_figures(row, calibration, settings.false_alarm_rate)
        rows.append(row)
        if row["threshold"] is not None:
            bought += [about | each for each in rates_bought(scored.labels, scored.scores, calibration)]
    tell_conditions(settings, category, detectors[0].net, scores[0])
    return rows, bought


if __name__ == "__main__":
    sys.exit(main())
