"""The region of interest: the part of the picture that is looked at, where the camera sees more than the part."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from models.errors import InputError


class RegionOfInterest(nn.Module):
    """A mask on the pixels, and on each grid of patches.

    See ``patches_inside`` for which patches are. What a patch sees reaches beyond its cell, so outside the region the
    network is shown what is inside, mirrored at the border: nothing there, however it changes, moves a feature inside,
    and there is no edge where the region ends.

    Args:
        inside: (H, W), not 0 where images are looked at.
        grids: rows and columns of patches, by their stride.

    Raises:
        InputError: on some grid no patch is inside.
    """

    def __init__(self, inside: Tensor, grids: dict[int, tuple[int, int]]) -> None:
        super().__init__()
        self.register_buffer("inside", (inside != 0).float())
        for stride, grid in grids.items():
            patches = patches_inside(inside, grid).nonzero()[:, 0]
            if not len(patches):
                raise InputError(
                    f"the region is too small: of the {grid[0]} x {grid[1]} patches of {stride} pixels none has its "
                    "centre in it; paint more of it white, or use a larger IMAGE_SIZE"
                )
            self.register_buffer(f"patches{stride}", patches, persistent=False)
        self.register_buffer("shown", _mirrored(self.inside), persistent=False)  # number of the pixel shown at each

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, filled outside the region."""
        return images.flatten(2).index_select(2, self.shown).view_as(images)

    def patches(self, stride: int) -> Tensor:
        """(n,) numbers of the patches inside, row by row, on the grid of this stride."""
        return self.get_buffer(f"patches{stride}")

    def select(self, features: Tensor, stride: int) -> Tensor:
        """(B, h*w, D) features of all patches -> (B, n, D) of those inside."""
        return features.index_select(1, self.patches(stride))


def patches_inside(inside: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W) mask -> (h*w,) bool, row by row: the patches of a ``grid`` that are inside.

    They are those whose cell and eight neighbours, over which features are averaged, have their centres where the mask
    is not 0; or, in a region so narrow that there is none, whose own cell has.
    """
    rows, columns = (
        ((torch.arange(cells) + 0.5) * pixels / cells).long() for cells, pixels in zip(grid, inside.shape, strict=True)
    )
    own = (inside.cpu() != 0)[rows][:, columns]
    whole = F.max_pool2d((~own)[None].float(), kernel_size=3, stride=1, padding=1)[0] == 0
    return (whole if whole.any() else own).flatten()


def _mirrored(inside: Tensor) -> Tensor:
    """(H, W) mask -> (H*W,): in each pixel's place the number of one inside.

    Those inside stay. One outside is mirrored at the nearest that is inside; where that leads out again, it is that.
    """
    outside = (inside.cpu() == 0).numpy()
    nearest = distance_transform_edt(outside, return_distances=False, return_indices=True)
    last = np.array(outside.shape)[:, None, None] - 1
    mirrored = (2 * nearest - np.indices(outside.shape)).clip(0, last)
    row, column = np.where(outside[tuple(mirrored)], nearest, mirrored)
    return torch.from_numpy(row * outside.shape[1] + column).flatten().int()
