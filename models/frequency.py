"""The frequency stream: a discrete wavelet transform that parts an image's structure from its detail."""

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WaveletTransform(nn.Module):
    """One level of the 2-D discrete wavelet transform, equal to ``pywt.dwt2(image, wavelet, mode="symmetric")``.

    >>> bands = WaveletTransform("haar")(torch.rand(2, 3, 224, 224))
    >>> bands.shape
    torch.Size([2, 3, 4, 112, 112])
    """

    def __init__(self, wavelet: str):
        super().__init__()
        self.wavelet = wavelet
        filters = pywt.Wavelet(wavelet)
        # Convolution layers correlate, so the filters are turned round.
        low, high = (np.array(taps[::-1]) for taps in (filters.dec_lo, filters.dec_hi))
        # PyWavelets' order: approximation, then detail across rows (cH), across columns (cV), across both (cD).
        kernels = np.stack([np.outer(low, low), np.outer(high, low), np.outer(low, high), np.outer(high, high)])
        self.register_buffer("kernels", torch.tensor(kernels, dtype=torch.float32)[:, None], persistent=False)
        self.taps = len(low)
        self._extensions: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 4, h, w): bands cA, cH, cV, cD with h = floor((H + taps - 1) / 2)."""
        batch, channels = images.shape[:2]
        bands = F.conv2d(self._extended(images.flatten(0, 1)[:, None]), self.kernels, stride=2)
        return bands.view(batch, channels, 4, *bands.shape[-2:])

    def _extended(self, images: Tensor) -> Tensor:
        """Images continued beyond their edges as in PyWavelets' symmetric mode: (c b a | a b c | c b a)."""
        for axis in (2, 3):
            size = images.shape[axis]
            before, after = self.taps - 2, 2 * ((size + self.taps - 1) // 2) - size
            if before or after:  # nothing to do for haar and an even size
                key = size, images.device
                if key not in self._extensions:
                    places = np.pad(np.arange(size), (before, after), mode="symmetric")
                    self._extensions[key] = torch.from_numpy(places).to(images.device)
                images = images.index_select(axis, self._extensions[key])
        return images


def frequency_map(bands: Tensor) -> Tensor:
    """Where an image has detail: (B, C, 4, h, w) bands -> (B, h, w), root of the detail's energy, 0 to 1 per image."""
    return min_max(bands[:, :, 1:].square().sum(dim=(1, 2)).sqrt())


def min_max(maps: Tensor) -> Tensor:
    """Scale each (..., h, w) map to 0 to 1 by its own minimum and maximum; a constant map becomes 0."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


class FrequencyGate(nn.Module):
    """The paper's gate: the approximation band, through an untrained convolution, weighs each feature channel.

    gate_l = sigmoid(conv_l(cA)) for both feature maps, conv_l 3x3 from 3 to C_l channels. Its weights are drawn once
    from ``seed`` and travel in the checkpoint, so training and test see the same gate.
    """

    def __init__(self, wavelet: str, channels: tuple[int, int], seed: int):
        super().__init__()
        self.transform = WaveletTransform(wavelet)
        self.convolutions = nn.ModuleList(  # skip_init: PyTorch's own initialisation would use the global generator
            nn.utils.skip_init(nn.Conv2d, 3, width, kernel_size=3, padding=1) for width in channels
        )
        generator = torch.Generator().manual_seed(seed)
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(convolution.weight, generator=generator)
            nn.init.zeros_(convolution.bias)

    def forward(self, images: Tensor, layers: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) in [0, 1] and two feature maps (B, C_l, h_l, w_l) -> the maps, gated."""
        structure = self.transform(images)[:, :, 0] / 2  # the gain of an orthonormal transform's low band is 2
        return tuple(
            layer * torch.sigmoid(convolution(F.interpolate(structure, layer.shape[-2:], mode="area")))
            for convolution, layer in zip(self.convolutions, layers, strict=True)
        )
