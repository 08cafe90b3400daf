"""Any convolutional network of timm as far as stride 16. timm is optional: nothing else here imports it."""

import difflib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.errors import InputError, one_line

PREFIX = "timm:"
OLDEST = "1.0.31"  # the first of timm's releases in which every network gives feature maps in the one way used here
SIDE = 224  # pixels of the image that a network is tried on; it is on torch's "meta" device, where nothing is computed


class _NoAttention(TorchFunctionMode):
    """Raises InputError where a network multiplies features with features, which convolutions never do.

    Except by a single column: a weighted mean over all places, as some convolutional networks have it.
    """

    PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "einsum")

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "").strip("_") in self.PRODUCTS and result.shape[-1] > 1:
            raise InputError("it is a transformer, or has attention as one, and no convolutional network")
        return result


class Maps(NamedTuple):
    """Which of a network's feature maps have stride 8 and stride 16, and their channels."""

    indices: tuple[int, int]
    channels: tuple[int, int]


@functools.cache
def timm_maps(name: str) -> Maps:
    """The feature maps of the network called ``name`` ('timm:resnet18'); of several at one stride the last.

    Neither weights nor memory for them are needed.

    Raises:
        InputError: timm is not installed, or has no such network, or the network has no such maps or is none that
            consists of convolutions.
    """
    try:
        import timm
    except ImportError:
        timm = None
    if timm is None or _numbers(timm.__version__) < _numbers(OLDEST):
        raise InputError(f"BACKBONE = {name!r} needs: pip install 'timm>={OLDEST}'; or a network without 'timm:'")
    architecture, _, tag = name.removeprefix(PREFIX).partition(".")
    known = timm.list_models()
    if timm.is_model(architecture):
        known = timm.list_models(f"{architecture}.*", include_tags=True) if tag else [architecture]
    if name.removeprefix(PREFIX) not in known:
        near = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=3)
        hint = f"; did you mean {', '.join(PREFIX + match for match in near)}?" if near else ""
        raise InputError(f"BACKBONE = {name!r} is unknown to timm {timm.__version__}{hint}")
    try:
        return _find_maps(name)
    except InputError as error:
        raise InputError(f"BACKBONE = {name!r} cannot be used: {error}") from None


def _find_maps(name: str) -> Maps:
    with torch.device("meta"):
        try:
            reductions = [layer["reduction"] for layer in _create(name).feature_info.info]
        except Exception as error:  # not every network of timm gives feature maps, and each says so in its own way
            raise InputError(f"timm has no feature maps of it ({one_line(error)})") from error
        if not {8, 16} <= set(reductions):
            found = ", ".join(str(stride) for stride in sorted(set(reductions)))
            raise InputError(f"it needs feature maps at stride 8 and 16, and has them at {found}")
        indices = tuple(len(reductions) - 1 - reductions[::-1].index(stride) for stride in (8, 16))
        trunk = _create(name, out_indices=indices).eval()
        try:
            with _NoAttention(), torch.no_grad():
                shapes = [tuple(layer.shape) for layer in trunk(torch.zeros(1, 3, SIDE, SIDE))]
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"it does not take images of {SIDE} pixels ({one_line(error)})") from error
    if [shape[2:] for shape in shapes] != [(SIDE // 8,) * 2, (SIDE // 16,) * 2]:
        raise InputError(f"its maps of {SIDE} pixels have sizes {shapes[0][2:]} and {shapes[1][2:]}, not 1/8 and 1/16")
    return Maps(indices, (shapes[0][1], shapes[1][1]))


def _create(name: str, **how: Any) -> nn.Module:
    """The network behind timm's interface for feature maps, which removes all that comes after the last one."""
    import timm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names are still names
        # 'getter': the one way that leaves every tensor the name it has in the whole network.
        return timm.create_model(name.removeprefix(PREFIX), features_only=True, feature_cls="getter", **how)


def timm_trunk(name: str) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """Module from normalised images (B, 3, H, W) to maps at stride 8 and 16, with random weights; mean; std.

    Raises :class:`InputError` as :func:`timm_maps` does.
    """
    trunk = _create(name, out_indices=timm_maps(name).indices)
    return trunk, trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"]


def timm_weights(name: str) -> dict[str, Tensor]:
    """State dict of the whole network with timm's pretrained weights, downloaded once.

    Raises OSError if there are none, or they cannot be had.
    """
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name.removeprefix(PREFIX), pretrained=True).state_dict()
    except Exception as error:  # timm, its hub and the hub's own network library each raise what they like
        raise OSError(one_line(error)) from error


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")[:3]]
