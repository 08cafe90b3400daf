"""The metric and the lenses: the affine maps that patch features go through last, one for each condition.

Whitening makes distances count by the good parts' own spread. A lens brings the features of pictures in another
condition (noise, blur, colour) to where the same parts' features lie in clean ones, so that one memory serves all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.parallel import one_thread, threads_of

SHRINKAGE = 0.1  # of whitening: near 0 all directions count alike, large values leave them as they are
KEPT = 0.99  # share of the squared distances between good patches that the dimensions kept hold
_ALIKE = 1e-8  # variance below which patches do not differ: what is left is rounding, and its inverse no float16
_RIDGE = 1e-3  # of a lens: what is added to the variances, as a share of their mean
_BLOCK = 1 << 21  # elements worked on at once: 8 MB


class Affine(NamedTuple):
    """The map y = x @ matrix + offset: ``matrix`` (D, K), ``offset`` (K,)."""

    matrix: Tensor
    offset: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., K)."""
        return features.to(self.matrix.dtype) @ self.matrix + self.offset

    def then(self, following: "Affine") -> "Affine":
        """This map and then ``following``, as one."""
        return Affine(self.matrix @ following.matrix, following(self.offset))

    def rounded(self) -> "Affine":
        """As a checkpoint holds it: the matrix in half precision. Memory and queries go through the same rounding."""
        return Affine(self.matrix.half().float(), self.offset.float())

    @torch.inference_mode()
    def apply_in_place(self, features: Tensor) -> Tensor:
        """Map contiguous (N, P, D) features, block by block, into their own memory; returns them as (N, P, K).

        K <= D, so that what is written never reaches what is still to be read. The features given are gone afterwards.
        """
        images, patches, dim = features.shape
        rows, kept = features.view(-1, dim), self.matrix.shape[1]
        mapped = features.view(-1)[: len(rows) * kept].view(-1, kept)
        step = max(1, _BLOCK // dim)
        for start in range(0, len(rows), step):
            mapped[start : start + step] = self(rows[start : start + step])
        return mapped.view(images, patches, kept)


class Moments(NamedTuple):
    """Of ``count`` patches the ``mean`` (D,) and the ``covariance`` (D, D), float64."""

    count: int
    mean: Tensor
    covariance: Tensor


class ConditionMaps(nn.Module):
    """One affine map for each condition, applied to each image's features by the condition that it is in.

    Args:
        maps: of the conditions in their order, clean first; all of the same shape.
    """

    def __init__(self, maps: Sequence[Affine]) -> None:
        super().__init__()
        self.register_buffer("matrices", torch.stack([each.matrix for each in maps]))
        self.register_buffer("offsets", torch.stack([each.offset for each in maps])[:, None])

    def forward(self, features: Tensor, conditions: Tensor | None = None) -> Tensor:
        """(B, P, D) features of images in ``conditions`` (B,), or all clean -> (B, P, K)."""
        if conditions is None:
            return features @ self.matrices[0] + self.offsets[0]
        return torch.baddbmm(self.offsets[conditions], features, self.matrices[conditions])


@torch.inference_mode()
@one_thread()
def fit_whitening(patches: Tensor | Moments, shrinkage: float = SHRINKAGE, kept: float = KEPT) -> Affine:
    """The map after which Euclidean distance is a shrunk Mahalanobis distance.

    Each eigenvector of the patches' covariance is scaled by 1 / sqrt(w + e * mean(w)), w its eigenvalue and e the
    shrinkage. That keeps it defined with fewer patches than dimensions and with channels that never vary; patches that
    do not vary at all leave nothing to measure by, and are compared as they are.

    Args:
        patches: (N, D) float32 or float16, or their moments.
        shrinkage: e > 0.
        kept: share of the squared distances between the patches that the dimensions kept must hold; the map leads to
            as few of them, of largest variance, as do.
    """
    _, mean, covariance = patches if isinstance(patches, Moments) else moments_of(patches)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)  # descending
    level = values.mean()
    scales = (values + shrinkage * level).rsqrt() if level > _ALIKE else torch.ones_like(values)
    held = (values * scales.square()).cumsum(dim=0)
    dim = int((held < kept * held[-1]).sum()) + 1 if level > _ALIKE else len(values)
    # An eigenvector's sign is arbitrary; fixing it makes the same data give the same map.
    signs = vectors.gather(0, vectors.abs().argmax(dim=0)[None]).sign()
    matrix = (vectors * signs * scales)[:, :dim]
    return Affine(matrix.float().contiguous(), (-mean @ matrix).float())


@torch.inference_mode()
@one_thread()
def fit_lens(corrupted: Tensor, clean: Tensor) -> Affine:
    """The map that brings the patches of corrupted images to where those of the same images, clean, lie.

    First least squares, with a small ridge: the best guess of each clean patch. Guesses lie too close to their mean, so
    that second the symmetric map follows that gives them the clean patches' mean and covariance again: of all maps that
    do, the one that moves them least (optimal transport between Gaussians),
    T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2 for covariances A of the guesses and B of the clean patches.

    Args:
        corrupted, clean: (n, D) float32 or float16, row by row the same places of the same images.
    """
    dim = corrupted.shape[1]
    _, mean, covariance = moments_of(corrupted, clean)
    (seen, shared), (_, spread) = (rows.split(dim, dim=1) for rows in covariance.split(dim))
    eye = torch.eye(dim, dtype=covariance.dtype)
    guess = torch.linalg.solve(seen + _RIDGE * seen.diagonal().mean().clamp_min(1e-12) * eye, shared)
    # What the guesses do not vary in cannot be stretched: without a floor a constant picture would divide by nothing.
    floor = _RIDGE * spread.diagonal().mean().clamp_min(1e-12) * eye
    guessed = guess.T @ seen @ guess + floor
    half, inverse = _powers(guessed, 0.5, -0.5)
    (middle,) = _powers(half @ (spread + floor) @ half, 0.5)
    matrix = guess @ (inverse @ middle @ inverse)
    return Affine(matrix.float(), (mean[dim:] - mean[:dim] @ matrix).float())


@torch.inference_mode()
def moments_of(*parts: Tensor) -> Moments:
    """Moments of patches: the rows of (N, D1), (N, D2), ... side by side, D in all.

    Products are in float32, block by block, their sums in float64, in the order of the blocks.
    """
    count, width = len(parts[0]), sum(part.shape[1] for part in parts)
    total = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    step = max(1, _BLOCK // width)
    starts = range(0, count, step)
    with threads_of(torch.device("cpu")) as (threads, parallel):
        # Around a point in their midst, the sums lose no digits to cancellation.
        origin = torch.cat([part[:: -(-count // 4096)].float().mean(dim=0) for part in parts])

        def block(start: int) -> tuple[Tensor, Tensor]:
            centred = torch.cat([part[start : start + step].float() for part in parts], dim=1) - origin
            return centred.sum(dim=0, dtype=torch.float64), centred.T @ centred

        for first in range(0, len(starts), 2 * threads):  # no more products wait to be added than that
            for own_total, own_products in parallel(block, starts[first : first + 2 * threads]):
                total += own_total
                products += own_products
    offset = total / count
    return Moments(count, origin + offset, products / count - torch.outer(offset, offset))


def pooled(parts: Sequence[Moments]) -> Moments:
    """The moments of all patches together from those of parts of them (Chan, Golub and LeVeque, 1979); of a single part
    its own."""
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    mean = sum(part.count / count * part.mean for part in parts)
    apart = [part.mean - mean for part in parts]
    spread = [part.covariance + torch.outer(own, own) for part, own in zip(parts, apart, strict=True)]
    covariance = sum(part.count / count * own for part, own in zip(parts, spread, strict=True))
    return Moments(count, mean, covariance)


def _powers(matrix: Tensor, *powers: float) -> list[Tensor]:
    """Powers of a symmetric positive (D, D) matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return [(vectors * values.clamp_min(1e-18) ** power) @ vectors.T for power in powers]
