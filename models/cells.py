"""What each vector of a memory stands for: the good patches that are nearest to it, its cell.

A coreset chooses patches, and a patch has noise of its own. The mean of its cell has less, and is what WEDGE-Net
remembers: one step of Lloyd's (1982) k-means from the coreset. Cells also tell how a memory would look had it not seen
some of the images.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.parallel import threads_of

FOLDS = 10
_TILE = 1024  # vectors in one product, which then fits in the cache


class Cells:
    """A memory of ``count`` training images, and the cells of its vectors among the patches of some of them.

    Args:
        features: (n, P, D) patches of these images, float32 or float16.
        images: (n,) their numbers among all ``count``, ascending.
        count: training images.
        chosen: (M, D) the patches that were chosen, of whichever images, sorted by image.
        owners: (M,) the number of the image that each comes from, ascending.
        averaged: whether the mean of each cell is remembered, or the patch that was chosen.

    Attributes:
        vectors: (M, D) what is remembered.
        radius: how far the farthest of the patches is from those chosen; 0 if all are.
    """

    @torch.inference_mode()
    def __init__(
        self, features: Tensor, images: Tensor, count: int, chosen: Tensor, owners: Tensor, averaged: bool
    ) -> None:
        self.features, self.images, self.chosen, self.averaged = features, images, chosen, averaged
        self.vectors, self.radius, self.cells = chosen, 0.0, None
        folds = min(FOLDS, count)
        self._bounds = torch.tensor([count * fold // folds for fold in range(folds + 1)])
        self._parts = torch.searchsorted(owners, self._bounds).tolist()
        if len(chosen) == count * features.shape[1]:
            return  # all patches: each stands for itself
        by_fold = [chosen[first:last] for first, last in itertools.pairwise(self._parts)]
        distances, self.cells, self.elsewhere = nearest_vectors(features, by_fold)
        self.radius = float(distances.max())
        if averaged:
            self.sums = self._sums(torch.ones_like(images, dtype=torch.bool))
            self.vectors = self._means(*self.sums)

    def distances(self, images: Tensor, *parts: Tensor) -> list[Tensor]:
        """How far the patches of good parts lie from a memory that has not seen them: K-fold, see ``without``.

        Folds are runs of neighbouring images, since those that follow each other on a line resemble each other most.

        Args:
            images: (k,) numbers of training images, ascending.
            parts: each (k, P, D), their patches, as they are or in another condition.

        Returns:
            For each part (k, P); infinite for the images of a fold that the whole memory comes from: nothing is left
            to judge them by.
        """
        found = [torch.full(part.shape[:2], torch.inf) for part in parts]
        folds = self._folds(images)
        for fold in folds.unique().tolist():
            inside, memory = folds == fold, self.without(fold)
            for part, own in zip(parts, found, strict=True):
                own[inside] = nearest_distances(part[inside], memory)
        return found

    @torch.inference_mode()
    def without(self, fold: int) -> list[Tensor]:
        """The memory's vectors, in parts, had it not seen the images of a fold.

        Means are of the other images' patches. A vector that comes from the fold goes, unless that leaves a hole: if
        patches of other images in its cell are farther than ``radius`` from all that remain, a memory made without the
        fold would have a vector there too. Then their mean stays, or where patches themselves are remembered, the last
        of those that are so far.
        """
        first, last = self._parts[fold : fold + 2]
        before, after = self.chosen[:first], self.chosen[last:]
        if self.cells is None:
            return [before, after]
        inside = self._folds(self.images) == fold
        holes = (self.cells >= first) & (self.cells < last) & (self.elsewhere > self.radius) & ~inside[:, None]
        rows, cells = holes.flatten().nonzero()[:, 0], self.cells[holes]
        if not self.averaged:
            kept = torch.full((len(self.chosen),), -1).scatter_reduce_(0, cells, rows, "amax")
            return [before, self.features.flatten(0, 1)[kept[kept >= 0]], after]
        vectors = self._means(*(whole - part for whole, part in zip(self.sums, self._sums(inside), strict=True)))
        return [vectors[:first], vectors[cells.unique()], vectors[last:]]

    def _folds(self, images: Tensor) -> Tensor:
        return torch.searchsorted(self._bounds, images, right=True) - 1

    def _sums(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (M, D) and numbers (M,) of the patches in each cell, of ``which`` images (n,) bool."""
        sums, sizes = torch.zeros(self.chosen.shape), torch.zeros(len(self.chosen))
        for image in which.nonzero()[:, 0].tolist():
            cells = self.cells[image]
            sums.index_add_(0, cells, self.features[image].float())
            sizes += torch.bincount(cells, minlength=len(sizes))
        return sums, sizes

    def _means(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """Of each cell the mean (M, D); of an empty one, what was chosen."""
        return torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], self.chosen.float())


class Nearest(NamedTuple):
    """Of patches (n, P): the ``distances`` to the nearest vector, its number in ``cells``, and the distance to the
    nearest in another part than its own, ``elsewhere``."""

    distances: Tensor
    cells: Tensor
    elsewhere: Tensor


def nearest_vectors(features: Tensor, memory: Sequence[Tensor]) -> Nearest:
    """Which vectors of a memory, given in parts (m, D), the patches (n, P, D) are nearest to; infinitely far if it has
    none. The same to the bit with any number of threads."""
    parts = _tiles(memory)

    def search(patches: Tensor) -> tuple[Tensor, ...]:
        best, cells = torch.full((len(parts), len(patches)), torch.inf), torch.zeros(len(patches), dtype=torch.long)
        least = torch.full((len(patches),), torch.inf)
        for part, own_best in zip(parts, best, strict=True):
            for start, tile, norms in part:
                squared, cell = torch.addmm(norms, patches, tile.T, alpha=-2).min(dim=1)
                cells = torch.where(squared < least, cell + start, cells)
                torch.minimum(least, squared, out=least)
                torch.minimum(own_best, squared, out=own_best)
        elsewhere = best.scatter(0, best.argmin(dim=0, keepdim=True), torch.inf).amin(dim=0)
        return _rooted(least, patches), cells, _rooted(elsewhere, patches)

    return Nearest(*map(torch.stack, zip(*_of_each(search, features), strict=True)))


def nearest_distances(features: Tensor, memory: Sequence[Tensor]) -> Tensor:
    """The ``distances`` of ``nearest_vectors`` alone, which takes half the time."""
    tiles = list(itertools.chain.from_iterable(_tiles(memory)))

    def search(patches: Tensor) -> Tensor:
        least = torch.full((len(patches),), torch.inf)
        for _, tile, norms in tiles:
            torch.minimum(least, torch.addmm(norms, patches, tile.T, alpha=-2).amin(dim=1), out=least)
        return _rooted(least, patches)

    return torch.stack(_of_each(search, features))


def _tiles(memory: Sequence[Tensor]) -> list[list[tuple[int, Tensor, Tensor]]]:
    """Of each part the vectors in pieces whose products fit in the cache: the number of the first among all, vectors in
    float32, their squared lengths."""
    starts = itertools.accumulate(map(len, memory), initial=0)
    return [
        [
            (start + place, tile := part[place : place + _TILE].float(), tile.square().sum(dim=1))
            for place in range(0, len(part), _TILE)
        ]
        for start, part in zip(starts, memory, strict=False)
    ]


def _of_each(search: Callable[[Tensor], Any], features: Tensor) -> list[Any]:
    """What ``search`` makes of each image's patches (P, D), in float32."""

    @torch.inference_mode()  # a mode of each thread's own
    def of_one(patches: Tensor) -> Any:
        return search(patches.float())

    with threads_of(torch.device("cpu")) as (_, parallel):
        return list(parallel(of_one, features))


def _rooted(squared: Tensor, patches: Tensor) -> Tensor:
    """Distances (P,) from squared ones that lack the patches' own squared lengths."""
    return (squared + patches.square().sum(dim=1)).clamp_min_(0).sqrt_()
