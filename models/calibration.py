"""How far good parts lie from a memory that has not seen them: what thresholds and units are taken from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.cells import Cells
from models.whitening import fit_lens, fit_whitening

_LENS_FOLDS = 4  # fewer: a lens is made for each, in every condition
_BUDGET = 2e12  # multiply-adds: about half a minute on two cores; the selection that comes before takes longer
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
def held_out_from_the_metric(features: Tensor, rows: Tensor, shrinkage: float, averaged: bool) -> Tensor:
    """``Cells.distances`` of all of a few images, each by a metric that was made without it: (n, P).

    ``features`` (n, P, D) are as they are before the metric, ``rows`` (M,) the patches of them that were chosen.
    """
    count, patches = features.shape[:2]
    images, distances = torch.arange(count), torch.empty(count, patches)
    for image in images:
        mapped = fit_whitening(features[images != image].flatten(0, 1), shrinkage)(features)
        cells = Cells(mapped, images, count, mapped.flatten(0, 1)[rows], rows // patches, averaged)
        (distances[image],) = cells.distances(image[None], mapped[image, None])[0]
    return distances
