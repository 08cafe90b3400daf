"""A trained checkpoint behind the interface of an exported model, for machines that have torch."""

from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from models.errors import InputError
from utils.data.dataset import as_images
from utils.line.edge_model import Judged, ModelInfo, model_info
from utils.pipeline.checkpoint import build_net, load_checkpoint, make_detector, misfit
from utils.settings import CONSTANTS, make_settings


class TorchModel:
    """A memory bank that ``train.py`` wrote, with the settings it was trained with; ``config`` gives the others.

    Raises:
        InputError: the file is absent, damaged, of a newer format, or the present backbone weights are others.
    """

    def __init__(self, path: Path, config: ModuleType) -> None:
        checkpoint = load_checkpoint(path)
        self.checkpoint = checkpoint
        values = {name: getattr(config, name) for name in CONSTANTS if hasattr(config, name)}
        # None says that a setting is not used: what is there then must only be valid.
        used = {name: value for name, value in checkpoint.settings.items() if value is not None}
        settings = make_settings(values | used)
        self.settings = settings
        net = build_net(settings)
        if reason := misfit(checkpoint, settings.embedding(), net):
            raise InputError(f"{path} does not fit: {reason}; set BACKBONE_WEIGHTS in config.py")
        self.detector = make_detector(checkpoint, net.with_state(checkpoint.state), settings.image_size, path)
        self.info: ModelInfo = model_info(
            checkpoint.category,
            checkpoint.calibration_scores.numpy(),
            settings.false_alarm_rate,
            checkpoint.settings,
            checkpoint.fingerprint,
            {"torch": torch.__version__},
            self.detector.inside,
        )

    def predict(self, images: np.ndarray) -> Judged:
        """Judge (N, H, W, 3) uint8 RGB images."""
        scores, maps, conditions, unfamiliar, _ = self.detector.predict(as_images(images))
        if conditions is None:
            conditions, unfamiliar = torch.zeros(len(images)).long(), torch.zeros(len(images)).bool()
        return Judged(*(tensor.cpu().numpy() for tensor in (scores, maps, conditions, unfamiliar)))
