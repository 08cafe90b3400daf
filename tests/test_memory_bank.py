"""The memory bank: distances against brute force in float64, on both ways to search, and what it refuses."""

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import memory_bank
from models.errors import InputError
from models.memory_bank import MemoryBank

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def brute_force(queries, vectors):
    return torch.cdist(queries.double(), vectors.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)


def check(vectors, queries):
    bank = MemoryBank(vectors)
    torch.testing.assert_close(bank.nearest(queries).double(), brute_force(queries, vectors), rtol=1e-4, atol=0)
    return bank


def low_rank(count, dim, seed, rank=24, noise=0.02):
    """Like patch features: a decaying spectrum, all entries shifted the same way."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(rank, dim, generator=torch.Generator().manual_seed(0)) / torch.arange(1, rank + 1)[:, None]
    shared = torch.randn(count, rank, generator=generator) @ axes
    return shared + noise * torch.randn(count, dim, generator=generator) + 1


def clusters(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dim, generator=torch.Generator().manual_seed(0)) * 10
    return centres[torch.arange(count) % 20] + 1e-3 * torch.randn(count, dim, generator=generator)


DATA = {
    "normal": lambda count, dim, seed: torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)),
    "low rank": low_rank,
    "clusters": clusters,
    "far from the origin": lambda count, dim, seed: low_rank(count, dim, seed) + 1000,
    "duplicates": lambda count, dim, seed: low_rank(10, dim, seed).repeat(-(-count // 10), 1)[:count],
    "one axis": lambda count, dim, seed: DATA["normal"](count, 1, seed).expand(count, dim),
    "all equal": lambda count, dim, seed: torch.full((count, dim), 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(1, 3, 7), (40, 1, 5), (777, 300, 64), (3000, 130, 256)], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_distances_equal_brute_force(data, size, dtype):
    count, queries, dim = size
    check(DATA[data](count, dim, 1).to(dtype), DATA[data](queries, dim, 2))


def test_both_ways_to_search_are_tested():
    assert MemoryBank(low_rank(3000, 256, 1))._keys is not None
    assert MemoryBank(torch.randn(3000, 256))._keys is None


@pytest.mark.parametrize("tile", [3000, 1 << 20])
@pytest.mark.parametrize("data", ["normal", "low rank"])
def test_small_tiles_and_blocks_change_nothing(data, tile, monkeypatch):
    vectors, queries = DATA[data](1003, 128, 1), DATA[data](301, 128, 2)
    expected = MemoryBank(vectors).nearest(queries)
    monkeypatch.setattr(memory_bank, "_TILE", {"cpu": tile, "gpu": tile})
    monkeypatch.setattr(memory_bank, "_LEAST", 700)
    monkeypatch.setattr(memory_bank, "_BLOCK", 64)
    monkeypatch.setattr(memory_bank, "_PAIRS", 7)
    monkeypatch.setattr(memory_bank, "_FETCH", 500)
    monkeypatch.setattr(memory_bank, "_TABLE", 0)
    torch.testing.assert_close(MemoryBank(vectors).nearest(queries), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("data", ["normal", "low rank", "far from the origin"])
@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2])
def test_queries_close_to_the_bank(data, step):
    vectors = DATA[data](3000, 256, 1)
    check(vectors, vectors[::20] + step * torch.randn(150, 256))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("data", DATA)
def test_a_query_in_the_bank_is_at_distance_zero(data, dtype):
    vectors = DATA[data](2000, 192, 1).to(dtype)
    assert MemoryBank(vectors).nearest(vectors[::7]).max() == 0


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(DATA)),
    st.integers(1, 400),
    st.integers(0, 40),
    st.integers(1, 80),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.integers(0, 9),
)
def test_any_bank_and_queries(data, count, queries, dim, scale, seed):
    vectors = DATA[data](count, dim, seed) * scale
    others = DATA[data](queries, dim, seed + 1) * scale
    bank = check(vectors, torch.cat([others, vectors[: queries // 2], (vectors[: queries // 2] + vectors[-1]) / 2]))
    assert (len(bank), bank.dim) == (count, dim)
    assert bank.nearest(vectors[:3]).max() == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=2, max_size=30), st.integers(1, 29))
def test_ties_and_integers(rows, count):
    points = torch.tensor(rows, dtype=torch.float32)
    count = min(count, len(points) - 1)
    assert torch.equal(MemoryBank(points[:count]).nearest(points[count:]).square().round(), squared(points, count))


def squared(points, count):
    return (points[count:, None] - points[:count]).square().sum(dim=2).amin(dim=1)


@pytest.mark.parametrize("data", ["normal", "low rank"])
def test_products_of_little_precision_only_cost_time(data, monkeypatch):
    """As on a GPU that is allowed TF32, or worse: the distances come from differences then."""

    def coarse(bias, left, right, *, alpha, out):
        return torch.add(bias, left.bfloat16().float() @ right.bfloat16().float(), alpha=alpha, out=out)

    vectors, queries = DATA[data](2000, 128, 1), DATA[data](100, 128, 2)
    bank = MemoryBank(vectors)
    bank._rounding = 1e-2
    monkeypatch.setattr(torch, "addmm", coarse)
    torch.testing.assert_close(bank.nearest(queries).double(), brute_force(queries, vectors), rtol=1e-5, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_tf32_is_noticed(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    vectors, queries = low_rank(3000, 256, 1).cuda(), low_rank(300, 256, 2).cuda()
    bank = check(vectors, queries)
    assert bank._rounding > 1e-5


@pytest.mark.parametrize("data", DATA)
def test_rounding_is_allowed_for(data):
    """What the bank reckons with is more than what happens, between its vectors and others."""
    vectors, queries = DATA[data](3000, 192, 1), DATA[data](784, 192, 2)
    bank = MemoryBank(vectors)
    b, q = bank._centred(vectors), bank._centred(queries)
    sizes = b.square().sum(dim=1) + q.square().sum(dim=1)[:, None]
    found = torch.addmm(b.square().sum(dim=1), q, b.T, alpha=-2) + q.square().sum(dim=1)[:, None]
    exact = torch.cdist(q.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert ((found - exact).abs() <= bank._rounding * sizes).all()


@pytest.mark.parametrize("data", ["normal", "low rank"])
def test_an_outlier_spoils_nothing(data):
    vectors, queries = DATA[data](2000, 192, 1), DATA[data](100, 192, 2)
    vectors[7] *= 1e4
    queries[3] *= 1e5
    check(vectors, queries)


def test_features_as_the_embedding_gives_them():
    features = low_rank(784, 192, 2).T.contiguous().view(1, 192, 784).transpose(1, 2)  # rows are not contiguous
    vectors = low_rank(2000, 192, 1)
    with torch.inference_mode():
        found = MemoryBank(vectors).nearest(features.flatten(0, 1))
    torch.testing.assert_close(found.double(), brute_force(features[0], vectors), rtol=1e-4, atol=0)


def test_queries_that_need_gradients_and_half_precision_ones():
    vectors, queries = low_rank(2000, 192, 1), low_rank(50, 192, 2)
    bank = MemoryBank(vectors.requires_grad_())
    assert not bank.nearest(queries.clone().requires_grad_()).requires_grad
    halves = queries.half()
    torch.testing.assert_close(bank.nearest(halves), bank.nearest(halves.float()))
    assert bank.nearest(halves).dtype == torch.float32


def test_no_queries_give_no_distances():
    assert MemoryBank(torch.randn(5, 3)).nearest(torch.empty(0, 3)).shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_devices(device, dtype):
    vectors, queries = low_rank(3000, 256, 1).to(dtype), low_rank(1500, 256, 2)
    bank = MemoryBank(vectors).to(device)
    assert bank.vectors.device.type == device
    assert torch.equal(bank.vectors.cpu(), vectors)
    found = bank.nearest(queries.to(device)).cpu().double()
    torch.testing.assert_close(found, brute_force(queries, vectors), rtol=1e-4, atol=0)
    assert bank.nearest(bank.vectors[:20]).max() == 0
    assert bank.to(device) is bank


def test_what_a_gpu_does_is_right(monkeypatch):
    monkeypatch.setattr(MemoryBank, "_prepare_pruning", lambda bank: None)
    assert check(low_rank(3000, 256, 1), low_rank(300, 256, 2))._keys is None


def test_pruning_that_does_not_pay_is_given_up():
    """Queries unlike the bank are about equally far from all of it: no bound rules anything out."""
    vectors = low_rank(3000, 256, 1)
    bank = MemoryBank(vectors)
    assert bank._keys is not None
    for seed in range(memory_bank._LOSSES + 1):
        queries = 3 * torch.randn(300, 256, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(bank.nearest(queries).double(), brute_force(queries, vectors), rtol=1e-4, atol=0)
    assert bank._keys is None
    check_queries = low_rank(300, 256, 2)
    torch.testing.assert_close(
        bank.nearest(check_queries).double(), brute_force(check_queries, vectors), rtol=1e-4, atol=0
    )


def test_bytes_are_those_of_everything_held():
    vectors = low_rank(3000, 256, 1)
    assert vectors.nbytes < MemoryBank(vectors).nbytes < vectors.nbytes * 1.5
    assert vectors.nbytes / 2 < MemoryBank(vectors.half()).nbytes < vectors.nbytes


def test_a_bank_leaves_the_random_numbers_alone_and_is_the_same_each_time():
    vectors, queries = low_rank(3000, 256, 1), low_rank(100, 256, 2)
    torch.manual_seed(5)
    first = MemoryBank(vectors)
    drawn = torch.rand(1)
    second = MemoryBank(vectors)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(first._basis, second._basis)
    assert torch.equal(first.nearest(queries), second.nearest(queries))


def test_pruning_compares_few_vectors_in_full(monkeypatch):
    vectors, queries = low_rank(5000, 256, 1), low_rank(784, 256, 2)
    bank, compared = MemoryBank(vectors), []
    distances = bank._distances
    monkeypatch.setattr(bank, "_distances", lambda *pairs: compared.append(len(pairs[2])) or distances(*pairs))
    bank.nearest(queries)
    assert sum(compared) < 0.02 * len(vectors) * len(queries)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(3), r"non-empty \(M, D\) matrix, got shape \(3,\)"),
        (torch.zeros(0, 3), r"got shape \(0, 3\)"),
        (torch.zeros(3, 0), r"got shape \(3, 0\)"),
        (torch.zeros(1, 2, 3), r"got shape \(1, 2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.float64), "float32 or float16, got torch.float64"),
        (torch.tensor([[0.0], [torch.nan]]), "NaN"),
        (torch.tensor([[0.0], [torch.inf]]), "infinite"),
        (torch.tensor([[-torch.inf], [torch.inf]]), "infinite"),
        (torch.tensor([[torch.inf]], dtype=torch.float16), "infinite"),
    ],
)
def test_bad_banks_are_refused(vectors, message):
    with pytest.raises(InputError, match=message) as caught:
        MemoryBank(vectors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vectors", [torch.randn(20, 64), low_rank(3000, 64, 1)], ids=["plain", "pruned"])
def test_bad_queries_are_refused(vectors):
    bank = MemoryBank(vectors)
    with pytest.raises(InputError, match=r"\(Q, 64\).*got \(5, 4\)"):
        bank.nearest(torch.zeros(5, 4))
    with pytest.raises(InputError, match=r"got \(64,\)"):
        bank.nearest(torch.zeros(64))
    for bad in (torch.nan, torch.inf, -torch.inf):
        queries = torch.zeros(2000, 64)
        queries[1999, 63] = bad
        with pytest.raises(InputError, match="NaN, infinite"):
            bank.nearest(queries)


@pytest.fixture
def short_of_memory(monkeypatch):
    """A bank whose products fit only if they have at most as many elements as ``bank.fits``."""
    bank = MemoryBank(torch.randn(3000, 64))
    products = bank._products

    def limited(centred):
        if bank._tile > bank.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return products(centred)

    monkeypatch.setattr(bank, "_products", limited)
    return bank


def test_a_full_gpu_is_searched_in_smaller_parts_and_says_so_once(short_of_memory):
    queries = torch.randn(2500, 64)
    short_of_memory.fits = memory_bank._TILE["cpu"] // 4
    with pytest.warns(UserWarning, match="smaller parts") as caught:
        found = short_of_memory.nearest(queries)
    assert len(caught) == 1
    torch.testing.assert_close(found.double(), brute_force(queries, short_of_memory.vectors), rtol=1e-4, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short_of_memory.nearest(queries)


def test_a_gpu_with_no_memory_at_all_is_an_error(short_of_memory):
    short_of_memory.fits = 0
    with pytest.warns(UserWarning, match="smaller parts"), pytest.raises(torch.OutOfMemoryError):
        short_of_memory.nearest(torch.randn(10, 64))


PEAK = """
import ctypes, torch
from models.memory_bank import MemoryBank
from tests.test_memory_bank import DATA
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
for data, dtype in (("low rank", torch.float32), ("low rank", torch.float16), ("normal", torch.float16)):
    bank, queries = MemoryBank(DATA[data](12000, 512, 1).to(dtype)), DATA[data](6000, 512, 2)
    bank.nearest(queries[:64])
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, so that taking it again is seen
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = peak()
    bank.nearest(queries)
    print(bank._keys is not None, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_search_takes_at_most_64_mb():
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    pruned, megabytes = zip(*map(str.split, run.stdout.splitlines()), strict=True)
    assert pruned == ("True", "True", "False")
    assert all(1 < float(each) < 64 for each in megabytes), megabytes
