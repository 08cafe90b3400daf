"""The coreset: index by index what the plain loop in float64 chooses, for friendly and hostile data."""

import io
import subprocess
import sys
import textwrap
import warnings

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from models import coreset
from models.coreset import NonFiniteError, first_centre, greedy_coreset, random_subset
from models.errors import InputError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(autouse=True)
def one_thread():
    """The sets are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain_loop(features, size, seed=0):
    """Greedy k-centre as everyone writes it; ends early if every row is chosen or equals one that is."""
    features = features.double()
    chosen = [first_centre(len(features), seed)]
    nearest = torch.full((len(features),), torch.inf, dtype=torch.float64)
    while len(chosen) < size:
        nearest = nearest.minimum((features - features[chosen[-1]]).square().sum(dim=1))
        if nearest.max() == 0:
            break
        chosen.append(int(nearest.argmax()))  # the first of equals
    return chosen


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).float()


def decaying(n, d):
    """A spectrum like that of real features."""
    return normal(n, d) * torch.arange(1, d + 1) ** -0.7


DATA = {
    "one dimension": lambda: normal(500, 1),
    "few dimensions": lambda: normal(2000, 5),
    "real spectrum": lambda: decaying(2000, 100),
    "more dimensions than a sketch, all alike": lambda: normal(700, 150),
    "clusters": lambda: (normal(30, 1, 20) * 100 + normal(30, 40, 20, seed=1) * 0.01).flatten(0, 1),
    "far from the origin": lambda: normal(1000, 10) + 1e4,
    "grid: many ties": lambda: integers(4, 3000, 5),
    "corners of a cube: hardly anything but ties": lambda: integers(2, 2000, 12),
    "every row ten times": lambda: normal(100, 80).repeat(10, 1),
    "one outlier": lambda: torch.cat([normal(999, 8), torch.full((1, 8), 1e6)]),
    "squares that float32 cannot hold": lambda: normal(300, 70) * 1e-25,
    "squares near float32's limit": lambda: normal(300, 70) * 1e16,
    "all rows equal": lambda: torch.ones(300, 3),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DATA)
def test_the_choice_is_the_plain_loops(name, device):
    features = DATA[name]()
    size = len(features) // 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than asked for
        chosen = greedy_coreset(features.to(device), size)
    assert chosen.tolist() == plain_loop(features, size)


@pytest.mark.parametrize("name", ["real spectrum", "more dimensions than a sketch, all alike", "grid: many ties"])
def test_however_the_work_is_cut_up(name, monkeypatch):
    monkeypatch.setattr(coreset, "ROWS", 7)
    monkeypatch.setattr(coreset, "CENTRES", 10)
    monkeypatch.setattr(coreset, "FETCH", 700)
    monkeypatch.setattr(coreset, "SAMPLE", 5)
    monkeypatch.setattr(coreset, "CANDIDATES", (2, 9))
    features = DATA[name]()[:500]
    assert greedy_coreset(features, 200).tolist() == plain_loop(features, 200)


def test_a_large_set():
    features = decaying(20_000, 70)
    assert greedy_coreset(features, 150).tolist() == plain_loop(features, 150)


@given(
    features=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.integers(-2, 2).map(float) | st.floats(-(2.0**56), 2.0**56, width=32, allow_subnormal=False),
    ),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_any_small_set(features, share, seed):
    size = max(1, round(share * len(features)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = greedy_coreset(features, size, seed)
    assert chosen.tolist() == plain_loop(torch.from_numpy(features), size, seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, device):
    features = decaying(1500, 100).to(dtype)
    assert greedy_coreset(features.to(device), 200).tolist() == plain_loop(features, 200)


def test_a_memory_map_is_read_only(tmp_path):
    features = decaying(1500, 100)
    np.save(tmp_path / "features.npy", features.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = greedy_coreset(np.load(tmp_path / "features.npy", mmap_mode="r"), 200)
    assert chosen.tolist() == plain_loop(features, 200)


def test_memory_stays_bounded(tmp_path):
    """180 MB of features on disk, and 96 MB that may be allocated."""
    shape = (90_000, 512)
    file = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", np.float32, shape)
    file[:] = np.random.default_rng(0).random(shape, np.float32)
    del file
    script = f"""
        import re, resource
        from pathlib import Path
        import numpy as np, torch
        from models.coreset import greedy_coreset

        torch.set_num_threads(1)
        greedy_coreset(torch.randn(5000, 512), 100)  # libraries loaded, buffers of theirs allocated
        used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (96 << 20),) * 2)
        greedy_coreset(np.load({str(tmp_path / "features.npy")!r}, mmap_mode="r"), 50)
        try:
            np.ones({shape}, np.float32)  # a copy of the features would not have gone unnoticed
        except MemoryError:
            print("bounded")
    """
    run = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "bounded\n"


def test_one_row_and_all_rows():
    features = normal(300, 20)
    assert greedy_coreset(features, 1).tolist() == [first_centre(300)]
    assert greedy_coreset(features[:1], 1).tolist() == [0]
    assert sorted(greedy_coreset(features, 300).tolist()) == list(range(300))


def test_a_smaller_choice_is_the_beginning_of_a_larger_one():
    features = decaying(1000, 64)
    assert torch.equal(greedy_coreset(features, 400)[:90], greedy_coreset(features, 90))


def test_the_seed_settles_the_choice_and_nothing_else_is_random():
    features = normal(1000, 20)
    state = torch.random.get_rng_state()
    assert torch.equal(greedy_coreset(features, 50, seed=3), greedy_coreset(features, 50, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    starts = {greedy_coreset(features, 1, seed=seed).item() for seed in range(20)}
    assert len(starts) > 15


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    features = decaying(3000, 70)
    torch.set_num_threads(threads)
    assert greedy_coreset(features, 100).tolist() == plain_loop(features, 100)
    with pytest.raises(NonFiniteError):
        greedy_coreset(features * torch.nan, 100)
    assert torch.get_num_threads() == threads


def test_duplicates_are_chosen_once():
    features = integers(3, 500, 3)
    with pytest.warns(UserWarning, match="100 rows asked for, but only 27 are distinct"):
        chosen = greedy_coreset(features, 100)
    assert len(features[chosen].unique(dim=0)) == len(chosen) == 27


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_left_as_they_are(dtype):
    features = normal(500, 30).to(dtype)
    before = features.clone()
    greedy_coreset(features, 100)
    assert torch.equal(features, before)


def test_low_precision_products_elsewhere_do_not_matter():
    features = decaying(2000, 150)
    expected = greedy_coreset(features, 300)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(greedy_coreset(features, 300), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", [name for name in DATA if name != "corners of a cube: hardly anything but ties"])
def test_bounds_are_bounds(name):
    features = DATA[name]()[:400]
    rows = torch.arange(len(features))
    one, other = torch.cartesian_prod(rows, rows).unbind(dim=1)
    centres = coreset._Centres(features, 1, map)
    exact = centres._distances(one, other, torch.float64)
    assert (centres._distances(one, other, torch.float32) >= exact).all()
    for bounds_of in (centres._sketch_bounds, centres._row_bounds):
        bounds = bounds_of(rows, rows).flatten()
        assert (bounds <= exact).all()
        if name == "real spectrum":  # of some use, too: not far below
            assert (bounds / exact)[exact > 0].mean() > 0.9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e19])
def test_the_first_bad_row_is_named(bad):
    features = np.ones((9000, 20), np.float32)
    features[[4321, 8000], 7] = bad
    with pytest.raises(NonFiniteError, match="row 4321") as caught:
        greedy_coreset(features, 10)
    assert caught.value.row == 4321


@pytest.mark.parametrize(
    "features", [torch.zeros(5), torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3, 3).int(), np.zeros((3, 3, 3))]
)
def test_only_matrices_of_floats(features):
    with pytest.raises(InputError, match=r"\(N, D\)"):
        greedy_coreset(features, 1)


@pytest.mark.parametrize("size", [-1, 0, 6])
def test_sizes_that_cannot_be(size):
    for choose in (lambda: greedy_coreset(torch.zeros(5, 2), size), lambda: random_subset(5, size)):
        with pytest.raises(InputError, match=f"1 to 5.*{size}"):
            choose()


def test_the_bar_counts_centres(monkeypatch):
    bars = []

    class Recorded(tqdm):
        def close(self):
            if not self.disable:
                bars.append((self.n, self.total))
            super().close()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(coreset, "tqdm", Recorded)
    monkeypatch.setattr(sys, "stderr", Terminal())
    greedy_coreset(normal(2000, 20), 400, progress=True)
    assert set(bars) == {(400, 400)}
    bars.clear()
    greedy_coreset(normal(2000, 20), 400)
    assert not bars


def test_random_subset():
    subset = random_subset(1000, 100, seed=5)
    assert subset.dtype == torch.int64
    assert len(subset.unique()) == 100
    assert 0 <= subset.min() < 100 < 900 <= subset.max() < 1000
    assert torch.equal(subset[:10], random_subset(1000, 10, seed=5))
    assert not torch.equal(subset, random_subset(1000, 100, seed=6))
    assert sorted(random_subset(50, 50).tolist()) == list(range(50))


def test_it_works_in_inference_mode():
    features = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    expected = greedy_coreset(features, 200)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the mode is that of one thread
    try:
        with torch.inference_mode():
            assert torch.equal(greedy_coreset(features * 1, 200), expected)
    finally:
        torch.set_num_threads(threads)
