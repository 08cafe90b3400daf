"""Train WEDGE-Net: embed a category's good images and keep the patches that cover them best.

    python train.py
    python train.py --category all --sampling-ratio all

Writes SAVE_DIR/10pct/model_data_tile_10pct.pt for each category and ratio. Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import config
from utils.console import check_writable, command, for_each
from utils.data.dataset import find_categories
from utils.pipeline.training import train_category, wedge_net_method
from utils.settings import SettingsParser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--overwrite", action="store_true", help="train again what is there already")
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    method = wedge_net_method(settings)
    net = method.net
    conditions = f", {len(net.conditions)} conditions" if len(net.conditions) > 1 else ""
    dims = " and ".join(map(str, net.dims))
    how = f"{net.backbone.name}, form {settings.form}, {dims} channels{conditions}"
    print(f"{settings.backbone} on {settings.device} by {how}")
    return for_each(categories, lambda category: train_category(settings, category, method, options.overwrite))


if __name__ == "__main__":
    sys.exit(main())
