"""A trained model at work on the line: what it knows about itself, and the ONNX file run without torch."""

import base64
import json
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from models.threads import session_options

import numpy as np

from models.conformal import conformal_threshold
from models.errors import InputError
from utils.data.image import Geometry
from utils.size import DEPTHS, as_size

FORMAT = 1
KEY = "wedge_net"  # of the model's metadata


@dataclass(frozen=True)
class ModelInfo:
    """What travels with a model.

    ``calibration_scores`` of good parts that it has not seen; ``threshold`` that they give at ``false_alarm_rate``;
    ``settings`` that the embedding depends on; ``fingerprint`` of the backbone's weights; ``versions`` that made it;
    ``region`` that is looked at, packed as :func:`pack_region` does, None for everything.
    """

    category: str
    calibration_scores: list[float]
    false_alarm_rate: float
    threshold: float
    settings: dict[str, Any]
    fingerprint: str
    versions: dict[str, str]
    region: str | None = None

    @property
    def geometry(self) -> Geometry:
        """How an image becomes the pixels that the model sees."""
        crop = self.settings["CENTER_CROP"]
        size = as_size(self.settings["IMAGE_SIZE"])
        return Geometry(size, self.settings["RESIZE"] if crop else min(size), crop)

    @property
    def bit_depth(self) -> int | None:
        """Of the camera that took the training images; None in a model that was made before it was asked."""
        return self.settings.get("BIT_DEPTH")

    @property
    def inside(self) -> np.ndarray | None:
        """(H, W) bool, where pictures are looked at; None for everywhere. Raises ValueError if it is damaged."""
        if self.region is None:
            return None
        height, width = self.geometry.image_size
        size = -(-height * width // 8)
        packed = zlib.decompressobj().decompress(base64.b64decode(self.region, validate=True), size)
        if len(packed) < size:
            raise ValueError
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=height * width).reshape(height, width) > 0

    @property
    def conditions(self) -> list[str]:
        """The conditions that an image may be in, by the numbers that a model gives."""
        return (self.settings.get("CONDITIONS") or "clean").split(",")

    def to_json(self) -> str:
        """Text for the model's metadata."""
        return json.dumps({"format": FORMAT} | asdict(self))

    @staticmethod
    def from_json(text: str) -> "ModelInfo":
        """Raises :class:`ValueError` if it is damaged or of a newer format."""
        contents = json.loads(text)
        if not isinstance(contents, dict) or not isinstance(contents.get("format"), int):
            raise ValueError("its description is damaged")
        if contents["format"] > FORMAT:
            raise ValueError(
                f"it has format {contents['format']}, newer than this program's {FORMAT}: update WEDGE-Net"
            )
        try:
            contents.setdefault("region", None)  # of models that were made before it was kept
            info = ModelInfo(**{field.name: contents[field.name] for field in fields(ModelInfo)})
            scores = np.asarray(info.calibration_scores, dtype=np.float64)
            if not np.isfinite([info.threshold, info.false_alarm_rate, *scores]).all() or not str(info.category):
                raise ValueError
            if not isinstance(info.geometry.resize, int) or info.geometry.resize < min(info.geometry.image_size):
                raise ValueError
            if info.bit_depth not in (None, *DEPTHS) or (info.inside is not None and not info.inside.any()):
                raise ValueError
        except (KeyError, TypeError, ValueError, zlib.error):
            raise ValueError("its description is incomplete or damaged") from None
        return info


def pack_region(inside: np.ndarray | None) -> str | None:
    """A region (H, W) bool as text of some hundred characters."""
    return None if inside is None else base64.b64encode(zlib.compress(np.packbits(inside).tobytes())).decode()


def model_info(
    category: str,
    calibration_scores: np.ndarray,
    false_alarm_rate: float,
    settings: dict[str, Any],
    fingerprint: str,
    versions: dict[str, str],
    inside: np.ndarray | None = None,
) -> ModelInfo:
    """A description with the threshold that belongs to it; ``inside`` (H, W) bool is the region that is looked at.

    Raises :class:`InputError` if there are no scores.
    """
    threshold = conformal_threshold(calibration_scores, false_alarm_rate)
    scores = [float(score) for score in calibration_scores]
    region = pack_region(inside)
    return ModelInfo(category, scores, false_alarm_rate, threshold, settings, fingerprint, versions, region)


class Judged(NamedTuple):
    """``scores`` (N,), anomaly ``maps`` (N, H, W), and for each image the condition that it was judged in, by its
    number among ``ModelInfo.conditions``, and whether it is ``unfamiliar``: unlike the training images in all of them.
    """

    scores: np.ndarray
    maps: np.ndarray
    conditions: np.ndarray
    unfamiliar: np.ndarray


class Model(Protocol):
    """What ``predict.py`` needs, whatever runs it."""

    info: ModelInfo

    def predict(self, images: np.ndarray) -> Judged:
        """Judge (N, H, W, 3) uint8 RGB images."""


class OnnxModel:
    """An exported model in onnxruntime, on the CPU.

    Args:
        path: a file that ``export_onnx.py`` wrote.
        threads: 0 leaves the number to onnxruntime.

    Raises:
        InputError: the file is absent, damaged, of a newer format or none of ours.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        if not path.is_file():
            raise InputError(f"model {path} is missing: export_onnx.py writes it")
        options = session_options(threads)
        options.log_severity_level = 4  # what goes wrong is raised, and said once
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an own class for everything that can be wrong with a file
            raise InputError(f"model {path} cannot be read, it is damaged or no ONNX file ({_line(error)})") from None
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise InputError(f"model {path} is no WEDGE-Net model: make one with export_onnx.py")
        try:
            self.info = ModelInfo.from_json(text)
        except ValueError as error:
            raise InputError(f"model {path} cannot be used: {error}") from None
        inputs = [(entry.name, entry.type, entry.shape[1:]) for entry in self.session.get_inputs()]
        if inputs != [("image", "tensor(uint8)", [*self.info.geometry.image_size, 3])]:
            raise InputError(f"model {path} cannot be used: its input is not what its description says")

    def predict(self, images: np.ndarray) -> Judged:
        """Judge (N, H, W, 3) uint8 RGB images.

        Raises :class:`InputError` if the model cannot run or gives no finite scores.
        """
        several = ["condition", "unfamiliar"] if self.info.settings.get("CONDITIONS") else []
        try:
            scores, maps, *found = self.session.run(["score", "anomaly_map", *several], {"image": images})
        except Exception as error:
            raise InputError(f"the model cannot run ({_line(error)}): export it again") from None
        if not np.isfinite(scores).all():
            raise InputError("the model gives scores that are not finite: export it again")
        return Judged(scores, maps, *(found or (np.zeros(len(images), int), np.zeros(len(images), bool))))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
