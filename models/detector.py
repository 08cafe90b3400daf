"""A trained detector: one image from pixels to score, in a few lines."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.memory_bank import MemoryBank
from models.patchcore import PatchCore
from models.scoring import AnomalyMap, Prediction
from models.wedge_net import Embedding, WedgeNet, by_condition, grid_size

Net = WedgeNet | PatchCore


class Detector:
    """An embedding and the memory of what good parts look like in it.

    Args:
        net: the embedding.
        banks: one for each of the net's conditions, in their order.
        image_size: height and width of the images in pixels.
        calibration_scores: (n,) of good parts that the bank has not seen, for a threshold; empty if unknown.
        score_scales: (K, 2), for each bank by what its scores are multiplied and what is added, so that good parts
            score alike in all conditions; None where there is one bank.
        bit_depth: of the camera that took the good parts, for whoever reads files to be judged; None if unknown.
    """

    def __init__(
        self,
        net: Net,
        banks: Sequence[MemoryBank],
        image_size: tuple[int, int],
        calibration_scores: Tensor | None = None,
        score_scales: Tensor | None = None,
        bit_depth: int | None = None,
    ):
        self.net, self.bit_depth = net, bit_depth
        self.calibration_scores = torch.zeros(0) if calibration_scores is None else calibration_scores
        self.banks = [bank.to(net.device) for bank in banks]
        self.scales = None if score_scales is None else score_scales.to(net.device)
        self.grid = grid_size(image_size)
        self.anomaly_map = AnomalyMap(self.grid, image_size, net.scoring).to(net.device)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Prediction:
        """(B, 3, H, W) images in [0, 1] -> their scores and anomaly maps."""
        return self.predict_embedding(self.net.embed(images))

    @torch.inference_mode()
    def predict_embedding(self, embedding: Embedding) -> Prediction:
        """What ``net.embed`` made of images -> their scores and anomaly maps."""
        distances, reading = self.distances(embedding), embedding.reading
        if reading is None:
            return self.anomaly_map.predict(distances)
        # Before the map, since there is less to scale than after it: its pixels are averages of distances.
        scale, offset = self.scales[reading.conditions, :, None, None].unbind(dim=1)
        scores, maps, *_ = self.anomaly_map.predict(distances * scale + offset)
        return Prediction(scores, maps, reading.conditions, reading.unfamiliar)

    @torch.inference_mode()
    def distances(self, embedding: Embedding) -> Tensor:
        """(B, h, w) distances from each patch to the nearest vector of its condition's bank."""
        features, reading = embedding

        def search(condition: int, own: Tensor) -> Tensor:
            return self.banks[condition].nearest(own.flatten(0, 1)).view(-1, *self.grid)

        return search(0, features) if reading is None else by_condition(reading.conditions, features, search)

    @property
    def bank_vectors(self) -> int:
        """Vectors in all banks together."""
        return sum(len(bank) for bank in self.banks)

    @property
    def bank_bytes(self) -> int:
        """Bytes of all banks' vectors together."""
        return sum(bank.vectors.nbytes for bank in self.banks)
