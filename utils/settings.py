"""config.py and the command line, checked once and frozen: every script starts here.

A setting is one constant of config.py, one flag (``IMAGE_SIZE``: ``--image-size``), one field of :class:`Settings`.
"""

import argparse
import ast
import dataclasses
import difflib
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from models.threads import cores

import pywt
import torch

from models.backbone import CHOICES, backbone_name
from models.condition import parse_conditions
from models.engine import ENGINES, PRECISIONS
from models.errors import InputError
from models.wedge_net import FORMS
from utils.console import Parser
from utils.size import DEPTHS, SMALLEST, Size, as_size

ALL_RATIOS = (1.0, 0.1, 0.01)

Check = Callable[[Any], Any]  # value as given -> value as used; raises ValueError("what is allowed")


def _integer(low: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"a whole number of at least {low}")
        return value

    return check


def _text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip() or "\0" in str(value):
        raise ValueError("a text that is not empty")
    return str(value).strip()


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser()


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _optional_path(value: Any) -> Path | None:
    return None if value is None else _path(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def _choice(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return value

    return check


def _wavelet(value: Any) -> str:
    if value not in pywt.wavelist(kind="discrete"):
        raise ValueError("a discrete wavelet of PyWavelets, such as haar, db2, sym4 or bior2.2")
    return value


def _workers(value: Any) -> int:
    if value == "auto":
        return min(4, cores())
    try:
        return _integer(0)(value)
    except ValueError:
        raise ValueError("'auto' or a whole number of at least 0") from None


def _ratios(value: Any) -> tuple[float, ...]:
    """0.1, '0.1', '0.1, 0.01', a list of numbers or 'all' -> the ratios in descending order."""
    allowed = "numbers in (0, 1], such as 0.1 or '0.1, 0.01', or 'all' for 1, 0.1 and 0.01"
    if isinstance(value, str):
        if value.strip().lower() == "all":
            return ALL_RATIOS
        value = value.split(",")
    try:
        ratios = {float(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if not isinstance(v, bool)}
    except (TypeError, ValueError):
        raise ValueError(allowed) from None
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(allowed)
    return tuple(sorted(ratios, reverse=True))


def _conditions(value: Any) -> tuple[str, ...]:
    """'clean, noise10' or a list of names -> the names, clean first, kind by kind in ascending order."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        names = ()
    return tuple(condition.name for condition in parse_conditions([name.strip() for name in names]))


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError("a number above 0 and below 1")
    return float(value)


def _optional_depth(value: Any) -> int | None:
    if value is not None and (type(value) is not int or value not in DEPTHS):
        raise ValueError(f"None or one of {', '.join(map(str, DEPTHS))}")
    return value


def _device(value: Any) -> torch.device:
    allowed = "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"
    if not isinstance(value, str):
        raise ValueError(allowed)
    if value == "auto":
        value = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(value)
    except RuntimeError:
        raise ValueError(allowed) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(allowed)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"'auto' or 'cpu' here: this machine shows {torch.cuda.device_count()} CUDA devices to torch")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("'auto' or 'cpu' here: this machine has no MPS device")
    return device


def _scheduler(value: Any) -> str | None:
    text = "" if value is None else _text(value)
    local = text.startswith("local:") and text[6:].isdecimal() and int(text[6:]) > 0
    if value is not None and not (local or "://" in text or text.endswith(".json")):
        raise ValueError(
            "None, 'local:4' (processes here), a scheduler's address ('tcp://host:8786') or its .json file"
        )
    return text or None


def _optional_count(value: Any) -> int | None:
    try:
        return None if value is None else _integer(1)(value)
    except ValueError as error:
        raise ValueError(f"None or {error}") from None


def _setting(check: Check, meaning: str, constant: str | None = None) -> Any:
    return dataclasses.field(metadata={"check": check, "meaning": meaning, "constant": constant})


@dataclass(frozen=True)
class Settings:
    """All settings, valid and in the form the code uses. Fields are the constants of config.py in lower case."""

    data_path: Path = _setting(_path, "data set in the MVTec AD layout")
    category: str = _setting(_text, "one category, a comma list, or 'all'")
    image_size: Size = _setting(as_size, "what the network sees, in pixels: a number (square) or (height, width)")
    resize: int = _setting(_integer(SMALLEST), "length of the shorter side before the centre crop, in pixels")
    center_crop: bool = _setting(
        _truth, "True: the centre is cut out, the edges are not looked at; False: the whole image"
    )
    region: Path | None = _setting(
        _optional_path, "a picture, white where images are looked at; None = the category's region.png, if there is one"
    )
    bit_depth: int | None = _setting(
        _optional_depth, "of files with 16 bits a channel: bits that are used; None = found from the training images"
    )
    batch_size: int = _setting(_integer(1), "images at a time")
    num_workers: int = _setting(_workers, "threads that decode images: 'auto' or a number, 0 = none")
    seed: int = _setting(_integer(0), "seed of the coreset's start, random sampling and the frequency gate")
    scheduler: str | None = _setting(
        _scheduler,
        "Dask workers that do the categories: None, 'local:4', 'tcp://host:8786' or a scheduler's .json file",
    )
    shard_images: int | None = _setting(
        _optional_count, "training images that are held in memory at a time; None = all of a category"
    )
    device: torch.device = _setting(_device, "'auto' (CUDA, then MPS, then CPU), 'cpu', 'cuda', 'cuda:N' or 'mps'")
    engine: str = _setting(_choice(*ENGINES), "what runs the backbone: " + ", ".join(ENGINES))
    precision: str = _setting(_choice(*PRECISIONS), "of the backbone on an NVIDIA GPU: " + ", ".join(PRECISIONS))
    backbone: str = _setting(backbone_name, f"frozen network: {CHOICES}")
    backbone_weights: str | None = _setting(_optional_text, "None = ImageNet, a state-dict file, or 'random' (dry run)")
    wavelet_type: str = _setting(_wavelet, "discrete wavelet of PyWavelets for the frequency stream")
    form: str = _setting(_choice(*FORMS), "the method: wedge (ours) or paper (the paper's own form)")
    conditions: tuple[str, ...] = _setting(_conditions, "form 'wedge': conditions to be robust to, a comma list")
    use_semantic: bool = _setting(_truth, "the semantic attention stream")
    save_dir: Path = _setting(_path, "folder for banks, tables and figures")
    sampling_ratio: tuple[float, ...] = _setting(_ratios, "share of patches kept: a number, a comma list, or 'all'")
    sampling_method: str = _setting(_choice("coreset", "random"), "how patches are chosen: coreset or random")
    false_alarm_rate: float = _setting(_rate, "share of good parts that may be called defective")
    semanticoff_dir: Path = _setting(_path, "banks trained with USE_SEMANTIC = False", "SemanticOFF_DIR")
    semanticon_dir: Path = _setting(_path, "banks trained with USE_SEMANTIC = True", "SemanticON_DIR")
    patchcore_dir: Path = _setting(_path, "memory banks of the PatchCore baseline", "PatchCore_DIR")
    patchcore_backbone: str = _setting(
        backbone_name, "the baseline's frozen network, any of BACKBONE's; a bank knows its own"
    )
    patchcore_weights: str | None = _setting(_optional_text, "the baseline's weights, as BACKBONE_WEIGHTS")

    def embedding(self) -> dict[str, Any]:
        """The settings that an embedding depends on, under their constants' names: what a bank must agree with."""
        names = ("FORM", "IMAGE_SIZE", "CENTER_CROP", "RESIZE", "BACKBONE", "WAVELET_TYPE", "USE_SEMANTIC")
        values = {name: getattr(self, name.lower()) for name in names} | {"IMAGE_SIZE": self.image_size.written()}
        if not self.center_crop:
            values["RESIZE"] = None  # not used then
        if self.bit_depth is not None:  # otherwise any will do
            values["BIT_DEPTH"] = self.bit_depth
        values["CONDITIONS"] = ",".join(self.conditions) if self.form == "wedge" else None
        return values


CONSTANTS = {field.metadata["constant"] or field.name.upper(): field for field in dataclasses.fields(Settings)}
BY_FORM = (  # were settings once; old config files and command lines are told what has taken their place
    "BANK_DTYPE", "CLEAN_SHARE", "EMBEDDING_DIM", "FREQUENCY_STREAM", "LIGHT_ALIGNMENT", "METRIC", "WHITENING_SHRINKAGE"
)  # fmt: skip
_GONE = "no setting any more, FORM decides it: 'wedge' (ours) or 'paper' (the paper's)"


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Check ``values`` (a value for each constant of config.py, under its name) and freeze them.

    Raises :class:`InputError` naming the constant, what was given and what is allowed.
    """
    checked = {}
    for constant, field in CONSTANTS.items():
        if constant not in values:
            raise InputError(f"setting {constant} is missing from config.py ({field.metadata['meaning']})")
        try:
            checked[field.name] = field.metadata["check"](values[constant])
        except ValueError as error:
            raise InputError(f"{constant} is {values[constant]!r}; it must be {error}") from None
    settings = Settings(**checked)
    shorter = min(settings.image_size)
    if settings.center_crop and settings.resize < shorter:
        raise InputError(
            f"RESIZE is {settings.resize}, smaller than the crop: it must be at least IMAGE_SIZE's shorter side "
            f"({shorter}), or set CENTER_CROP = False"
        )
    return settings


class SettingsParser(Parser):
    """A script's command line: a flag for every setting, ``--config FILE``, and what the script itself adds."""

    def __init__(self, config: ModuleType, description: str | None):
        super().__init__(description)
        self.config = config

    def read(self, argv: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
        """Merge config.py, ``--config FILE`` and the flags; returns the settings and the script's own options."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.error = self.error  # type: ignore[method-assign]
        first.add_argument("--config")
        values = _constants(vars(self.config), "config.py")
        file = first.parse_known_args(argv)[0].config
        if file is not None:
            values |= _constants(_run_file(file), file)

        self.add_argument("--config", metavar="FILE", help="a file like config.py; what it leaves out keeps its value")
        group = self.add_argument_group("settings, with their present values")
        for constant, field in CONSTANTS.items():
            group.add_argument(
                _flag(constant),
                dest=constant,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{field.metadata['meaning']} (now: {values.get(constant)})".replace("%", "%%"),
            )
        for constant in BY_FORM:
            self.add_argument(_flag(constant), type=_refuse, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        options = self.parse_args(argv)
        for constant, field in CONSTANTS.items():
            if hasattr(options, constant):
                values[constant] = _from_text(getattr(options, constant), field.metadata["check"])
                delattr(options, constant)
        return make_settings(values), options


def positive(text: str) -> int:
    """A whole number of at least 1, as the type of a script's own flag."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _flag(constant: str) -> str:
    return "--" + constant.lower().replace("_", "-")


def _refuse(_text: str) -> None:
    raise argparse.ArgumentTypeError(_GONE)


def _from_text(text: str, check: Check) -> Any:
    """A flag's text as the constant would be written: numbers, True, False and None, unless the setting takes text."""
    if check in (_text, _path):
        return text
    spelled = {"true": True, "false": False, "none": None}
    if text.lower() in spelled:
        return spelled[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _run_file(file: str) -> dict[str, Any]:
    try:
        return runpy.run_path(file)
    except OSError as error:
        raise InputError(f"--config {file}: {error.strerror or error}") from None
    except Exception as error:  # the user's file may raise anything
        raise InputError(f"--config {file}: {type(error).__name__}: {error}") from None


def _constants(namespace: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The settings among a config file's names. A constant that is not a setting is a slip worth stopping for."""
    for name in namespace:
        if name in BY_FORM:
            raise InputError(f"{name} in {file}: {_GONE}")
        if name not in CONSTANTS and name.isupper() and not name.startswith("_"):
            near = difflib.get_close_matches(name, CONSTANTS, n=1)
            raise InputError(f"unknown setting {name} in {file}" + (f"; did you mean {near[0]}?" if near else ""))
    return {name: namespace[name] for name in CONSTANTS if name in namespace}


def ratio_name(ratio: float) -> str:
    """The name of a sampling ratio in folders and files: 1.0 -> '100pct', 0.1 -> '10pct', 0.001 -> '0_1pct'."""
    return f"{ratio * 100:.10g}".replace(".", "_") + "pct"
