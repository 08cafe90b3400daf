"""Image AUROC of WEDGE-Net and PatchCore under sensor noise (the paper's Figure 5).

    python eval_noise_robustness.py
    python eval_noise_robustness.py --category all --sampling-ratio all --noise-seeds 3

Gaussian noise of sigma 0, 10, 20, 30 and 40 grey levels (of 255) is added to the test images. It is seeded by image,
level and SEED, so the figures do not depend on batch size or workers. Beside AUROC stand the shares of good and of
defective images above the threshold that training set for 5 % false alarms. PatchCore's columns are empty without its
bank.

Writes SAVE_DIR/full_noise_comparison_smoothed_tile_10pct.csv and figure5_noise_robustness_tile_10pct.png. Settings are
in config.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import config
from utils.console import command
from utils.pipeline.robustness import NOISE, add_levels, measure_robustness
from utils.settings import SettingsParser, positive

CSV = "full_noise_comparison_smoothed_{}_{}.csv"
PNG = "figure5_noise_robustness_{}_{}.png"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument(
        "--noise-seeds", type=positive, default=1, metavar="N", help="draw the noise N times: mean and range (now: 1)"
    )
    add_levels(parser, NOISE)
    settings, options = parser.read(argv)
    return measure_robustness(settings, replace(NOISE, levels=options.levels), CSV, PNG, options.noise_seeds)


if __name__ == "__main__":
    sys.exit(main())
