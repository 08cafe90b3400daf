"""The nearest vector of a memory bank on a GPU, as one kernel that never stores the distances that are not the least.

Needs triton, which comes with torch's builds for CUDA.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from models.memory_bank import MemoryBank

_QUERIES, _VECTORS, _DIMENSIONS = 64, 128, 32  # worked on at once by a program, which holds 64 x 128 products
_PROGRAMS = 264  # two for each multiprocessor of a large GPU
_TILE = 1 << 25  # products held at once where the kernel is not used: 128 MB


class Table:
    """A bank as a GPU searches it.

    A bank in float16 is searched by tensor cores: a query is parted into two numbers of 11 bits, and their products
    with the bank's, added up in float32, are as exact as float32's own and faster. A bank in float32 takes
    float32 products. They find the nearest vector; the distance to it comes from differences. Where two vectors are
    equally near within rounding, it may be that of the other one.

    Args:
        bank: its vectors are used where they are; on a GPU, unless triton interprets.
    """

    def __init__(self, bank: MemoryBank) -> None:
        self.vectors = bank.vectors
        self.halves = torch.linalg.vector_norm(self.vectors, dim=1, dtype=torch.float32).square() / 2
        # Rows of whole blocks are read faster.
        self.padding = -bank.dim % _DIMENSIONS
        self.padded = None
        if self.vectors.dtype == torch.float16:
            self.padded = F.pad(self.vectors, (0, self.padding)) if self.padding else self.vectors

    def nearest(self, queries: Tensor) -> Tensor:
        """(Q, D) float32 queries -> (Q,) Euclidean distances to the nearest vector. Can be part of a CUDA graph."""
        place = self._by_products(queries) if self.padded is None else self._by_kernel(queries)
        return torch.linalg.vector_norm(queries - self.vectors.index_select(0, place), dim=1)

    def _by_products(self, queries: Tensor) -> Tensor:
        """(Q, D) -> (Q,) numbers of the nearest vectors."""
        size, parts = max(1, _TILE // len(queries)), []
        for number, (vectors, halves) in enumerate(zip(self.vectors.split(size), self.halves.split(size), strict=True)):
            best, place = torch.addmm(halves, queries, vectors.T, beta=-1).max(dim=1)
            parts.append((best, place + number * size))
        if len(parts) == 1:
            return parts[0][1]
        best, place = (torch.stack(each) for each in zip(*parts, strict=True))
        return place.gather(0, best.argmax(dim=0, keepdim=True))[0]

    def _by_kernel(self, queries: Tensor) -> Tensor:
        """(Q, D) -> (Q,) numbers of the nearest vectors."""
        queries = queries.contiguous()
        (count, dim), (total, width) = queries.shape, self.padded.shape
        blocks = triton.cdiv(count, _QUERIES)
        parts = max(1, min(_PROGRAMS // blocks, triton.cdiv(total, _VECTORS)))
        size = triton.cdiv(triton.cdiv(total, parts), _VECTORS) * _VECTORS
        parts = triton.cdiv(total, size)
        best = queries.new_empty(parts, count)
        place = torch.empty(parts, count, dtype=torch.int32, device=queries.device)
        _nearest[blocks, parts](
            queries,
            self.padded,
            self.halves,
            best,
            place,
            count,
            dim,
            total,
            width,
            size,
            _QUERIES,
            _VECTORS,
            _DIMENSIONS,
        )
        return place[0] if parts == 1 else place.gather(0, best.argmax(dim=0, keepdim=True))[0]


@triton.jit
def _nearest(
    queries,  # pointers: (count, dim) float32
    vectors,  # (total, width) float16, zero beyond dim
    halves,  # (total,)
    best,  # (parts, count), written
    place,  # (parts, count) int32, written
    count,
    dim,
    total,
    width,  # a multiple of DIMENSIONS
    size,
    QUERIES: tl.constexpr,
    VECTORS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
):
    """For QUERIES queries and one part of the bank, ``size`` vectors: the greatest q.b - |b|^2 / 2, and whose it is.

    That is the nearest, since |q - b|^2 = |q|^2 - 2 (q.b - |b|^2 / 2).
    """
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    first = tl.program_id(1) * size
    greatest = tl.full((QUERIES,), float("-inf"), tl.float32)
    found = tl.zeros((QUERIES,), tl.int32)
    for start in range(first, tl.minimum(first + size, total), VECTORS):
        vector = start + tl.arange(0, VECTORS)
        products = tl.zeros((QUERIES, VECTORS), tl.float32)
        for offset in range(0, width, DIMENSIONS):
            column = offset + tl.arange(0, DIMENSIONS)
            own = (query[:, None] < count) & (column[None, :] < dim)
            left = tl.load(queries + query[:, None] * dim + column[None, :], mask=own, other=0.0)
            other = vector[None, :].to(tl.int64) * width + column[:, None]
            right = tl.load(vectors + other, mask=vector[None, :] < total, other=0.0)
            high = left.to(tl.float16)
            products = tl.dot(high, right, products)
            products = tl.dot((left - high.to(tl.float32)).to(tl.float16), right, products)
        half = tl.load(halves + vector, mask=vector < total, other=float("inf"))
        value, member = tl.max(products - half[None, :], axis=1, return_indices=True)
        found = tl.where(value > greatest, start + member, found)
        greatest = tl.maximum(value, greatest)
    tl.store(best + tl.program_id(1) * count + query, greatest, mask=query < count)
    tl.store(place + tl.program_id(1) * count + query, found, mask=query < count)
