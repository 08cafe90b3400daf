"""WEDGE-Net's embedding: what each patch of an image looks like, as one vector."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.engine import make_engine
from models.errors import InputError
from models.frequency import FrequencyGate
from models.scoring import WEDGE_NET
from models.semantic import attention_mask


class WedgeNet(nn.Module):
    """Frozen backbone, frequency stream and semantic attention: images -> patch features. Nothing in it is trained.

    Args:
        backbone: frozen network that gives feature maps at stride 8 and stride 16 (``models.backbone.build_backbone``).
        wavelet: discrete wavelet of PyWavelets, for the frequency stream.
        frequency_stream: 'gate' (the paper's gate) or 'off'.
        use_semantic: append the stride-8 features weighed by the semantic attention.
        seed: of the gate's untrained weights.
        device: where the embedding is computed.
        engine: what runs the backbone, see ``models.engine.make_engine``.

    >>> from models.backbone import build_backbone
    >>> net = WedgeNet(build_backbone("efficientnet_lite0"))
    >>> net.embed(torch.rand(2, 3, 224, 224)).shape
    torch.Size([2, 784, 192])
    """

    scoring = WEDGE_NET

    def __init__(
        self,
        backbone: Backbone,
        *,
        wavelet: str = "haar",
        frequency_stream: str = "gate",
        use_semantic: bool = True,
        seed: int = 42,
        device: torch.device | str = "cpu",
        engine: str = "auto",
    ):
        super().__init__()
        self.device = torch.device(device)
        self.fingerprint = backbone.fingerprint
        self.use_semantic = use_semantic
        self.frequency = FrequencyGate(wavelet, backbone.channels, seed) if frequency_stream == "gate" else None
        self.dim = sum(backbone.channels) + use_semantic * backbone.channels[0]
        self.backbone = make_engine(backbone, self.device, engine)
        self.requires_grad_(False).eval().to(self.device)

    def frequency_parameters(self) -> dict[str, Tensor]:
        """The frequency stream's own parameters, on the CPU; empty if it has none."""
        return {} if self.frequency is None else {k: v.cpu() for k, v in self.frequency.state_dict().items()}

    def with_frequency(self, parameters: dict[str, Tensor]) -> "WedgeNet":
        """This network with the frequency parameters that a bank was made with; the backbone is shared, not copied.

        Raises :class:`InputError` if they are not those of this network's frequency stream.
        """
        own = self.frequency_parameters()
        if {k: v.shape for k, v in own.items()} != {k: getattr(v, "shape", None) for k, v in parameters.items()}:
            raise InputError("the parameters of the bank's frequency stream do not fit the network: train it again")
        if all(torch.equal(parameters[name], value) for name, value in own.items()):
            return self
        twin = copy.copy(self)
        twin._modules = self._modules | {"frequency": copy.deepcopy(self.frequency)}
        twin.frequency.load_state_dict(parameters)
        return twin

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, h*w, D) patch features, row by row; h, w = ceil(H / 8), ceil(W / 8).

        Every statistic is per image: an image's features do not depend on the batch it comes in. D is the sum of both
        layers' channels, plus stride-8 channels again with the semantic stream (ResNet-50: 1536, or 2048).
        """
        images = images.to(self.device, torch.float32)
        return self.combine(images, *self.backbone(images))

    def combine(self, images: Tensor, layer2: Tensor, layer3: Tensor) -> Tensor:
        """What ``embed`` makes of images and the backbone's two feature maps; all of it can be exported."""
        gated2, gated3 = (layer2, layer3) if self.frequency is None else self.frequency(images, (layer2, layer3))
        gated3 = F.interpolate(gated3, size=gated2.shape[-2:], mode="bilinear")
        parts = [F.normalize(gated2, dim=1), F.normalize(gated3, dim=1)]
        if self.use_semantic:
            parts.append(F.normalize(layer2, dim=1) * attention_mask(layer2) * 2)
        embedding = F.avg_pool2d(torch.cat(parts, dim=1), kernel_size=3, stride=1, padding=1)
        return embedding.flatten(2).transpose(1, 2)


def grid_size(image_size: int) -> tuple[int, int]:
    """Rows and columns of patches that an image of ``image_size`` pixels square is seen in: (28, 28) for 224."""
    cells = -(-image_size // 8)
    return cells, cells
