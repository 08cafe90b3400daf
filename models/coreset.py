"""Greedy k-centre, which patches a memory bank keeps: the same points as the plain loop, without its cost."""

import warnings

import numpy as np
import torch
from tqdm import tqdm

from models.errors import InputError


class NonFiniteError(InputError):
    """A feature is NaN or infinite; ``row`` says where, so that a caller can name the image it came from."""

    def __init__(self, row: int) -> None:
        super().__init__(f"features must be finite: row {row} holds NaN or infinity")
        self.row = row


def random_subset(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """``size`` of the indices 0 to ``n - 1``, drawn without replacement: (size,) int64 in ascending order."""
    _check_size(size, n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size].sort().values


def first_centre(n: int, seed: int = 0) -> int:
    """The index of the first centre, uniform in 0 to ``n - 1``; the only random part of :func:`greedy_coreset`."""
    return int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed)))


def greedy_coreset(
    features: torch.Tensor | np.ndarray, size: int, seed: int = 0, *, progress: bool = False
) -> torch.Tensor:
    """Choose ``size`` rows of ``features`` (N, D): (size,) int64 in the order of choice."""
    x = torch.as_tensor(features)
    n = len(x)
    _check_size(size, n)
    for start in range(0, n, 8192):
        bad = ~x[start : start + 8192].isfinite().all(1)
        if bad.any():
            raise NonFiniteError(start + int(bad.nonzero()[0, 0]))
    block = min(n, 2048)
    distance = torch.full((n,), torch.inf, dtype=torch.float64, device=x.device)  # squared; stale ones are upper bounds
    seen = torch.zeros(n, dtype=torch.int64, device=x.device)  # how many centres a stale distance knows
    chosen = [first_centre(n, seed)]
    bar = tqdm(total=size, initial=1, disable=not progress, unit="centre")
    while len(chosen) < size:
        top = distance.topk(block).indices.sort().values
        rows = x[top].double()
        outside = distance.clone().index_fill_(0, top, -1).max()
        fresh = distance[top]
        for first in range(int(seen[top].min()), len(chosen), 1024):
            fresh = fresh.minimum(nearest_squared(rows, x[chosen[first : first + 1024]]))
        while len(chosen) < size:
            best = int(fresh.argmax())
            if fresh[best] < outside or fresh[best] <= 0:
                break
            chosen.append(int(top[best]))
            bar.update()
            fresh = fresh.minimum((rows - rows[best]).square().sum(1))
        distance[top] = fresh
        seen[top] = len(chosen)
        if len(chosen) < size and distance.max() <= 0:
            message = f"{size} centres asked, {len(chosen)} distinct points found: only those are kept"
            warnings.warn(message, stacklevel=2)
            break
    bar.close()
    return torch.tensor(chosen)


def nearest_squared(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return torch.cdist(rows, centres.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1).square()


def _check_size(size: int, n: int) -> None:
    if not 1 <= size <= n:
        raise InputError(f"size must lie in 1 to {n} (the number of features), got {size}")
