"""A trained detector: one image from pixels to score, in four lines."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.memory_bank import MemoryBank
from models.scoring import AnomalyMap, image_scores
from models.wedge_net import WedgeNet, grid_size


class Prediction(NamedTuple):
    """``scores`` (B,), higher is more anomalous; ``maps`` (B, H, W) anomaly maps. Both are distances, float32."""

    scores: Tensor
    maps: Tensor


class Detector:
    """An embedding and the memory of what good parts look like in it."""

    def __init__(self, net: WedgeNet, bank: MemoryBank, image_size: int):
        self.net = net
        self.bank = bank.to(net.device)
        self.grid = grid_size(image_size)
        self.anomaly_map = AnomalyMap(self.grid, image_size).to(net.device)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """(B, 3, H, W) images in [0, 1] -> their scores and anomaly maps."""
        return self.predict_features(self.net.embed(images))

    @torch.inference_mode()
    def predict_features(self, features: Tensor) -> Prediction:
        """(B, h*w, D) patch features, as ``WedgeNet.embed`` gives them -> the images' scores and anomaly maps."""
        distances = self.bank.nearest(features.flatten(0, 1)).view(-1, *self.grid)
        maps = self.anomaly_map(distances)
        return Prediction(image_scores(maps), maps)
