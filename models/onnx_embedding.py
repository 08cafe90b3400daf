"""What comes before the search, as nodes of an ONNX graph: the frequency stream, and each method's patch features."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
import pywt
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from models.condition import FLOOR, GAIN, LEVELS, SHARES, STATISTICS, ConditionStream
from models.detector import Net
from models.frequency import FrequencyGate
from models.onnx_graph import Writer
from models.wedge_net import WedgeNet, grid_size


class Embedded(NamedTuple):
    """Names in a graph: ``features`` (N, P, D) of each scale before the metric, and what the frequency stream reads;
    None without one."""

    features: list[str]
    condition: str | None = None
    unfamiliar: str | None = None
    statistics: str | None = None


def write_embedding(
    write: Writer, net: Net, trunk: onnx.GraphProto, images: str, image_size: tuple[int, int]
) -> Embedded:
    """From ``images`` (N, 3, H, W) in [0, 1] to patch features."""
    backbone, stream, reading = net.backbone.backbone, getattr(net, "stream", None), []
    if net.region is not None:
        pixels = write("Gather", write("Reshape", images, [0, 3, -1]), net.region.shown, axis=2)
        images = write("Reshape", pixels, [0, 3, *image_size])
    gain, offset = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    if stream is not None:
        gain, offset, *reading = _stream(write, stream, images)
    # The light is aligned and pixels are normalised at one go.
    gain = write("Div", gain, backbone.std)
    offset = write("Div", write("Sub", offset, backbone.mean), backbone.std)
    normalised = write("Add", write("Mul", images, gain), offset)
    layer2, layer3 = write.insert(trunk, normalised)
    strides = (8,)
    if not isinstance(net, WedgeNet):
        layer2 = _pooled(write, layer2)
        maps = [write("Concat", layer2, _enlarged(write, _pooled(write, layer3), layer2), axis=1)]
    elif net.form == "paper":
        maps = [_pooled(write, _paper(write, net, images, image_size, layer2, layer3))]
    else:
        maps, strides = [_pooled(write, each) for each in _wedge(write, net, layer2, layer3)], net.strides
    features = []
    for own, dim, stride in zip(maps, net.raw_dims, strides, strict=True):
        own = write("Reshape", own, [0, dim, -1])
        if net.region is not None:
            own = write("Gather", own, net.region.patches(stride), axis=2)
        features.append(write("Transpose", own, perm=[0, 2, 1]))
    return Embedded(features, *reading)


def _wedge(write: Writer, net: WedgeNet, layer2: str, layer3: str) -> list[str]:
    """``WedgeNet._wedge``"""
    if net.use_semantic:
        layer2 = write("Mul", layer2, write("Add", _attention(write, layer2), 0.5))
    if net.region is None:
        mean = write("GlobalAveragePool", layer3)
    else:
        inside = write("Gather", write("Reshape", layer3, [0, 0, -1]), net.region.patches(16), axis=2)
        mean = write("Unsqueeze", write("ReduceMean", inside, [2]), [3])
    layer3 = write("Sub", layer3, write("Mul", mean, net.recipe.centring))
    return [{2: layer2, 3: layer3}[layer] for layer in net.recipe.layers]


def _paper(write: Writer, net: WedgeNet, images: str, image_size: tuple[int, int], layer2: str, layer3: str) -> str:
    """``WedgeNet._paper``"""
    gated2, gated3 = layer2, layer3
    if net.gate is not None:
        gated2, gated3 = _gated(write, net.gate, images, image_size, (layer2, layer3))
    parts = [_normalised(write, gated2), _normalised(write, _enlarged(write, gated3, gated2))]
    if net.use_semantic:
        attention = write("Mul", _attention(write, layer2), 2.0)
        parts.append(write("Mul", _normalised(write, layer2), attention))
    return write("Concat", *parts, axis=1)


def _pooled(write: Writer, maps: str) -> str:
    """Each place averaged with its neighbours."""
    return write("AveragePool", maps, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)


def _enlarged(write: Writer, maps: str, like: str) -> str:
    """Bilinear, to the height and width of ``like``."""
    sizes = write("Concat", write("Shape", maps, end=2), write("Shape", like, start=2), axis=0)
    return write("Resize", maps, "", "", sizes, mode="linear")


def _normalised(write: Writer, maps: str) -> str:
    return write("Div", maps, write("Max", write("ReduceL2", maps, [1]), 1e-12))


def _attention(write: Writer, layer2: str) -> str:
    """``attention_mask``"""
    activity = write("ReduceMean", write("Abs", layer2), [1])
    low, high = write("ReduceMin", activity, [2, 3]), write("ReduceMax", activity, [2, 3])
    return write("Div", write("Sub", activity, low), write("Max", write("Sub", high, low), 1e-12))


def _gated(
    write: Writer, gate: FrequencyGate, images: str, image_size: tuple[int, int], layers: Sequence[str]
) -> list[str]:
    """``FrequencyGate.forward``: low band and area average, both linear, are one matrix on each side."""
    gated = []
    for convolution, layer, stride in zip(gate.convolutions, layers, (8, 16), strict=True):
        grid = grid_size(image_size, stride)
        rows, columns = (_low_band(gate.transform.wavelet, *each) for each in zip(image_size, grid, strict=True))
        structure = write("MatMul", rows, write("MatMul", images, columns.T))
        weights = write("Conv", structure, convolution.weight, convolution.bias, pads=[1] * 4)
        gated.append(write("Mul", layer, write("Sigmoid", weights)))
    return gated


def _low_band(wavelet: str, pixels: int, cells: int) -> Tensor:
    """The (cells, pixels) matrix that takes a line of pixels to the means, in each cell, of its approximation band."""
    low, _ = pywt.dwt(np.eye(pixels), wavelet, mode="symmetric", axis=0)
    return F.interpolate(torch.from_numpy(low / 2**0.5).T[None], size=cells, mode="area")[0].T


def _stream(write: Writer, stream: ConditionStream, images: str) -> list[str]:
    """``ConditionStream.forward``: gain and offset (N, 3, 1, 1) of the channels; condition, unfamiliar, statistics."""
    # A convolution picks some pixels of some lines sooner than a slice does.
    some = write("Conv", images, np.ones((3, 1, 1, 1)), strides=[stream.step] * 2, group=3)
    some = write("Reshape", _seen(write, stream.seen_pixels, write("Reshape", some, [0, 3, -1])), [0, -1])
    clipped = [
        write("ReduceMean", write("Cast", where, to=TensorProto.FLOAT), [1])
        for where in (write("GreaterOrEqual", some, 1 - FLOOR), write("LessOrEqual", some, FLOOR))
    ]
    clipped = write("Max", write("Concat", *clipped, axis=1), stream.least_clipped)
    (structure, count), *details = _bands(write, stream, images)
    if stream.seen_structure is not None:
        structure, count = _seen(write, stream.seen_structure, structure), len(stream.seen_structure)
    if stream.align_light:
        gain, offset = _alignment(write, stream, *_quantiles(write, structure, count))
        structure = write("Add", write("Mul", structure, gain), offset)
        mix = write("Transpose", write("Div", gain, 3.0), perm=[0, 2, 1])
    else:
        gain, offset, mix = torch.ones(3, 1), torch.zeros(3, 1), torch.full((1, 3), 1 / 3)
    seen = [getattr(stream, f"seen_detail{level}") for level in range(LEVELS)]
    if not any(places is not None for places in seen) and len({size for _, size in details}) == 1:  # at one go
        details, seen = [(write("Concat", *(bands for bands, _ in details), axis=2), details[0][1])], [None]
    detail = [
        _detail(write, write("MatMul", mix, bands), size, places)
        for (bands, size), places in zip(details, seen, strict=True)
    ]
    colourfulness = write("Sub", write("ReduceMax", structure, [1]), write("ReduceMin", structure, [1]))
    both = write("Concat", write("ReduceMean", structure, [1]), colourfulness, axis=1)
    quantiles = [write("Squeeze", each, [2]) for each in _quantiles(write, both, count)]
    (bottom, _), (middle, colourful), (top, most) = (
        write.several("Split", 2, each, [1, 1], axis=1) for each in quantiles
    )
    above, below = (write("Sub", *pair) for pair in ((top, middle), (middle, bottom)))
    # All logarithms at once, the skewness's parts last.
    values = write("Concat", clipped, *detail, above, below, axis=1)
    floors = np.array([1e-3] * 2 + [FLOOR] * (STATISTICS - 3))
    light, details, above, below = write.several(
        "Split", 4, write("Log", write("Add", values, floors)), [2, STATISTICS - 5, 1, 1], axis=1
    )
    statistics = write("Concat", light, write("Sub", above, below), colourful, most, details, axis=1)

    apart = write("Sub", write("Unsqueeze", statistics, [1]), stream.means)
    squared = write("ReduceSum", write("Mul", write("MatMul", apart, stream.precision), apart), [2], keepdims=0)
    nearest = write("ArgMin", squared, axis=1, keepdims=0)
    limit = write("Gather", stream.limits, nearest)
    unfamiliar = write("Greater", write("ReduceMin", squared, [1], keepdims=0), limit)
    condition = write("ArgMin", write("Add", squared, stream.doubt), axis=1, keepdims=0)
    return [write("Unsqueeze", gain, [-1]), write("Unsqueeze", offset, [-1]), condition, unfamiliar, statistics]


def _alignment(write: Writer, stream: ConditionStream, low: str, median: str, high: str) -> list[str]:
    """``ConditionStream._alignment``: gain and offset (N, 3, 1) from the channels' quantiles."""
    spread = write("Sub", high, low)
    light = write("Concat", median, spread, axis=2)
    brightness = write("ReduceMean", light, [1])
    divisor = write("Max", brightness, 1e-6)
    least = write("ReduceMax", write("Div", stream.least_light[:1] - FLOOR, divisor), [2])
    most = write("ReduceMin", write("Div", stream.most_light[:1] + FLOOR, divisor), [2])
    factor = write("Min", write("Max", least, 1.0), most)
    light, brightness = write("Mul", light, factor), write("Mul", brightness, factor)
    seen = write("Concat", brightness, write("Sub", light, brightness), axis=1)
    change = write("Sub", write("Min", write("Max", seen, stream.least_light), stream.most_light), seen)
    common, own = write.several("Split", 2, change, [1, 3], axis=1)
    wanted = write("Add", write("Add", light, common), own)
    wanted_median, wanted_spread = write.several("Split", 2, wanted, [1, 1], axis=2)
    ratio = write("Div", write("Add", wanted_spread, 1e-6), write("Add", spread, 1e-6))
    gain = write("Clip", ratio, 1 / GAIN, GAIN)
    return [gain, write("Sub", wanted_median, write("Mul", gain, median))]


def _quantiles(write: Writer, planes: str, count: int, shares: Sequence[float] = (0.1, 0.5, 0.9)) -> list[str]:
    """The quantiles (N, C, 1) of planes (N, C, count) at shares, which rise."""
    found = []
    for share in shares:  # of the largest that one leaves, the next leaves some: no plane is sorted
        planes, _ = write.several("TopK", 2, planes, [count - int((count - 1) * share)], sorted=0)
        found.append(write("ReduceMin", planes, [2]))
    return found


def _seen(write: Writer, places: Tensor | None, planes: str) -> str:
    """Of planes (N, C, n) what lies inside the region of interest."""
    return planes if places is None else write("Gather", planes, places, axis=2)


def _bands(write: Writer, stream: ConditionStream, images: str) -> list[tuple[str, int]]:
    """The channels' structure (N, 3, size) and, for each level, bands cH, cV and cD, one behind the other,
    (N, 3, 3 * size); each with its size."""
    levels = [[(stream.structure.rows, stream.structure.columns)]]
    for level in stream.details:
        (low_rows, high_rows), (low_columns, high_columns) = level.rows.chunk(2), level.columns.chunk(2)
        levels.append([(high_rows, low_columns), (low_rows, high_columns), (high_rows, high_columns)])
    sizes = [len(rows) * len(columns) for (rows, columns), *_ in levels]
    blocks = [[_block(matrix) for matrix in pair] for pairs in levels for pair in pairs]
    shapes = {tuple(None if block is None else len(block) for block in pair) for pair in blocks}
    if len(shapes) == 1 and None not in shapes.pop():  # haar, and a large picture: one step for all
        kernels = torch.stack([torch.outer(*pair) for pair in blocks])
        # Each channel has its own, with zeros for the others: onnxruntime is faster with them than with groups.
        kernels = torch.einsum("ij,pkl->ipjkl", torch.eye(3), kernels).flatten(0, 1)
        found = write("Reshape", write("Conv", images, kernels, strides=kernels.shape[2:]), [0, 3, -1])
        counts = [len(pairs) * size for pairs, size in zip(levels, sizes, strict=True)]
        return list(zip(write.several("Split", len(counts), found, counts, axis=2), sizes, strict=True))
    found = []
    for pairs, size in zip(levels, sizes, strict=True):
        bands = [write("MatMul", rows, write("MatMul", images, columns.T)) for rows, columns in pairs]
        found.append((write("Concat", *(write("Reshape", band, [0, 3, size]) for band in bands), axis=2), size))
    return found


def _block(matrix: Tensor) -> Tensor | None:
    """If a (cells, pixels) matrix takes each cell from a block of pixels of its own, all alike: its weights there."""
    block = matrix[0, : matrix.shape[1] // len(matrix)]
    blocks = torch.block_diag(*[block[None]] * len(matrix))
    return block if blocks.shape == matrix.shape and torch.equal(blocks, matrix) else None


def _detail(write: Writer, bands: str, size: int, places: Tensor | None) -> str:
    """SHARES of the absolute coefficients of bands, one behind the other, (N, 1, bands * size): (N, bands * shares)."""
    planes = write("Abs", _seen(write, places, write("Reshape", bands, [0, -1, size])))
    quantiles = _quantiles(write, planes, size if places is None else len(places), sorted(SHARES))
    return write("Reshape", write("Concat", *quantiles, axis=2), [0, -1])
