"""The whole detector as one ONNX graph: from pixels to score and anomaly map, written node by node.

The graph is what a CPU runs, in memory as in an exported file. ``models.detector`` has the same in PyTorch, for
training, GPUs and the tests. What differs is the search: one product for each tile of the bank, with the squared
lengths of its vectors folded in.
"""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

from models.condition import STATISTICS
from models.detector import Detector
from models.errors import InputError
from models.onnx_embedding import write_embedding
from models.onnx_graph import Writer, model_of, trunk_graph
from models.scoring import LEAST_BACKGROUND, Prediction, quarter
from models.whitening import ConditionMaps

TILE = 384  # bank vectors in one product: with one image's 784 patches 1.2 MB, which stays in a core's cache
FLOAT_LAYERS = 6  # convolutions that an 8-bit backbone keeps in float32: all later ones amplify what they round off
AT_ONCE = 2  # images: the intermediate results of more do not fit the caches
READING = ("condition", "unfamiliar", "statistics")  # outputs
LARGEST = 2**31 - 2**20  # bytes that one protobuf file can hold, with room for the graph itself


def detector_graph(detector: Detector, int8_images: Iterable[np.ndarray] | None = None) -> onnx.ModelProto:
    """One checked ONNX model of a detector on the CPU, for a file.

    Input ``image`` (N, H, W, 3) uint8 RGB; outputs ``score`` (N,) and ``anomaly_map`` (N, H, W), N open; with a
    frequency stream also ``condition`` (N,) int64 and ``unfamiliar`` (N,) bool.

    Args:
        int8_images: (1, 3, H, W) float32 in [0, 1], good images on which the ranges of an 8-bit backbone are measured;
            None leaves it in float32.

    Raises:
        InputError: the bank is too large for one file.
    """
    size = sum(bank.vectors.nbytes for bank in detector.banks)
    if size > LARGEST:
        raise InputError(
            f"a bank of {size / 1e9:.1f} GB does not fit in one ONNX file (2 GB): use a smaller SAMPLING_RATIO"
        )
    image_size = detector.image_size
    backbone = detector.net.backbone.backbone
    trunk = trunk_graph(backbone, image_size)
    if int8_images is not None:
        mean, std = backbone.mean.numpy(), backbone.std.numpy()
        trunk = _quantised(trunk, ((image - mean) / std for image in int8_images))
    write = Writer()
    planes = write("Cast", write("Transpose", "image", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    written = _write(write, [detector], trunk, write("Div", planes, 255.0), image_size)
    pixels = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *image_size, 3])
    whole = _model(write, pixels, {name: value for name, value in written.items() if name != "statistics"}, image_size)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def memory_graph(detectors: Sequence[Detector], trunk: onnx.GraphProto) -> onnx.ModelProto:
    """One ONNX model of detectors that share a network, whose backbone's trunk is given as a graph.

    Input ``images`` (N, 3, H, W) float32 in [0, 1]; outputs as a file's, named ``score1`` and ``anomaly_map1`` from the
    second detector on; with a frequency stream also ``statistics`` (N, S).
    """
    write = Writer()
    image_size = detectors[0].image_size
    written = _write(write, detectors, trunk, "images", image_size)
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, *image_size])
    return _model(write, images, written, image_size)


def _write(
    write: Writer, detectors: Sequence[Detector], trunk: onnx.GraphProto, images: str, image_size: tuple[int, int]
) -> dict[str, str]:
    """From ``images`` (N, 3, H, W) in [0, 1] to what a model may give, by its name there."""
    net = detectors[0].net
    embedded = write_embedding(write, net, trunk, images, image_size)
    metrics = getattr(net, "maps", None) or [None] * len(embedded.features)
    scales = [
        in_metric(write, metric, features, bank.vectors, embedded.condition)
        for metric, features, bank in zip(metrics, embedded.features, detectors[0].banks, strict=True)
    ]
    found = {}
    for number, detector in enumerate(detectors):
        distances = [nearest(write, scale, bank.vectors) for scale, bank in zip(scales, detector.banks, strict=True)]
        score, anomaly_map = _judge(write, detector, distances, embedded.condition)
        found |= {f"score{number or ''}": score, f"anomaly_map{number or ''}": anomaly_map}
    return found | {name: value for name, value in zip(READING, embedded[1:], strict=True) if value is not None}


def _model(
    write: Writer, entry: onnx.ValueInfoProto, outputs: dict[str, str], image_size: tuple[int, int]
) -> onnx.ModelProto:
    """The model with this input, and outputs made of the values that go with their names."""
    types = {"condition": TensorProto.INT64, "unfamiliar": TensorProto.BOOL}
    shapes = {"anomaly_map": list(image_size), "statistics": [STATISTICS]}
    ends = {}
    for name, value in outputs.items():
        kind = name.rstrip("0123456789")
        shape = ["batch", *shapes.get(kind, [])]
        ends[value] = helper.make_tensor_value_info(name, types.get(kind, TensorProto.FLOAT), shape)
    return write.model(entry, ends)


class OnePiece:
    """Detectors of one network on the CPU as one graph, run by the network's engine.

    Args:
        detectors: at least one; they share a network and the size of images.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        engine, size = detectors[0].net.backbone, detectors[0].image_size
        self.session = engine.session(memory_graph(detectors, engine.trunk(size)))
        self.names = [output.name for output in self.session.get_outputs()]
        self.count = len(detectors)

    def __call__(self, images: Tensor) -> list[Prediction]:
        """(B, 3, H, W) images in [0, 1] -> what each detector makes of them.

        Raises :class:`InputError` if a score is not finite.
        """
        images = images.detach().to("cpu", torch.float32).contiguous()
        # numpy() and from_numpy() share memory with torch: nothing is copied on the way.
        parts = [self.session.run(None, {"images": part.numpy()}) for part in images.split(AT_ONCE)]
        whole = [torch.from_numpy(own[0] if len(own) == 1 else np.concatenate(own)) for own in zip(*parts, strict=True)]
        found = dict(zip(self.names, whole, strict=True))
        reading = [found.get(name) for name in READING]
        predictions = [
            Prediction(found[f"score{number or ''}"], found[f"anomaly_map{number or ''}"], *reading)
            for number in range(self.count)
        ]
        if not all(prediction.scores.isfinite().all() for prediction in predictions):
            raise InputError("a score is not finite: check the image that it comes from, and the backbone's weights")
        return predictions


class Queries(NamedTuple):
    """Names of patches (N * P, K + 1), each around ``centre`` (K,) and with a 1 behind, and of their squared
    lengths, that 1 included."""

    patches: str
    squared: str
    centre: Tensor


def in_metric(
    write: Writer, metric: ConditionMaps | None, features: str, vectors: Tensor, condition: str | None
) -> Queries:
    """A scale's features (N, P, D) through metric and lens, if there are any."""
    # |q - b|^2 = |q|^2 + |b|^2 - 2 q.b is taken around a bank's mean, which keeps rounding small beside distances.
    centre = vectors.mean(dim=0, dtype=torch.float32).cpu()
    if metric is not None:
        matrices = F.pad(metric.matrices.cpu(), (0, 1))
        offsets = F.pad(metric.offsets.cpu() - centre, (0, 1), value=1.0)
        chosen = [matrices[0], offsets[0]]
        if condition is not None and len(matrices) > 1:
            chosen = [write("Gather", each, condition) for each in (matrices, offsets)]
        patches = write("Add", write("MatMul", features, chosen[0]), chosen[1])
    else:
        patches = write("Pad", write("Sub", features, centre), [0, 0, 0, 0, 0, 1], 1.0)
    patches = write("Reshape", patches, [-1, len(centre) + 1])
    return Queries(patches, write("ReduceSumSquare", patches, [1], keepdims=0), centre)


def nearest(write: Writer, queries: Queries, vectors: Tensor) -> str:
    """Distances (N * P,) to the nearest of (M, K) vectors."""
    # The greatest of 2 q.b - |b|^2 + 1 belongs to the nearest. With a column for the last two, one product gives it.
    table = write("Sub", write("Cast", vectors, to=TensorProto.FLOAT), queries.centre)
    lengths = (vectors.cpu().float() - queries.centre).square().sum(dim=1, keepdim=True)
    table = write("Transpose", write("Concat", write("Mul", table, 2.0), 1 - lengths, axis=1), perm=[1, 0])
    counts = [min(TILE, len(vectors) - start) for start in range(0, len(vectors), TILE)]
    # All up to here is done once, when a model is loaded.
    tiles = write.several("Split", len(counts), table, counts, axis=1)
    best = [write("ReduceMax", write("MatMul", queries.patches, tile), [1], keepdims=0) for tile in tiles]
    least = write("Sub", queries.squared, write("Max", *best))
    return write("Sqrt", write("Abs", least))  # not Relu, which may hide NaN


def _judge(write: Writer, detector: Detector, distances: Sequence[str], condition: str | None) -> tuple[str, str]:
    """``models.detector.combine``: the distances of each scale -> score (N,) and anomaly map (N, H, W)."""

    def chosen(values: Tensor) -> Tensor | str:
        values = values[:, None]
        return values[0] if condition is None or len(values) == 1 else write("Gather", values, condition)

    scaled, maps = [], detector.anomaly_maps
    for scale, (own, each) in enumerate(zip(distances, maps, strict=True)):
        patches = detector.net.patches(detector.image_size, scale)
        own = write("Mul", write("Reshape", own, [-1, patches]), chosen(detector.scales[:, scale]))
        if each.scoring.background:  # ``models.scoring.less_background``
            lowest, _ = write.several("TopK", 2, own, [quarter(patches)], axis=1, largest=0, sorted=0)
            lowest = write("Max", write("ReduceMax", lowest, [1], keepdims=1), LEAST_BACKGROUND)
            own = write("Sub", own, write("Mul", lowest, each.scoring.background))
        if scale == 0:
            own = write("Add", own, chosen(detector.offsets))
        if each.places is not None:
            own = write("Gather", write("Pad", own, [0, 0, 0, 1]), each.places, axis=1)
        scaled.append(write("Reshape", own, [-1, *each.grid]))
    # A map is rows @ distances @ columns.T. All scales' right-hand products come first, then one product adds them up.
    wide = [write("MatMul", own, each.columns.T) for own, each in zip(scaled, maps, strict=True)]
    if maps[0].weights is None:
        rows = torch.cat([each.rows for each in maps], dim=1)
        anomaly_map = write("MatMul", rows, write("Concat", *wide, axis=1))
    else:
        parts = [
            write("Mul", write("MatMul", each.rows, own), each.weights) for own, each in zip(wide, maps, strict=True)
        ]
        anomaly_map = parts[0] if len(parts) == 1 else write("Sum", *parts)
    smoothed = maps[0].scoring.smoothed
    return write("ReduceMax", anomaly_map if smoothed else scaled[0], [1, 2], keepdims=0), anomaly_map


def _quantised(trunk: onnx.GraphProto, images: Iterable[np.ndarray]) -> onnx.GraphProto:
    """The trunk in 8 bits: weights by channel, activations by the ranges that they take on normalised ``images``."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {trunk.input[0].name: image}

    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        onnx.save(model_of(trunk), plain)
        quant_pre_process(
            plain, plain, skip_symbolic_shape=True
        )  # without shapes, parts are rounded that should not be
        network = onnx.load(plain)
        for node in network.graph.node:
            node.name = node.output[0]
        onnx.save(network, plain)
        quantize_static(
            plain,
            small,
            Reader(),
            nodes_to_exclude=[node.name for node in network.graph.node if node.op_type == "Conv"][:FLOAT_LAYERS],
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # 7 bits: older processors add up pairs of products in 16 bits, which would overflow
        )
        return onnx.load(small).graph
