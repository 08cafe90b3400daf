"""A trained detector: one image from pixels to score, in four lines."""

import torch
from torch import Tensor

from models.memory_bank import MemoryBank
from models.patchcore import PatchCore
from models.scoring import AnomalyMap, Prediction
from models.wedge_net import WedgeNet, grid_size

Net = WedgeNet | PatchCore


class Detector:
    """An embedding and the memory of what good parts look like in it.

    ``calibration_scores`` (n,) are those of good parts that the bank has not seen, for a threshold; empty if unknown.
    """

    def __init__(self, net: Net, bank: MemoryBank, image_size: int, calibration_scores: Tensor | None = None):
        self.net = net
        self.calibration_scores = torch.zeros(0) if calibration_scores is None else calibration_scores
        self.bank = bank.to(net.device)
        self.grid = grid_size(image_size)
        self.anomaly_map = AnomalyMap(self.grid, image_size, net.scoring).to(net.device)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """(B, 3, H, W) images in [0, 1] -> their scores and anomaly maps."""
        return self.predict_features(self.net.embed(images))

    @torch.inference_mode()
    def predict_features(self, features: Tensor) -> Prediction:
        """(B, h*w, D) patch features, as ``net.embed`` gives them -> the images' scores and anomaly maps."""
        distances = self.bank.nearest(features.flatten(0, 1)).view(-1, *self.grid)
        return self.anomaly_map.predict(distances)
