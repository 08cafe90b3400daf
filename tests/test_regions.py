"""The worst region of a map, and where it lies in the picture's own file."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from utils.data.image import Geometry
from utils.regions import Region, worst_region
from utils.size import Size


@pytest.mark.parametrize("smoothness", [0.0, 0.7, 2.0])
@given(height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_regions_are_those_of_scipy(smoothness, height, width, share, seed):
    noise = np.random.default_rng(seed).random((height, width))
    values = ndimage.gaussian_filter(noise, smoothness).astype(np.float32)
    threshold = float(np.quantile(values, share))
    mask = values.astype(np.float64) > threshold
    labelled, count = ndimage.label(mask, np.ones((3, 3)))
    found = worst_region(values, threshold)
    if not count:
        assert found is None
        return
    member = labelled == labelled[np.unravel_index(np.argmax(values), values.shape)]
    rows, columns = np.flatnonzero(member.any(axis=1)), np.flatnonzero(member.any(axis=0))
    box = columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    assert found == Region(*box, member.sum(), count)


def test_a_long_way_round_is_one_region():
    comb = np.zeros((224, 224))
    comb[:, ::2], comb[-1] = 1, 1
    assert worst_region(comb, 0.5) == Region(0, 0, 224, 224, 224 * 112 + 112, 1)
    assert worst_region(comb[:-1], 0.5) == Region(0, 0, 1, 223, 223, 112)


def test_nothing_above_the_threshold_is_none():
    flat = np.full((5, 7), 0.3, np.float32)
    assert worst_region(flat, float(flat[0, 0])) is None
    assert worst_region(flat, 0.3) is not None  # as for scores: the float32 nearest to 0.3 is above it
    assert worst_region(flat, 0.1) == Region(0, 0, 7, 5, 35, 1)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("size", [(640, 480), (97, 411), (64, 64), (1000, 130)])
def test_a_box_covers_in_the_file_what_the_model_saw_of_it(crop, size):
    """Paint one spot into a file, find it where the model sees it, and go back."""
    geometry = Geometry(Size(64, 64), 72 if crop else 64, crop)
    corner, scale = geometry.in_file(size)
    for across, down in ((0.1, 0.15), (0.5, 0.5), (0.8, 0.9)):
        left = int(corner[0] + across * 64 * scale[0])
        top = int(corner[1] + down * 64 * scale[1])
        spot = max(3, 6 * round(scale[0])), max(3, 6 * round(scale[1]))
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[top : top + spot[1], left : left + spot[0]] = 255
        seen = geometry.apply(Image.fromarray(pixels))[..., 0].astype(float)
        box = worst_region(seen, 127).in_file(corner, scale, size)
        right, bottom = min(left + spot[0], size[0]), min(top + spot[1], size[1])
        ends = min(right, round(corner[0] + 64 * scale[0])), min(bottom, round(corner[1] + 64 * scale[1]))
        for found, true, step in (
            (box.x, left, scale[0]),
            (box.x + box.width, ends[0], scale[0]),
            (box.y, top, scale[1]),
            (box.y + box.height, ends[1], scale[1]),
        ):
            assert abs(found - true) <= step + 1
        assert box.x >= 0 and box.y >= 0 and box.x + box.width <= size[0] and box.y + box.height <= size[1]
        assert 1 <= box.area <= box.width * box.height


def test_without_a_crop_the_whole_map_is_the_whole_file():
    corner, scale = Geometry(Size(64, 64), 64, False).in_file((333, 17))
    assert Region(0, 0, 64, 64, 64 * 64, 1).in_file(corner, scale, (333, 17)) == Region(0, 0, 333, 17, 333 * 17, 1)
    assert Region(63, 0, 1, 1, 1, 2).in_file(corner, scale, (333, 17)) == Region(327, 0, 6, 1, 1, 2)
