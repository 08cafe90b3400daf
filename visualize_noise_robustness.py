"""One good part under growing sensor noise, as PatchCore and WEDGE-Net see it: a tile of 4 x 4.

    python visualize_noise_robustness.py
    python visualize_noise_robustness.py --category all

Rows are Gaussian noise of sigma 0, 10, 20 and 40 grey levels (of 255) on the first image of test/good; columns are the
original, the corrupted image and both methods' anomaly maps, each method with one colour scale. Without a PatchCore
bank its column is grey.

Writes SAVE_DIR/Figure_Noise_Robustness_tile.png; with several ratios each figure's name has its own
(Figure_Noise_Robustness_tile_10pct.png). Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import config
from utils.console import command
from utils.pipeline.robustness import NOISE, show_robustness
from utils.settings import SettingsParser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw every category and ratio that the settings ask for; returns the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    return show_robustness(settings, NOISE, "Figure_Noise_Robustness_{}.png")


if __name__ == "__main__":
    sys.exit(main())
