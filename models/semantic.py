"""The semantic attention stream: where the network itself is active, it looks closer."""

from torch import Tensor

from models.frequency import min_max


def attention_mask(layer2: Tensor) -> Tensor:
    """Mean absolute activation over channels, scaled to 0 to 1 per image: (B, C, h, w) -> (B, 1, h, w).

    Scaled per image, not over the batch as the original does: an image's mask must not depend on its neighbours.
    """
    return min_max(layer2.abs().mean(dim=1, keepdim=True))
