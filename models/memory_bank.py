"""The memory bank: the patches that are kept, and the exact distance from any patch to the nearest of them.

A distance comes from a matrix product, |q - b|^2 = |q|^2 + |b|^2 - 2 q.b, taken for a tile of bank vectors and queries
at a time. On a CPU most of that product is saved. Rotate all vectors so that the first p coordinates, the head, hold
most of the bank's variance. The remaining coordinates of two vectors differ by at least the difference of their
lengths, so that

    |q - b|^2  >=  |head q - head b|^2 + (|rest q| - |rest b|)^2,

which is a product of p + 1 instead of D numbers. Only the few vectors whose bound is below the best distance known so
far are compared in full, by the differences of their coordinates. Nothing is approximate: rounding is allowed for.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.errors import InputError

_BLOCK = 1024  # queries searched together
_TILE = 1 << 23  # elements of the product held at once: 32 MB
_ROWS = 4096  # bank vectors worked on at once when a bank is made
_FETCH = 1 << 19  # elements of bank vectors fetched at once: 2 MB, in a core's cache
_GROUP = 16  # bank vectors that are looked at one by one only if the least of their bounds calls for it
_PAIRS = 1 << 14  # groups looked at at once
_ROUNDING = 4e-6  # largest error seen of a float32 |q|^2 + |b|^2 - 2 q.b, relative to |q|^2 + |b|^2, whatever D
_TOLERANCE = 1e-4  # relative error of a distance that is accepted


class MemoryBank:
    """Exact nearest-neighbour distances to a set of vectors.

    Args:
        vectors: (M, D) float32 or float16, M >= 1. float16 is kept as it is; the arithmetic is float32.

    Raises:
        InputError: the vectors are not a non-empty (M, D) matrix of finite float32 or float16 numbers.

    >>> bank = MemoryBank(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    >>> bank.nearest(torch.tensor([[3.0, 4.0]]))
    tensor([4.])
    """

    def __init__(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise InputError(f"a memory bank must be a non-empty (M, D) matrix, got shape {tuple(vectors.shape)}")
        if vectors.dtype not in (torch.float32, torch.float16):
            raise InputError(f"a memory bank must be float32 or float16, got {vectors.dtype}")
        self.vectors = vectors.detach().contiguous()
        self._block = _BLOCK
        # Rounding is relative to the vectors' lengths: what they have in common goes, if it is most of them.
        mean, length = self.vectors.mean(dim=0, dtype=torch.float32), _squared_norms(self.vectors).mean()
        self._centre = mean if mean.square().sum() > length / 2 else None
        self._norms = torch.cat([_squared_norms(self._centred(part)) for part in self.vectors.split(_ROWS)])
        if not self._norms.isfinite().all():
            raise InputError("the memory bank holds NaN, infinite or huge values: build it again from finite features")
        self._largest = self._norms.max()
        self._basis, self._keys = None, None
        if self.vectors.device.type == "cpu":  # a GPU is done with the plain product sooner
            self._prepare_pruning()

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.vectors.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes in memory: the vectors and what speeds up their search."""
        held = (self.vectors, self._norms, self._centre, self._basis, self._keys)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def to(self, device: torch.device | str) -> "MemoryBank":
        """This bank on ``device``; itself if it is there already."""
        vectors = self.vectors.to(device)
        return self if vectors is self.vectors else MemoryBank(vectors)

    @torch.no_grad()
    def nearest(self, queries: Tensor) -> Tensor:
        """Euclidean distance from each query to the nearest vector of the bank.

        Takes at most 64 MB beyond the bank, the queries and the result, whatever their number. Runs with smaller
        blocks, after one warning, where a GPU's memory is short.

        Args:
            queries: (Q, D), any Q including 0, on the bank's device.

        Returns:
            (Q,) float32, within 1e-4 relative of the true distances; exactly 0 for a query that is in the bank.

        Raises:
            InputError: the queries are not (Q, D) with the bank's D, or hold NaN or infinite values.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries must be (Q, {self.dim}) as the memory bank is, got {tuple(queries.shape)}")
        distances = torch.empty(len(queries), device=queries.device)
        start = 0
        while start < len(queries):
            block = slice(start, start + self._block)
            try:
                distances[block] = self._nearest(queries[block].float().contiguous())
            except torch.OutOfMemoryError:
                if self._block == 1:
                    raise
                if self._block == _BLOCK:
                    warnings.warn("little GPU memory is left: the bank is searched in smaller blocks", stacklevel=2)
                self._block //= 2
            else:
                start += self._block
        return distances

    def _nearest(self, queries: Tensor) -> Tensor:
        """(Q, D) float32 -> (Q,): one block of queries."""
        keys, norms = self._project(queries)
        if not norms.isfinite().all():
            raise InputError("the queries hold NaN, infinite or huge values: check the image that they come from")
        slack = _ROUNDING * (norms + self._largest)
        search = self._plain if self._basis is None else self._pruned
        return search(queries, keys, norms, slack)

    def _plain(self, queries: Tensor, keys: Tensor, norms: Tensor, slack: Tensor) -> Tensor:
        """Distances (Q,) from products, and from differences where a product is too coarse."""
        best = torch.full_like(norms, torch.inf)
        for start, tile in self._tiles(keys):
            least = tile.amin(dim=0)
            squared = least + norms
            nearest = squared.clamp(min=0).sqrt()
            # Where a query is close to the bank, the subtraction leaves little but rounding.
            doubtful = (squared * (2 * _TOLERANCE) < slack).nonzero()[:, 0]
            if len(doubtful):
                limit = (least + 2 * slack)[doubtful]
                vector, column = (tile[:, doubtful] <= limit).nonzero(as_tuple=True)
                query = doubtful[column]
                nearest[doubtful] = torch.inf
                nearest.scatter_reduce_(0, query, self._distances(queries, query, start + vector), "amin")
            best = torch.minimum(best, nearest)
        return best

    def _pruned(self, queries: Tensor, keys: Tensor, norms: Tensor, slack: Tensor) -> Tensor:
        """Distances (Q,) from differences, to every vector whose bound, give or take ``slack``, could be the least."""
        everyone = torch.arange(len(queries))
        best = torch.full_like(norms, torch.inf)
        for start, tile in self._tiles(keys):
            groups = tile.view(-1, _GROUP, len(queries))
            least = groups.amin(dim=1)
            # The vector with the least bound is most often the nearest one: after it, few others are in question.
            group = least.argmin(dim=0)
            member = groups[group, :, everyone].argmin(dim=1)
            best = torch.minimum(best, self._distances(queries, everyone, start + group * _GROUP + member))
            groups[group, member, everyone] = torch.inf
            limit = best.square() - norms + slack
            found = (least <= limit).nonzero()
            for group, query in (pairs.unbind(dim=1) for pairs in found.split(_PAIRS)):
                pair, member = (groups[group, :, query] <= limit[query, None]).nonzero(as_tuple=True)
                group, query = group[pair], query[pair]
                exact = self._distances(queries, query, start + group * _GROUP + member)
                best.scatter_reduce_(0, query, exact, "amin")
        return best

    def _tiles(self, keys: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a bank vector and, from it on, bounds (rows, Q) of squared distances, less |q|^2."""
        columns = len(keys) + (0 if self._basis is not None else self.dim)  # the product, and what it is computed from
        rows = max(1, _TILE // columns // _GROUP) * _GROUP
        for start in range(0, len(self._norms), rows):
            part = slice(start, start + rows)
            bank = self._centred(self.vectors[part]) if self._keys is None else self._keys[part]
            yield start, torch.addmm(self._norms[part, None], bank, keys.T, alpha=-2)

    def _distances(self, queries: Tensor, query: Tensor, vector: Tensor) -> Tensor:
        """Distances (P,) between ``queries[query]`` and ``vectors[vector]``."""
        pairs = max(1, _FETCH // self.dim)
        return torch.cat(
            [
                torch.linalg.vector_norm(queries.index_select(0, q).sub_(self.vectors.index_select(0, v)), dim=1)
                for q, v in zip(query.split(pairs), vector.split(pairs), strict=True)
            ]
        )

    def _centred(self, vectors: Tensor) -> Tensor:
        return vectors.float() if self._centre is None else vectors.float() - self._centre

    def _project(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, D) -> what the tiles are the product of, (Q, D) or with pruning (Q, p + 1), and squared norms (Q,)."""
        centred = self._centred(queries)
        norms = _squared_norms(centred)
        return (centred if self._basis is None else _keys(centred @ self._basis, norms)), norms

    def _prepare_pruning(self) -> None:
        """Rotate the bank, if the bounds are expected to save time; p is what costs least for vectors of the bank."""
        count, dim = self.vectors.shape
        largest = min(128, dim // 2, count // 2) // 16 * 16
        if largest == 0:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            basis = torch.svd_lowrank(self._centred(self.vectors[:: -(-count // _ROWS)]), q=largest)[2]
        heads = torch.cat([self._centred(part) @ basis for part in self.vectors.split(_ROWS)])

        # How far from the others a few of the bank's vectors are, and how many bounds are less than that. The patches
        # of another image are a little farther away.
        probes = torch.linspace(0, count - 1, min(64, count, max(1, _TILE // count))).long()
        tiles = [tile for _, tile in self._tiles(self._centred(self.vectors[probes]))]
        squared = torch.cat(tiles)
        squared[probes, torch.arange(len(probes))] = torch.inf
        limit = (squared.amin(dim=0) + self._norms[probes]) * 1.05 - self._norms[probes]

        chosen, least_cost = 0, count * dim
        for p in range(16, largest + 1, 16):
            keys = _keys(heads[:, :p], self._norms)
            bounds = torch.addmm(self._norms[:, None], keys, keys[probes].T, alpha=-2)
            candidates = (bounds <= limit).sum().item() / len(probes)
            # In multiply-adds of the product, as measured: to fetch and compare one vector takes 32 for each element
            # and 10,000; all that is not product takes as long as five of these.
            cost = (count + dim) * p + (candidates + 5) * (32 * dim + 10_000)
            if cost < least_cost:
                chosen, least_cost = p, cost
        if chosen:
            missing = -count % _GROUP  # from whole groups: what fills up the last one is infinitely far away
            self._basis = basis[:, :chosen].contiguous()
            self._keys = pad(_keys(heads[:, :chosen], self._norms), (0, 0, 0, missing))
            self._norms = pad(self._norms, (0, missing), value=torch.inf)


def _squared_norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32).square()


def _keys(heads: Tensor, norms: Tensor) -> Tensor:
    """(N, p) heads and squared norms (N,) of whole vectors -> (N, p + 1): heads, and the length of the rest.

    The length is rounded up, which keeps the bounds below the distances.
    """
    rest = (norms - _squared_norms(heads)).clamp(min=0) + _ROUNDING * norms
    return torch.cat([heads, rest.sqrt()[:, None]], dim=1)
