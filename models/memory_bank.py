"""The memory bank: the patches that are kept, and the exact distance from any patch to the nearest of them.

A distance comes from a matrix product, |q - b|^2 = |q|^2 + |b|^2 - 2 q.b, taken for a tile of bank vectors and queries
at a time. On a CPU most of that product is saved. Rotate all vectors so that the first p coordinates, the head, hold
most of the bank's variance. The remaining coordinates of two vectors differ by at least the difference of their
lengths, so that

    |q - b|^2  >=  |head q - head b|^2 + (|rest q| - |rest b|)^2,

which is a product of p + 1 instead of D numbers. Only the few vectors whose bound is below the best distance known so
far are compared in full, by the differences of their coordinates. Nothing is approximate: rounding is allowed for.
Whether this pays depends on the data: a thousand dimensions or more, not whitened, most often do. It is foretold when
the bank is made, and given up for good where it does not.
"""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from models.errors import InputError

_BLOCK = 1024  # queries searched together
_TILE = {"cpu": 1 << 20, "gpu": 1 << 22}  # elements of the product held at once: 4 MB, and 16
_LEAST = 1 << 22  # least bounds held at once: 16 MB
_ROWS = 4096  # bank vectors worked on at once when a bank is made
_FETCH = 1 << 19  # elements of bank vectors fetched at once: 2 MB
_GROUP = 16  # bank vectors that are looked at one by one only if the least of their bounds calls for it
_PAIRS = 1 << 11  # groups looked at at once
_TABLE = 1 << 22  # elements of a small bank that are kept as the product takes them: 16 MB
_WORTH = 0.5  # share of a plain product's cost that pruning may take: onnxruntime multiplies faster than torch does
_LOSSES = 3  # blocks of queries that pruning may cost time before it is given up
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
        # Rounding is relative to the vectors' lengths, so they are measured from their mean.
        self._centre = self.vectors.mean(dim=0, dtype=torch.float32)
        self._norms = torch.cat([_squared_norms(self._centred(part)) for part in self.vectors.split(_ROWS)])
        if not self._norms.isfinite().all():
            raise InputError("the memory bank holds NaN, infinite or huge values: build it again from finite features")
        self._rounding = self._measure_rounding()
        self._basis, self._keys, self._table, self._losses = None, None, None, 0
        self._tile = _TILE["cpu" if self.vectors.device.type == "cpu" else "gpu"]
        if self.vectors.device.type == "cpu":  # a GPU is done with the plain product sooner
            self._prepare_pruning()
        if self._keys is None:
            self._prepare_product()

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.vectors.shape[1]

    @property
    def pruned(self) -> bool:
        """Whether most of the product is saved, so that this search is the fastest that there is on a CPU."""
        return self._keys is not None

    @property
    def nbytes(self) -> int:
        """Bytes in memory: the vectors and what speeds up their search."""
        held = (self.vectors, self._norms, self._centre, self._basis, self._keys, self._table)
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
        full_tile, start = self._tile, 0
        while start < len(queries):
            block = slice(start, start + _BLOCK)
            part = queries[block].float().contiguous()
            try:
                found = None if self._keys is None else self._pruned(part)
                # What pruning worked with is gone by now: both at once would take too much memory.
                distances[block] = self._plain(part) if found is None else found
            except torch.OutOfMemoryError:
                if self._tile < 1 << 16:
                    raise
                if self._tile == full_tile:
                    warnings.warn("little GPU memory is left: the bank is searched in smaller parts", stacklevel=2)
                self._tile //= 2
            else:
                start += _BLOCK
        return distances

    def _plain(self, queries: Tensor) -> Tensor:
        """(Q, D) float32 -> (Q,) distances: from products, and from differences where a product is too coarse."""
        centred = self._centred(queries)
        norms = self._query_norms(centred)
        least = None
        for _, tile in self._products(centred):
            least = tile.amin(dim=1) if least is None else torch.minimum(least, tile.amin(dim=1))
        squared = least + norms
        distances = squared.clamp(min=0).sqrt_()
        # Where a query is close to the bank, the subtraction leaves little but rounding: 2 _TOLERANCE squared < slack.
        doubtful = (squared * (2 / 3 * (_TOLERANCE / self._rounding - 1)) < norms).nonzero()[:, 0]
        if len(doubtful):
            distances[doubtful] = torch.inf
            limit = (least + 2 * self._slack(norms, squared))[doubtful, None]
            for start, tile in self._products(centred[doubtful]):
                row, vector = (tile <= limit).nonzero(as_tuple=True)
                query = doubtful[row]
                distances.scatter_reduce_(0, query, self._distances(queries, query, start + vector), "amin")
        return distances

    def _products(self, centred: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a bank vector and, from it on, squared distances (Q, rows), less those of the queries.

        What was yielded before is overwritten.
        """
        rows = max(1, self._tile // max(centred.shape))
        out = _tile(centred, len(centred), min(rows, len(self)))
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            bank = self._centred(self.vectors[part]) if self._table is None else self._table[part]
            norms = self._norms[start : start + len(bank)]
            yield start, torch.addmm(norms, centred, bank.T, alpha=-2, out=out[:, : len(bank)])

    def _pruned(self, queries: Tensor) -> Tensor | None:
        """(Q, D) float32 -> (Q,) distances: from differences, to every vector whose bound could be the least.

        None if there are so many of them that the plain search is faster.
        """
        centred = self._centred(queries)
        norms = self._query_norms(centred)
        keys = self._with_rest(centred @ self._basis, norms)
        everyone = torch.arange(len(queries))
        best = torch.full_like(norms, torch.inf)

        def compare(group: Tensor, query: Tensor, bounds: Tensor) -> None:
            pair, member = (bounds <= limit[query, None]).nonzero(as_tuple=True)
            group, query = group[pair], query[pair]
            best.scatter_reduce_(0, query, self._distances(queries, query, group * _GROUP + member), "amin")

        for start, least, tile in self._least_bounds(keys):
            # The vector with the least bound is most often the nearest one: after it, few others are in question.
            group = least.min(dim=0).indices  # twice as fast as argmin
            least[group, everyone] = torch.inf
            group += start
            bounds = self._bounds(keys, group, everyone, tile)
            member = bounds.argmin(dim=1)
            bounds[everyone, member] = torch.inf
            best = torch.minimum(best, self._distances(queries, None, group * _GROUP + member))
            squared = best.square()
            limit = squared - norms + self._slack(norms, squared)
            compare(group, everyone, bounds)
            found = (least <= limit).numpy().ravel()  # NumPy looks through it ten times as fast
            many = np.count_nonzero(found)  # before they are listed, which takes 16 bytes for each
            if many * _comparison_cost(self.dim) > least.numel() * _GROUP * (self.dim - keys.shape[1]):
                self._count_loss()
                return None
            for pairs in torch.from_numpy(np.flatnonzero(found)).split(_PAIRS):
                group, query = start + pairs // len(queries), pairs % len(queries)
                compare(group, query, self._bounds(keys, group, query, tile))
        return best

    def _least_bounds(self, keys: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Keys (Q, p + 1) of queries -> the number of a group of bank vectors and, from it on, the least bound in each
        group, (groups, Q): of squared distances, less those of the queries. If the bank is small, all bounds too."""
        count, queries = len(self._keys), len(keys)
        most = max(1, _LEAST // queries) * _GROUP
        rows = min(most, max(1, self._tile // queries // _GROUP) * _GROUP)
        tile = _tile(keys, min(rows, count), queries)
        for first in range(0, count, most):
            last = min(first + most, count)
            least = keys.new_empty((last - first) // _GROUP, queries)
            for start in range(first, last, rows):
                part = slice(start, min(start + rows, last))
                bank = self._keys[part]
                bounds = torch.addmm(self._norms[part, None], bank, keys.T, alpha=-2, out=tile[: len(bank)])
                # While they are still in the cache.
                groups = slice((start - first) // _GROUP, (part.stop - first) // _GROUP)
                torch.amin(bounds.unflatten(0, (-1, _GROUP)), dim=1, out=least[groups])
            yield first // _GROUP, least, tile if rows >= count else None

    def _bounds(self, keys: Tensor, group: Tensor, query: Tensor, tile: Tensor | None) -> Tensor:
        """Of pairs (P,) of a group and a query: the bounds (P, _GROUP) for the vectors of the group, from the ``tile``
        of all bounds or computed anew, which is faster than to keep more of them than fit the cache."""
        if tile is not None:
            return tile.unflatten(0, (-1, _GROUP))[group, :, query]
        width = _GROUP * keys.shape[1]
        pairs = max(1, min(_FETCH // width, len(group)))
        bounds = self._norms.view(-1, _GROUP).index_select(0, group)
        bank = keys.new_empty(pairs, width)
        for start in range(0, len(group), pairs):
            part = slice(start, start + pairs)
            size = len(group[part])
            torch.index_select(self._keys.view(-1, width), 0, group[part], out=bank[:size])
            products = torch.bmm(keys[query[part], None], bank[:size].view(size, _GROUP, -1).transpose(1, 2))
            bounds[part].sub_(products[:, 0], alpha=2)
        return bounds

    def _distances(self, queries: Tensor, query: Tensor | None, vector: Tensor) -> Tensor:
        """Distances (P,) between ``queries[query]``, or all queries where it is None, and ``vectors[vector]``."""
        pairs = max(1, min(_FETCH // self.dim, len(vector)))
        distances = queries.new_empty(len(vector))
        left = queries.new_empty(pairs, self.dim)  # allocated once: small blocks that come and go scatter the memory
        right = self.vectors.new_empty(pairs, self.dim)
        for start in range(0, len(vector), pairs):
            part = slice(start, start + pairs)
            size = len(vector[part])
            torch.index_select(self.vectors, 0, vector[part], out=right[:size])
            if query is None:
                torch.sub(queries[part], right[:size], out=left[:size])
            else:
                torch.index_select(queries, 0, query[part], out=left[:size]).sub_(right[:size])
            torch.linalg.vector_norm(left[:size], dim=1, out=distances[part])
        return distances

    def _centred(self, vectors: Tensor) -> Tensor:
        return vectors.float() - self._centre

    def _query_norms(self, centred: Tensor) -> Tensor:
        """Squared norms (Q,) of centred queries, which must be finite."""
        norms = _squared_norms(centred)
        if not math.isfinite(norms.max()):
            raise InputError("the queries hold NaN, infinite or huge values: check the image that they come from")
        return norms

    def _slack(self, norms: Tensor, squared: Tensor) -> Tensor:
        """How far rounding may move the squared distance to a vector that is no farther away than ``squared``.

        Such a vector b has |b|^2 <= (|q| + |q - b|)^2 <= 2 |q|^2 + 2 |q - b|^2.
        """
        return self._rounding * (3 * norms + 2 * squared)

    def _with_rest(self, heads: Tensor, norms: Tensor) -> Tensor:
        """(N, p) heads and squared norms (N,) of whole vectors -> (N, p + 1): heads, and the length of the rest.

        The length is rounded up, which keeps the bounds below the distances.
        """
        rest = (norms - _squared_norms(heads)).clamp(min=0) + self._rounding * norms
        return torch.cat([heads, rest.sqrt()[:, None]], dim=1)

    def _measure_rounding(self) -> float:
        """Error of |q|^2 + |b|^2 - 2 q.b by a product on this device, relative to |q|^2 + |b|^2, doubled for safety.

        It depends on the data (most where all products q_i b_i are alike), and on what PyTorch may do for speed: TF32.
        """
        rows = self._centred(self.vectors[:: -(-len(self) // 1024)])
        columns = rows[:: -(-len(rows) // 64)]
        products = (rows @ columns.T).cpu().double()
        rows, columns = rows.cpu().double(), columns.cpu().double()
        sizes = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
        errors = 2 * (products - rows @ columns.T).abs() / sizes.clamp(min=1e-30)
        return max(2 * errors.max().item(), 5e-7)

    def _prepare_pruning(self) -> None:
        """Rotate the bank, if the bounds are expected to save time; p is what costs least for vectors of the bank."""
        count, dim = self.vectors.shape
        largest = min(128, dim // 2, count // 2) // 16 * 16
        if largest == 0:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            basis = torch.svd_lowrank(self._centred(self.vectors[:: -(-count // _ROWS)]), q=largest)[2]
        basis = torch.linalg.qr(basis.double()).Q.float()  # orthonormal to the last digit: the bounds rely on it
        heads = torch.cat([self._centred(part) @ basis for part in self.vectors.split(_ROWS)])

        # How many bounds will be below a query's distance? Some vectors of the bank are asked, as if they came from
        # another image: a bank is sorted by image, so the vectors beside them are left out, of the same image mostly.
        probes = torch.linspace(0, count - 1, min(64, count, 1 + _LEAST // count)).long()
        queries = self._centred(self.vectors[probes])
        products = torch.cat([self._centred(part) @ queries.T for part in self.vectors.split(_ROWS)])
        beside = (torch.arange(count)[:, None] - probes).abs() <= count // 64
        least = (self._norms[:, None] - 2 * products).masked_fill_(beside, torch.inf).amin(dim=0)

        chosen, least_cost = 0, count * dim * _WORTH
        for p in range(16, largest + 1, 16):
            keys = self._with_rest(heads[:, :p], self._norms)
            bounds = torch.addmm(self._norms[:, None], keys, keys[probes].T, alpha=-2)
            others = ((bounds <= least) & ~beside).sum().item() / len(probes) - 1
            # In multiply-adds of the product, as measured: beside the comparisons, the rest takes as long as two more
            # of them and six more coordinates.
            cost = (count + dim) * (p + 6) + (others + 2) * _comparison_cost(dim)
            if cost < least_cost:
                chosen, least_cost = p, cost
        if chosen:
            missing = -count % _GROUP  # from whole groups: what fills up the last one is infinitely far away
            self._basis = basis[:, :chosen].contiguous()
            self._keys = pad(self._with_rest(heads[:, :chosen], self._norms), (0, 0, 0, missing))
            self._norms = pad(self._norms, (0, missing), value=torch.inf)

    def _prepare_product(self) -> None:
        """Search by plain products."""
        if self.vectors.numel() <= _TABLE:
            self._table = self._centred(self.vectors)

    def _count_loss(self) -> None:
        """Note that pruning cost time for a block of queries; where it keeps doing so, search plainly from now on."""
        self._losses += 1
        if self._losses >= _LOSSES:
            self._basis = self._keys = None
            self._norms = self._norms[: len(self)]
            self._prepare_product()


def _comparison_cost(dim: int) -> int:
    """Of one group's bounds and one vector compared in full, in multiply-adds of a matrix product, as measured."""
    return 32 * dim + 20_000


def _squared_norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32).square()


def _tile(like: Tensor, rows: int, columns: int) -> Tensor:
    """Room for (rows, columns), each row beginning at a multiple of 64 bytes: else a product takes up to 1.5 times."""
    return like.new_empty(rows, -(-columns // 16) * 16)[:, :columns]
