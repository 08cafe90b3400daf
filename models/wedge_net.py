"""WEDGE-Net's embedding: what each patch of an image looks like, as one vector."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.condition import CLEAN, Condition, ConditionStream, Reading
from models.engine import in_parts, make_engine
from models.errors import InputError
from models.frequency import FrequencyGate
from models.scoring import WEDGE_NET
from models.semantic import attention_mask
from models.whitening import Whitening


class Embedding(NamedTuple):
    """What a network makes of B images: ``features`` (B, h*w, D) of their patches, row by row; and, of WEDGE-Net's
    'condition' stream, ``reading``, the condition that each image is in."""

    features: Tensor
    reading: Reading | None = None


class WedgeNet(nn.Module):
    """Frozen backbone, frequency stream and semantic attention: images -> patch features, no gradient training.

    What a category's training images decide comes with ``with_stream`` (their light, and what tells the conditions
    apart) and ``with_whitening`` (the metric), or from a checkpoint with ``with_state``. Without a metric features are
    compared as they are.

    Args:
        backbone: frozen network that gives feature maps at stride 8 and stride 16 (``models.backbone.build_backbone``).
        frequency: the frequency stream: a ``ConditionStream``, the paper's ``FrequencyGate``, or None.
        use_semantic: append the stride-8 features weighed by the semantic attention.
        device: where the embedding is computed.
        engine: what runs the backbone, see ``models.engine.make_engine``.

    >>> from models.backbone import build_backbone
    >>> net = WedgeNet(build_backbone("efficientnet_lite0"))
    >>> net.embed(torch.rand(2, 3, 224, 224)).features.shape
    torch.Size([2, 784, 192])
    """

    scoring = WEDGE_NET

    def __init__(
        self,
        backbone: Backbone,
        *,
        frequency: ConditionStream | FrequencyGate | None = None,
        use_semantic: bool = True,
        device: torch.device | str = "cpu",
        engine: str = "auto",
    ):
        super().__init__()
        self.device = torch.device(device)
        self.fingerprint = backbone.fingerprint
        self.use_semantic = use_semantic
        self.gate = frequency if isinstance(frequency, FrequencyGate) else None
        self.stream = frequency if isinstance(frequency, ConditionStream) else None
        self.whitening = nn.ModuleList()  # one for each condition, or none
        self.raw_dim = sum(backbone.channels) + use_semantic * backbone.channels[0]
        self.backbone = make_engine(backbone, self.device, engine)
        self._latest: list[WedgeNet] = []  # what with_state gave last; in a list, since it is no part of this module
        self.requires_grad_(False).eval().to(self.device)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those that have a memory bank of their own, clean first."""
        return (CLEAN,) if self.stream is None else self.stream.conditions

    @property
    def dim(self) -> int:
        """Dimension D of a patch's features."""
        return self.whitening[0].dim if self.whitening else self.raw_dim

    def with_stream(self, stream: ConditionStream) -> "WedgeNet":
        """This network with a stream that knows a category's conditions; the backbone is shared, not copied."""
        return self._twin(stream=stream.to(self.device))

    def with_whitening(self, whitening: Sequence[Whitening]) -> "WedgeNet":
        """This network with a category's own metric, one for each condition; the backbone is shared, not copied."""
        return self._twin(whitening=nn.ModuleList(whitening).to(self.device))

    def _twin(self, **modules: nn.Module) -> "WedgeNet":
        twin = copy.copy(self)
        twin._modules = self._modules | modules
        return twin

    def state(self) -> dict[str, Tensor]:
        """All that is not the backbone's, on the CPU: what the frequency stream knows and the metric's linear maps."""
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
        twin = self._twin(**{name: copy.deepcopy(module) for name, module in self._modules.items()})
        maps = len(self.conditions) if "whitening.0.mean" in state else 0
        try:
            parts = [(state[f"whitening.{k}.mean"], state[f"whitening.{k}.matrix"]) for k in range(maps)]
            twin.whitening = nn.ModuleList(Whitening(*part) for part in parts)
            twin.load_state_dict(state)
            if any(len(whitening.mean) != self.raw_dim for whitening in twin.whitening):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            raise InputError("what it was made with does not fit the network: train it again") from None
        self._latest[:] = [twin.requires_grad_(False).eval().to(self.device)]
        return twin

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Embedding:
        """(B, 3, H, W) images in [0, 1] -> their patch features (B, h*w, D); h, w = ceil(H / 8), ceil(W / 8).

        Every statistic is per image: an image's features do not depend on the batch it comes in. D is the sum of both
        layers' channels, plus stride-8 channels again with the semantic stream (ResNet-50: 1536, or 2048), unless the
        metric's map leaves some out.
        """
        images = images.to(self.device, torch.float32)
        if self.stream is None:
            return Embedding(in_parts(self._features, self.backbone.at_once, images))
        reading = self.stream(images)
        return Embedding(in_parts(self._features, self.backbone.at_once, reading.images, reading.conditions), reading)

    def _features(self, images: Tensor, conditions: Tensor | None = None) -> Tensor:
        """Features (B, h*w, D) of images, in the metric of their conditions (B,)."""
        features = self.combine(images, *self.backbone(images))
        if not self.whitening:
            return features
        if conditions is None:
            return self.whitening[0](features)
        return by_condition(conditions, features, lambda condition, own: self.whitening[condition](own))

    def combine(self, images: Tensor, layer2: Tensor, layer3: Tensor) -> Tensor:
        """Features (B, h*w, D), before the metric, of images and the backbone's two feature maps; can be exported."""
        gated2, gated3 = (layer2, layer3) if self.gate is None else self.gate(images, (layer2, layer3))
        gated3 = F.interpolate(gated3, size=gated2.shape[-2:], mode="bilinear")
        parts = [F.normalize(gated2, dim=1), F.normalize(gated3, dim=1)]
        if self.use_semantic:
            parts.append(F.normalize(layer2, dim=1) * attention_mask(layer2) * 2)
        embedding = F.avg_pool2d(torch.cat(parts, dim=1), kernel_size=3, stride=1, padding=1)
        return embedding.flatten(2).transpose(1, 2)


def by_condition(conditions: Tensor, values: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Of (B, ...) values, those of each of the conditions (B,) that there are, through a function of condition and
    values; (B, ...) in the old order."""
    present = sorted(set(conditions.tolist()))
    if len(present) == 1:
        return function(present[0], values)
    parts = [(conditions == condition).nonzero()[:, 0] for condition in present]
    results = [function(condition, values[part]) for condition, part in zip(present, parts, strict=True)]
    return torch.cat(results)[torch.cat(parts).argsort()]


def grid_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in an image of this height and width in pixels: (28, 28) for (224, 224)."""
    height, width = image_size
    return -(-height // 8), -(-width // 8)


def _equal(own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return own.keys() == state.keys() and all(
        isinstance(state[name], Tensor) and torch.equal(own[name], state[name]) for name in own
    )
