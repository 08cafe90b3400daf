"""The whole detector as one ONNX graph: from the pixels that a camera gives to score and anomaly map.

The backbone is written by ``models.onnx_graph``; all that follows it is exported from the very modules that PyTorch
runs, so that there is no second implementation to keep in step. Only the search differs: plain tiles of the bank, which
every runtime can do.
"""

import copy
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper
from torch import Tensor, nn

from models.backbone import Backbone
from models.detector import Detector, combine
from models.errors import InputError
from models.onnx_graph import IR_VERSION, OPSET, exported_graph, onnx_graph
from models.tracing import fold_batch_norms
from models.wedge_net import WedgeNet

TILE = 2048  # bank vectors compared at a time: 6 MB for one image's 784 patches, whatever the bank
FLOAT_LAYERS = 6  # convolutions that an 8-bit backbone keeps in float32: all later ones amplify what they round off
LARGEST = 2**31 - 2**20  # bytes that one protobuf file can hold, with room for the graph itself


class BankSearch(nn.Module):
    """Distance from each patch to the nearest vector of a bank, one tile of the bank after the other.

    |q - b|^2 = |q|^2 + |b|^2 - 2 q.b is taken around the bank's mean, which keeps rounding small beside distances.

    Args:
        bank: (M, D), float32 or float16, kept as it is; the arithmetic is float32.
    """

    def __init__(self, bank: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", bank.mean(dim=0, dtype=torch.float32))
        for number, tile in enumerate(bank.split(TILE)):
            self.register_buffer(f"tile{number}", tile.T.contiguous())
            self.register_buffer(f"norms{number}", (tile.float() - self.centre).square().sum(dim=1))
        self.tiles = number + 1

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, D) patch features -> (B, P) distances."""
        queries = features.flatten(0, 1) - self.centre  # one large product instead of one for each image
        doubled, best = queries * -2, None
        for number in range(self.tiles):
            tile = self.get_buffer(f"tile{number}").float() - self.centre[:, None]
            least = torch.addmm(self.get_buffer(f"norms{number}"), doubled, tile).amin(dim=1)
            best = least if best is None else torch.minimum(best, least)
        squared = best + queries.square().sum(dim=1)
        return squared.clamp_min(0).sqrt().view(features.shape[:2])


class _Head(nn.Module):
    """What follows the backbone: features, metric, search, map and score."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.net = detector.net
        self.searches = nn.ModuleList(BankSearch(bank.vectors) for bank in detector.banks)
        self.anomaly_maps = nn.ModuleList(detector.anomaly_maps)
        self.register_buffer("scales", detector.scales)
        self.register_buffer("offsets", detector.offsets)

    def forward(
        self, images: Tensor, layer2: Tensor, layer3: Tensor, conditions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features = self.net.combine(images, layer2, layer3, conditions)
        distances = [search(scale) for search, scale in zip(self.searches, features, strict=True)]
        return combine(distances, self.scales, self.offsets, self.anomaly_maps, conditions)


class _Front(nn.Module):
    """What comes before the backbone: the region of interest, the light aligned, and the condition."""

    def __init__(self, net: WedgeNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images, reading = self.net.prepare(images)
        return (images,) if reading is None else (images, reading.conditions, reading.unfamiliar)


def detector_graph(
    detector: Detector,
    backbone: Backbone,
    image_size: tuple[int, int],
    *,
    int8_images: Iterable[np.ndarray] | None = None,
) -> onnx.ModelProto:
    """One checked ONNX model of a detector on the CPU.

    Input ``image`` (N, H, W, 3) uint8 RGB; outputs ``score`` (N,) and ``anomaly_map`` (N, H, W), N open; with several
    conditions also ``condition`` (N,) int64 and ``unfamiliar`` (N,) bool.

    Args:
        backbone: the one that the detector's embedding was built with.
        image_size: H and W.
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
    network = onnx_graph(fold_batch_norms(copy.deepcopy(backbone)), image_size)
    network = network.graph if int8_images is None else _quantised(network, int8_images)
    example = torch.zeros(2, 3, *image_size)
    layers = [output.name for output in network.output]
    graph, images, chosen = _pixels(image_size), "images", []
    inputs = {"images": example, **dict(zip(("layer2", "layer3"), backbone(example), strict=True))}
    if detector.net.stream is not None:
        chosen = ["condition", "unfamiliar"]
        inputs["condition"] = torch.zeros(len(example), dtype=torch.int64)
    if detector.net.stream is not None or detector.net.region is not None:
        front = exported_graph(_Front(detector.net), "front", {"images": example}, ["prepared", *chosen])
        graph, images = _merge(graph, front, {"images": "images"}), "prepared"
    graph = _merge(graph, network, {images: "images"}, keep=[images, *chosen])
    head = exported_graph(_Head(detector), "head", inputs, ["score", "anomaly_map"])
    links = dict(zip([images, *layers, *chosen[:1]], inputs, strict=True))
    graph = _merge(graph, head, links, keep=chosen)
    outputs = {output.name: output for output in graph.output}
    del graph.output[:]
    graph.output.extend(outputs[name] for name in ["score", "anomaly_map", *chosen])
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _pixels(image_size: tuple[int, int]) -> onnx.GraphProto:
    """uint8 (N, H, W, 3) ``image`` -> float32 (N, 3, H, W) ``images`` in [0, 1]."""
    shape = ["batch", *image_size, 3]
    nodes = [
        helper.make_node("Transpose", ["image"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["bytes", "white"], ["images"]),
    ]
    return helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, None)],
        [helper.make_tensor("white", TensorProto.FLOAT, [], [255.0])],
    )


def _merge(
    first: onnx.GraphProto, second: onnx.GraphProto, links: dict[str, str], keep: Sequence[str] = ()
) -> onnx.GraphProto:
    """Feed outputs of ``first`` to the inputs of ``second`` that ``links`` names; ``keep`` stay outputs as well.

    Names inside ``second`` are prefixed by its own name, those of its outputs are not.
    """
    outputs = [*keep, *(output.name for output in second.output)]
    prefix = second.name + "/"
    second = compose.add_prefix_graph(second, prefix, rename_outputs=False)
    return compose.merge_graphs(
        first, second, io_map=[(one, prefix + other) for one, other in links.items()], outputs=outputs
    )


def _quantised(network: onnx.ModelProto, images: Iterable[np.ndarray]) -> onnx.GraphProto:
    """The backbone in 8 bits: weights by channel, activations by the ranges that they take on ``images``."""
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
            return None if image is None else {"images": image}

    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        onnx.save(network, plain)
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
