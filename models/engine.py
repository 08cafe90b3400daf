"""What runs the network: onnxruntime on a CPU, torch elsewhere. The only place that knows.

OpenVINO was measured too: for a whole detector with efficientnet_lite0 it takes a tenth longer than onnxruntime.

An engine is called like the backbone it is made from, images (B, 3, H, W) in [0, 1] -> (layer 2, layer 3), and in
float32 gives the same feature maps within 1e-4 of their largest value, with channels last in memory.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from models.threads import session_options

import torch
from torch import Tensor

from models.backbone import Backbone
from models.errors import InputError, one_line
from models.tracing import UnknownLayer, fold_batch_norms, fuse_relu

if TYPE_CHECKING:  # optional, and slow to import
    import onnx
    import onnxruntime

ENGINES = ("auto", "torch", "onnxruntime")
AT_ONCE = 4  # images: more at a time are slower on a CPU, whose caches their intermediate results do not fit
TOLERANCE = 1e-4  # of the largest feature: what a translated network may differ by from torch
PRECISIONS = {  # of the backbone on a GPU; what follows it is always float32
    "float32": torch.float32,
    "tf32": torch.float32,  # factors rounded to 11 bits, as NVIDIA's tensor cores take them
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def make_engine(
    backbone: Backbone, device: torch.device, kind: str = "auto", precision: str = "float32"
) -> "TorchEngine | OnnxEngine":
    """Choose what runs ``backbone`` on ``device``; ``backbone`` itself is left as it is.

    Args:
        kind: one of ``ENGINES``. 'auto' is onnxruntime on a CPU where it is installed, and torch otherwise.
        precision: one of ``PRECISIONS``; feature maps are float32 all the same.

    Raises:
        InputError: unknown kind, onnxruntime asked for where it cannot run, or another precision than float32 without
            a GPU.
    """
    if kind not in ENGINES:
        raise InputError(f"ENGINE = {kind!r} is unknown; choose one of {', '.join(ENGINES)}")
    missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    if precision != "float32" and device.type != "cuda":
        raise InputError(f"PRECISION = {precision!r} is for NVIDIA GPUs, not DEVICE = {device.type!r}: use 'float32'")
    if kind == "onnxruntime" and missing:
        raise InputError(f"ENGINE = 'onnxruntime' needs: pip install {' '.join(missing)}; or use ENGINE = 'torch'")
    if kind == "onnxruntime" and device.type != "cpu":
        raise InputError(f"ENGINE = 'onnxruntime' is for the CPU, not {device}: use 'torch'")
    if kind == "torch" or missing or device.type != "cpu":
        return TorchEngine(backbone, device, precision)
    return OnnxEngine(backbone)


def in_parts(function: Callable[..., tuple[Tensor, ...]], count: int, *batches: Tensor) -> tuple[Tensor, ...]:
    """``function`` of ``count`` images at a time; each of what it returns, in one batch."""
    parts = [function(*part) for part in zip(*(batch.split(count) for batch in batches), strict=True)]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(results) for results in zip(*parts, strict=True))


class OnnxEngine:
    """onnxruntime on the CPU, with as many threads as torch has when it is made: the backbone, or a whole detector."""

    name = "onnxruntime"
    at_once = AT_ONCE

    def __init__(self, backbone: Backbone) -> None:
        from models.onnx_graph import onnx_graph, written_graph

        self.options = session_options(torch.get_num_threads())
        self.backbone = fold_batch_norms(copy.deepcopy(backbone))
        # The graph is not kept on the disk: making it takes a tenth of a second, no more than checking a file would.
        self.any_size, self.of_size = None, {}
        self.trunks: dict[tuple[int, int] | None, onnx.GraphProto] = {}  # by size; None for one that takes any
        with contextlib.suppress(UnknownLayer):
            self.trunks[None] = written_graph(self.backbone.trunk)
            self.any_size = self.session(onnx_graph(self.backbone, self.trunks[None]))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # numpy() and from_numpy() share memory with torch: nothing is copied on the way in.
        images = images.detach().to("cpu", torch.float32).contiguous()
        session = self.any_size or self._session_of_size(images)
        parts = [session.run(None, {"images": part.numpy()}) for part in images.split(AT_ONCE)]
        # Channels last, as the torch engine has them: torch pools and enlarges such maps up to twenty times as fast.
        layer2, layer3 = (
            torch.cat([torch.from_numpy(layer).contiguous(memory_format=torch.channels_last) for layer in layers])
            for layers in zip(*parts, strict=True)
        )
        return _checked(self.backbone.name, images, layer2, layer3)

    def trunk(self, size: tuple[int, int]) -> "onnx.GraphProto":
        """The backbone's trunk, for images of this height and width; its maps have the sizes that are expected."""
        self(torch.zeros(1, 3, *size))
        return self.trunks[None if self.any_size else size]

    def session(self, graph: "onnx.ModelProto") -> "onnxruntime.InferenceSession":
        """What runs a graph, the backbone's own or that of a whole detector."""
        import onnxruntime

        return onnxruntime.InferenceSession(graph.SerializeToString(), self.options, providers=["CPUExecutionProvider"])

    def _session_of_size(self, images: Tensor) -> "onnxruntime.InferenceSession":
        """For a network that torch's exporter has to translate, which fixes height and width; made once for each.

        The exporter knows nothing of the network it is given, so that what comes of it is compared with torch.
        Raises :class:`InputError` if it fails or differs.
        """
        from models.onnx_graph import onnx_graph, trunk_graph

        size = tuple(images.shape[2:])
        if size not in self.of_size:
            refusal = f"{self.backbone.name} cannot run in onnxruntime: set ENGINE = 'torch' "
            try:
                self.trunks[size] = trunk_graph(self.backbone, size)
                session = self.session(onnx_graph(self.backbone, self.trunks[size]))
                found = session.run(None, {"images": images[:1].numpy()})
            except Exception as error:  # the exporter and onnxruntime have dozens of their own, and no common one
                raise InputError(f"{refusal}({one_line(error)[:200]})") from error
            for layer, expected in zip(found, self.backbone(images[:1]), strict=True):
                difference = (torch.from_numpy(layer) - expected).abs().max() / expected.abs().max()
                if not difference < TOLERANCE:
                    raise InputError(f"{refusal}(its maps would differ by {difference:.1e})")
            self.of_size[size] = session
        return self.of_size[size]


class TorchEngine:
    """The backbone in torch: batch norms folded into the convolutions, on a GPU ReLUs as well."""

    name = "torch"

    def __init__(self, backbone: Backbone, device: torch.device, precision: str = "float32") -> None:
        self.backbone_name = backbone.name
        self.device, self.dtype, self.tf32 = device, PRECISIONS[precision], precision == "tf32"
        # channels_last: 1.3 to 1.6 times as fast on a CPU, and the layout that tensor cores want; a GPU
        # that must do without them is slower for it.
        exact = device.type == "cuda" and precision == "float32"
        self.layout = torch.contiguous_format if exact else torch.channels_last
        network = fold_batch_norms(copy.deepcopy(backbone))
        if device.type == "cuda":
            network = fuse_relu(network)
        self.backbone = network.to(device, self.dtype, memory_format=self.layout)
        self.at_once = AT_ONCE if device.type == "cpu" else 1 << 30  # a GPU works on all images together

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        torch.backends.cudnn.allow_tf32 = self.tf32  # of a recording too: a CUDA graph keeps what it was recorded with
        images = images.to(self.device, self.dtype).contiguous(memory_format=self.layout)
        layer2, layer3 = self.backbone(images)
        return _checked(self.backbone_name, images, layer2.float(), layer3.float())


def _checked(name: str, images: Tensor, layer2: Tensor, layer3: Tensor) -> tuple[Tensor, Tensor]:
    """The two maps, if they have the sizes that all that follows expects."""
    for layer, stride in ((layer2, 8), (layer3, 16)):
        if any(cells != -(-pixels // stride) for cells, pixels in zip(layer.shape[2:], images.shape[2:], strict=True)):
            raise InputError(f"{name} needs an IMAGE_SIZE that is a multiple of 16 pixels")
    return layer2, layer3
