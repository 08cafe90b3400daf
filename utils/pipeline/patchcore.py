"""PatchCore's memory banks as files: our own, and those that other programs write."""

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbone import IMAGENET_MEAN, IMAGENET_STD, build_backbone, feature_channels
from models.detector import Detector
from models.errors import InputError
from models.patchcore import PatchCore
from utils.pipeline.checkpoint import as_checkpoint, make_bank, make_detector, misfit, region_misfit
from utils.settings import Settings, ratio_name

_ANOMALIB_BANK = "model.memory_bank"  # in the state dict of a Lightning checkpoint of anomalib 2
_ANOMALIB_BACKBONE = "model.feature_extractor.feature_extractor."


def patchcore_path(settings: Settings, category: str, ratio: float) -> Path:
    """PatchCore_DIR/model_data_tile.pt for a whole bank, PatchCore_DIR/model_data_tile_10pct.pt for a part of it."""
    part = "" if ratio == 1 else f"_{ratio_name(ratio)}"
    return settings.patchcore_dir / f"model_data_{category}{part}.pt"


def find_patchcore(settings: Settings, category: str) -> tuple[Path, float] | None:
    """The largest of a category's banks and the ratio that its name tells; None if there is none. .pt before .ckpt."""
    name = re.compile(rf"model_data_{re.escape(category)}(?:_(\d+(?:_\d+)?)pct)?\.(?:pt|ckpt)")
    found = []
    for path in sorted(settings.patchcore_dir.glob("model_data_*")):
        if match := name.fullmatch(path.name):
            ratio = float(match[1].replace("_", ".")) / 100 if match[1] else 1.0
            found.append((ratio, path.suffix == ".pt", path))
    if not found:
        return None
    ratio, _, path = max(found)
    return path, ratio


def patchcore_embedding(settings: Settings) -> dict[str, Any]:
    """The settings that a bank of ours must agree with, under their constants' names."""
    names = ("IMAGE_SIZE", "CENTER_CROP", "RESIZE", "BIT_DEPTH")
    geometry = {name: value for name, value in settings.embedding().items() if name in names}
    return geometry | {"PATCHCORE_BACKBONE": settings.patchcore_backbone}


def build_patchcore(settings: Settings) -> PatchCore:
    """The baseline's embedding network that the settings describe; the same one for the same settings."""
    return _build(
        settings.patchcore_backbone, settings.patchcore_weights, settings.device, settings.engine, settings.precision
    )


@functools.lru_cache(maxsize=1)
def _build(name: str, weights: str | None, device: torch.device, engine: str, precision: str) -> PatchCore:
    with _own_names():
        backbone = build_backbone(name, weights)
    net = PatchCore(backbone, device=device, engine=engine, precision=precision)
    net.built_by = (_build, name, weights, device, engine, precision)  # as ``checkpoint.build_net`` has it
    return net


def patchcore_dim(settings: Settings) -> int:
    """Dimensions of the baseline's vectors. Raises :class:`InputError` if PATCHCORE_BACKBONE is none of timm's."""
    with _own_names():
        return sum(feature_channels(settings.patchcore_backbone))


@contextmanager
def _own_names() -> Iterator[None]:
    """The settings that messages on backbones name are those of the other backbone."""
    try:
        yield
    except InputError as error:
        message = str(error).replace("BACKBONE", "PATCHCORE_BACKBONE")
        raise InputError(message.replace("PATCHCORE_BACKBONE_WEIGHTS", "PATCHCORE_WEIGHTS")) from error


def load_patchcore(settings: Settings, category: str) -> Detector | None:
    """The baseline's detector with the largest bank of a category, or None if PatchCore_DIR holds none.

    A bank is one of train_patchcore.py's files, a dict with ``memory_bank``, a bare (M, D) tensor, or a PatchCore
    checkpoint of anomalib 2, whose own backbone weights are then used. Ours tell the backbone they were made with,
    whatever PATCHCORE_BACKBONE says now; of others' files nothing tells how their images were resized and cropped, so
    that the settings have to agree with it. Nothing in a file is executed.

    Raises :class:`InputError` if the file is unreadable, holds no bank, or does not fit the settings or the backbone.
    """
    found = find_patchcore(settings, category)
    if found is None:
        return None
    path, _ = found
    contents = _read(path)
    if isinstance(contents, dict) and "format" in contents:
        checkpoint = as_checkpoint(contents, path)
        made_with = checkpoint.settings.get("PATCHCORE_BACKBONE")
        if isinstance(made_with, str) and made_with != settings.patchcore_backbone:
            # PATCHCORE_WEIGHTS are those of the other backbone.
            settings = replace(settings, patchcore_backbone=made_with, patchcore_weights=None)
        net = build_patchcore(settings)
        reason = misfit(checkpoint, patchcore_embedding(settings), net) or region_misfit(checkpoint, settings, category)
        if reason is not None:
            raise InputError(
                f"memory bank {path} does not fit: {reason}; change the setting or run train_patchcore.py again"
            )
        return make_detector(checkpoint, net.with_state(checkpoint.state), settings.image_size, path)
    bank, weights = _find_bank(contents, path)
    dim = patchcore_dim(settings)
    if bank.shape[1] != dim:
        raise InputError(
            f"memory bank {path} does not fit: its vectors have {bank.shape[1]} dimensions, layers 2 and 3 of "
            f"{settings.patchcore_backbone} give {dim}; set PATCHCORE_BACKBONE to the network it was made with"
        )
    net = build_patchcore(settings) if weights is None else _own_network(settings, weights, path)
    return Detector(net, [make_bank(bank, path)], settings.image_size, bit_depth=settings.bit_depth)


class _Ignored:
    """Stands in for every class and function of a file but torch's own: made of anything, it does nothing."""

    def __new__(cls, *_args: Any) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        pass


def _read(path: Path) -> Any:
    """What ``torch.load`` finds in a file, without executing anything that the file names.

    A Lightning checkpoint holds settings of its program beside its tensors, as objects of classes that are not
    installed here and would not be trusted if they were.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive: torch.load says what it is, if it can
        names = []
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler or archive reader met
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"memory bank {path} cannot be read, it is damaged or no checkpoint ({reason})") from error


def _find_bank(contents: Any, path: Path) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The (M, D) vectors in another program's file, float32 or float16, and the weights of its backbone if it has them.

    Raises :class:`InputError` if there are no such vectors.
    """
    weights = None
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), Mapping):
        state = contents["state_dict"]
        bank = state.get(_ANOMALIB_BANK)
        names = [name for name in state if name.startswith(_ANOMALIB_BACKBONE)]
        weights = {name.removeprefix(_ANOMALIB_BACKBONE): state[name] for name in names} or None
    else:
        bank = contents.get("memory_bank") if isinstance(contents, dict) else contents
    if not isinstance(bank, Tensor) or bank.ndim != 2 or not bank.is_floating_point():
        raise InputError(
            f"{path} holds no PatchCore memory bank: expected a file of train_patchcore.py, a dict with an (M, D) "
            f"tensor 'memory_bank', such a tensor alone, or an anomalib checkpoint with '{_ANOMALIB_BANK}'"
        )
    return (bank if bank.dtype == torch.float16 else bank.float()), weights


def _own_network(settings: Settings, weights: dict[str, Tensor], path: Path) -> PatchCore:
    """The network that an anomalib checkpoint brings along: timm's weights are others than torchvision's."""
    try:
        backbone = build_backbone(settings.patchcore_backbone, weights)
    except InputError as error:
        raise InputError(
            f"memory bank {path} does not fit PATCHCORE_BACKBONE = {settings.patchcore_backbone!r}: {error}"
        ) from error
    # anomalib normalises by ImageNet's figures, whatever the network was trained with.
    backbone.mean, backbone.std = (torch.tensor(figure).view(1, 3, 1, 1) for figure in (IMAGENET_MEAN, IMAGENET_STD))
    return PatchCore(backbone, device=settings.device, engine=settings.engine, precision=settings.precision)
