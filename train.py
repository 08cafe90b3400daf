"""Train WEDGE-Net: embed a category's good images and keep the patches that cover them best.

    python train.py
    python train.py --category all --sampling-ratio all

Writes SAVE_DIR/10pct/model_data_tile_10pct.pt for each category and ratio. Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import torch

import config
from models.whitening import fit_whitening
from utils.checkpoint import bank_path, build_net
from utils.conditions import learn_conditions
from utils.console import check_writable, command, for_each
from utils.dataset import find_categories
from utils.settings import SettingsParser
from utils.training import Method, train_category


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--overwrite", action="store_true", help="train again what is there already")
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    net = build_net(settings)
    dim = settings.embedding_dim or net.dim
    print(
        f"{settings.backbone} on {settings.device} by {net.backbone.name}, {dim} dimensions a patch, {settings.metric}"
    )
    method = Method(
        net,
        settings.embedding(),
        lambda category, ratio: bank_path(settings.save_dir, category, ratio),
        "SAVE_DIR",
        lambda patches: fit_whitening(patches, settings.metric, settings.whitening_shrinkage, settings.embedding_dim),
        getattr(torch, settings.bank_dtype),
        None if net.stream is None else lambda samples, category: learn_conditions(net, samples, settings, category),
    )
    return for_each(categories, lambda category: train_category(settings, category, method, options.overwrite))


if __name__ == "__main__":
    sys.exit(main())
