"""The region of interest: the part of the picture that is looked at, where the camera sees more than the part."""

import torch
from torch import Tensor, nn

from models.errors import InputError


class RegionOfInterest(nn.Module):
    """A mask on the pixels, and on each grid of patches.

    A patch is inside if its cell's centre is. What it sees reaches beyond its cell, so outside the region the network
    is shown one colour: nothing there, however it changes, moves a feature inside.

    Args:
        inside: (H, W), not 0 where images are looked at.
        colour: (3,) in [0, 1], what images are filled with outside: the network's mean colour is zeros to it, as it
            has them beyond the picture's edge.
        grids: rows and columns of patches, by their stride.

    Raises:
        InputError: on some grid no patch is inside.
    """

    def __init__(self, inside: Tensor, colour: Tensor, grids: dict[int, tuple[int, int]]) -> None:
        super().__init__()
        self.register_buffer("inside", (inside != 0).float())
        self.register_buffer("outside", inside == 0, persistent=False)
        self.register_buffer("colour", colour.detach().reshape(3, 1, 1).clone(), persistent=False)
        for stride, grid in grids.items():
            patches = patches_inside(inside, grid).nonzero()[:, 0]
            if not len(patches):
                raise InputError(
                    f"the region is too small: of the {grid[0]} x {grid[1]} patches of {stride} pixels none has its "
                    "centre in it; paint more of it white, or use a larger IMAGE_SIZE"
                )
            self.register_buffer(f"patches{stride}", patches, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, filled outside the region."""
        return torch.where(self.outside, self.colour, images)

    def patches(self, stride: int) -> Tensor:
        """(n,) numbers of the patches inside, row by row, on the grid of this stride."""
        return self.get_buffer(f"patches{stride}")

    def select(self, features: Tensor, stride: int) -> Tensor:
        """(B, h*w, D) features of all patches -> (B, n, D) of those inside."""
        return features.index_select(1, self.patches(stride))


def patches_inside(inside: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W) mask -> (h*w,) bool, row by row: the patches of a ``grid`` whose centre lies where it is not 0."""
    rows, columns = (
        ((torch.arange(cells) + 0.5) * pixels / cells).long() for cells, pixels in zip(grid, inside.shape, strict=True)
    )
    return (inside.cpu() != 0)[rows][:, columns].flatten()
