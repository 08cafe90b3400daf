"""From patch distances to an anomaly map, and from the map to the image's score. The only place where this is done."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

SMOOTHING = 4.0  # pixels, the Gaussian's sigma


class AnomalyMap(nn.Module):
    """Upsample a grid of distances to the image bilinearly and smooth it with a Gaussian of sigma 4.

    Both steps are linear and act on rows and columns alike, so together they are one matrix on each side,
    ``map = rows @ distances @ columns.T``: equal to ``scipy.ndimage.gaussian_filter(upsampled, 4)``
    and many times faster.
    """

    def __init__(self, grid: tuple[int, int], image_size: int):
        super().__init__()
        self.register_buffer("rows", _upsample_and_smooth(grid[0], image_size), persistent=False)
        self.register_buffer("columns", _upsample_and_smooth(grid[1], image_size), persistent=False)

    def forward(self, distances: Tensor) -> Tensor:
        """(B, h, w) distances -> (B, H, W) anomaly maps in the same unit."""
        return self.rows @ distances @ self.columns.T


def _upsample_and_smooth(cells: int, pixels: int) -> Tensor:
    """The (pixels, cells) matrix of both steps along one axis: what they make of each unit vector."""
    upsampled = F.interpolate(torch.eye(cells, dtype=torch.float64)[None], size=pixels, mode="linear")[0]
    smoothed = gaussian_filter1d(upsampled.numpy(), SMOOTHING, axis=1)
    return torch.from_numpy(np.ascontiguousarray(smoothed.T)).float()


def image_scores(maps: Tensor) -> Tensor:
    """(B, H, W) anomaly maps -> (B,) scores: each image's worst place."""
    return maps.amax(dim=(1, 2))
