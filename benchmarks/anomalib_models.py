"""anomalib's detectors with this project's weights in them: the peers that the benchmarks compare with.

anomalib itself is imported only where a detector is built: ``make bench`` installs it in an environment of its own.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.backbone import Backbone

NETWORKS = {  # timm's names: the network, and its blocks up to layers 1, 2 and 3
    "efficientnet_lite0": ("tf_efficientnet_lite0", ("blocks.1", "blocks.2", "blocks.4")),
    "resnet18": ("resnet18", ("layer1", "layer2", "layer3")),
    "resnet50": ("resnet50", ("layer1", "layer2", "layer3")),
    "wide_resnet50_2": ("wide_resnet50_2", ("layer1", "layer2", "layer3")),
}
PADIM_FEATURES = 100  # of all three layers' channels, drawn at random: PaDiM's own choice for its smallest network


def build_patchcore(backbone: Backbone, bank: Tensor | None = None) -> nn.Module:
    """anomalib's PatchcoreModel of one neighbour, ready to judge with a bank (M, D), or else to be trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomalib's own, about packages that it could use
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    name, layers = NETWORKS[backbone.name]
    peer = PatchcoreModel(layers[1:], name, pre_trained=False, num_neighbors=1)
    if bank is not None:
        peer.memory_bank = bank
    return _with_weights(peer, backbone).train(bank is None)


def build_padim(backbone: Backbone, seed: int) -> nn.Module:
    """anomalib's PadimModel of the first three layers, ready to be trained; ``seed`` draws the channels it looks at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from anomalib.models.image.padim.torch_model import PadimModel

    name, layers = NETWORKS[backbone.name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peer = PadimModel(name, list(layers), pre_trained=False, n_features=PADIM_FEATURES)
    return _with_weights(peer, backbone).train()


def _with_weights(peer: nn.Module, backbone: Backbone) -> nn.Module:
    network = peer.feature_extractor.feature_extractor
    # Two names for each tensor but one order; timm keeps some layers after the last that is used.
    state = dict(zip(network.state_dict(), backbone.state_dict().values(), strict=False))
    network.load_state_dict(state, strict=False)
    return peer


class Verdict(nn.Module):
    """A peer as a plain function: images (B, 3, H, W) in [0, 1] -> scores (B,) and maps (B, H, W)."""

    def __init__(self, peer: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        self.peer = peer.eval()
        self.register_buffer("mean", backbone.mean.detach().clone())
        self.register_buffer("std", backbone.std.detach().clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.peer((images - self.mean) / self.std)
        return found.pred_score, found.anomaly_map[:, 0]


def in_openvino(verdict: Verdict, image_size: tuple[int, int]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The same, converted to OpenVINO for one image at a time, in float32, with as many threads as torch has."""
    import openvino

    shape = [1, 3, *image_size]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(verdict, example_input=torch.rand(shape), input=shape)
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # it would use bfloat16 where the processor can
    }
    compiled = openvino.compile_model(model, "CPU", options)

    def judge(image: Tensor) -> tuple[Tensor, Tensor]:
        scores, maps = compiled(image.numpy()).values()
        return torch.from_numpy(scores), torch.from_numpy(maps)

    return judge
