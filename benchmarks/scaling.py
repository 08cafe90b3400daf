"""How time and memory grow: with training images, bank, dimensions, batch and threads.

    python -m benchmarks.scaling --data-path magnetic_tile_data --category magnetic_tile --center-crop false

Coreset: 0.1 % of the patches of 100 to 5,000 training images (real ones, repeated with jitter as far as there are not
enough). Search: the patches of one image in banks of 0.1 to 100 % of 128 images' patches. Dimensions: both, on networks
with 152, 192, 1536 and 2048 of them. Batch: images judged 1 to 64 at a time; threads: one and all. Peak memory is what
the process takes beyond what it held before, where the system tells (Linux).

Writes ``benchmarks/results/scaling.csv`` and ``.png``, a panel for each sweep with the exponent of a power law.
"""

import ctypes
import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import config
from benchmarks.common import RESULTS, Row, describe_machine, describe_versions, print_table, write_csv
from benchmarks.coreset import cases
from benchmarks.inference import load
from models.coreset import greedy_coreset
from models.detector import Detector
from models.memory_bank import MemoryBank
from models.wedge_net import WedgeNet
from utils.console import command
from utils.data.dataset import batches, evenly, find_categories, test_samples
from utils.settings import Settings, SettingsParser, positive

IMAGES = (100, 300, 1000, 3000, 5000)
CORESET = 0.001
BANKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WIDTHS = {
    "efficientnet_lite0, semantic off": False,
    "efficientnet_lite0": True,
    "resnet50, semantic off": False,
    "resnet50": True,
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PATCHES = 784  # of an image of 224 pixels
JITTER = 0.02  # of a feature's own size: an image that is repeated is not the same image


def measured(call: Callable[[], object], repeats: int) -> tuple[float, float | None]:
    """Median seconds of a call, and the megabytes that the first one takes at its peak. Of several the first one is
    not timed."""
    before = _reset_peak()
    first = _seconds(call)
    peak = _status("VmHWM")
    seconds = [first] if repeats == 1 else [_seconds(call) for _ in range(repeats)]
    return float(np.median(seconds)), None if before is None or peak is None else peak - before


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _reset_peak() -> float | None:
    """Give free memory back and forget the peak so far; the megabytes held now, None where the system cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):  # not Linux, not glibc
        return None
    return _status("VmRSS")


def _status(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)


def repeated(patches: Tensor, count: int) -> Tensor:
    """(count, D) patches: those given, again and again, each time a little different."""
    generator = torch.Generator().manual_seed(0)
    many = torch.empty(count, patches.shape[1])
    for start in range(0, count, len(patches)):
        part = many[start : start + len(patches)]
        part.copy_(patches[: len(part)])
        if start:
            part.mul_(torch.empty_like(part).normal_(1, JITTER, generator=generator))
    return many


class Point(NamedTuple):
    """What is called, at which place of which sweep, and how often."""

    sweep: str
    place: float
    call: Callable[[], object]
    repeats: int


def dimensions(settings: Settings, images: int, repeats: int) -> Iterator[Point]:
    """Coreset and search on networks of different width."""
    for _, patches in cases(settings, images, WIDTHS):
        queries, others = patches[-PATCHES:].contiguous(), patches[:-PATCHES]
        size = len(others) // 100
        bank = MemoryBank(others[greedy_coreset(others, size)])
        where = f"{len(others) // PATCHES} images, 1 %"
        dim = patches.shape[1]
        call = functools.partial(greedy_coreset, others, size)
        yield Point(f"dimensions: coreset, {where}", dim, call, repeats)
        yield Point(f"dimensions: search, {where}", dim, functools.partial(bank.nearest, queries), 5 * repeats)


def images_and_banks(patches: Tensor, repeats: int) -> Iterator[Point]:
    """Coresets of more and more images, and searches in larger and larger banks."""
    for images in IMAGES:
        many = repeated(patches, images * PATCHES)
        size = int(len(many) * CORESET)
        call = functools.partial(greedy_coreset, many, size)
        yield Point(f"training images: coreset, {CORESET:.1%}", images, call, 1 if images >= 1000 else repeats)
    queries, others = patches[-PATCHES:].contiguous(), patches[:-PATCHES]
    chosen = greedy_coreset(others, int(len(others) * BANKS[-2]))
    for ratio in BANKS:
        bank = MemoryBank(others if ratio == 1 else others[chosen[: int(len(others) * ratio)]])
        yield Point("bank: search, vectors", len(bank), functools.partial(bank.nearest, queries), repeats)


def batches_and_threads(patches: Tensor, settings: Settings, repeats: int) -> Iterator[Point]:
    """Images judged from pixels to score and map, more of them at once, and by more threads."""
    samples = evenly(test_samples(settings, find_categories(settings)[0]), max(BATCHES))
    images = torch.cat([batch.images for batch in batches(samples, settings)]).to(settings.device)
    images = images.repeat(-(-max(BATCHES) // len(images)), 1, 1, 1)
    bank = MemoryBank(patches[greedy_coreset(patches, len(patches) // 100)].half())
    every = torch.get_num_threads()
    for threads in dict.fromkeys((every, 1)):
        torch.set_num_threads(threads)  # onnxruntime takes as many when the network is made
        backbone, _ = load("efficientnet_lite0")
        net = WedgeNet(backbone, form="paper", use_semantic=True, device=settings.device, engine=settings.engine)
        detector = Detector(net, [bank], settings.image_size)
        for batch in BATCHES if threads == every else (1, 16):
            call = functools.partial(detector.predict, images[:batch])
            if threads == every:
                yield Point("batch: images at once", batch, call, repeats)
            if batch in (1, 16):
                yield Point(f"threads: {batch} images at once", threads, call, 3 * repeats)
    torch.set_num_threads(every)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--images", type=positive, default=128, help="training images to take patches from")
    parser.add_argument("--repeats", type=positive, default=3, help="calls of which the median counts")
    settings, options = parser.read(argv)
    print(describe_machine(settings.device))
    print(describe_versions("torch", "onnxruntime"))
    ((_, patches),) = cases(settings, options.images, {"efficientnet_lite0": True})
    points = itertools.chain(
        images_and_banks(patches, options.repeats),
        batches_and_threads(patches, settings, options.repeats),
        dimensions(settings, min(33, options.images), options.repeats),
    )
    rows: list[Row] = []
    for point in points:
        seconds, megabytes = measured(point.call, point.repeats)
        rows.append({"sweep": point.sweep, "place": point.place, "milliseconds": seconds * 1e3, "peak_mb": megabytes})
        print(f"{point.sweep}: {point.place:g}: {seconds * 1e3:.1f} ms", flush=True)
    rows = [row | {"exponent": exponent(rows, row["sweep"])} for row in rows]
    print_table(rows)
    write_csv(RESULTS / "scaling.csv", rows)
    draw(RESULTS / "scaling.png", rows)
    return 0


def exponent(rows: Sequence[Row], sweep: str) -> float:
    """The power of its place with which a sweep's time grows, by least squares of the logarithms."""
    own = [row for row in rows if row["sweep"] == sweep]
    if len(own) < 2:
        return float("nan")
    return float(np.polyfit(*(np.log([row[name] for row in own]) for name in ("place", "milliseconds")), 1)[0])


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Save a panel for each kind of sweep, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps: dict[str, list[str]] = {}
    for row in rows:
        kind = row["sweep"].split(":")[0]
        if row["sweep"] not in sweeps.setdefault(kind, []):
            sweeps[kind].append(row["sweep"])
    figure, panels = pyplot.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 7), squeeze=False)
    for (kind, names), (time_panel, memory_panel) in zip(sweeps.items(), panels.T, strict=True):
        for name in names:
            own = [row for row in rows if row["sweep"] == name]
            label = f"{name.split(': ')[1]}: power {own[0]['exponent']:.2f}"
            time_panel.plot([r["place"] for r in own], [r["milliseconds"] for r in own], "o-", label=label)
            taken = [(r["place"], r["peak_mb"]) for r in own if r["peak_mb"] is not None]
            if taken:
                memory_panel.plot(*zip(*taken, strict=True), "o-")
        time_panel.set(title=kind, xscale="log", yscale="log", ylabel="milliseconds")
        memory_panel.set(xscale="log", xlabel=kind, ylabel="peak memory beyond the input, MB")
        memory_panel.set_ylim(bottom=0, top=max(1, memory_panel.get_ylim()[1]))
        places = sorted({row["place"] for row in rows if row["sweep"] in names})
        for panel in (time_panel, memory_panel):
            panel.set_xticks(places, [f"{place:g}" for place in places], rotation=45)
            panel.set_xticks([], minor=True)
        time_panel.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
