"""From patch distances to an anomaly map and an image's score. The only place where this is done."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from models.region import patches_inside

# Below it a quartile counts as this: distances near 0, of patches that are remembered as they are, are mostly rounding.
LEAST_BACKGROUND = 0.2


class Scoring(NamedTuple):
    """The choices by which methods differ.

    ``upsampling`` of the distances, as ``torch.nn.functional.interpolate`` calls it for one axis ('linear' or
    'nearest'); ``border``, how the Gaussian continues the map beyond the image, as scipy calls it ('reflect' or
    'mirror'); ``smoothed``, whether an image's score is the maximum of its smoothed map or of the distances themselves;
    ``sigma``, the Gaussian's, in pixels; ``background``, the share of an image's own lower quartile that is taken out
    of its distances, see ``less_background``.
    """

    upsampling: str
    border: str
    smoothed: bool
    sigma: float = 4.0
    background: float = 0.0


PAPER = Scoring("linear", "reflect", smoothed=True)
WEDGE_NET = PAPER._replace(background=0.5)
PATCHCORE = Scoring("nearest", "mirror", smoothed=False)


class Prediction(NamedTuple):
    """``scores`` (B,), higher is more anomalous; ``maps`` (B, H, W) anomaly maps. Both are distances, float32.

    Where there are several conditions: ``conditions`` (B,) int64, which one each image was judged in, and
    ``unfamiliar`` (B,) bool, whether it is like none of them; both follow from ``statistics`` (B, S).
    """

    scores: Tensor
    maps: Tensor
    conditions: Tensor | None = None
    unfamiliar: Tensor | None = None
    statistics: Tensor | None = None


class AnomalyMap(nn.Module):
    """Upsample a grid of distances to the image and smooth it with a Gaussian, of sigma 4 in both methods.

    Both steps are linear and act on rows and columns alike, so together they are one matrix on each side,
    ``map = rows @ distances @ columns.T``: equal to ``scipy.ndimage.gaussian_filter(upsampled, sigma)``
    and many times faster.

    Args:
        grid: rows and columns of patches.
        image_size: height and width in pixels.
        scoring: how the method does it.
        inside: (H, W), not 0 where images are looked at; None for everywhere. Elsewhere the map is 0, and inside only
            what is inside counts: near the border the Gaussian's weights are those of the patches that there are.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        image_size: tuple[int, int],
        scoring: Scoring = PAPER,
        inside: Tensor | None = None,
    ):
        super().__init__()
        self.grid, self.scoring = grid, scoring
        self.register_buffer("rows", _upsample_and_smooth(grid[0], image_size[0], scoring), persistent=False)
        self.register_buffer("columns", _upsample_and_smooth(grid[1], image_size[1], scoring), persistent=False)
        self.register_buffer("places", None, persistent=False)
        self.register_buffer("weights", None, persistent=False)
        if inside is not None:
            patches = patches_inside(inside, grid)
            # Of the patches inside, then of a 0 that follows them: each of the grid's has its number.
            self.places = torch.where(patches, patches.cumsum(0) - 1, patches.sum())
            reached = self.rows @ patches.view(grid).float() @ self.columns.T
            self.weights = (inside.cpu() != 0) / reached.clamp_min(1e-6)  # nothing to see where no patch is near

    def forward(self, distances: Tensor) -> Tensor:
        """(B, h, w) distances -> (B, H, W) anomaly maps in the same unit."""
        maps = self.rows @ distances @ self.columns.T
        return maps if self.weights is None else maps * self.weights

    def on_grid(self, distances: Tensor) -> Tensor:
        """(B, P) distances of the patches that are looked at -> (B, h, w), 0 for the others."""
        if self.places is not None:
            distances = F.pad(distances, (0, 1)).index_select(1, self.places)
        return distances.unflatten(1, self.grid)


def _upsample_and_smooth(cells: int, pixels: int, scoring: Scoring) -> Tensor:
    """The (pixels, cells) matrix of both steps along one axis: what they make of each unit vector."""
    upsampled = F.interpolate(torch.eye(cells, dtype=torch.float64)[None], size=pixels, mode=scoring.upsampling)[0]
    smoothed = gaussian_filter1d(upsampled.numpy(), scoring.sigma, axis=1, mode=scoring.border)
    return torch.from_numpy(np.ascontiguousarray(smoothed.T)).float()


def less_background(distances: Tensor, share: float) -> Tensor:
    """(B, P) distances, in units of what good parts have, less a share of their lower quartile in each image; can be
    exported.

    What all of a picture has in common, such as its light, moves all of its distances, and is no defect. A defect moves
    the quartile only if it covers three quarters of the picture.
    """
    if not share:
        return distances
    lowest = distances.topk(quarter(distances.shape[1]), dim=1, largest=False, sorted=False).values
    return distances - share * lowest.amax(dim=1, keepdim=True).clamp_min(LEAST_BACKGROUND)


def quarter(patches: int) -> int:
    """A quarter of so many patches, rounded up."""
    return -(-patches // 4)


def image_scores(maps: Tensor) -> Tensor:
    """(B, H, W) anomaly maps, or (B, h, w) distances -> (B,) scores: each image's worst place."""
    return maps.amax(dim=(1, 2))
