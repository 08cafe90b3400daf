"""How long it takes to choose 10 % of the patches: this project's coreset, the plain loop and anomalib's KCenterGreedy.

    python -m benchmarks.coreset --data-path magnetic_tile_data --category magnetic_tile
    python -m benchmarks.coreset --features features.npy

Patches of up to 128 training images, with 152, 192 and 2048 dimensions, or the rows of (N, D) files. Each step of the
other two costs the same, so a few of their steps are timed and multiplied; ``--whole`` runs the plain loop to its end.
Their steps and whole runs of ours alternate. Writes ``benchmarks/results/coreset.csv`` and ``.png``; exit code 1 if

- the choice among the first 20,000 patches differs from that of the plain loop in float64;
- at any size of the whole choice, a patch (of every fourth) is farther from the chosen ones than the next one chosen,
  by 1e-5 or more;
- with ``--whole``, less than 99.5 % of the patches are those that the plain loop in float32 chooses.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

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
from benchmarks.inference import load
from models.coreset import first_centre, greedy_coreset
from models.wedge_net import WedgeNet
from utils.console import command
from utils.data.dataset import find_categories, train_samples
from utils.pipeline.inference import extract_features
from utils.settings import Settings, SettingsParser, positive

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomalib's own, about packages that it could use
        from anomalib.models.components.sampling import KCenterGreedy
except ImportError:
    KCenterGreedy = None

RATIO = 0.1
CASES = {"efficientnet_lite0, semantic off": False, "efficientnet_lite0": True, "resnet50": True}
STEPS = {"plain loop": 50, "anomalib": 10}
CHECKED_ROWS, CHECKED_SIZE = 20_000, 400  # of the comparison with float64
LARGEST_GAP = 1e-5  # relative, in covering radius
LEAST_SHARED = 0.995  # of the chosen patches, between ours and the plain loop in float32


def plain_loop(features: Tensor, size: int) -> Iterator[int]:
    """Greedy k-centre as everyone writes it, in the precision of ``features``; yields each row as it is chosen."""
    lengths = features.square().sum(dim=1)
    nearest = torch.full_like(lengths, torch.inf)
    chosen = first_centre(len(features))
    for _ in range(size):
        yield chosen
        distance = lengths + lengths[chosen] - 2 * (features @ features[chosen])
        torch.minimum(nearest, distance, out=nearest)
        chosen = int(nearest.argmax())


def take(loop: Iterator[object], steps: int) -> None:
    """Let ``loop`` go on for some steps."""
    for _ in itertools.islice(loop, steps):
        pass


def anomalib_loop(features: Tensor) -> Iterator[None]:
    """The steps of anomalib's sampler, by its own methods and in its order, after its random projection."""
    sampler = KCenterGreedy(features, RATIO)
    sampler.model.fit(features)
    sampler.features = sampler.model.transform(features)
    chosen = torch.tensor(first_centre(len(features)), device=features.device)
    while True:
        sampler.update_distances(chosen)
        chosen = sampler.get_new_idx()
        sampler.min_distances.scatter_(0, chosen.view(1, 1), 0.0)
        yield


def largest_gap(features: Tensor, chosen: Tensor) -> float:
    """How much farther a patch is from the first k chosen ones than the next chosen one; relative, for the worst k.

    Every fourth patch is looked at.
    """
    mean = features[::100].double().mean(dim=0)  # without it, and in float32, rounding would exceed the tolerance
    centres = features[chosen.to(features.device)] - mean
    lengths = centres.square().sum(dim=1)

    def nearest(rows: Tensor) -> np.ndarray:  # (R, K) squared distance to the nearest of the first 1 ... K chosen
        squared = torch.addmm(lengths, rows, centres.T, alpha=-2) + rows.square().sum(dim=1, keepdim=True)
        return np.minimum.accumulate(squared.cpu().numpy(), axis=1)

    farthest = np.max([nearest(rows - mean).max(axis=0) for rows in features[::4].split(512)], axis=0)
    next_chosen = np.concatenate([np.diagonal(nearest(r), 512 * i - 1) for i, r in enumerate(centres.split(512))])
    return float(np.sqrt(farthest[:-1] / next_chosen).max() - 1)


def measure(name: str, features: Tensor, repeats: int, whole: bool) -> tuple[list[Row], list[str]]:
    """One row for each way to choose, and what is wrong with our choice."""
    n, dim = features.shape
    size = int(n * RATIO)
    loops = {"plain loop": plain_loop(features, size)}
    if KCenterGreedy is not None:
        loops["anomalib"] = anomalib_loop(features)
    count = {way: min(STEPS[way], size // (repeats + 1)) for way in loops}
    functions: dict[str, Callable] = {"ours": lambda: greedy_coreset(features, size)}
    for way, loop in loops.items():
        functions[way] = functools.partial(take, loop, count[way])
    seconds = alternate(functions, repeats)
    seconds |= {way: [t * size / count[way] for t in seconds[way]] for way in loops}

    chosen = greedy_coreset(features, size)
    part = features[:CHECKED_ROWS]
    checked = min(CHECKED_SIZE, len(part))
    same = greedy_coreset(part, checked).tolist() == list(plain_loop(part.double(), checked))
    gap = largest_gap(features, chosen)
    wrong = [] if same else [f"{name}: not the float64 loop's choice among the first {len(part)} patches"]
    if gap >= LARGEST_GAP:
        wrong.append(f"{name}: a patch was passed over that was farther by {gap:.1g}, relative")
    if whole:
        start = time.perf_counter()
        plain = list(plain_loop(features, size))
        seconds["plain loop"] = [time.perf_counter() - start]
        shared = len(set(plain) & set(chosen.tolist())) / size
        print(f"{name}: {shared:.2%} of the patches are those of the whole plain loop in float32")
        if shared < LEAST_SHARED:
            wrong.append(f"{name}: only {shared:.2%} of the patches are those of the plain loop in float32")
    print(f"{name}: same as float64 among the first {len(part)} patches: {same}; largest gap {gap:.1g}")

    ours, _ = median_and_spread(seconds["ours"])
    rows = []
    for way, times in seconds.items():
        median, spread = median_and_spread(times)
        steps = f"{count[way] * repeats} of {size}" if way in loops and not (whole and way == "plain loop") else "all"
        rows.append(
            {
                "features": name,
                "patches": n,
                "dimensions": dim,
                "chosen": size,
                "way": way,
                "steps_timed": steps,
                "seconds": median,
                "spread_s": spread,
                "times_ours": median / ours,
            }
        )
    return rows, wrong


def cases(settings: Settings, images: int, which: Mapping[str, bool] = CASES) -> Iterator[tuple[str, Tensor]]:
    """The name and (N, D) patch features of each case: a backbone's name, and whether the semantic stream is on.

    They are of form 'paper', whose single scale holds both layers: the widest vectors that are to be had.
    """
    samples = train_samples(settings, find_categories(settings)[0])[:images]
    for name, use_semantic in which.items():
        backbone, weights = load(name.split(",")[0])
        net = WedgeNet(backbone, form="paper", use_semantic=use_semantic, device=settings.device)
        (features,) = extract_features(net, samples, settings, name)
        yield f"{name}, {weights} weights, {len(samples)} images", features.flatten(0, 1).to(settings.device)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--features", nargs="+", type=Path, metavar="FILE", help="(N, D) float32 arrays as .npy files")
    parser.add_argument("--images", type=positive, default=128, help="training images to take patches from")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds of measurement")
    parser.add_argument("--whole", action="store_true", help="run the plain loop to its end: minutes, or an hour")
    settings, options = parser.read(argv)
    print(describe_machine())
    print(describe_versions("torch", "numpy", "anomalib"))
    if KCenterGreedy is None:
        print("install anomalib to compare with it as well")
    if options.features:
        features = ((str(path), torch.from_numpy(np.load(path)).to(settings.device)) for path in options.features)
    else:
        features = cases(settings, options.images)

    rows: list[Row] = []
    wrong: list[str] = []
    for case in features:
        its_rows, its_wrong = measure(*case, options.repeats, options.whole)
        rows += its_rows
        wrong += its_wrong
    print_table(rows)
    write_csv(RESULTS / "coreset.csv", rows)
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        bars.setdefault(f"{row['features'].split(',')[0]}, D = {row['dimensions']}", {})[row["way"]] = row["seconds"]
    plot_bars(RESULTS / "coreset.png", f"Choosing {RATIO:.0%} of the patches", "seconds", bars)
    for line in wrong:
        print(f"DIFFERS: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
