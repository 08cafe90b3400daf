"""A trained memory bank as a file: everything that its scores depend on, written whole or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from torch import Tensor

from models.backbone import build_backbone
from models.condition import ConditionStream
from models.detector import Detector, Net
from models.errors import InputError
from models.frequency import FrequencyGate
from models.memory_bank import MemoryBank
from models.wedge_net import RECIPE, Recipe, WedgeNet
from utils.atomic import atomic_file
from utils.data.region import read_region, region_path
from utils.settings import Settings, ratio_name

FORMAT = 6
INSIDE = "region.inside"  # of a network's state


@dataclass(frozen=True)
class Checkpoint:
    """One category's memory banks and what they were made with.

    ``memory_banks`` for each scale (M, D) float32 or float16; ``scales`` (K, S) and ``offsets`` (K,), see ``Detector``;
    ``settings`` those the embedding depends on, and the BIT_DEPTH that was found; ``state`` what the embedding has
    beside the backbone; ``fingerprint`` of the backbone's weights; ``training_digest`` of the training files;
    ``calibration_scores`` (n,) of training images against a bank without them; ``picture_sizes`` of the training files:
    the smallest and the largest (width, height); ``remembered`` what remember.py has added since, a dict for each time.
    """

    memory_banks: list[Tensor]
    scales: Tensor
    offsets: Tensor
    settings: dict[str, Any]
    state: dict[str, Tensor]
    fingerprint: str
    category: str
    sampling_ratio: float
    sampling_method: str
    seed: int
    training_images: int
    training_digest: str
    calibration_scores: Tensor
    picture_sizes: list[tuple[int, int]]
    remembered: list[dict[str, Any]]


def bank_path(save_dir: Path, category: str, ratio: float) -> Path:
    """SAVE_DIR/10pct/model_data_tile_10pct.pt"""
    return save_dir / ratio_name(ratio) / f"model_data_{category}_{ratio_name(ratio)}.pt"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary file, then rename. Raises :class:`InputError` if the disk is full or not writable."""
    contents = {"format": FORMAT} | {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    contents["state"] = {name: _packed(name, tensor) for name, tensor in checkpoint.state.items()}
    try:
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it could not be written whole"
        raise InputError(f"cannot save {path} ({reason}): is the disk full? Nothing that was there is lost") from error


def load_checkpoint(path: Path, *, metadata_only: bool = False) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed. With ``metadata_only`` the bank stays on the disk.

    Raises :class:`InputError` if the file is absent, truncated, not a WEDGE-Net checkpoint, or of a newer format.
    """
    if not path.is_file():
        raise InputError(f"memory bank {path} is missing: make it with train.py and the same settings")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=metadata_only or None)
    except Exception as error:  # torch raises whatever its unpickler or archive reader met
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"memory bank {path} cannot be read, it is damaged or no checkpoint ({reason})") from error
    return as_checkpoint(contents, path)


def as_checkpoint(contents: Any, path: Path) -> Checkpoint:
    """What ``torch.load`` read from ``path``, checked. Raises :class:`InputError` if it is none of ours, or newer."""
    names = {field.name for field in fields(Checkpoint)}
    if not isinstance(contents, dict) or not isinstance(contents.get("format"), int):
        raise InputError(f"{path} is not a WEDGE-Net memory bank: it has no format version")
    if contents["format"] > FORMAT:
        raise InputError(
            f"{path} has format {contents['format']}, newer than this program's {FORMAT}: update WEDGE-Net"
        )
    if contents["format"] < FORMAT:
        raise InputError(f"{path} was made by an older version of this program: train it again (--overwrite)")
    if missing := sorted(names - set(contents)):
        raise InputError(f"{path} is not a complete WEDGE-Net memory bank: it lacks {', '.join(missing)}")
    for name, kind in get_type_hints(Checkpoint).items():
        if not isinstance(contents[name], get_origin(kind) or kind):
            raise InputError(f"{path} is damaged: its {name} is of type {type(contents[name]).__name__}")
    banks, scales, offsets = (contents[name] for name in ("memory_banks", "scales", "offsets"))
    if not banks or not all(isinstance(bank, Tensor) and bank.ndim == 2 for bank in banks):
        raise InputError(f"{path} is damaged: its memory_banks are not matrices")
    if contents["calibration_scores"].ndim != 1 or offsets.ndim != 1 or scales.shape != (len(offsets), len(banks)):
        raise InputError(f"{path} is damaged: its calibration_scores, scales or offsets have a wrong shape")
    if not (scales.isfinite().all() and offsets.isfinite().all()):  # a score of NaN is above no threshold
        raise InputError(f"{path} is damaged: its scales or offsets are not finite")
    if not all(isinstance(tensor, Tensor) for tensor in contents["state"].values()):
        raise InputError(f"{path} is damaged: its state holds what is no tensor")
    contents["state"] = {name: tensor.float() for name, tensor in contents["state"].items()}
    return Checkpoint(**{name: contents[name] for name in names})


def _packed(name: str, tensor: Tensor) -> Tensor:
    """In no more than what they hold: metric and lenses in half precision, see ``Affine.rounded``, a mask in bytes."""
    if name == INSIDE:
        return tensor.to(torch.uint8)
    return tensor.half() if name.endswith(".matrices") else tensor


def misfit(checkpoint: Checkpoint, embedding: Mapping[str, Any], net: Net) -> str | None:
    """The first way in which a bank does not fit the present embedding and its settings, or None if it does."""
    for name, wanted in embedding.items():
        saved = checkpoint.settings.get(name)
        if saved != wanted:
            return f"it was made with {name} = {saved!r}, the setting is {wanted!r}"
    if checkpoint.fingerprint != net.fingerprint:
        return f"it was made with other backbone weights ({checkpoint.fingerprint}, now {net.fingerprint})"
    if len(checkpoint.offsets) != len(net.conditions):
        return f"it holds {len(checkpoint.offsets)} conditions, the settings {len(net.conditions)}"
    return None


def region_misfit(checkpoint: Checkpoint, settings: Settings, category: str) -> str | None:
    """How the region that lies beside the images is not the one that a bank was made with, or None.

    A bank brings its region along: where none lies there, nothing differs. Raises :class:`InputError` if it cannot be
    read.
    """
    path = region_path(settings, category)
    if path is None:
        return None
    saved, inside = checkpoint.state.get(INSIDE), read_region(path, settings)
    if saved is None:
        return f"it was made without a region, and {path} is there now"
    if not torch.equal(saved != 0, torch.from_numpy(inside)):
        return f"it was made with another region than {path}"
    return None


def build_net(settings: Settings, recipe: Recipe = RECIPE) -> WedgeNet:
    """The embedding network that the settings describe, without what comes from a category's training images."""
    backbone = build_backbone(settings.backbone, settings.backbone_weights)
    frequency = None
    if settings.form == "paper":
        frequency = FrequencyGate(settings.wavelet_type, backbone.channels, settings.seed)
    elif len(settings.conditions) > 1 or recipe.align_light:
        frequency = ConditionStream(settings.wavelet_type, settings.conditions, recipe.align_light, settings.image_size)
    net = WedgeNet(
        backbone,
        form=settings.form,
        frequency=frequency,
        use_semantic=settings.use_semantic,
        recipe=recipe,
        device=settings.device,
        engine=settings.engine,
        precision=settings.precision,
    )
    net.built_by = (build_net, settings, recipe)  # what a process elsewhere builds the same from
    return net


def make_bank(vectors: Tensor, path: Path) -> MemoryBank:
    """The vectors of a file as a memory bank. Raises :class:`InputError` naming the file if they cannot be used."""
    try:
        return MemoryBank(vectors)
    except InputError as error:
        raise InputError(f"memory bank {path} cannot be used: {error}") from error


def make_detector(checkpoint: Checkpoint, net: Net, image_size: tuple[int, int], path: Path) -> Detector:
    """The detector of a checkpoint of ``path`` that fits ``net``, which is as it was when the checkpoint was made.

    Raises :class:`InputError` if a bank cannot be used.
    """
    if net.region is not None and tuple(net.region.inside.shape) != tuple(image_size):
        raise InputError(f"{path} is damaged: its region has another size than its images")
    banks = [make_bank(vectors, path) for vectors in checkpoint.memory_banks]
    if tuple(bank.dim for bank in banks) != net.dims:
        found, wanted = (" and ".join(map(str, dims)) for dims in ([bank.dim for bank in banks], net.dims))
        raise InputError(f"{path} is damaged: its vectors have {found} dimensions, its metric {wanted}")
    return Detector(
        net,
        banks,
        image_size,
        checkpoint.scales,
        checkpoint.offsets,
        checkpoint.calibration_scores,
        checkpoint.settings.get("BIT_DEPTH"),
    )


def load_detector(settings: Settings, category: str, ratio: float, net: WedgeNet) -> tuple[Detector, Checkpoint]:
    """The detector of one category and ratio; of ``net`` it shares the backbone, the rest comes from the checkpoint.

    Raises :class:`InputError` if its bank is missing, unreadable, or does not fit the settings (which one is said).
    """
    path = bank_path(settings.save_dir, category, ratio)
    checkpoint = load_checkpoint(path)
    if reason := misfit(checkpoint, settings.embedding(), net) or region_misfit(checkpoint, settings, category):
        raise InputError(f"memory bank {path} does not fit: {reason}; change the setting or train again")
    return make_detector(checkpoint, net.with_state(checkpoint.state), settings.image_size, path), checkpoint
