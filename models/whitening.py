"""The metric: distances measured by the good parts' own spread, so that a direction that hardly varies counts more."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

METRICS = ("whitened", "euclidean")
_BLOCK = 1 << 21  # elements worked on at once: 8 MB


class Whitening(nn.Module):
    """A linear map y = (x - mean) @ matrix after which Euclidean distance is the metric that was asked for.

    Args:
        mean: (D,) float32.
        matrix: (D, K) float32, K <= D, columns in the order of descending variance.
    """

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    @property
    def dim(self) -> int:
        """Dimension K of what comes out."""
        return self.matrix.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        return (features - self.mean) @ self.matrix

    @torch.inference_mode()
    def apply_in_place(self, features: Tensor) -> Tensor:
        """Map contiguous (N, h*w, D) features, block by block, into their own memory; returns them as (N, h*w, K).

        K <= D, so that what is written never reaches what is still to be read. The features given are gone afterwards.
        """
        images, patches, dim = features.shape
        rows = features.view(-1, dim)
        mapped = features.view(-1)[: len(rows) * self.dim].view(-1, self.dim)
        for start, block in _blocks(rows):
            mapped[start : start + len(block)] = self(block.to(self.mean.device))
        return mapped.view(images, patches, self.dim)


@torch.inference_mode()
def fit_whitening(
    patches: Tensor, metric: str = "whitened", shrinkage: float = 1.0, dim: int | float | None = None
) -> Whitening | None:
    """Fit the map to training patches, in one pass and with memory for one block.

    'whitened' scales each eigenvector of the patches' covariance by 1 / sqrt(w + e * mean(w)), w its eigenvalue and e
    the shrinkage: a shrunk Mahalanobis distance. e -> 0 is full whitening, a large e comes near to 'euclidean', which
    scales none. The shrinkage keeps it defined with fewer patches than dimensions and with channels that never vary;
    patches that do not vary at all leave nothing to measure by, and are compared as they are.

    Args:
        patches: (N, D) float32.
        metric: one of ``METRICS``.
        shrinkage: e >= 0; at 0 all directions must vary.
        dim: how many directions to keep, those of largest variance. None keeps all D; so does 'euclidean' below 1,
            while 'whitened' keeps as many as hold that share of the squared distances between the patches.

    Returns:
        None where there is nothing to map: 'euclidean' in all dimensions.
    """
    if metric == "euclidean" and (dim is None or dim < 1 or dim == patches.shape[1]):
        return None
    mean, covariance = _moments(patches)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)  # descending
    spread = values.mean()
    scaled = metric == "whitened" and spread > 0
    scale = torch.rsqrt(values + shrinkage * spread) if scaled else torch.ones_like(values)
    if dim is not None and dim < 1:
        held = (values * scale.square()).cumsum(dim=0)
        dim = int((held < dim * held[-1]).sum()) + 1 if scaled else None
    # An eigenvector's sign is arbitrary; fixing it makes the same data give the same map.
    signs = vectors.gather(0, vectors.abs().argmax(dim=0)[None]).sign()
    return Whitening(mean.float(), (vectors * signs * scale)[:, :dim].float().contiguous())


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of (N, D) patches: products in float32, block by block, their sums in float64."""
    count, width = patches.shape
    total = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    # Around a point in their midst, the sums lose no digits to cancellation.
    origin = patches[:: -(-count // 4096)].mean(dim=0)
    for _, block in _blocks(patches):
        centred = block - origin
        total += centred.sum(dim=0, dtype=torch.float64)
        products += centred.T @ centred
    offset = total / count
    return origin + offset, products / count - torch.outer(offset, offset)


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        yield start, rows[start : start + step]
