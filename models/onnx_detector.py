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
from models.condition import ConditionStream
from models.detector import Detector
from models.errors import InputError
from models.onnx_graph import IR_VERSION, OPSET, exported_graph, onnx_graph
from models.tracing import fold_batch_norms

TILE = 2048  # bank vectors compared at a time: 6 MB for one image's 784 patches, whatever the bank
FLOAT_LAYERS = 6  # convolutions that an 8-bit backbone keeps in float32: all later ones amplify what they round off
LARGEST = 2**31 - 2**20  # bytes that one protobuf file can hold, with room for the graph itself


class BankSearch(nn.Module):
    """Distance from each patch to the nearest vector of a bank, one tile of the bank after the other.

    |q - b|^2 = |q|^2 + |b|^2 - 2 q.b is taken around the banks' mean, which keeps rounding small beside distances.
    Of several banks each image is searched in its own: banks of one size are picked out; of different sizes, all are
    searched in a row, and the vectors of other banks count as infinitely far away.

    Args:
        banks: K banks (M_k, D), float32 or float16, kept as they are; the arithmetic is float32.
    """

    def __init__(self, banks: Sequence[Tensor]) -> None:
        super().__init__()
        sizes = torch.tensor([len(bank) for bank in banks])
        self.in_a_row = bool((sizes != sizes[0]).any())
        vectors = torch.cat(list(banks))[None] if self.in_a_row else torch.stack(list(banks))
        self.register_buffer("centre", vectors.mean(dim=1, keepdim=True, dtype=torch.float32))
        if self.in_a_row:
            self.register_buffer("owner", torch.arange(len(banks)).repeat_interleave(sizes))
        for number, tile in enumerate(vectors.split(TILE, dim=1)):
            self.register_buffer(f"tile{number}", tile.transpose(1, 2).contiguous())
            self.register_buffer(f"norms{number}", (tile.float() - self.centre).square().sum(dim=2)[:, None])
        self.tiles = number + 1

    def forward(self, features: Tensor, conditions: Tensor | None = None) -> Tensor:
        """(B, P, D) patch features, and (B,) the bank of each image where there are several -> (B, P) distances."""
        shape, picked = features.shape[:2], None if self.in_a_row else conditions
        if conditions is None:
            features = features.flatten(0, 1)[None]  # one large product instead of one for each image

        def own(buffer: str) -> Tensor:
            return self.get_buffer(buffer) if picked is None else self.get_buffer(buffer)[picked]

        centre = own("centre")
        queries = features - centre
        doubled, centre = queries * -2, centre.transpose(1, 2)
        best = None
        for number in range(self.tiles):
            norms, tile = own(f"norms{number}"), own(f"tile{number}").float() - centre
            if self.in_a_row:
                owner = self.owner[number * TILE : (number + 1) * TILE]
                norms = norms.masked_fill(owner != conditions[:, None, None], torch.inf)
                products = doubled @ tile + norms
            else:
                products = torch.baddbmm(norms, doubled, tile)
            least = products.amin(dim=2)
            best = least if best is None else torch.minimum(best, least)
        squared = best + queries.square().sum(dim=2)
        return squared.clamp_min(0).sqrt().view(shape)


class _Head(nn.Module):
    """What follows the backbone: features, metric, search, map and score."""

    def __init__(self, detector: Detector, bank_dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.grid, self.anomaly_map = detector.net, detector.grid, detector.anomaly_map
        self.search = BankSearch([bank.vectors.to(bank_dtype) for bank in detector.banks])
        if self.net.whitening:
            self.register_buffer("mean", torch.stack([whitening.mean for whitening in self.net.whitening])[:, None])
            self.register_buffer("matrix", torch.stack([whitening.matrix for whitening in self.net.whitening]))
        self.register_buffer("scales", detector.scales)

    def forward(
        self, images: Tensor, layer2: Tensor, layer3: Tensor, conditions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features = self.net.combine(images, layer2, layer3)
        chosen = 0 if conditions is None else conditions
        if self.net.whitening:
            features = (features - self.mean[chosen]) @ self.matrix[chosen]
        distances = self.search(features, conditions)
        if conditions is not None:
            scale, offset = self.scales[conditions, :, None].unbind(dim=1)
            distances = distances * scale + offset
        return self.anomaly_map.predict(distances.unflatten(1, self.grid))[:2]


class _Stream(nn.Module):
    """What comes before the backbone: the light aligned, and the condition."""

    def __init__(self, stream: ConditionStream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reading = self.stream(images)
        return reading.images, reading.conditions, reading.unfamiliar


def detector_graph(
    detector: Detector,
    backbone: Backbone,
    image_size: tuple[int, int],
    *,
    bank_dtype: torch.dtype = torch.float32,
    int8_images: Iterable[np.ndarray] | None = None,
) -> onnx.ModelProto:
    """One checked ONNX model of a detector on the CPU.

    Input ``image`` (N, H, W, 3) uint8 RGB; outputs ``score`` (N,) and ``anomaly_map`` (N, H, W), N open; with several
    conditions also ``condition`` (N,) int64 and ``unfamiliar`` (N,) bool.

    Args:
        backbone: the one that the detector's embedding was built with.
        image_size: H and W.
        bank_dtype: what the bank is stored in, float32 or float16.
        int8_images: (1, 3, H, W) float32 in [0, 1], good images on which the ranges of an 8-bit backbone are measured;
            None leaves it in float32.

    Raises:
        InputError: the bank is too large for one file.
    """
    size = sum(bank.vectors.numel() for bank in detector.banks) * bank_dtype.itemsize
    if size > LARGEST:
        raise InputError(
            f"a bank of {size / 1e9:.1f} GB does not fit in one ONNX file (2 GB): use BANK_DTYPE = 'float16' or "
            "a smaller SAMPLING_RATIO"
        )
    network = onnx_graph(fold_batch_norms(copy.deepcopy(backbone)), image_size)
    network = network.graph if int8_images is None else _quantised(network, int8_images)
    example = torch.zeros(2, 3, *image_size)
    layers = [output.name for output in network.output]
    graph, images, chosen = _pixels(image_size), "images", []
    inputs = {"images": example, **dict(zip(("layer2", "layer3"), backbone(example), strict=True))}
    if detector.net.stream is not None:
        chosen = ["condition", "unfamiliar"]
        stream = exported_graph(_Stream(detector.net.stream), "stream", {"images": example}, ["aligned", *chosen])
        graph, images = _merge(graph, stream, {"images": "images"}), "aligned"
        inputs["condition"] = torch.zeros(len(example), dtype=torch.int64)
    graph = _merge(graph, network, {images: "images"}, keep=[images, *chosen])
    head = exported_graph(_Head(detector, bank_dtype), "head", inputs, ["score", "anomaly_map"])
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
