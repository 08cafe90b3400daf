"""WEDGE-Net's embedding: what each patch of an image looks like, as one vector at each scale."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.condition import CLEAN, Condition, ConditionStream, Reading
from models.engine import in_parts, make_engine
from models.errors import InputError
from models.frequency import FrequencyGate
from models.region import RegionOfInterest
from models.scoring import PAPER, WEDGE_NET, Scoring
from models.semantic import attention_mask
from models.whitening import SHRINKAGE, Affine, ConditionMaps

FORMS = ("wedge", "paper")


@dataclass(frozen=True)
class Recipe:
    """The figures of form 'wedge' that the ablation varies and nobody else needs to.

    ``layers`` that are remembered; ``centring``, the share of an image's own mean that is taken out of layer 3, so that
    its light counts less; ``shrinkage`` of the metric, None for plain Euclidean distances; ``averaged``, whether the
    means of cells are remembered or the patches that were chosen, see ``Cells``; ``scoring``; ``align_light``.
    """

    layers: tuple[int, ...] = (2, 3)
    centring: float = 0.7
    shrinkage: float | None = SHRINKAGE
    averaged: bool = True
    scoring: Scoring = WEDGE_NET
    align_light: bool = True


RECIPE = Recipe()


class Embedding(NamedTuple):
    """What a network makes of B images.

    ``features``, for each scale those of their patches (B, P, D), row by row: all h*w of the grid, or those inside the
    region of interest; and, of WEDGE-Net's frequency stream, ``reading``, the condition that each image is in.
    """

    features: tuple[Tensor, ...]
    reading: Reading | None = None


class WedgeNet(nn.Module):
    """Frozen backbone, frequency stream and semantic attention: images -> patch features, no gradient training.

    Form 'wedge': two scales, layer 2 on its grid of stride 8 and layer 3 on its grid of stride 16, with the lengths
    that the network gives them, each averaged over 3 x 3 places. What a category's training images decide comes with
    ``with_stream`` (their light, and what tells the conditions apart) and ``with_maps`` (metric and lenses), or from a
    checkpoint with ``with_state``; what of the pictures is looked at, with ``with_region``. Form 'paper': one scale,
    both layers gated by the frequency stream and normalised.

    Args:
        backbone: frozen network that gives feature maps at stride 8 and stride 16 (``models.backbone.build_backbone``).
        form: one of ``FORMS``.
        frequency: the frequency stream: a ``ConditionStream`` for 'wedge', a ``FrequencyGate`` for 'paper', or None.
        use_semantic: 'wedge': weigh layer 2 by the semantic attention; 'paper': append it, so weighed.
        recipe: of form 'wedge'.
        device: where the embedding is computed.
        engine, precision: what runs the backbone, and how exactly, see ``models.engine.make_engine``.

    >>> from models.backbone import build_backbone
    >>> net = WedgeNet(build_backbone("efficientnet_lite0"))
    >>> [tuple(scale.shape) for scale in net.embed(torch.rand(2, 3, 224, 224))]
    [(2, 784, 40), (2, 196, 112)]
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        form: str = "wedge",
        frequency: ConditionStream | FrequencyGate | None = None,
        use_semantic: bool = False,
        recipe: Recipe = RECIPE,
        device: torch.device | str = "cpu",
        engine: str = "auto",
        precision: str = "float32",
    ):
        super().__init__()
        self.device = torch.device(device)
        self.backbone_name, self.fingerprint = backbone.name, backbone.fingerprint
        self.form, self.use_semantic, self.recipe = form, use_semantic, recipe
        self.scoring = PAPER if form == "paper" else recipe.scoring
        self.gate = frequency if isinstance(frequency, FrequencyGate) else None
        self.stream = frequency if isinstance(frequency, ConditionStream) else None
        self.register_module("region", None)  # everything is looked at
        self.maps = nn.ModuleList()  # one for each scale, or none: features are compared as they are
        layer2, layer3 = backbone.channels
        self.raw_dims = tuple({2: layer2, 3: layer3}[layer] for layer in recipe.layers)
        if form == "paper":
            self.raw_dims = (layer2 + layer3 + use_semantic * layer2,)
        self.strides = (8,) if form == "paper" else tuple({2: 8, 3: 16}[layer] for layer in recipe.layers)
        self.backbone = make_engine(backbone, self.device, engine, precision)
        self._latest: list[WedgeNet] = []  # what with_state gave last; in a list, since it is no part of this module
        self.requires_grad_(False).eval().to(self.device)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those that an image may be in, clean first."""
        return (CLEAN,) if self.stream is None else self.stream.conditions

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions D of a patch's features, for each scale."""
        return tuple(maps.matrices.shape[2] for maps in self.maps) if self.maps else self.raw_dims

    def grids(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of patches, for each scale, that images of this height and width are seen in."""
        return [grid_size(image_size, stride) for stride in self.strides]

    def patches(self, image_size: tuple[int, int], scale: int) -> int:
        """Patches of an image that are looked at, at a scale."""
        if self.region is not None:
            return len(self.region.patches(self.strides[scale]))
        return math.prod(self.grids(image_size)[scale])

    def with_stream(self, stream: ConditionStream) -> "WedgeNet":
        """This network with a stream that knows a category's conditions; the backbone is shared, not copied."""
        return self._twin(stream=stream.to(self.device))

    def with_region(self, inside: Tensor) -> "WedgeNet":
        """This network looking at nothing but where ``inside`` (H, W) is not 0; everything else is shared.

        Raises :class:`InputError` if no patch is inside.
        """
        region = region_of_interest(inside).to(self.device)
        if self.stream is None:
            return self._twin(region=region)
        stream = copy.deepcopy(self.stream)
        stream.look_inside(inside)
        return self._twin(region=region, stream=stream.to(self.device))

    def with_maps(self, maps: Sequence[Sequence[Affine]]) -> "WedgeNet":
        """This network with a category's metric and lenses: for each scale a map for each condition, clean first."""
        return self._twin(maps=nn.ModuleList(ConditionMaps(scale) for scale in maps).to(self.device))

    def _twin(self, **modules: nn.Module) -> "WedgeNet":
        twin = copy.copy(self)
        twin._modules = self._modules | modules
        return twin

    def state(self) -> dict[str, Tensor]:
        """All that is not the backbone's, on the CPU: what the frequency stream knows, metric and lenses."""
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
        try:
            scales = range(len(self.raw_dims)) if "maps.0.matrices" in state else ()
            parts = [(state[f"maps.{scale}.matrices"], state[f"maps.{scale}.offsets"][:, 0]) for scale in scales]
            twin.maps = nn.ModuleList(
                ConditionMaps([Affine(*one) for one in zip(*part, strict=True)]) for part in parts
            )
            if "region.inside" in state:
                twin = twin.with_region(state["region.inside"])
            twin.load_state_dict(state)
            for maps, dim in zip(twin.maps, self.raw_dims, strict=False):
                kept = maps.matrices.shape[-1]
                if maps.matrices.shape != (len(self.conditions), dim, kept) or maps.offsets.shape[-1] != kept:
                    raise ValueError
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            raise InputError("what it was made with does not fit the network: train it again") from None
        self._latest[:] = [twin.requires_grad_(False).eval().to(self.device)]
        return twin

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) images in [0, 1] -> their patch features (B, P, D), one tensor for each scale.

        Every statistic is per image: an image's features do not depend on the batch it comes in.
        """
        return self.look(images).features

    @torch.inference_mode()
    def look(self, images: Tensor, condition: int | None = None) -> Embedding:
        """``embed``, and the condition that each image is judged in; ``condition`` if that is known."""
        images = images.to(self.device, torch.float32)
        images, reading = self.prepare(images)
        if reading is None:
            return Embedding(in_parts(self._features, self.backbone.at_once, images))
        if condition is not None:
            reading = reading._replace(conditions=torch.full_like(reading.conditions, condition))
        return Embedding(in_parts(self._features, self.backbone.at_once, images, reading.conditions), reading)

    def prepare(self, images: Tensor) -> tuple[Tensor, Reading | None]:
        """(B, 3, H, W) images -> as the backbone sees them, and what the frequency stream does; can be exported."""
        images = self.fill(images)
        if self.stream is None:
            return images, None
        reading = self.stream(images)
        return reading.images, reading

    def fill(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, filled outside the region of interest if there is one."""
        return images if self.region is None else self.region(images)

    def _features(self, images: Tensor, conditions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Features of images in their conditions (B,), in the metric."""
        return self.combine(images, *self.backbone(images), conditions)

    def combine(
        self, images: Tensor, layer2: Tensor, layer3: Tensor, conditions: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Features (B, P, D) of images and the backbone's two feature maps, for each scale; can be exported."""
        scales = self._paper(images, layer2, layer3) if self.form == "paper" else self._wedge(layer2, layer3)
        pooled = [F.avg_pool2d(scale, kernel_size=3, stride=1, padding=1).flatten(2).mT for scale in scales]
        if self.region is not None:
            pooled = [self.region.select(*each) for each in zip(pooled, self.strides, strict=True)]
        if not self.maps:
            return tuple(pooled)
        return tuple(maps(scale, conditions) for maps, scale in zip(self.maps, pooled, strict=True))

    def _wedge(self, layer2: Tensor, layer3: Tensor) -> list[Tensor]:
        """The scales that are remembered, each on its own grid and with the lengths that the network gives."""
        if self.use_semantic:
            layer2 = layer2 * (attention_mask(layer2) + 0.5)
        layer3 = layer3 - self.recipe.centring * self._own_mean(layer3)
        return [{2: layer2, 3: layer3}[layer] for layer in self.recipe.layers]

    def _own_mean(self, layer3: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 1, 1): each image's own mean, over what is looked at."""
        if self.region is None:
            return layer3.mean(dim=(2, 3), keepdim=True)
        return layer3.flatten(2).index_select(2, self.region.patches(16)).mean(dim=2)[..., None, None]

    def _paper(self, images: Tensor, layer2: Tensor, layer3: Tensor) -> list[Tensor]:
        """Both layers gated, normalised and concatenated on layer 2's grid, with layer 2 once more by attention."""
        gated2, gated3 = (layer2, layer3) if self.gate is None else self.gate(images, (layer2, layer3))
        gated3 = F.interpolate(gated3, size=gated2.shape[-2:], mode="bilinear")
        parts = [F.normalize(gated2, dim=1), F.normalize(gated3, dim=1)]
        if self.use_semantic:
            parts.append(F.normalize(layer2, dim=1) * attention_mask(layer2) * 2)
        return [torch.cat(parts, dim=1)]


def grid_size(image_size: tuple[int, int], stride: int = 8) -> tuple[int, int]:
    """Rows and columns of patches that an image of this height and width is seen in: (28, 28) for (224, 224)."""
    height, width = image_size
    return -(-height // stride), -(-width // stride)


def region_of_interest(inside: Tensor) -> RegionOfInterest:
    """The region of either method's networks, for images of the mask's (H, W), see ``RegionOfInterest``."""
    return RegionOfInterest(inside, {stride: grid_size(tuple(inside.shape), stride) for stride in (8, 16)})


def _equal(own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    return own.keys() == state.keys() and all(
        isinstance(state[name], Tensor) and torch.equal(own[name], state[name]) for name in own
    )
