"""Image AUROC of WEDGE-Net and PatchCore under changing light and colour (the paper's Figure 6).

    python eval_color_robustness.py
    python eval_color_robustness.py --category all --sampling-ratio all

The test images get brightness times 1 + 0.3 f, contrast times 1 + 0.5 f, saturation times 1 + 0.5 f and hue turned by
0.1 f of the circle (at most half), in that order, for factors f from 0 to 3. Beside AUROC stand the shares of good and
of defective images above the threshold that training set for 5 % false alarms. PatchCore's columns are empty without
its bank.

Writes SAVE_DIR/final_color_comparison_tile_10pct.csv and figure6_color_robustness_tile_10pct.png. Settings are in
config.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import config
from utils.console import command
from utils.pipeline.robustness import COLOUR, add_levels, measure_robustness
from utils.settings import SettingsParser

CSV = "final_color_comparison_{}_{}.csv"
PNG = "figure6_color_robustness_{}_{}.png"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    add_levels(parser, COLOUR)
    settings, options = parser.read(argv)
    return measure_robustness(settings, replace(COLOUR, levels=options.levels), CSV, PNG)


if __name__ == "__main__":
    sys.exit(main())
