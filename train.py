"""Train WEDGE-Net: embed a category's good images and keep the patches that cover them best.

    python train.py
    python train.py --category all --sampling-ratio all
    python train.py --without 017.png 023.png --overwrite

Writes SAVE_DIR/10pct/model_data_tile_10pct.pt for each category and ratio, and beside it odd_images_tile_10pct.csv and
.png: the training pictures that are unlike the others, to be looked at before all else. Nothing is left out by itself,
only what --without names, or DATA_PATH/tile/exclude.txt (a file name a line). Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import config
from models.errors import InputError
from utils.console import Run, check_writable, command, for_each
from utils.data.dataset import find_categories
from utils.pipeline.cluster import trainers
from utils.pipeline.odd_images import name_odd_images, tell_threshold, tell_twins
from utils.pipeline.training import tell_edges, train_category, wedge_net_method
from utils.settings import SettingsParser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--overwrite", action="store_true", help="train again what is there already")
    parser.add_argument("--without", nargs="+", default=[], metavar="FILE", help="training pictures to leave out")
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    if options.without and len(categories) > 1:
        raise InputError(f"--without names pictures of one category, CATEGORY names {len(categories)}")
    check_writable(settings.save_dir, "SAVE_DIR")
    method = wedge_net_method(settings)
    net = method.net
    conditions = f", {len(net.conditions)} conditions" if len(net.conditions) > 1 else ""
    dims = " and ".join(map(str, net.dims))
    how = f"{net.backbone.name}, form {settings.form}, {dims} channels{conditions}"
    print(f"{settings.backbone} on {settings.device} by {how}")

    def train(category: str, run_shards: Run) -> None:
        trained = train_category(settings, category, method, options.overwrite, options.without, run_shards)
        for number, each in enumerate(trained):
            if number == 0:
                tell_edges(each, settings, category)
                tell_twins(each, settings, category)
            tell_threshold(each, settings, category)
            name_odd_images(each, settings, category)

    with trainers(settings, net) as (run, run_shards):
        return for_each(categories, lambda category: train(category, run_shards), run=run)


if __name__ == "__main__":
    sys.exit(main())
