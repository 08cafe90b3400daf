"""What score a good part gets: the training images scored against a bank that has not seen them."""

import torch
from torch import Tensor

from models.conformal import conformal_threshold, p_values
from models.memory_bank import MemoryBank
from models.scoring import AnomalyMap

__all__ = ["conformal_threshold", "held_out_scores", "p_values"]

FOLDS = 10
_BUDGET = 2e13  # multiply-adds: about three minutes on two cores, seconds on a GPU
_FEWEST = 20  # images scored however large the bank


@torch.inference_mode()
def held_out_scores(features: Tensor, vectors: Tensor, owners: Tensor, anomaly_map: AnomalyMap) -> Tensor:
    """Score training images, each against the bank without the vectors of its own fold's images.

    One coreset serves all folds: taking a fold's vectors out of the bank leaves what the other images contributed, so
    the cost is one search for each image and no second selection. Folds are runs of neighbouring images, since those
    that follow each other on a line resemble each other most.

    Args:
        features: (N, h*w, D) patch features of the training images.
        vectors: (M, D) the bank, sorted by image.
        owners: (M,) index of the image that each vector comes from, ascending.
        anomaly_map: turns distances into scores.

    Returns:
        (n,) scores, n <= N: evenly spaced images where the bank is so large that all of them would take too long, and
        none for a fold that the whole bank comes from, since nothing is left to judge it by.
    """
    images, patches, dim = features.shape
    count = min(images, max(_FEWEST, int(_BUDGET / (patches * len(vectors) * dim))))
    chosen = torch.linspace(0, images - 1, count).round().long()
    grid = (anomaly_map.rows.shape[1], anomaly_map.columns.shape[1])
    device = anomaly_map.rows.device
    scores = []
    for fold in range(min(FOLDS, images)):
        first, last = (images * k // min(FOLDS, images) for k in (fold, fold + 1))
        start, stop = torch.searchsorted(owners, torch.tensor([first, last])).tolist()
        # Two slices rather than one bank put together: they are views, and a bank may be as large as memory allows.
        others = [MemoryBank(part.to(device)) for part in (vectors[:start], vectors[stop:]) if len(part)]
        if not others:
            continue
        for image in chosen[(chosen >= first) & (chosen < last)].tolist():
            queries = features[image].to(device)
            distances = torch.stack([bank.nearest(queries) for bank in others]).amin(dim=0)
            scores.append(anomaly_map.predict(distances.view(1, *grid)).scores)
    return torch.cat(scores).cpu() if scores else torch.zeros(0)
