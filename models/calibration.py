"""What score a good part gets: the training images scored against a bank that has not seen them."""

import torch
from torch import Tensor

from models.memory_bank import MemoryBank
from models.scoring import AnomalyMap

FOLDS = 10
_BUDGET = 2e12  # multiply-adds: about half a minute on two cores; the selection that comes before takes longer
_TILE = 1024  # bank vectors in one product, which then fits in the cache
_MOST = 500  # images: more hardly move a threshold
_FEWEST = 20  # images scored however large the bank


@torch.inference_mode()
def held_out_scores(features: Tensor, vectors: Tensor, owners: Tensor, anomaly_map: AnomalyMap) -> Tensor:
    """Score training images, each against a bank of the others: K-fold calibration at the cost of one search.

    A fold's bank is the whole bank without the vectors of the fold's own images. That leaves holes where one of them
    stood for patches of other images too; a bank made without the fold would have another vector there, so patches of
    other images are added until none is farther from the bank than the farthest is from the whole one. Scores then have
    the same distribution as with a selection of its own for each fold, and without the holes filled are too high.

    Folds are runs of neighbouring images, since those that follow each other on a line resemble each other most.

    Args:
        features: (N, h*w, D) patch features of the training images.
        vectors: (M, D) the bank, sorted by image.
        owners: (M,) index of the image that each vector comes from, ascending.
        anomaly_map: turns distances into scores.

    Returns:
        (n,) scores, n <= N: of evenly spaced images where there are more than it takes, or the bank is so large that
        all of them would take too long; none for a fold that the whole bank comes from, since nothing is left to judge
        it by.
    """
    images, patches, dim = features.shape
    if images == 1:
        return torch.zeros(0)
    count = min(images, _MOST, max(_FEWEST, int(_BUDGET / (patches * len(vectors) * dim))))
    chosen = torch.linspace(0, images - 1, count).round().long()
    bounds = torch.tensor([images * k // min(FOLDS, images) for k in range(min(FOLDS, images) + 1)])
    fold_of = torch.searchsorted(bounds, chosen, right=True) - 1
    device = anomaly_map.rows.device

    # Distance of each patch to the nearest vector of each fold: whatever is left out, the rest follows from these.
    nearest = torch.full((len(bounds) - 1, count, patches), torch.inf, device=device)
    parts = torch.searchsorted(owners, bounds).unfold(0, 2, 1).tolist()
    tiles = [
        (fold, tile, tile.square().sum(dim=1))
        for fold, (start, stop) in enumerate(parts)
        if start < stop
        for tile in vectors[start:stop].to(device).float().split(_TILE)
    ]
    for row, image in enumerate(chosen.tolist()):
        queries = features[image].to(device)
        own = queries.square().sum(dim=1)
        for fold, tile, norms in tiles:
            squared = torch.addmm(norms, queries, tile.T, alpha=-2).amin(dim=1).add_(own)
            torch.minimum(nearest[fold, row], squared.clamp_min_(0).sqrt_(), out=nearest[fold, row])

    radius = nearest.amin(dim=0).max()
    grid = (anomaly_map.rows.shape[1], anomaly_map.columns.shape[1])
    scores = []
    for fold in range(len(nearest)):
        distances = nearest[torch.arange(len(nearest)) != fold].amin(dim=0)
        if not distances.isfinite().all():
            continue
        inside = fold_of == fold
        holes = (distances > radius) & ~inside.to(device)[:, None]
        rows, places = holes.cpu().nonzero(as_tuple=True)
        added = _cover(features[chosen[rows], places].to(device), distances[holes], radius)
        filling = MemoryBank(added) if len(added) else None
        for row, image in zip(inside.nonzero()[:, 0].tolist(), chosen[inside].tolist(), strict=True):
            own = distances[row]
            if filling is not None:
                own = torch.minimum(own, filling.nearest(features[image].to(device)))
            scores.append(anomaly_map.predict(own.view(1, *grid)).scores)
    return torch.cat(scores).cpu() if scores else torch.zeros(0)


def _cover(patches: Tensor, distances: Tensor, radius: Tensor) -> Tensor:
    """Of (n, D) patches, at ``distances`` (n,) from a bank, those (m, D) that leave none farther than ``radius``.

    The farthest first, as in the selection of a coreset.
    """
    added = []
    while len(patches):
        added.append(patches[distances.argmax()])
        distances = torch.minimum(distances, torch.linalg.vector_norm(patches - added[-1], dim=1))
        patches, distances = patches[distances > radius], distances[distances > radius]
    return torch.stack(added) if added else patches
