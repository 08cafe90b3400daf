"""Export trained detectors: one self-contained .onnx file each, which gives the same answers without torch.

    python export_onnx.py
    python export_onnx.py --int8

Writes SAVE_DIR/10pct/model_data_tile_10pct.onnx beside the checkpoint (ONNX opset 18): input ``image`` (N, H, W, 3)
uint8 RGB, outputs ``score`` (N,) and ``anomaly_map`` (N, H, W), and with FORM = 'wedge' also ``condition`` (N,) and
``unfamiliar`` (N,); threshold, calibration scores and settings are in the model's metadata. Before a file is kept it is
compared with PyTorch on the test images. --int8 quarters the backbone, and the file's name ends in _int8.
SAVE_DIR/predict.pyz is predict.py in one file, for a device that has no more than requirements-edge.txt. Settings are
in config.py.
"""

import dataclasses
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import models.threads  # noqa: F401 - before torch

import numpy as np
import onnx
import onnxruntime
import torch

import config
from models.detector import Detector
from models.errors import InputError
from models.onnx_detector import detector_graph
from models.onnx_graph import OPSET
from models.wedge_net import WedgeNet
from utils.atomic import atomic_file
from utils.console import command, for_each, progress
from utils.data.dataset import Sample, batches, evenly, find_categories, test_samples, train_samples
from utils.line.edge_model import KEY, OnnxModel, model_info
from utils.line.edge_program import write_program
from utils.metrics import auroc
from utils.pipeline.checkpoint import Checkpoint, bank_path, build_net, load_detector
from utils.pipeline.inference import at_depth_of
from utils.settings import Settings, SettingsParser

CALIBRATION_IMAGES = 64  # training images that set the ranges of an 8-bit backbone
TOLERANCE = 1e-4  # relative, of a float32 model's scores


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export every category and ratio that the settings ask for; returns the exit code."""
    parser = SettingsParser(config, __doc__)
    parser.add_argument("--int8", action="store_true", help="backbone in 8 bits, ranges from the training images")
    settings, options = parser.read(argv)
    # Torch runs what the models are compared with.
    settings = dataclasses.replace(settings, device=torch.device("cpu"), engine="torch", precision="float32")
    net = build_net(settings)

    def export(category: str) -> None:
        for ratio in settings.sampling_ratio:
            export_detector(settings, category, ratio, net, options.int8)

    code = for_each(find_categories(settings), export)
    program = settings.save_dir / "predict.pyz"
    write_program(program)
    print(f"{program}: predict.py in one file; with it, a model and requirements-edge.txt a device needs no more")
    return code


def export_detector(settings: Settings, category: str, ratio: float, net: WedgeNet, int8: bool) -> Path:
    """Write one model, after a comparison with PyTorch; returns its path."""
    detector, checkpoint = load_detector(settings, category, ratio, net)
    settings = at_depth_of([detector], settings)
    path = bank_path(settings.save_dir, category, ratio)
    path = path.with_name(f"{path.stem}{'_int8' * int8}.onnx")
    int8_images = calibration_images(settings, category) if int8 else None
    samples = comparison_samples(settings, category)
    write_model(path, category, detector, checkpoint, settings, samples, int8_images)
    return path


def write_model(
    path: Path,
    category: str,
    detector: Detector,
    checkpoint: Checkpoint,
    settings: Settings,
    samples: Sequence[Sample],
    int8_images: Iterator[np.ndarray] | None = None,
    mirrored: bool = False,
) -> None:
    """Write a detector as ONNX, after a comparison with PyTorch on ``samples``; ``int8_images`` make 8 bits of it.

    Of samples that the memory holds itself, distances are mostly rounding: they are to be compared ``mirrored``.
    """
    int8 = int8_images is not None
    graph = detector_graph(detector, int8_images)
    info = model_info(
        category,
        checkpoint.calibration_scores.numpy(),
        settings.false_alarm_rate,
        checkpoint.settings,
        checkpoint.fingerprint,
        {module.__name__: module.__version__ for module in (torch, onnx, onnxruntime, np)}
        | {"python": platform.python_version()},
        detector.inside,
    )
    onnx.helper.set_model_props(graph, {KEY: info.to_json()})
    with atomic_file(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())
        compared = compare(detector, OnnxModel(temporary), samples, settings, category, mirrored)
        print(f"[{category}] {path}: {temporary.stat().st_size / 1e6:.2f} MB, opset {OPSET}\n    {compared}")
        if not int8 and compared.score_difference > TOLERANCE:
            raise RuntimeError(
                f"{path} is not kept: its scores differ from PyTorch's, which is a fault of this program"
            )


def calibration_images(settings: Settings, category: str) -> Iterator[np.ndarray]:
    """Training images spread over the whole set, (1, 3, H, W) float32 in [0, 1]."""
    samples = evenly(train_samples(settings, category), CALIBRATION_IMAGES)
    for batch in batches(samples, settings):
        yield from batch.images.numpy()[:, None]


def comparison_samples(settings: Settings, category: str) -> list[Sample]:
    """The test images, or where there are none as many training images as say enough."""
    try:
        return test_samples(settings, category)
    except InputError:
        return evenly(train_samples(settings, category), CALIBRATION_IMAGES)


class Comparison(NamedTuple):
    """An exported model beside PyTorch: largest differences, image AUROC of both (None if undefined), verdict flips."""

    images: int
    score_difference: float  # relative
    map_difference: float
    auroc: float | None
    torch_auroc: float | None
    flips: int

    def __str__(self) -> str:
        ranking = "" if self.auroc is None else f", image AUROC {self.auroc:.4f} (PyTorch {self.torch_auroc:.4f})"
        return (
            f"beside PyTorch on {self.images} images: scores differ by {self.score_difference:.1e} of their value at "
            f"most, maps by {self.map_difference:.1e}{ranking}, verdict flips {self.flips}"
        )


def compare(
    detector: Detector,
    model: OnnxModel,
    samples: Sequence[Sample],
    settings: Settings,
    category: str,
    mirrored: bool = False,
) -> Comparison:
    """Run both on the same pixels, one image at a time, or on their mirror image."""
    scores, map_difference = [], 0.0
    with torch.inference_mode():
        for batch in progress(batches(samples, settings), f"{category}: comparison"):
            for image in batch.images.flip(3) if mirrored else batch.images:
                expected = detector.predict_embedding(detector.net.look(image[None]))
                pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0)[None].contiguous().numpy()
                judged = model.predict(pixels)
                scores.append((judged.scores[0], expected.scores.item()))
                map_difference = max(map_difference, float(np.abs(judged.maps - expected.maps.numpy()).max()))
    found, wanted = np.array(scores, dtype=np.float64).T
    labels = np.array([sample.label for sample in samples])
    flips = ((found > model.info.threshold) != (wanted > model.info.threshold)).sum()
    # Rounding acts on squared distances, whose root magnifies it near zero: where a patch is in the memory itself. So
    # squares are compared, on the scale of a good part's at least; of all other scores that is the relative difference.
    # Good parts that are all one picture have nothing but rounding for scores: a tenth of what patches measure counts.
    lengths = [bank.vectors.float().square().sum(dim=1).mean().sqrt() for bank in detector.banks]
    measure = sum(float(unit * length) for unit, length in zip(detector.scales[0], lengths, strict=True))
    usual = max(np.median(model.info.calibration_scores), measure / 10)
    squares = np.abs(found - wanted) * (np.abs(found) + np.abs(wanted))
    difference = float((squares / (2 * np.maximum(wanted**2, usual**2))).max())
    return Comparison(len(samples), difference, map_difference, auroc(labels, found), auroc(labels, wanted), int(flips))


if __name__ == "__main__":
    sys.exit(main())
