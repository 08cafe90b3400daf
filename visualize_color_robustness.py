"""One good part under changing light and colour, as PatchCore and WEDGE-Net see it: a tile of 4 x 4.

    python visualize_color_robustness.py
    python visualize_color_robustness.py --category all

Rows are colour jitter of factor 0, 1, 2 and 3 (see eval_color_robustness.py) on the first image of test/good; columns
are the original, the corrupted image and both methods' anomaly maps, each method with one colour scale. Without a
PatchCore bank its column is grey.

Writes SAVE_DIR/Figure_Color_Robustness_tile_Final.png; with several ratios each figure's name has its own
(Figure_Color_Robustness_tile_10pct_Final.png). Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import config
from utils.console import command
from utils.pipeline.robustness import COLOUR, show_robustness
from utils.settings import SettingsParser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw every category and ratio that the settings ask for; returns the exit code."""
    settings, _ = SettingsParser(config, __doc__).read(argv)
    return show_robustness(settings, COLOUR, "Figure_Color_Robustness_{}_Final.png")


if __name__ == "__main__":
    sys.exit(main())
