"""PatchCore's embedding, the baseline: plain features of a frozen network, each averaged over its neighbourhood."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone import Backbone
from models.condition import CLEAN
from models.engine import in_parts, make_engine
from models.scoring import PATCHCORE
from models.wedge_net import Embedding, grid_size, region_of_interest


class PatchCore:
    """Frozen backbone: images -> patch features, as anomalib's PatchCore has them. Nothing in it is trained.

    Args:
        backbone: frozen network that gives feature maps at stride 8 and stride 16 (``models.backbone.build_backbone``).
        device: where the embedding is computed.
        engine, precision: what runs the backbone, and how exactly, see ``models.engine.make_engine``.

    >>> from models.backbone import build_backbone
    >>> net = PatchCore(build_backbone("efficientnet_lite0"))
    >>> [tuple(scale.shape) for scale in net.embed(torch.rand(2, 3, 224, 224))]
    [(2, 784, 152)]
    """

    scoring = PATCHCORE
    conditions = (CLEAN,)

    def __init__(
        self,
        backbone: Backbone,
        *,
        device: torch.device | str = "cpu",
        engine: str = "auto",
        precision: str = "float32",
    ):
        self.device = torch.device(device)
        self.backbone_name, self.fingerprint = backbone.name, backbone.fingerprint
        self.dims = self.raw_dims = (sum(backbone.channels),)
        self.region = None
        self.backbone = make_engine(backbone, self.device, engine, precision)

    def state(self) -> dict[str, Tensor]:
        """The region of interest if it has one: all else that it is made of is the backbone's."""
        return {} if self.region is None else {"region.inside": self.region.inside.cpu()}

    def with_state(self, state: dict[str, Tensor]) -> "PatchCore":
        """This network as it was when a bank was made. Raises :class:`InputError` if no patch is inside the region."""
        return self.with_region(state["region.inside"]) if "region.inside" in state else self

    def with_region(self, inside: Tensor) -> "PatchCore":
        """As ``WedgeNet.with_region``."""
        twin = copy.copy(self)
        twin.region = region_of_interest(inside).to(self.device)
        return twin

    def grids(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of patches, of its one scale, that images of this height and width are seen in."""
        return [grid_size(image_size)]

    def patches(self, image_size: tuple[int, int], scale: int) -> int:
        """Patches of an image that are looked at, at its only scale."""
        return math.prod(self.grids(image_size)[scale]) if self.region is None else len(self.region.patches(8))

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) images in [0, 1] -> their patch features (B, P, D), of one scale; P = H / 8 * W / 8, or fewer.

        D is the sum of both layers' channels (WideResNet-50: 1536). Features keep the length that the network gives.
        """
        return self.look(images).features

    @torch.inference_mode()
    def look(self, images: Tensor, condition: int | None = None) -> Embedding:
        """``embed``, as a :class:`WedgeNet` gives it; there is but one condition."""
        images = images.to(self.device, torch.float32)
        if self.region is not None:
            images = self.region(images)
        return Embedding(in_parts(self._features, self.backbone.at_once, images))

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features (B, P, D) of images."""
        layer2, layer3 = (F.avg_pool2d(layer, kernel_size=3, stride=1, padding=1) for layer in self.backbone(images))
        layer3 = F.interpolate(layer3, size=layer2.shape[-2:], mode="bilinear")
        features = torch.cat([layer2, layer3], dim=1).flatten(2).mT
        return (features if self.region is None else self.region.select(features, 8),)
