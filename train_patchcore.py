"""Train the PatchCore baseline on the same images: plain features of layers 2 and 3, and the patches that cover them.

    python train_patchcore.py --sampling-ratio 1,0.1
    python train_patchcore.py --category all --patchcore-backbone efficientnet_lite0

Writes PatchCore_DIR/model_data_tile.pt (all patches) or PatchCore_DIR/model_data_tile_10pct.pt for each category and
ratio; what compares with PatchCore takes the largest. Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import config
from utils.console import Run, check_writable, command, for_each
from utils.data.dataset import find_categories
from utils.pipeline.cluster import trainers
from utils.pipeline.training import patchcore_method, train_category
from utils.settings import SettingsParser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--overwrite", action="store_true", help="train again what is there already")
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.patchcore_dir, "PatchCore_DIR")
    method = patchcore_method(settings)
    net = method.net
    print(
        f"{settings.patchcore_backbone} on {settings.device} by {net.backbone.name}, {net.dims[0]} dimensions a patch"
    )

    def train(category: str, run_shards: Run) -> None:
        train_category(settings, category, method, options.overwrite, run=run_shards)

    with trainers(settings, net) as (run, run_shards):
        return for_each(categories, lambda category: train(category, run_shards), run=run)


if __name__ == "__main__":
    sys.exit(main())
