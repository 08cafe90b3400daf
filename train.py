"""Train WEDGE-Net: embed a category's good images and keep the patches that cover them best.

    python train.py
    python train.py --category all --sampling-ratio all

Writes SAVE_DIR/10pct/model_data_tile_10pct.pt for each category and ratio. Settings are in config.py.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import config
from models.calibration import held_out_scores
from models.coreset import greedy_coreset, random_subset
from models.errors import InputError
from models.scoring import AnomalyMap
from models.wedge_net import WedgeNet, grid_size
from utils.checkpoint import Checkpoint, bank_path, build_net, load_checkpoint, misfit, save_checkpoint
from utils.console import check_writable, command, for_each
from utils.dataset import Sample, files_digest, find_categories, train_samples
from utils.inference import extract_features
from utils.settings import Settings, SettingsParser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--overwrite", action="store_true", help="train again what is there already")
    settings, options = parser.read(argv)
    categories = find_categories(settings)
    check_writable(settings.save_dir, "SAVE_DIR")
    net = build_net(settings)
    print(f"{settings.backbone} on {settings.device} by {net.backbone.name}, {net.dim} dimensions a patch")
    return for_each(categories, lambda category: train_category(settings, category, net, options.overwrite))


def train_category(settings: Settings, category: str, net: WedgeNet, overwrite: bool = False) -> None:
    """Make the banks of one category, at every ratio that is not there yet."""
    samples = train_samples(settings, category)
    ratios = [
        ratio for ratio in settings.sampling_ratio if overwrite or is_missing(settings, category, ratio, net, samples)
    ]
    if not ratios:
        return

    features = extract_features(net, samples, settings, f"{category}: features")
    patches = features.flatten(0, 1)
    chosen = choose_patches(patches, ratios, settings, category)
    anomaly_map = AnomalyMap(grid_size(settings.image_size), settings.image_size, net.scoring).to(net.device)

    for ratio in ratios:
        size = bank_size(len(patches), ratio, category)
        # A whole bank is the features themselves: a copy would double the memory.
        rows = torch.arange(len(patches)) if ratio == 1 else chosen[:size].sort().values
        bank = patches if ratio == 1 else patches[rows]
        scores = held_out_scores(features, bank, rows // features.shape[1], anomaly_map)
        path = bank_path(settings.save_dir, category, ratio)
        checkpoint = Checkpoint(
            memory_bank=bank,
            settings=settings.embedding(),
            frequency=net.frequency_parameters(),
            fingerprint=net.fingerprint,
            category=category,
            sampling_ratio=ratio,
            sampling_method=settings.sampling_method,
            seed=settings.seed,
            training_images=len(samples),
            training_digest=files_digest(samples),
            calibration_scores=scores,
        )
        save_checkpoint(path, checkpoint)
        print(f"[{category}] {len(samples)} images, kept {len(bank)} of {len(patches)} patches: {path}")


def is_missing(settings: Settings, category: str, ratio: float, net: WedgeNet, samples: Sequence[Sample]) -> bool:
    """Whether a bank has to be made: one that is there and fits is skipped, one that does not fit is not replaced."""
    path = bank_path(settings.save_dir, category, ratio)
    if not path.exists():
        return True
    saved = load_checkpoint(path, metadata_only=True)
    reason = misfit(saved, settings.embedding(), net)
    if reason is None and saved.training_digest != files_digest(samples):
        reason = f"it was made from {saved.training_images} other training images"
    if reason is None and (saved.sampling_method, saved.seed) != (settings.sampling_method, settings.seed):
        reason = f"it was made by {saved.sampling_method} sampling with SEED {saved.seed}"
    if reason is not None:
        raise InputError(
            f"{path} is there but does not fit: {reason}; use --overwrite to replace it, or another SAVE_DIR"
        )
    print(f"[{category}] {path} is there and fits: skipped (--overwrite trains it again)")
    return False


def choose_patches(patches: Tensor, ratios: Sequence[float], settings: Settings, category: str) -> Tensor:
    """Indices of the patches to keep for the largest ratio below 1; a smaller ratio keeps the first of them.

    Both methods choose one after the other, so a smaller bank is the beginning of a larger one.
    """
    partial = [ratio for ratio in ratios if ratio < 1]
    if not partial:
        return torch.arange(0)
    size = bank_size(len(patches), max(partial), category)
    if settings.sampling_method == "random":
        return random_subset(len(patches), size, settings.seed)
    return greedy_coreset(patches, size, settings.seed, progress=True)


def bank_size(patches: int, ratio: float, category: str) -> int:
    """How many patches a ratio keeps: rounded down, at least one."""
    size = int(patches * ratio)
    if size == 0:
        print(f"[{category}] ratio {ratio} of {patches} patches is less than one: keeping 1", file=sys.stderr)
    return max(1, size)


if __name__ == "__main__":
    sys.exit(main())
