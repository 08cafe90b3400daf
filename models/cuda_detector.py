"""A whole detector on an NVIDIA GPU: all of it, from pixels to maps, is one CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from models.cuda_search import Table
from models.detector import Detector
from models.errors import InputError
from models.scoring import Prediction
from models.wedge_net import Embedding

GRAPH_IMAGES = 32  # more at a time keep the GPU so busy that launching its kernels one by one costs little
Function = Callable[[Tensor], Sequence[Tensor]]


class CudaPiece:
    """Detectors of one network on a GPU; what they make of images comes back to the CPU.

    Args:
        detectors: at least one; they share a network and the size of images.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self.detectors, self.net = detectors, detectors[0].net
        self.tables = [[Table(bank) for bank in detector.banks] for detector in detectors]
        self.graphs: dict[torch.Size, Function] = {}
        self.side = torch.cuda.Stream(self.net.device) if self.net.device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[Prediction]:
        """(B, 3, H, W) images in [0, 1] -> what each detector makes of them.

        Raises :class:`InputError` if a score is not finite.
        """
        images = images.to(self.net.device, torch.float32)
        if len(images) > GRAPH_IMAGES:
            found = [tensor.cpu() for tensor in self._judge(images)]
        else:
            if images.shape not in self.graphs:
                self.graphs[images.shape] = record(self._judge, images)
            found = self.graphs[images.shape](images)
        reading, own = found[2 * len(self.detectors) :], iter(found)
        predictions = [Prediction(next(own), next(own), *reading) for _ in self.detectors]
        if not all(prediction.scores.isfinite().all() for prediction in predictions):
            raise InputError("a score is not finite: check the image that it comes from, and the backbone's weights")
        return predictions

    def _judge(self, images: Tensor) -> list[Tensor]:
        """Score and map of each detector, then, with a frequency stream, what it reads: nothing waits for the GPU."""
        features, reading = self._look(images)
        conditions = None if reading is None else reading.conditions
        found = []
        for detector, tables in zip(self.detectors, self.tables, strict=True):
            queries = [own.flatten(0, 1) for own in features]
            with self._aside():
                rest = [table.nearest(own) for table, own in zip(tables[1:], queries[1:], strict=True)]
            distances = [tables[0].nearest(queries[0]), *rest]
            self._join()
            shaped = [each.view(own.shape[:2]) for each, own in zip(distances, features, strict=True)]
            found += detector.judge(shaped, conditions)
        return found if reading is None else [*found, conditions, reading.unfamiliar, reading.statistics]

    def _look(self, images: Tensor) -> Embedding:
        """``net.look``, the stream beside the backbone, which needs no more of it than the light."""
        stream = getattr(self.net, "stream", None)
        if stream is None:
            return self.net.look(images)
        images = self.net.fill(images)
        with self._aside():
            reading = stream(images)
        aligned = stream.align(images)
        layers = self.net.backbone(aligned)
        self._join()
        return Embedding(self.net.combine(aligned, *layers, reading.conditions), reading)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done in it, a GPU does beside what follows, until ``_join``. What it reads must be kept till then."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            yield

    def _join(self) -> None:
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)


def record(function: Function, images: Tensor) -> Function:
    """``function`` as a CUDA graph for images of this shape: a replay launches all of its kernels at once.

    What it returns is on the CPU. It must not look at results on the way, and keeps the memory that it works in.
    """
    device, seen = images.device, images.clone()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up and choose their algorithms before the recording
            for _ in range(3):
                like = function(seen)
        stream.synchronize()
        # All results in one piece of memory, which is copied to the CPU at once.
        sizes = [-(-tensor.nbytes // 8) * 8 for tensor in like]
        there = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        here = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=True)
        results = _parts(here, sizes, like)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for part, result in zip(_parts(there, sizes, like), function(seen), strict=True):
                part.copy_(result)
            here.copy_(there, non_blocking=True)

    @torch.inference_mode()
    def replay(images: Tensor) -> list[Tensor]:
        with torch.cuda.device(device):
            seen.copy_(images)
            graph.replay()
            torch.cuda.current_stream().synchronize()
        return [result.clone() for result in results]

    return replay


def _parts(memory: Tensor, sizes: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Bytes as tensors of these shapes and kinds, one behind the other."""
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(memory.split(list(sizes)), like, strict=True)
    ]
