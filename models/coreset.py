"""Greedy k-centre: which patches a memory bank keeps. The same choice as the plain loop, without its cost.

The plain loop chooses the point farthest from the centres, measures all N points against this new centre, and again,
K times: N x K distances in D dimensions, streamed from memory. Here hardly any of them is computed.

**Stale distances are upper bounds.** The distance to the nearest centre only shrinks as centres are added. A point
whose last known distance is below the farthest point's cannot be next, and nobody needs to know how near it is by now.

**Sketches give lower bounds.** Each row becomes W = 64 numbers: its coordinates on the principal directions, and the
length of what these leave over. Sketches are never farther apart than their rows: projecting only shortens, and the
lengths of two leftovers differ by no more than the leftovers do.

So the points with the largest last known distances are brought forward, and each is

1. *dismissed*, nearly always: a product of sketches finds the centre that seems nearest, and the distance to this one
   proves to be short enough. Whether another centre is nearer still does not matter;
2. or else *measured*: against every centre that the sketches cannot rule out, in float64.

Among the measured points centres are chosen, until the farthest of them is no farther than those not brought forward.

Only float64 distances are compared with each other, every shortcut is a bound that allows for rounding, and of equally
far points the first is chosen. The result is that of the plain loop in float64, whatever the shortcuts were worth.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.errors import InputError
from models.parallel import threads_of

DIRECTIONS = 62  # with two more numbers a sketch is 256 bytes; fewer rule out less, more cost more to multiply
SAMPLE = 2048  # rows, at most, that the principal directions are taken from
CANDIDATES = 16, 512  # fewest and most rows measured in one round, among which centres are chosen
ROWS, CENTRES = 512, 2048  # sides of the largest product of sketches: 4 MB, which a CPU's cache holds
FETCH = 2**17  # numbers of features at work at a time: 1 MB in float64
ON_GPU = 4, 64  # as many times larger are the product's sides and the fetch there
REACH = 16  # how many others a measured row can come nearer to, roughly
ROUND = 64  # rows looked through in the time of one distance: where there are many, a round may well measure more
UNIT = 2.0**-24  # float32 rounds to within this, relatively


class NonFiniteError(InputError):
    """A feature is NaN, infinite or huge; ``row`` says where, so that a caller can name the image it came from."""

    def __init__(self, row: int) -> None:
        super().__init__(f"features must be finite and shorter than 1e18, row {row} is not")
        self.row = row


def random_subset(n: int, size: int, seed: int = 0) -> Tensor:
    """Draw ``size`` of the indices 0 to ``n - 1`` without replacement: (size,) int64.

    They come in the order drawn: the first few are themselves a random subset. Raises InputError unless
    1 <= size <= n.
    """
    _check_size(size, n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]


def first_centre(n: int, seed: int = 0) -> int:
    """The first centre, uniform in 0 to ``n - 1``: all that :func:`greedy_coreset` leaves to chance."""
    return int(torch.randint(n, (1,), generator=torch.Generator().manual_seed(seed)))


def greedy_coreset(features: Tensor | np.ndarray, size: int, seed: int = 0, *, progress: bool = False) -> Tensor:
    """Choose ``size`` rows such that every row has a chosen one near: greedy k-centre, or farthest-first traversal.

    The first is :func:`first_centre`. Each further one is the row that is farthest, in Euclidean distance, from those
    chosen before; where several are equally far, the first of them.

    Args:
        features: (N, D) floats on a CPU or CUDA device, or a NumPy array or memory map. They are read in place; beside
            them it takes 272 bytes a row, 256 a chosen row and some 50 MB for each thread. Arithmetic is float32 and
            float64 whatever the storage.
        size: how many rows to choose, 1 to N.
        seed: settles the first row.
        progress: show a bar, on a terminal. The time left appears once 5 % are chosen, when the pace has become steady.

    Returns:
        (size,) int64 indices on the CPU in the order of choice. If there are fewer distinct rows than ``size``, one of
        each, with a warning.

    Raises:
        InputError: the features are not a non-empty matrix of floats, or ``size`` is not in 1 to N.
        NonFiniteError: an InputError whose ``row`` is the first with a NaN or an infinity, or longer than 1e18.

    >>> greedy_coreset(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), size=3)
    tensor([0, 3, 2])
    """
    features = _as_matrix(features)
    n = len(features)
    _check_size(size, n)
    with (
        torch.inference_mode(False),  # the mode is a thread's own: threads could not write to what this one makes in it
        torch.no_grad(),
        _float32_products(),
        threads_of(features.device) as (threads, parallel),
        tqdm(total=size, desc="coreset", unit="centre", leave=False, disable=None if progress else True) as bar,
    ):
        centres = _Centres(features, size, parallel)
        centres.add(np.array([first_centre(n, seed)]))
        upper = np.full(n, np.inf)  # squared distance from each row to its nearest centre, or more
        tried = np.zeros(n, np.int32)  # how many centres the row was tried against
        measured = np.zeros(n, np.int32)  # ... and measured against, so that its bound, if no less since, is exact

        def lower(rows: np.ndarray, seen: np.ndarray, method: Callable[..., np.ndarray]) -> None:
            rows = rows[np.argsort(seen[rows], kind="stable")]  # neighbours have about the same centres to catch up on
            parts = [rows[part] for part in _parts(len(rows), min(centres.rows, max(64, -(-len(rows) // threads))))]
            bounds = parallel(method, parts, [int(seen[part[0]]) for part in parts], [upper[part] for part in parts])
            for part, its_bounds in zip(parts, bounds, strict=True):
                upper[part] = its_bounds
            seen[rows] = len(centres)

        width = candidates = CANDIDATES[0]
        while len(centres) < size:
            block, outside = _largest(upper, width)
            if not len(block):
                message = f"{size} rows asked for, but only {len(centres)} are distinct: one of each is chosen"
                warnings.warn(message, stacklevel=2)
                break
            lower(block, tried, centres.try_nearest)
            undecided = np.count_nonzero(upper[block] > outside)
            among, inside = _largest(upper[block], candidates)
            outside = max(outside, inside)
            rows = block[among]
            rows = rows[upper[rows] > outside]
            lower(rows, measured, centres.measure)
            rows = rows[upper[rows] > outside]
            between = centres.between(rows, upper[rows])
            chosen = _choose(rows, upper, between, outside)[: size - len(centres)]
            centres.add(chosen)
            tried[rows] = measured[rows] = len(centres)

            if len(centres) >= 0.05 * size:
                if bar.n == 0:  # the clock starts: what went before says nothing about the pace
                    bar.initial = bar.n = bar.last_print_n = len(centres)
                    bar.unpause()
                bar.update(len(centres) - bar.n)
            # As many rows are measured at once as leave each within reach of few others, since the distances between
            # those are all computed; and as many are brought forward as leave about that number undecided.
            reached, allowed = np.isfinite(between).sum(), max(REACH * len(rows), n // ROUND)
            if reached < allowed and 8 * len(rows) > candidates:
                candidates = min(2 * candidates, CANDIDATES[1])
            elif reached > 2 * allowed:
                candidates = max(candidates // 2, CANDIDATES[0])
            if undecided > candidates:
                width = max(width // 2, candidates)
            elif 4 * undecided < candidates:
                width = min(2 * width, n)
    return centres.indices.cpu()


def _largest(values: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Positions, ascending, of at most ``width`` largest values, all positive; and a limit that no other exceeds.

    If more than ``width`` share the largest value, the first of them are taken, and the limit is just below: the others
    are as large but come later, so they lose to these.
    """
    if len(values) <= width:
        return np.flatnonzero(values > 0), 0.0
    limit = np.partition(values, -width - 1)[-width - 1]
    positions = np.flatnonzero(values > limit)
    if not len(positions) and limit > 0:
        positions = np.flatnonzero(values == limit)[:width]
        limit = np.nextafter(limit, 0)
    return positions, float(limit)


def _choose(rows: np.ndarray, upper: np.ndarray, between: np.ndarray, outside: float) -> np.ndarray:
    """The plain loop among ``rows``, which ascend, while the farthest is above ``outside``; lowers their ``upper``."""
    distance, chosen = upper[rows], []
    while len(rows):
        farthest = distance.argmax()  # the first of equals
        if distance[farthest] <= outside:
            break
        chosen.append(rows[farthest])
        np.minimum(distance, between[farthest], out=distance)
    upper[rows] = distance
    return np.array(chosen, np.int64)


class _Centres:
    """The centres chosen so far, and how near other rows are to them; all distances squared.

    The sketch of a row, less the mean, is (s, x_1 ... x_p, r): its squared length s, its coordinates x_i on the
    principal directions, and the length r of the rest. Two sketches' distance s + s' - 2 (x_1 x'_1 + ... + r r') is one
    inner product once (1, -2 x_1 ... -2 r) is made of one of them. Rounding is paid for by storing s a little short.
    """

    def __init__(self, features: Tensor, capacity: int, parallel: Callable[..., Iterable]) -> None:
        self.features = features
        sides, fetch = (1, 1) if features.device.type == "cpu" else ON_GPU
        self.rows, self.centres = ROWS * sides, CENTRES * sides
        self.pairs = max(1, FETCH * fetch // features.shape[1])
        self.mean, self.directions = _principal_directions(features)
        width = self.directions.shape[1] + 2
        self.sketches = torch.empty(len(features), width, device=features.device)
        for _ in parallel(self._sketch, _parts(len(features), self.pairs)):
            pass
        self.chosen = torch.empty(capacity, dtype=torch.int64, device=features.device)
        self.chosen_sketches = self.sketches.new_empty(capacity, width)
        self.count = 0

    def __len__(self) -> int:
        return self.count

    @property
    def indices(self) -> Tensor:
        """(len,) the rows that are centres, in the order they were added."""
        return self.chosen[: self.count]

    def add(self, rows: np.ndarray) -> None:
        new = slice(self.count, self.count + len(rows))
        self.chosen[new] = self._tensor(rows)
        self.chosen_sketches[new] = self.sketches[self.chosen[new]]
        self.count = new.stop

    def try_nearest(self, rows: np.ndarray, seen: int, upper: np.ndarray) -> np.ndarray:
        """``upper`` bounds (R,), lowered to the distance of the centre that seems nearest past the first ``seen``."""
        index = self._tensor(rows)
        query = _query(self.sketches[index])
        least, nearest = torch.full_like(query[:, 0], torch.inf), torch.zeros_like(index)
        for start, stop in self._unseen(seen):
            bounds = query @ self.chosen_sketches[start:stop].T
            position = _argmin(bounds)
            bound = bounds.gather(1, position[:, None])[:, 0]
            nearest = torch.where(bound < least, start + position, nearest)
            least = torch.minimum(least, bound)
        distance = self._distances(index, self.chosen[nearest], torch.float32)
        return np.minimum(upper, distance.cpu().numpy())

    def measure(self, rows: np.ndarray, seen: int, upper: np.ndarray) -> np.ndarray:
        """Exact distances (R,) to the nearest centre, if ``upper`` bounds are exact for the first ``seen`` centres."""
        index, distance = self._tensor(rows), self._tensor(upper)
        for start, stop in self._unseen(seen):
            centres = self.chosen[start:stop]
            for bounds_of in (self._sketch_bounds, self._row_bounds):
                bounds = bounds_of(index, centres)
                likely = self._distances(index, centres[_argmin(bounds)], torch.float64)
                distance = torch.minimum(distance, likely)  # rules out nearly all the others
                below = bounds < distance[:, None].float()
                if _few(below):
                    break
            row, column = below.nonzero(as_tuple=True)
            exact = self._distances(index[row], centres[column], torch.float64)
            distance.scatter_reduce_(0, row, exact, "amin")
        return distance.cpu().numpy()

    def between(self, rows: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Exact distances (R, R) from row to column, or infinity where they are not below the column's ``upper``."""
        index, limit = self._tensor(rows), self._tensor(upper)
        for bounds_of in (self._sketch_bounds, self._row_bounds):
            below = bounds_of(index, index) < limit[:, None].float()
            if _few(below):
                break
        column, row = below.nonzero(as_tuple=True)
        result = torch.full(below.shape, torch.inf, dtype=torch.float64, device=below.device)
        result[row, column] = self._distances(index[column], index[row], torch.float64)
        return result.cpu().numpy()

    def _unseen(self, seen: int) -> Iterator[tuple[int, int]]:
        """Starts and stops of the centres past the first ``seen``, as many at a time as one product takes."""
        for start in range(seen, self.count, self.centres):
            yield start, min(start + self.centres, self.count)

    def _sketch_bounds(self, rows: Tensor, others: Tensor) -> Tensor:
        """Lower bounds (R, O) of distances, by the sketches: cheap."""
        sketches = self.sketches[rows]
        return (_query(sketches) @ self.sketches[others].T).add_(sketches[:, :1])

    def _row_bounds(self, rows: Tensor, others: Tensor) -> Tensor:
        """Lower bounds (R, O) of distances, by the rows themselves: only rounding away from the distances."""
        a, b = ((self.features[index] - self.mean).float() for index in (rows, others))
        bounds = torch.addmm(_short(b.square().sum(1), b.shape[1]), a, b.T, alpha=-2)
        return bounds.add_(_short(a.square().sum(1, keepdim=True), a.shape[1]))

    def _distances(self, rows: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
        """Distances (P,) of pairs by float64 arithmetic, or by float32 arithmetic, rounded up."""
        dim = self.features.shape[1]
        result = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        for part in _parts(len(rows), self.pairs):
            difference = self.features.index_select(0, rows[part])
            difference = difference.to(torch.promote_types(difference.dtype, dtype))
            difference -= self.features.index_select(0, others[part])
            result[part] = difference.square_().sum(1)
        if dtype == torch.float32:
            result = result * (1 + (dim + 8) * UNIT) + dim * torch.finfo(dtype).tiny
        return result

    def _sketch(self, part: slice) -> None:
        """Make the sketches of some rows, see the class; raises NonFiniteError."""
        rows = self.features[part].to(torch.float64, copy=True)
        rows -= self.mean
        coordinates = rows @ self.directions
        squared = rows.square_().sum(1)
        if not squared.max() < 4e36:
            _raise_non_finite(self.features)
        sketches = self.sketches[part]
        sketches[:, 0] = _short(squared, sketches.shape[1])
        sketches[:, 1:-1] = coordinates
        sketches[:, -1] = (squared - coordinates.square().sum(1)).clamp_min_(0).sqrt_()

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.features.device)


def _few(chosen: Tensor) -> bool:
    """Whether so few are true that it is cheaper to fetch the rows of each pair than to multiply all of them."""
    return 32 * int(torch.count_nonzero(chosen)) <= chosen.numel()


def _query(sketches: Tensor) -> Tensor:
    """(R, W) whose inner products with other sketches are the distances to them, less the sketches' own s."""
    query = sketches * -2
    query[:, 0] = 1
    return query


def _short(squared: Tensor, terms: int) -> Tensor:
    """Squared lengths, less what rounding and underflow may add to a distance made of so many float32 products."""
    return squared * (1 - 4 * (terms + 8) * UNIT) - 1e-30


def _principal_directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) float32 and orthonormal directions (D, p) float64 of the largest variance, of a sample and roughly.

    That is near enough: with any mean and any orthonormal directions the bounds are bounds.
    """
    generator = torch.Generator().manual_seed(0)
    n, dim = features.shape
    rows = torch.randint(n, (min(n, SAMPLE),), generator=generator)  # even steps would fall in with the images' rows
    sample = features[rows.to(features.device)].float().nan_to_num(0, 0, 0)
    mean = sample.mean(0)
    sample -= mean
    directions = torch.randn(dim, min(dim, DIRECTIONS), generator=generator).to(features.device)
    for _ in range(2):  # subspace iteration
        directions = torch.linalg.qr(sample.T @ (sample @ directions)).Q
    return mean, torch.linalg.qr(directions.double()).Q


def _raise_non_finite(features: Tensor) -> None:
    for part in _parts(len(features), ROWS):
        bad = (~(features[part].double().square().sum(1) < 1e36)).nonzero()  # NaN compares as false
        if len(bad):
            raise NonFiniteError(part.start + int(bad[0]))


def _argmin(rows: Tensor) -> Tensor:
    """Each row's position of its least number. On a CPU NumPy finds it several times as fast as torch."""
    return torch.from_numpy(rows.numpy().argmin(1)) if rows.device.type == "cpu" else rows.argmin(1)


def _parts(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """Products in full float32 even where TF32 or bfloat16 is allowed: the bounds allow for float32's rounding only."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _as_matrix(features: Tensor | np.ndarray) -> Tensor:
    if isinstance(features, np.ndarray):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
            features = torch.from_numpy(features)
    features = features.detach()
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        shape, kind = tuple(features.shape), features.dtype
        raise InputError(f"features must be a non-empty (N, D) matrix of floating-point numbers, got {shape}, {kind}")
    return features


def _check_size(size: int, n: int) -> None:
    if not 1 <= size <= n:
        raise InputError(f"the rows to choose must number 1 to {n}, as many as there are, got {size}")
