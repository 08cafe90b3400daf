"""How far good parts lie from a memory that has not seen them: what thresholds and units are taken from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.memory_bank import MemoryBank
from models.whitening import fit_lens, fit_whitening

FOLDS = 10
_LENS_FOLDS = 4  # fewer: a lens is made for each, in every condition
_BUDGET = 2e12  # multiply-adds: about half a minute on two cores; the selection that comes before takes longer
_TILE = 1024  # bank vectors in one product, which then fits in the cache
_MOST = 2000  # images: a threshold is settled by far fewer, but each that is scored can be named as odd
_NUMBERS = 2**29  # features held once more for it: 2 GB of float32
_FEWEST = 20  # images scored however large the bank
FEW = 20  # images: a metric made of so few suits them better than new ones


def calibration_images(images: int, banks: Sequence[tuple[int, int, int]]) -> Tensor:
    """Which of the training images are held out, one fold after the other: (n,) numbers, evenly spaced.

    All of them, unless there are more than it takes, or banks or images are so large that all would take too long or
    too much memory.
    ``banks``: for each scale the patches of an image, the vectors of the bank and their dimension.
    """
    cost = sum(patches * vectors * dim for patches, vectors, dim in banks)
    numbers = sum(patches * dim for patches, _, dim in banks)
    count = min(images, _MOST, max(_FEWEST, min(int(_BUDGET / cost), _NUMBERS // numbers)))
    return torch.linspace(0, images - 1, count).round().long()


@torch.inference_mode()
def through_held_out_lenses(corrupted: Tensor, clean: Tensor) -> Tensor:
    """(n, h*w, D) patches of training images in a condition, brought to where the same images' clean ones lie.

    Each image is seen through a lens that was made without it. A lens suits the images that it was made from better
    than new ones, the fewer they are the more, so that through it they would lie too near. A single image is seen
    through its own.
    """
    count = len(corrupted)
    folds = min(_LENS_FOLDS, count)
    if folds == 1:
        return fit_lens(corrupted[0], clean[0])(corrupted)
    fold = torch.arange(count) * folds // count
    return torch.cat(
        [
            fit_lens(corrupted[fold != own].flatten(0, 1), clean[fold != own].flatten(0, 1))(corrupted[fold == own])
            for own in range(folds)
        ]
    )


@torch.inference_mode()
def held_out_distances(features: Tensor, images: Tensor, count: int, vectors: Tensor, owners: Tensor) -> Tensor:
    """Distances of training images' patches from a bank of the others: K-fold calibration at the cost of one search.

    A fold's bank is the whole bank without the vectors of the fold's own images. That leaves holes where one of them
    stood for patches of other images too; a bank made without the fold would have another vector there, so patches of
    other images are added until none is farther from the bank than the farthest is from the whole one. Distances then
    have the same distribution as with a selection of its own for each fold, and without the holes filled are too high.

    Folds are runs of neighbouring images, since those that follow each other on a line resemble each other most.

    Args:
        features: (n, P, D) patch features of some training images, float32 or float16.
        images: (n,) their numbers among the ``count`` training images, ascending.
        vectors: (M, D) the bank, sorted by image.
        owners: (M,) number of the image that each vector comes from, ascending.

    Returns:
        (n, h*w); infinite for the images of a fold that the whole bank comes from: nothing is left to judge them by.
    """
    patches = features.shape[1]
    bounds = torch.tensor([count * k // min(FOLDS, count) for k in range(min(FOLDS, count) + 1)])
    fold_of = torch.searchsorted(bounds, images, right=True) - 1
    folds = len(bounds) - 1
    device = vectors.device

    # Distance of each patch to the nearest vector of each fold: whatever is left out, the rest follows from these.
    nearest = torch.full((folds, len(images), patches), torch.inf, device=device)
    parts = torch.searchsorted(owners, bounds).unfold(0, 2, 1).tolist()
    tiles = [
        (fold, tile, tile.square().sum(dim=1))
        for fold, (start, stop) in enumerate(parts)
        if start < stop
        for tile in vectors[start:stop].float().split(_TILE)
    ]
    for row, queries in enumerate(features):
        queries = queries.to(device).float()
        own = queries.square().sum(dim=1)
        for fold, tile, norms in tiles:
            squared = torch.addmm(norms, queries, tile.T, alpha=-2).amin(dim=1).add_(own)
            torch.minimum(nearest[fold, row], squared.clamp_min_(0).sqrt_(), out=nearest[fold, row])

    radius = nearest.amin(dim=0).max()
    held_out = torch.full((len(images), patches), torch.inf, device=device)
    for fold in range(folds):
        distances = nearest[torch.arange(folds) != fold].amin(dim=0) if folds > 1 else held_out
        inside = (fold_of == fold).to(device)
        if not distances.isfinite().all() or not inside.any():
            continue
        holes = (distances > radius) & ~inside[:, None]
        added = cover(features.to(device)[holes].float(), distances[holes], radius)
        held_out[inside] = distances[inside]
        if len(added):
            nearer = MemoryBank(added).nearest(features.to(device)[inside].flatten(0, 1)).view(-1, patches)
            held_out[inside] = torch.minimum(held_out[inside], nearer)
    return held_out.cpu()


@torch.inference_mode()
def held_out_from_the_metric(features: Tensor, rows: Tensor, shrinkage: float) -> Tensor:
    """``held_out_distances`` of all of a few images, each by a metric that was made without it: (n, h*w).

    ``features`` (n, h*w, D) are as they are before the metric, ``rows`` (M,) the patches of them that are remembered.
    """
    count, patches = features.shape[:2]
    images, distances = torch.arange(count), torch.empty(count, patches)
    for image in images:
        mapped = fit_whitening(features[images != image].flatten(0, 1), shrinkage)(features)
        bank = mapped.flatten(0, 1)[rows]
        distances[image] = held_out_distances(mapped, images, count, bank, rows // patches)[image]
    return distances


def cover(patches: Tensor, distances: Tensor, radius: Tensor | float) -> Tensor:
    """Of (n, D) patches, at ``distances`` (n,) from a bank, those (m, D) that leave none farther than ``radius``.

    The farthest first, as in the selection of a coreset.
    """
    added = []
    while len(patches):
        added.append(patches[distances.argmax()])
        distances = torch.minimum(distances, torch.linalg.vector_norm(patches - added[-1], dim=1))
        patches, distances = patches[distances > radius], distances[distances > radius]
    return torch.stack(added) if added else patches
