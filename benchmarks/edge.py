"""What a device gains: a trained detector in PyTorch beside its exported models, each in a process of its own.

    python -m benchmarks.edge --category tile --sampling-ratio 0.1,0.01
    python -m benchmarks.edge --images 100

Takes the settings of train.py, whose banks must be there; exports the models. Writes ``benchmarks/results/edge.csv``
and ``.png``. Latency is that of one image, decoded and resized; cold start lasts from the start of Python to the first
score. Last, predict.py judges a folder of JPEGs of one megapixel, all of it in time: start, decoding, scoring.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image

import config
import export_onnx
from benchmarks.common import RESULTS, Row, plot_bars, print_table, write_csv
from models.conformal import conformal_threshold
from utils.console import command
from utils.data.dataset import batches, evenly, test_samples
from utils.metrics import auroc
from utils.pipeline.checkpoint import bank_path, build_net, load_checkpoint
from utils.pipeline.timing import describe_machine, describe_versions
from utils.settings import Settings, SettingsParser, positive

EXPORTS = {"ONNX": False, "ONNX, int8": True}  # whether the backbone is in 8 bits
THREADS = (1, 2)
RUNTIMES = {"torch": ("torch", "torchvision", "scipy", "pywavelets", "pillow"), "edge": ("onnxruntime", "pillow")}

WORKER = """
import json, sys, time, types
import numpy as np
path, engine, pixels, threads, born = sys.argv[1:]
if path.endswith(".onnx"):
    from pathlib import Path
    from utils.line.edge_model import OnnxModel
    model = OnnxModel(Path(path), int(threads))
else:
    import models.threads, torch, config
    from pathlib import Path
    from utils.line.torch_model import TorchModel
    torch.set_num_threads(int(threads))
    model = TorchModel(Path(path), types.SimpleNamespace(**vars(config) | {"ENGINE": engine, "DEVICE": "cpu"}))
images = np.load(pixels, mmap_mode="r")
model.predict(images[:1].copy())
cold = time.time() - float(born)
seconds, scores = [], []
for image in images:
    one = image[None].copy()
    start = time.perf_counter()
    scores.append(float(model.predict(one)[0][0]))
    seconds.append(time.perf_counter() - start)
# Not getrusage: that begins with the parent's peak.
rss = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024 / 1e6
print(json.dumps({"cold": cold, "rss": rss, "seconds": seconds, "scores": scores}))
"""


def installed_mb(packages: Sequence[str]) -> float:
    """Megabytes on the disk of packages and all that they require."""
    found: dict[str, float] = {}
    queue = list(packages)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in found:
            continue
        package = importlib.metadata.distribution(name)
        located = [Path(str(package.locate_file(file))) for file in package.files or []]
        found[name] = sum(path.stat().st_size for path in located if path.is_file()) / 1e6
        requirements = [Requirement(text) for text in package.requires or []]
        queue += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sum(found.values())


def run(path: Path, engine: str, pixels: Path, threads: int) -> dict:
    """What the worker measures, in a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    arguments = [sys.executable, "-c", WORKER, path, engine, pixels, str(threads), str(time.time())]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=RESULTS.parents[1])
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout)


def measure(settings: Settings, ratio: float, limit: int | None) -> list[Row]:
    """One row for each way to run the bank of one ratio and each number of threads."""
    category = settings.category
    samples = test_samples(settings, category)
    if limit is not None:
        samples = evenly(samples, limit)
    labels = np.array([sample.label for sample in samples])
    checkpoint = bank_path(settings.save_dir, category, ratio)
    calibration = load_checkpoint(checkpoint).calibration_scores.numpy()
    threshold = conformal_threshold(calibration, settings.false_alarm_rate)
    net = build_net(settings)
    ways = {"PyTorch": (checkpoint, "torch"), "PyTorch, backbone in onnxruntime": (checkpoint, "onnxruntime")}
    for name, int8 in EXPORTS.items():
        path = export_onnx.export_detector(settings, category, ratio, net, int8)
        ways[name] = (path, "")
    sizes = {runtime: installed_mb(packages) for runtime, packages in RUNTIMES.items()}

    rows, reference = [], None
    with tempfile.TemporaryDirectory() as folder:
        pixels = Path(folder, "pixels.npy")
        images = torch.cat([batch.images for batch in batches(samples, settings)])
        np.save(pixels, (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        for threads in THREADS:
            for name, (path, engine) in ways.items():
                measured = run(path, engine, pixels, threads)
                scores = np.array(measured["scores"])
                reference = scores if reference is None else reference
                milliseconds = np.array(measured["seconds"]) * 1e3
                rows.append(
                    {
                        "category": category,
                        "ratio": ratio,
                        "way": name,
                        "threads": threads,
                        "model_mb": path.stat().st_size / 1e6,
                        "runtime_mb": sizes["edge" if path.suffix == ".onnx" else "torch"],
                        "cold_start_s": measured["cold"],
                        "p50_ms": float(np.percentile(milliseconds, 50)),
                        "p95_ms": float(np.percentile(milliseconds, 95)),
                        "peak_rss_mb": measured["rss"],
                        "image_auroc": auroc(labels, scores),
                        "score_difference": float(np.abs(scores / reference - 1).max()),
                        "verdict_flips": int(((scores > threshold) != (reference > threshold)).sum()),
                        "images": len(samples),
                    }
                )
    return rows


def folder_speed(settings: Settings, ratio: float, files: int) -> float:
    """Images a second of predict.py on so many JPEGs of one megapixel: test pictures, enlarged, again and again."""
    model = bank_path(settings.save_dir, settings.category, ratio).with_suffix(".onnx").resolve()
    with tempfile.TemporaryDirectory() as folder:
        samples = evenly(test_samples(settings, settings.category), min(25, files))
        for number, sample in enumerate(samples):
            picture = Image.open(sample.path).convert("RGB")
            factor = (1e6 / (picture.width * picture.height)) ** 0.5
            size = (round(picture.width * factor), round(picture.height * factor))
            first = Path(folder, f"{number}.jpg")
            picture.resize(size, Image.Resampling.BICUBIC).save(first, quality=90)
            for copy in range(number + len(samples), files, len(samples)):
                shutil.copy(first, Path(folder, f"{copy}.jpg"))
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "predict.py", model, folder], cwd=RESULTS.parents[1], check=True, stdout=subprocess.DEVNULL
        )
        return files / (time.perf_counter() - start)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--images", type=positive, metavar="N", help="this many test images, spread over all")
    parser.add_argument("--files", type=positive, default=1000, help="JPEGs for predict.py (now: 1000)")
    settings, options = parser.read([*(sys.argv[1:] if argv is None else argv), "--device", "cpu"])
    print(describe_machine())
    print(describe_versions("torch", "onnxruntime"))
    rows = [row for ratio in settings.sampling_ratio for row in measure(settings, ratio, options.images)]
    print_table(rows)
    write_csv(RESULTS / "edge.csv", rows)
    for ratio in settings.sampling_ratio:
        speed = folder_speed(settings, ratio, options.files)
        alone = 1e3 / min(row["p50_ms"] for row in rows if (row["ratio"], row["way"]) == (ratio, "ONNX"))
        print(
            f"predict.py, {ratio:g} of the patches, {options.files} JPEGs of 1 megapixel: {speed:.1f} images/s, "
            f"{speed / alone:.0%} of the whole-image speed"
        )
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        label = f"{row['ratio'] * 100:g} % bank, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        bars.setdefault(label, {})[row["way"]] = row["p50_ms"]
    plot_bars(RESULTS / "edge.png", f"One image of {settings.category}, {settings.backbone}", "milliseconds", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
