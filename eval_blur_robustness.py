"""Image AUROC of WEDGE-Net and PatchCore on pictures out of focus.

    python eval_blur_robustness.py
    python eval_blur_robustness.py --category all --sampling-ratio all --levels 0,0.5,1,1.5,2,2.5,3

The test images are blurred by a Gaussian of sigma 0, 1, 1.5, 2 and 3 pixels. Beside AUROC stand the shares of good and
of defective images above the threshold that training set for 5 % false alarms. PatchCore's columns are empty without
its bank.

Writes SAVE_DIR/full_blur_comparison_tile_10pct.csv and figure_blur_robustness_tile_10pct.png. Settings are in
config.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import config
from utils.console import command
from utils.pipeline.robustness import BLUR, add_levels, measure_robustness
from utils.settings import SettingsParser

CSV = "full_blur_comparison_{}_{}.csv"
PNG = "figure_blur_robustness_{}_{}.png"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    add_levels(parser, BLUR)
    settings, options = parser.read(argv)
    return measure_robustness(settings, replace(BLUR, levels=options.levels), CSV, PNG)


if __name__ == "__main__":
    sys.exit(main())
