import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from models.scoring import AnomalyMap, image_scores


@pytest.mark.parametrize(("cells", "pixels"), [(28, 224), (13, 100), (40, 320), (4, 32)])
def test_map_equals_interpolation_and_scipys_filter(cells, pixels):
    distances = torch.rand(3, cells, cells, generator=torch.Generator().manual_seed(0)) * 5
    upsampled = F.interpolate(distances[:, None], size=(pixels, pixels), mode="bilinear")[:, 0].double().numpy()
    expected = np.stack([gaussian_filter(image, sigma=4) for image in upsampled])
    maps = AnomalyMap((cells, cells), (pixels, pixels))(distances)
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(image_scores(maps).numpy(), expected.max(axis=(1, 2)), atol=1e-4)


def test_rows_and_columns_are_not_mixed_up():
    distances = torch.zeros(1, 4, 8)
    distances[0, 3, 0] = 1
    peak = AnomalyMap((4, 8), (64, 64))(distances)[0].argmax().item()
    assert peak // 64 > 48
    assert peak % 64 < 8
