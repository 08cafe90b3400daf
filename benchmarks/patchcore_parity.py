"""Is our PatchCore baseline PatchCore? Scores and maps beside those of anomalib, whose network gets the same weights.

    python -m benchmarks.patchcore_parity

Needs anomalib (compared with 2.7.0; exit code 2 without it). Exit code 1 if a difference is above the tolerance.
"""

import importlib.util
import sys

import torch
from PIL import Image
from torch import Tensor

from benchmarks.anomalib_models import Verdict, build_patchcore
from benchmarks.common import Row, describe_machine, describe_versions, print_table
from benchmarks.inference import load
from models.coreset import greedy_coreset
from models.detector import Detector
from models.memory_bank import MemoryBank
from models.patchcore import PatchCore
from utils.data.image import Geometry
from utils.data.sample_data import render_image
from utils.size import Size

NAMES = ("efficientnet_lite0", "resnet18", "wide_resnet50_2")
SIZES = (224, 100)  # a multiple of both strides and a multiple of neither
TOLERANCE = 1e-3  # relative


def sample(split: str, count: int, size: int) -> Tensor:
    """(count, 3, size, size) images of the rendered tile, in [0, 1]."""
    images = (Image.fromarray(render_image("tile", split, index).image) for index in range(count))
    pixels = [torch.from_numpy(Geometry(Size(size, size), size, True).apply(image)) for image in images]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 255


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative, element by element."""
    return ((found - expected).abs() / expected.abs()).max().item()


@torch.inference_mode()
def compare(name: str, size: int) -> list[Row]:
    """One row for each kind of image; the bank is a tenth of the patches of good parts."""
    backbone, weights = load(name)
    net = PatchCore(backbone)
    patches = net.embed(sample("train/good", 8, size))[0].flatten(0, 1)
    bank = patches[greedy_coreset(patches, len(patches) // 10)]
    detector = Detector(net, [MemoryBank(bank)], (size, size))
    peer = Verdict(build_patchcore(backbone, bank), backbone)
    kinds = {
        "good": sample("test/good", 4, size),
        "defective": sample("test/crack", 4, size),
        "random": torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)),
    }
    rows = []
    for kind, images in kinds.items():
        ours = detector.predict(images)
        scores, maps = peer(images)
        row = {"backbone": name, "weights": weights, "pixels": size, "images": kind, "score": ours.scores.max().item()}
        row["score_difference"] = largest_difference(ours.scores, scores)
        row["map_difference"] = largest_difference(ours.maps, maps)
        rows.append(row)
    return rows


def main() -> int:
    """Compare and print; the exit code."""
    if importlib.util.find_spec("anomalib") is None:
        print("install anomalib to run this: pip install anomalib==2.7.0", file=sys.stderr)
        return 2
    print("PatchCore, one neighbour: differences from anomalib, relative to its figures")
    print(describe_machine())
    print(describe_versions("anomalib", "torch", "timm"))
    rows = [row for name in NAMES for size in SIZES for row in compare(name, size)]
    print_table(rows)
    largest = max(row[figure] for row in rows for figure in ("score_difference", "map_difference"))
    print(f"largest difference {largest:.2g}, tolerance {TOLERANCE:g}")
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
