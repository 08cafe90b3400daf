"""Is our PatchCore baseline PatchCore? Scores and maps beside those of anomalib, whose network gets the same weights.

    python -m benchmarks.patchcore_parity

Needs anomalib (compared with 2.7.0; exit code 2 without it). Exit code 1 if a difference is above the tolerance.
"""

import importlib.util
import sys
import warnings

import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import Row, describe_machine, describe_versions, print_table
from benchmarks.inference import load
from models.backbone import Backbone
from models.coreset import greedy_coreset
from models.detector import Detector
from models.memory_bank import MemoryBank
from models.patchcore import PatchCore
from utils.image import Geometry
from utils.sample_data import render_image

NETWORKS = {  # ours: timm's name and its names of layers 2 and 3
    "efficientnet_lite0": ("tf_efficientnet_lite0", ("blocks.2", "blocks.4")),
    "resnet18": ("resnet18", ("layer2", "layer3")),
    "wide_resnet50_2": ("wide_resnet50_2", ("layer2", "layer3")),
}
SIZES = (224, 100)  # a multiple of both strides and a multiple of neither
TOLERANCE = 1e-3  # relative


def sample(split: str, count: int, size: int) -> Tensor:
    """(count, 3, size, size) images of the rendered tile, in [0, 1]."""
    images = (Image.fromarray(render_image("tile", split, index).image) for index in range(count))
    pixels = [torch.from_numpy(Geometry(size, size, True).apply(image)) for image in images]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 255


def build_peer(backbone: Backbone, bank: Tensor) -> torch.nn.Module:
    """anomalib's PatchcoreModel with timm's network, our weights in it, and our bank."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    name, layers = NETWORKS[backbone.name]
    peer = PatchcoreModel(layers, name, pre_trained=False, num_neighbors=1).eval()
    network = peer.feature_extractor.feature_extractor
    # Two names for each tensor but one order; timm keeps some layers after the last that is used.
    state = dict(zip(network.state_dict(), backbone.state_dict().values(), strict=False))
    network.load_state_dict(state, strict=False)
    peer.memory_bank = bank
    return peer


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative, element by element."""
    return ((found - expected).abs() / expected.abs()).max().item()


@torch.inference_mode()
def compare(name: str, size: int) -> list[Row]:
    """One row for each kind of image; the bank is a tenth of the patches of good parts."""
    backbone, weights = load(name)
    net = PatchCore(backbone)
    patches = net.embed(sample("train/good", 8, size)).features.flatten(0, 1)
    bank = patches[greedy_coreset(patches, len(patches) // 10)]
    detector = Detector(net, [MemoryBank(bank)], size)
    peer = build_peer(backbone, bank)
    kinds = {
        "good": sample("test/good", 4, size),
        "defective": sample("test/crack", 4, size),
        "random": torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)),
    }
    rows = []
    for kind, images in kinds.items():
        ours = detector.predict(images)
        theirs = peer((images - backbone.mean) / backbone.std)
        row = {"backbone": name, "weights": weights, "pixels": size, "images": kind, "score": ours.scores.max().item()}
        row["score_difference"] = largest_difference(ours.scores, theirs.pred_score)
        row["map_difference"] = largest_difference(ours.maps, theirs.anomaly_map[:, 0])
        rows.append(row)
    return rows


def main() -> int:
    """Compare and print; the exit code."""
    if importlib.util.find_spec("anomalib") is None:
        print("install anomalib to run this: pip install anomalib==2.7.0", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # anomalib's own
    print("PatchCore, one neighbour: differences from anomalib, relative to its figures")
    print(describe_machine())
    print(describe_versions("anomalib", "torch", "timm"))
    rows = [row for name in NETWORKS for size in SIZES for row in compare(name, size)]
    print_table(rows)
    largest = max(row[figure] for row in rows for figure in ("score_difference", "map_difference"))
    print(f"largest difference {largest:.2g}, tolerance {TOLERANCE:g}")
    return int(largest > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
