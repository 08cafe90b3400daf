"""A trained detector: one image from pixels to score, in a few lines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.engine import OnnxEngine
from models.memory_bank import MemoryBank
from models.patchcore import PatchCore
from models.scoring import AnomalyMap, Prediction, image_scores, less_background
from models.wedge_net import Embedding, WedgeNet

if TYPE_CHECKING:
    from models.cuda_detector import CudaPiece
    from models.onnx_detector import OnePiece

Net = WedgeNet | PatchCore

LARGEST_GRAPH = 1 << 26  # numbers in the banks of a graph: 256 MB, of which onnxruntime takes three times as much


class Detector:
    """An embedding and the memory of what good parts look like in it.

    Args:
        net: the embedding.
        banks: one for each of the net's scales, in their order.
        image_size: height and width of the images in pixels.
        scales: (K, S), for each condition and scale by what distances are multiplied before they are added.
        offsets: (K,), for each condition what is added to them, so that good parts score alike in all conditions.
        calibration_scores: (n,) of good parts that the bank has not seen, for a threshold; empty if unknown.
        bit_depth: of the camera that took the good parts, for whoever reads files to be judged; None if unknown.
    """

    def __init__(
        self,
        net: Net,
        banks: Sequence[MemoryBank],
        image_size: tuple[int, int],
        scales: Tensor | None = None,
        offsets: Tensor | None = None,
        calibration_scores: Tensor | None = None,
        bit_depth: int | None = None,
    ):
        self.net, self.bit_depth = net, bit_depth
        self.calibration_scores = torch.zeros(0) if calibration_scores is None else calibration_scores
        self.banks = [bank.to(net.device) for bank in banks]
        count = len(net.conditions)
        self.scales = (torch.ones(count, len(banks)) if scales is None else scales).to(net.device)
        self.offsets = (torch.zeros(count) if offsets is None else offsets).to(net.device)
        self.grids = net.grids(image_size)
        self.image_size = image_size
        self.anomaly_maps = [each.to(net.device) for each in make_maps(net, image_size)]
        self.pieces: dict[tuple[Detector, ...], OnePiece | CudaPiece] = {}  # alone, with others

    def predict(self, images: Tensor) -> Prediction:
        """(B, 3, H, W) images in [0, 1] -> their scores and anomaly maps."""
        return predict_together([self], images)[0]

    @torch.inference_mode()
    def predict_embedding(self, embedding: Embedding) -> Prediction:
        """What ``net.look`` made of images -> their scores and anomaly maps."""
        reading = embedding.reading
        conditions = None if reading is None else reading.conditions
        scores, maps = self.judge(self.distances(embedding.features), conditions)
        if reading is None:
            return Prediction(scores, maps)
        return Prediction(scores, maps, conditions, reading.unfamiliar, reading.statistics)

    @torch.inference_mode()
    def distances(self, features: Sequence[Tensor]) -> list[Tensor]:
        """For each scale the (B, P) distances from each patch to the nearest vector of the bank."""
        return [
            bank.nearest(own.flatten(0, 1)).view(own.shape[:2]) for bank, own in zip(self.banks, features, strict=True)
        ]

    def judge(self, distances: Sequence[Tensor], conditions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances of each scale (B, P), of images in ``conditions`` (B,) or all clean -> scores and maps."""
        return combine(distances, self.scales, self.offsets, self.anomaly_maps, conditions)

    @property
    def one_piece(self) -> bool:
        """Whether all of it runs as one graph: on an NVIDIA GPU, and with onnxruntime unless a bank is better kept out.

        That is one whose search is pruned, or so large that a graph's copies of it would fill the memory.
        """
        if self.net.device.type == "cuda":
            return True
        vectors = sum(bank.vectors.numel() for bank in self.banks)
        pruned = any(bank.pruned for bank in self.banks)
        return isinstance(self.net.backbone, OnnxEngine) and not pruned and vectors <= LARGEST_GRAPH

    @property
    def inside(self) -> np.ndarray | None:
        """(H, W) bool, where images are looked at; None for everywhere."""
        return None if self.net.region is None else self.net.region.inside.cpu().numpy() > 0

    @property
    def bank_vectors(self) -> int:
        """Vectors in all banks together."""
        return sum(len(bank) for bank in self.banks)

    @property
    def bank_bytes(self) -> int:
        """Bytes of all that a category has beside the backbone: the banks' vectors, metric and lenses."""
        maps = [maps.matrices for maps in getattr(self.net, "maps", [])]
        return sum(bank.vectors.nbytes for bank in self.banks) + sum(2 * each.numel() for each in maps)


@torch.inference_mode()
def predict_together(detectors: Sequence[Detector], images: Tensor) -> list[Prediction]:
    """What each of several detectors makes of (B, 3, H, W) images in [0, 1]; those of one network share its work."""
    found: dict[Detector, Prediction] = {}
    for net in dict.fromkeys(detector.net for detector in detectors):
        own = [detector for detector in detectors if detector.net is net]
        if whole := tuple(detector for detector in own if detector.one_piece):
            found |= zip(whole, _piece(whole)(images), strict=True)
        if parted := [detector for detector in own if not detector.one_piece]:
            embedding = net.look(images)
            found |= {detector: detector.predict_embedding(embedding) for detector in parted}
    return [found[detector] for detector in detectors]


def _piece(detectors: tuple[Detector, ...]) -> "OnePiece | CudaPiece":
    """The graph of detectors of one network, which the first of them keeps."""
    pieces = detectors[0].pieces
    if detectors not in pieces:
        if detectors[0].net.device.type == "cuda":  # each needs packages that the other does without
            from models.cuda_detector import CudaPiece as Piece
        else:
            from models.onnx_detector import OnePiece as Piece
        pieces[detectors] = Piece(detectors)
    return pieces[detectors]


def make_maps(net: Net, image_size: tuple[int, int]) -> list[AnomalyMap]:
    """What makes maps of a net's distances, for each of its scales."""
    inside = None if net.region is None else net.region.inside
    return [AnomalyMap(grid, image_size, net.scoring, inside) for grid in net.grids(image_size)]


def combine(
    distances: Sequence[Tensor],
    scales: Tensor,
    offsets: Tensor,
    anomaly_maps: Sequence[AnomalyMap],
    conditions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Distances (B, P) of each scale -> scores (B,) and anomaly maps (B, H, W); can be exported.

    Each scale's distances are brought to a common unit before its map is made, since there is less to scale than after
    it, and the maps are added. A map's weights sum to 1: what is added to distances is added to the map.
    """
    chosen = slice(0, 1) if conditions is None else conditions
    scales, offsets = scales[chosen], offsets[chosen]
    scoring = anomaly_maps[0].scoring
    scaled = [less_background(own * scales[:, scale, None], scoring.background) for scale, own in enumerate(distances)]
    scaled[0] = scaled[0] + offsets[:, None]
    maps = None
    for own, anomaly_map in zip(scaled, anomaly_maps, strict=True):
        own = anomaly_map(anomaly_map.on_grid(own))
        maps = own if maps is None else maps + own
    return image_scores(maps if scoring.smoothed else anomaly_maps[0].on_grid(scaled[0])), maps
