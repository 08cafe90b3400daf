"""The whole detector as one ONNX graph: from the pixels that a camera gives to score and anomaly map.

The backbone is written by ``models.onnx_graph``; all that follows it is exported from the very modules that PyTorch
runs, so that there is no second implementation to keep in step. Only the search differs: plain tiles of the bank, which
every runtime can do.
"""

import copy
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper
from torch import Tensor, nn

from models.backbone import Backbone
from models.detector import Detector
from models.engine import fold_batch_norms
from models.errors import InputError
from models.onnx_graph import IR_VERSION, OPSET, onnx_graph

TILE = 2048  # bank vectors compared at a time: 6 MB for one image's 784 patches, whatever the bank
FLOAT_LAYERS = 6  # convolutions that an 8-bit backbone keeps in float32: all later ones amplify what they round off
LARGEST = 2**31 - 2**20  # bytes that one protobuf file can hold, with room for the graph itself


class BankSearch(nn.Module):
    """Distance from each patch to the nearest vector of the bank, one tile of the bank after the other.

    |q - b|^2 = |q|^2 + |b|^2 - 2 q.b is taken around the bank's mean, which keeps rounding small beside distances.

    Args:
        vectors: (M, D) float32 or float16, kept as they are; the arithmetic is float32.
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", vectors.mean(dim=0, dtype=torch.float32))
        for number, tile in enumerate(vectors.split(TILE)):
            self.register_buffer(f"tile{number}", tile.T.contiguous())
            self.register_buffer(f"norms{number}", (tile.float() - self.centre).square().sum(dim=1))
        self.tiles = number + 1

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, D) patch features -> (B, P) Euclidean distances."""
        queries = (features - self.centre).flatten(0, 1)
        doubled = queries * -2
        best = None
        for number in range(self.tiles):
            tile, norms = self.get_buffer(f"tile{number}"), self.get_buffer(f"norms{number}")
            least = torch.addmm(norms, doubled, tile.float() - self.centre[:, None]).amin(dim=1)
            best = least if best is None else torch.minimum(best, least)
        squared = best + queries.square().sum(dim=1)
        return squared.clamp_min(0).sqrt().unflatten(0, features.shape[:2])


class _Head(nn.Module):
    """What follows the backbone."""

    def __init__(self, detector: Detector, bank_dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.grid, self.anomaly_map = detector.net, detector.grid, detector.anomaly_map
        self.search = BankSearch(detector.bank.vectors.to(bank_dtype))

    def forward(self, images: Tensor, layer2: Tensor, layer3: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.combine(images, layer2, layer3)
        return self.anomaly_map.predict(self.search(features).unflatten(1, self.grid))


def detector_graph(
    detector: Detector,
    backbone: Backbone,
    image_size: int,
    *,
    bank_dtype: torch.dtype = torch.float32,
    int8_images: Iterable[np.ndarray] | None = None,
) -> onnx.ModelProto:
    """One checked ONNX model of a detector on the CPU.

    Input ``image`` (N, S, S, 3) uint8 RGB; outputs ``score`` (N,) and ``anomaly_map`` (N, S, S), N open.

    Args:
        backbone: the one that the detector's embedding was built with.
        image_size: S.
        bank_dtype: what the bank is stored in, float32 or float16.
        int8_images: (1, 3, S, S) float32 in [0, 1], good images on which the ranges of an 8-bit backbone are measured;
            None leaves it in float32.

    Raises:
        InputError: the bank is too large for one file.
    """
    size = detector.bank.vectors.numel() * torch.finfo(bank_dtype).bits // 8
    if size > LARGEST:
        raise InputError(
            f"a bank of {size / 1e9:.1f} GB does not fit in one ONNX file (2 GB): use BANK_DTYPE = 'float16' or "
            "a smaller SAMPLING_RATIO"
        )
    network = onnx.load_from_string(onnx_graph(fold_batch_norms(copy.deepcopy(backbone))))
    network = network.graph if int8_images is None else _quantised(network, int8_images)
    head = _head(detector, bank_dtype, torch.zeros(2, 3, image_size, image_size), backbone)
    layers = [output.name for output in network.output]
    first = _merge(_pixels(image_size), network, {"images": "images"}, keep=["images"])
    graph = _merge(first, head, dict(zip(["images", *layers], ["images", "layer2", "layer3"], strict=True)))
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _head(detector: Detector, bank_dtype: torch.dtype, example: Tensor, backbone: Backbone) -> onnx.GraphProto:
    """Inputs ``images`` (N, 3, S, S), ``layer2`` and ``layer3``; outputs ``score`` and ``anomaly_map``."""
    open_batch = {0: torch.export.Dim("batch")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that three inputs share one batch is just what is meant
        program = torch.onnx.export(
            _Head(detector, bank_dtype).eval(),
            (example, *backbone(example)),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images", "layer2", "layer3"],
            output_names=["score", "anomaly_map"],
            dynamic_shapes=(open_batch,) * 3,
            verbose=False,
        )
    head = program.model_proto.graph
    head.name = "head"
    for node in head.node:
        del node.metadata_props[:]  # where in this machine's source files each came from
    return head


def _pixels(image_size: int) -> onnx.GraphProto:
    """uint8 (N, S, S, 3) ``image`` -> float32 (N, 3, S, S) ``images`` in [0, 1]."""
    shape = ["batch", image_size, image_size, 3]
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
