"""How long one image's patches take to find their nearest neighbours: this project's search, faiss and torch.cdist.

    python -m benchmarks.search --data-path magnetic_tile_data --category magnetic_tile
    python -m benchmarks.search --features features.npy

The bank holds 50 to 60,000 of the patches of training images, the queries are the patches of one more image: at both
scales of form 'wedge', by its metric, and of form 'paper'; or the rows of (N, D) files, the last 784 being the queries.
Ours is the search that a detector would use, in its graph or outside of it. All distances are exact, so all are
compared with brute force in float64. Writes ``benchmarks/results/search.csv`` and ``.png``; exit code 1 if a distance
of ours is off by more than 1e-4, relative.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from models.threads import session_options

import numpy as np
import torch
from torch import Tensor

import config
from benchmarks.common import (
    RESULTS,
    Row,
    alternate,
    describe_machine,
    describe_versions,
    median_and_spread,
    plot_bars,
    print_table,
    write_csv,
)
from benchmarks.coreset import cases
from benchmarks.inference import load
from models.errors import InputError
from models.memory_bank import MemoryBank
from models.wedge_net import RECIPE, WedgeNet
from models.whitening import fit_whitening
from utils.console import command
from utils.data.dataset import find_categories, train_samples
from utils.pipeline.inference import extract_features
from utils.settings import Settings, SettingsParser, positive

try:
    import faiss
except ImportError:
    faiss = None

SIZES = (50, 500, 5_000, 60_000)  # vectors in a bank
QUERIES = 784  # patches of a 224 x 224 image, at stride 8
TOLERANCE = 1e-4
LARGEST = 2**24  # numbers in a bank: with more, an hour goes by
SHORTEST = 0.02  # seconds a measurement: shorter calls are repeated


def brute_force(queries: Tensor, vectors: Tensor) -> Tensor:
    """(Q,) distances from differences, in float64."""
    pairs = (
        torch.cdist(queries.double(), part.double(), compute_mode="donot_use_mm_for_euclid_dist")
        for part in vectors.split(1024)
    )
    return torch.stack([distances.amin(dim=1) for distances in pairs]).amin(dim=0)


def searches(queries: Tensor, vectors: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each way to search, ready to be called; gives (Q,) distances."""
    bank = MemoryBank(vectors)
    in_graph = vectors.device.type == "cpu" and not bank.pruned
    ways = {
        "ours": graph_search(bank, queries) if in_graph else lambda: bank.nearest(queries),
        "torch.cdist": lambda: torch.cdist(queries, vectors).amin(dim=1),
    }
    if faiss is not None and vectors.device.type == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(vectors.shape[1])
        index.add(vectors.numpy())
        ways["faiss"] = lambda: torch.from_numpy(index.search(queries.numpy(), 1)[0][:, 0]).clamp(min=0).sqrt()
    return ways


def graph_search(bank: MemoryBank, queries: Tensor) -> Callable[[], Tensor]:
    """That part of a detector's graph that looks the queries up, in onnxruntime."""
    import onnxruntime
    from onnx import TensorProto, helper

    from models.onnx_detector import in_metric, nearest
    from models.onnx_graph import Writer

    write = Writer()
    distances = nearest(write, in_metric(write, None, "patches", bank.vectors, None), bank.vectors)
    patches = helper.make_tensor_value_info("patches", TensorProto.FLOAT, [1, *queries.shape])
    graph = write.model(patches, {distances: helper.make_tensor_value_info("distances", TensorProto.FLOAT, None)})
    options = session_options(torch.get_num_threads())
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"patches": queries[None].numpy()})[0])


def both_scales(settings: Settings, images: int) -> Iterator[tuple[str, Tensor, int]]:
    """Name, (N, D) patches and an image's number of patches, of each scale of form 'wedge'."""
    samples = train_samples(settings, find_categories(settings)[0])[:images]
    backbone, weights = load("efficientnet_lite0")
    net = WedgeNet(backbone, device=settings.device, engine=settings.engine)
    for stride, features in zip(net.strides, extract_features(net, samples, settings, "both scales"), strict=True):
        name = f"efficientnet_lite0, stride {stride}, {weights} weights, {len(samples)} images"
        patches = features.flatten(0, 1)
        yield name, fit_whitening(patches, RECIPE.shrinkage)(patches).to(settings.device), features.shape[1]


def repeated(call: Callable[[], Tensor]) -> tuple[Callable[[], None], int]:
    """``call`` as often as makes a measurement long enough, and how often that is."""
    call()
    start = time.perf_counter()
    call()
    times = max(1, round(SHORTEST / (time.perf_counter() - start)))

    def calls() -> None:
        for _ in range(times):
            call()

    return calls, times


def measure(name: str, queries: Tensor, vectors: Tensor, repeats: int) -> list[Row]:
    """One row for each way to search a bank of ``vectors``."""
    ways = searches(queries, vectors)
    exact = brute_force(queries, vectors)
    errors = {way: ((call() - exact).abs() / exact).max().item() for way, call in ways.items()}
    loops = {way: repeated(call) for way, call in ways.items()}
    seconds = alternate({way: calls for way, (calls, _) in loops.items()}, repeats)
    rows = []
    for way, (_, times) in loops.items():
        median, spread = median_and_spread([t / times * 1e3 for t in seconds[way]])
        row = {"features": name, "dimensions": vectors.shape[1], "bank": len(vectors), "queries": len(queries)}
        rows.append(row | {"way": way, "milliseconds": median, "spread_ms": spread, "largest_error": errors[way]})
    for row in rows:
        row["times_ours"] = row["milliseconds"] / rows[0]["milliseconds"]
    return rows


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--features", nargs="+", type=Path, metavar="FILE", help="(N, D) float32 arrays as .npy files")
    parser.add_argument("--images", type=positive, default=129, help="training images; the last one is looked up")
    parser.add_argument("--repeats", type=positive, default=9, help="rounds of measurement")
    settings, options = parser.read(argv)
    print(describe_machine())
    print(describe_versions("torch", "faiss-cpu"))
    if faiss is None:
        print("install faiss-cpu to compare with it as well")
    if options.features:
        features = (
            (str(path), torch.from_numpy(np.load(path)).to(settings.device), QUERIES) for path in options.features
        )
    else:
        joint = ((*case, QUERIES) for case in cases(settings, options.images))
        features = itertools.chain(both_scales(settings, options.images), joint)

    rows: list[Row] = []
    bars: dict[str, dict[str, float]] = {}
    for name, patches, count in features:
        patches, queries = patches[:-count], patches[-count:].contiguous()
        order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(settings.seed))
        for size in SIZES:
            if size > len(patches) or size * patches.shape[1] > LARGEST:
                continue
            vectors = patches[order[:size].to(patches.device)]
            its_rows = measure(name, queries, vectors, options.repeats)
            bars[f"{name}\n{len(vectors):,} vectors"] = {row["way"]: row["milliseconds"] for row in its_rows}
            rows += its_rows
    if not rows:
        raise InputError(f"too few patches for a bank of {SIZES[0]}: give more --images or rows")
    print_table(rows)
    write_csv(RESULTS / "search.csv", rows)
    plot_bars(RESULTS / "search.png", "Nearest vectors of an image's patches", "milliseconds", bars)
    wrong = [row for row in rows if row["way"] == "ours" and not row["largest_error"] <= TOLERANCE]
    for row in wrong:
        print(f"DIFFERS: {row['features']}, {row['bank']} vectors: by {row['largest_error']:.1g}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
