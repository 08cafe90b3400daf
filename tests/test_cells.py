"""What a memory's vectors stand for, and the memory without some images: against plain loops in float64."""

import itertools

import numpy as np
import pytest
import torch

from models.cells import Cells, nearest_distances, nearest_vectors
from models.conformal import conformal_threshold
from models.coreset import greedy_coreset, random_subset
from models.memory_bank import MemoryBank
from models.scoring import AnomalyMap, image_scores


def draw_images(count, seed, spread=0.5):
    """(count, 16, 6) features: patches of a place resemble each other from image to image."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(16, 6, generator=torch.Generator().manual_seed(99)) * 4
    return places + torch.randn(count, 16, 6, generator=generator) * spread


def held_out(features, images, count, chosen, owners, averaged=True):
    """Distances of the images' patches to the memory without their fold."""
    return Cells(features, images, count, chosen, owners, averaged).distances(images, features)


def memory_by_loops(features, images, rows, averaged, left_out=()):
    """The definition: (M, D) vectors of the patches ``rows`` of all ``features``, of whose cells the patches of
    ``images`` are known, had the memory not seen the images ``left_out``."""
    known = features[images].flatten(0, 1).double()
    patches, per_image = features.flatten(0, 1).double(), features.shape[1]
    radius = torch.cdist(known, patches[rows]).amin(dim=1).max()
    cells, holes = {row: [] for row in rows.tolist()}, {row: [] for row in rows.tolist()}
    left = patches[[row for row in cells if row // per_image not in left_out]]
    for image in images.tolist():
        for patch in patches[image * per_image : (image + 1) * per_image]:
            nearest = min(cells, key=lambda row: torch.dist(patches[row], patch).item())
            if image not in left_out:
                cells[nearest].append(patch)
                if not len(left) or torch.cdist(patch[None], left).min() > radius:
                    holes[nearest].append(patch)
    memory = []
    for row, cell in cells.items():
        own = row // per_image in left_out
        if cell and averaged and (holes[row] or not own):
            memory.append(torch.stack(cell).mean(dim=0))
        elif holes[row] and own:
            memory.append(holes[row][-1])
        elif not own:
            memory.append(patches[row])
    return torch.stack(memory) if memory else patches[:0]


def folds_of(count):
    bounds = [count * fold // min(10, count) for fold in range(min(10, count) + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]


@pytest.mark.parametrize(
    ("count", "kept", "known"),
    [
        (13, 20, range(13)),  # folds of one and two images
        (7, 60, range(7)),  # each a fold of its own
        (20, 30, range(0, 20, 4)),  # of some images alone the patches are known, a fold has none of them
        (2, 8, range(2)),
        (3, 48, range(3)),  # all patches
    ],
)
@pytest.mark.parametrize("method", ["coreset", "random"])
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_memory_and_what_it_would_be_without_a_fold_are_those_of_the_definition(
    count, kept, known, method, averaged, dtype
):
    features, images = draw_images(count, 0).to(dtype), torch.tensor(known)
    patches = features.flatten(0, 1)
    rows = (greedy_coreset(patches, kept) if method == "coreset" else random_subset(len(patches), kept)).sort().values
    cells = Cells(features[images], images, count, patches[rows], rows // 16, averaged)
    torch.testing.assert_close(
        cells.vectors.double(), memory_by_loops(features, images, rows, averaged), rtol=1e-4, atol=1e-4
    )
    reach = torch.cdist(features[images].flatten(0, 1).double(), patches[rows].double()).amin(dim=1).max()
    assert cells.radius == pytest.approx(reach.item(), abs=2e-3)
    altered = features[images] + draw_images(count, 1)[images].to(dtype) * 0.1
    found = cells.distances(images, features[images], altered)
    for fold in folds_of(count):
        inside = torch.tensor([number in fold for number in known])
        memory = memory_by_loops(features, images, rows, averaged, fold)
        for distances, part in zip(found, (features[images], altered), strict=True):
            expected = torch.cdist(part[inside].double(), memory).amin(dim=2)
            torch.testing.assert_close(distances[inside].double(), expected, rtol=1e-4, atol=1e-4)


def test_what_leaves_nothing_to_be_judged_by_is_infinitely_far():
    """A single image; and the one image that the whole memory comes from, whose cells hold others' patches."""
    features = draw_images(5, 0)
    (alone,) = held_out(features[:1], torch.tensor([0]), 1, features[0], torch.zeros(16).long())
    assert alone.shape == (1, 16) and alone.isinf().all()
    (alone,) = held_out(features[:1], torch.tensor([0]), 1, features[0, :3], torch.zeros(3).long())
    assert alone.isinf().all()
    (found,) = held_out(features, torch.arange(5), 5, features[3], torch.full((16,), 3))
    assert found.isfinite().all()


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5, 1.0])
def test_held_out_distances_are_distributed_like_those_of_new_images(ratio, averaged):
    anomaly_map, higher, alarms = AnomalyMap((4, 4), (32, 32)), [], []
    for seed in range(0, 12, 2):
        features, fresh = draw_images(100, seed + 1), draw_images(400, seed + 2)
        patches = features.flatten(0, 1)
        rows = greedy_coreset(patches, int(len(patches) * ratio)).sort().values
        cells = Cells(features, torch.arange(100), 100, patches[rows], rows // 16, averaged)
        (own,) = cells.distances(torch.arange(100), features)
        new = MemoryBank(cells.vectors).nearest(fresh.flatten(0, 1))
        calibration, scores = (image_scores(anomaly_map(part.view(-1, 4, 4))).numpy() for part in (own, new))
        higher.append((calibration.mean() - scores.mean()) / scores.std())
        alarms.append((scores > conformal_threshold(calibration, 0.1)).mean())
    assert abs(np.mean(higher)) < 0.25
    assert 0.05 < np.mean(alarms) < 0.15  # 0.1, give or take what 100 and 400 images tell


def test_a_memory_is_the_same_to_the_bit_with_any_number_of_threads():
    features = draw_images(40, 3)
    rows = greedy_coreset(features.flatten(0, 1), 60).sort().values
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            cells = Cells(features, torch.arange(40), 40, features.flatten(0, 1)[rows], rows // 16, True)
            found.append((cells.vectors, *cells.distances(torch.arange(40), features)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_nearest_of_several_parts_is_that_of_all():
    patches, parts = draw_images(3, 5), [draw_images(200, 6).flatten(0, 1)[:1500], torch.zeros(0, 6), torch.ones(1, 6)]
    distances, numbers, elsewhere = nearest_vectors(patches, parts)
    each = torch.cdist(patches, torch.cat(parts))
    expected, one = each.min(dim=2), each[..., -1]
    torch.testing.assert_close(distances, expected.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(numbers, expected.indices)
    assert torch.equal(nearest_distances(patches, parts), distances)
    others = torch.where(numbers == 1500, each[..., :-1].amin(dim=2), one)
    torch.testing.assert_close(elsewhere, others, rtol=1e-4, atol=1e-4)
    assert nearest_vectors(patches, [torch.zeros(0, 6)]).distances.isinf().all()
    assert nearest_distances(patches, [torch.zeros(0, 6)]).isinf().all()
