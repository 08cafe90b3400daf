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
from models.whitening import Whitening


class WedgeNet(nn.Module):
    """Frozen backbone, frequency stream and semantic attention: images -> patch features, no gradient training.

    What a category's training images decide, the metric's linear map, comes with ``with_whitening`` or, from a
    checkpoint, with ``with_state``; without it features are compared as they are.

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
        self.whitening: Whitening | None = None
        self.raw_dim = sum(backbone.channels) + use_semantic * backbone.channels[0]
        self.backbone = make_engine(backbone, self.device, engine)
        self._latest: list[WedgeNet] = []  # what with_state gave last; in a list, since it is no part of this module
        self.requires_grad_(False).eval().to(self.device)

    @property
    def dim(self) -> int:
        """Dimension D of a patch's features."""
        return self.raw_dim if self.whitening is None else self.whitening.dim

    def with_whitening(self, whitening: Whitening) -> "WedgeNet":
        """This network with a category's own metric; the backbone is shared, not copied."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.whitening = whitening.to(self.device)
        return twin

    def state(self) -> dict[str, Tensor]:
        """All that is not the backbone's, on the CPU: the frequency gate's weights and the metric's linear map."""
        return {name: tensor.cpu() for name, tensor in self.state_dict().items()}

    def with_state(self, state: dict[str, Tensor]) -> "WedgeNet":
        """This network as it was when a bank was made; the backbone is shared, not copied.

        Banks that were made with the same state, such as those of one category, get the same network, so that an image
        is embedded once for all of them.

        Raises :class:`InputError` if the state is not one of such a network.
        """
        for known in (self, *self._latest):
            if _equal(known.state(), state):
                return known
        twin = copy.copy(self)
        twin._modules = {name: copy.deepcopy(module) for name, module in self._modules.items()}
        parts = [state.get(f"whitening.{name}") for name in ("mean", "matrix")]
        try:
            if any(part is not None for part in parts):
                twin.whitening = Whitening(*parts)
            twin.load_state_dict(state)
            if twin.whitening is not None and len(twin.whitening.mean) != self.raw_dim:
                raise ValueError
        except (AttributeError, TypeError, ValueError, RuntimeError):
            raise InputError("what it was made with does not fit the network: train it again") from None
        self._latest[:] = [twin.requires_grad_(False).eval().to(self.device)]
        return twin

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, h*w, D) patch features, row by row; h, w = ceil(H / 8), ceil(W / 8).

        Every statistic is per image: an image's features do not depend on the batch it comes in. D is the sum of both
        layers' channels, plus stride-8 channels again with the semantic stream (ResNet-50: 1536, or 2048), unless the
        metric's map leaves some out.
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
        embedding = embedding.flatten(2).transpose(1, 2)
        return embedding if self.whitening is None else self.whitening(embedding)


def grid_size(image_size: int) -> tuple[int, int]:
    """Rows and columns of patches that an image of ``image_size`` pixels square is seen in: (28, 28) for 224."""
    cells = -(-image_size // 8)
    return cells, cells


def _equal(own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return own.keys() == state.keys() and all(
        isinstance(state[name], Tensor) and torch.equal(own[name], state[name]) for name in own
    )
