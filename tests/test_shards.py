"""A category in shards: its moments, its coreset, and a training that never holds it whole; sums that threads leave
alone."""

import itertools

import numpy as np
import pytest
import torch

import config
import evaluation
import train
from models.composable_coreset import Merged, Part, coreset_of_shard
from models.coreset import greedy_coreset
from models.whitening import fit_lens, fit_whitening, moments_of, pooled
from utils.console import in_turn
from utils.data.corruptions import color_jitter
from utils.data.dataset import train_samples
from utils.pictures.tables import read_csv
from utils.pipeline.checkpoint import bank_path, build_net
from utils.pipeline.shards import InMemory, InShards, embed, in_shards
from utils.settings import SettingsParser


def features(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 3


def settings_of(flags, *more):
    return SettingsParser(config, "").read([*flags, *more])[0]


def farthest(rows: np.ndarray, centres: np.ndarray) -> float:
    """By brute force: the largest distance of a row to its nearest centre."""
    return float(np.linalg.norm(rows[:, None] - centres[None], axis=2).min(axis=1).max())


def chosen_in_shards(rows: torch.Tensor, size: int, shard: int, at_once: int) -> Part:
    merged, first = Merged(size, 0, at_once), 0
    for part in rows.split(shard):
        merged.add(coreset_of_shard(part, first, size))
        first += len(part)
    return merged.result()


# --- moments ---


@pytest.mark.parametrize("shard", [1, 7, 100, 1000])
def test_moments_of_shards_are_those_of_the_whole(shard):
    rows = features(1000, 6)
    found = pooled([moments_of(part) for part in rows.split(shard)])
    assert found.count == 1000
    np.testing.assert_allclose(found.mean.numpy(), rows.double().numpy().mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        found.covariance.numpy(), np.cov(rows.double().numpy().T, bias=True), rtol=1e-4, atol=1e-4
    )


def test_moments_of_a_single_shard_are_its_own_to_the_bit():
    whole = moments_of(features(500, 6))
    assert all(torch.equal(*pair) for pair in zip(pooled([whole])[1:], whole[1:], strict=True))


def test_metric_lens_and_colour_are_the_same_to_the_bit_with_any_number_of_threads():
    clean, pictures = features(3000, 112), torch.rand(1, 3, 224, 224)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            lens = fit_lens(0.7 * clean + 0.1 * features(3000, 112, 1), clean)
            found.append([*fit_whitening(clean), *lens, color_jitter(pictures, 1.0)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [torch.equal(*pair) for pair in zip(*found, strict=True)] == [True] * 5


# --- coreset ---


def test_a_single_shard_is_the_choice_from_the_whole():
    rows = features(300, 5)
    part = chosen_in_shards(rows, 40, 300, 8)
    assert torch.equal(part.numbers, greedy_coreset(rows, 40)) and torch.equal(part.vectors, rows[part.numbers])


@pytest.mark.parametrize(("shard", "at_once"), [(60, 8), (60, 2), (37, 3), (25, 8)])
def test_vectors_are_those_rows_of_the_whole_each_once(shard, at_once):
    rows = features(300, 5)
    part = chosen_in_shards(rows, 40, shard, at_once)
    assert len(part.numbers.unique()) == 40 and torch.equal(part.vectors, rows[part.numbers])
    assert torch.equal(part.numbers, chosen_in_shards(rows, 40, shard, at_once).numbers)


@pytest.mark.parametrize("at_once", [2, 3, 6])
def test_the_radius_keeps_its_bound(at_once):
    """Against the best of all sets of centres, by brute force: 2 r, and 2 r more for each merging."""
    for seed in range(8):
        rows = features(18, 2, seed)
        best = min(
            farthest(rows.numpy(), rows[list(centres)].numpy()) for centres in itertools.combinations(range(18), 3)
        )
        part = chosen_in_shards(rows, 3, 3 + seed % 3, at_once)
        shards = -(-18 // (3 + seed % 3))
        mergings = next(times for times in itertools.count(1) if at_once**times >= shards)
        assert farthest(rows.numpy(), part.vectors.numpy()) <= 2 * (1 + mergings) * best + 1e-5


def test_shards_cost_little_of_the_radius():
    rows = features(3000, 8)
    whole = farthest(rows.numpy(), rows[greedy_coreset(rows, 150)].numpy())
    assert farthest(rows.numpy(), chosen_in_shards(rows, 150, 400, 8).vectors.numpy()) < 1.3 * whole


def test_a_shard_smaller_than_the_memory_gives_all_it_has():
    rows = features(50, 3)
    part = coreset_of_shard(rows[40:], 40, 20)
    assert part.numbers.tolist() == list(range(40, 50)) and torch.equal(part.vectors, rows[40:])
    assert len(chosen_in_shards(rows, 20, 10, 4).numbers) == 20


def test_fewer_distinct_rows_than_asked_for_are_no_error():
    rows = torch.arange(40).div(2).floor().repeat(2)[:, None].expand(80, 3).contiguous()  # 20 that differ
    with pytest.warns(UserWarning, match="are distinct"):
        part = chosen_in_shards(rows, 60, 70, 4)
    assert len(part.vectors.unique(dim=0)) == len(rows.unique(dim=0)) == len(part.vectors)


# --- training ---


def test_features_in_shards_are_those_in_memory(flags):
    settings = settings_of(flags, "--category", "tile", "--shard-images", "3")
    net, samples = build_net(settings), train_samples(settings, "tile")
    shards = in_shards(samples, 3)
    assert [len(shard) for shard in shards] == [3, 3, 2]
    whole, parts = (embed(net, each, settings, "test", in_turn) for each in ([samples], shards))
    assert isinstance(whole, InMemory) and isinstance(parts, InShards) and whole.patches == parts.patches
    metrics = [fit_whitening(moments) for moments in whole.moments()]
    for own, other in zip(metrics, map(fit_whitening, parts.moments()), strict=True):
        torch.testing.assert_close(own.matrix, other.matrix, rtol=0.02, atol=5e-3)
    for each in (whole, parts):
        each.to_metric(metrics)
        each.choose([[20, 5], [10, 3]])
    numbers = torch.tensor([1, 2, 4, 7])
    for own, other in zip(whole.of(numbers), parts.of(numbers), strict=True):
        torch.testing.assert_close(own, other)
    everything = whole.of(torch.arange(8))
    for scale, sizes in enumerate(((20, 5), (10, 3))):
        for size in sizes:
            memory = parts.of_size(scale, size)
            assert len(memory.vectors) == size and (memory.owners.diff() >= 0).all()
            for vector, owner in zip(memory.vectors, memory.owners, strict=True):
                assert (everything[scale][owner] - vector).abs().amax(dim=1).min() < 1e-5
        few, many = (parts.of_size(scale, size).vectors.tolist() for size in reversed(sizes))
        assert all(vector in many for vector in few)  # a smaller memory is the beginning of a larger one


def test_as_many_images_as_there_are_is_training_without_shards(flags, tmp_path):
    found = []
    for images in ("None", "8"):
        own = [*flags, "--save-dir", str(tmp_path / images), "--shard-images", images]
        assert train.main(own) == 0
        found.append(bank_path(tmp_path / images, "tile", 0.1).read_bytes())
    assert found[0] == found[1]


def test_a_training_in_shards_finds_what_one_in_memory_finds(flags, tmp_path, capsys):
    own = [*flags, "--conditions", "clean,noise20", "--sampling-ratio", "0.1,0.05"]
    rows = {}
    for images in ("None", "3"):
        mine = [*own, "--save-dir", str(tmp_path / images), "--shard-images", images]
        assert train.main(mine) == evaluation.main(mine) == 0
        rows[images] = read_csv(tmp_path / images / "final_evaluation_results.csv")
    assert "[tile] 8 images in 3 shards" in capsys.readouterr().out
    for whole, parts in zip(*rows.values(), strict=True):
        assert parts["bank_vectors"] == whole["bank_vectors"] and parts["training_images"] == 8
        assert parts["image_auroc"] == pytest.approx(whole["image_auroc"], abs=0.1)
        assert parts["threshold"] == pytest.approx(whole["threshold"], rel=0.15)


def test_what_cannot_be_had_in_shards_is_refused(flags, capsys):
    for more in (["--sampling-ratio", "1"], ["--sampling-method", "random"]):
        assert train.main([*flags, "--shard-images", "3", *more]) == 2
        assert "is not to be had with SHARD_IMAGES" in capsys.readouterr().err
    assert train.main([*flags, "--shard-images", "0"]) == 2
    assert "SHARD_IMAGES is 0; it must be None or a whole number of at least 1" in capsys.readouterr().err
