"""The memory bank: the patches that are kept, and the exact distance from any patch to the nearest of them."""

import torch
from torch import Tensor

from models.errors import InputError

_TILE = 1 << 21  # elements of one (queries, bank) product: 8 MB, which stays in a CPU's last-level cache


class MemoryBank:
    """Exact nearest-neighbour distances to a set of vectors.

    Args:
        vectors: (M, D) float32 or float16, M >= 1. float16 is kept as it is; the arithmetic is float32.

    Raises:
        InputError: the vectors are not a non-empty (M, D) matrix of finite float32 or float16 numbers.

    Example:
        >>> bank = MemoryBank(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
        >>> bank.nearest(torch.tensor([[3.0, 4.0]]))
        tensor([4.])
    """

    def __init__(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise InputError(f"a memory bank must be a non-empty (M, D) matrix, got shape {tuple(vectors.shape)}")
        if vectors.dtype not in (torch.float32, torch.float16):
            raise InputError(f"a memory bank must be float32 or float16, got {vectors.dtype}")
        self.vectors = vectors
        self._centre = vectors.mean(dim=0, dtype=torch.float32)
        self._norms = torch.cat([self._centred(block).square().sum(dim=1) for block in vectors.split(4096)])
        if not self._norms.isfinite().all():
            raise InputError("the memory bank holds NaN or infinite values: build it again from finite features")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.vectors.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return self.vectors.nbytes

    def to(self, device: torch.device | str) -> "MemoryBank":
        """The same bank on another device."""
        return MemoryBank(self.vectors.to(device))

    def nearest(self, queries: Tensor) -> Tensor:
        """Euclidean distance from each query to the nearest vector of the bank.

        Args:
            queries: (Q, D), any Q including 0, on the bank's device.

        Returns:
            (Q,) float32, within 1e-4 relative of the true distances.

        Raises:
            InputError: the queries are not (Q, D) with the bank's D, or hold NaN or infinite values.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries must be (Q, {self.dim}) as the memory bank is, got {tuple(queries.shape)}")
        parts = [self._nearest(block) for block in queries.split(1024)]
        return torch.cat(parts) if parts else queries.new_zeros(0, dtype=torch.float32)

    def _nearest(self, queries: Tensor) -> Tensor:
        centred = self._centred(queries)
        norms = centred.square().sum(dim=1)
        if not norms.isfinite().all():
            raise InputError("the queries hold NaN or infinite values: check the image that they come from")
        best = torch.full_like(norms, torch.inf)
        winner = torch.zeros_like(norms, dtype=torch.long)
        rows = max(1, _TILE // max(1, len(queries)))
        for start in range(0, len(self), rows):
            block = self._centred(self.vectors[start : start + rows])
            squared = torch.addmm(self._norms[start : start + rows], centred, block.T, alpha=-2)
            least, index = squared.min(dim=1)
            winner = torch.where(least < best, index + start, winner)
            best = torch.minimum(best, least)
        return (queries.float() - self.vectors[winner]).norm(dim=1)

    def _centred(self, vectors: Tensor) -> Tensor:
        return vectors.float() - self._centre
