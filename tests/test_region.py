"""The region of interest: what is outside is neither remembered nor scored, whatever it shows."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import config
import eval_noise_robustness
import evaluation
import export_onnx
import predict
import remember
import test as figure3
import train
import train_patchcore
import utils.line.torch_model
import visualize_noise_robustness
from models.backbone import build_backbone
from models.condition import ConditionStream
from models.detector import make_maps
from models.errors import InputError
from models.region import RegionOfInterest, patches_inside
from models.scoring import PATCHCORE, AnomalyMap
from models.wedge_net import WedgeNet
from tests.test_hostile import mutate
from utils.data.dataset import batches, train_samples
from utils.data.dataset import test_samples as samples_for_test
from utils.data.image import read_image
from utils.data.region import read_region
from utils.line.edge_model import ModelInfo, OnnxModel, pack_region
from utils.line.torch_model import TorchModel
from utils.metrics import aupro, evaluate
from utils.pictures.tables import read_csv
from utils.pipeline.checkpoint import bank_path, build_net, load_checkpoint, load_detector
from utils.pipeline.inference import at_depth_of, score_samples
from utils.pipeline.patchcore import load_patchcore
from utils.settings import SettingsParser

HEIGHT, WIDTH = 96, 192
LABEL = 64  # rows of a picture above its label, which is as wide as it is
GREY = 4095  # white of a camera of 12 bits


def make_labelled(root: Path, name: str, labels: bool, train: int = 16, good: int = 6, bad: int = 6) -> None:
    """A category of 12-bit grey pictures; below row LABEL a number that always differs, or what the part is made of."""
    rng, stripes = np.random.default_rng(3), np.random.default_rng(4)

    def part() -> np.ndarray:
        x = np.arange(WIDTH) + rng.uniform(0, 8)
        pixels = 2000 + 600 * np.sin(2 * np.pi * x / 12)[None] + rng.uniform(-100, 100)
        return pixels + rng.normal(0, 60, (HEIGHT, WIDTH))

    def save(path: Path, pixels: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        label = stripes.integers(0, 2, (4, 24)).repeat(8, axis=0).repeat(8, axis=1) * GREY
        if labels:
            pixels[LABEL:] = label
        Image.fromarray(pixels.clip(0, GREY).astype(np.uint16)).save(path)

    for folder, count in {"train/good": train, "test/good": good}.items():
        for index in range(count):
            save(root / name / folder / f"{index:03d}.png", part())
    for index in range(bad):
        pixels, mask = part(), np.zeros((HEIGHT, WIDTH), np.uint8)
        top, left = rng.integers(8, LABEL - 24), rng.integers(8, WIDTH - 24)
        pixels[top : top + 14, left : left + 14] *= 0.5
        mask[top : top + 14, left : left + 14] = 255
        save(root / name / "test/spot" / f"{index:03d}.png", pixels)
        truth = root / name / "ground_truth/spot" / f"{index:03d}_mask.png"
        truth.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(truth)


def paint(path: Path, rows: int = LABEL, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """A region of interest: the first of HEIGHT rows, in a picture of ``size`` (width, height)."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:rows] = 255
    Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(path)


@dataclass(frozen=True)
class Masked:
    """A labelled category with a region, trained and exported; ``plain`` is DATA_PATH of the same without labels."""

    root: Path
    flags: list[str]
    checkpoint: Path
    model: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def plain(self) -> Path:
        return self.root / "plain"

    def with_(self, **changes: object) -> list[str]:
        """The flags with others instead."""
        return [*self.flags, *(text for name, value in changes.items() for text in (flag(name), str(value)))]

    def settings(self, **changes: object):
        return SettingsParser(config, "").read(self.with_(**changes))[0]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Masked:
    root = tmp_path_factory.mktemp("masked")
    make_labelled(root / "data", "part", labels=True)
    make_labelled(root / "plain", "part", labels=False)
    paint(root / "data/part/region.png")
    pairs = {
        "data_path": root / "data",
        "category": "part",
        "save_dir": root / "out",
        "patchcore_dir": root / "patchcore",
        "backbone": "efficientnet_lite0",
        "patchcore_backbone": "efficientnet_lite0",
        "conditions": "clean, noise20",
        "image_size": f"{HEIGHT},{WIDTH}",
        "center_crop": False,
        "num_workers": 0,
        "device": "cpu",
        "false_alarm_rate": 0.1,
    }
    flags = [text for name, value in pairs.items() for text in (flag(name), str(value))]
    assert train.main(flags) == 0
    assert export_onnx.main(flags) == 0
    bank = root / "out/10pct/model_data_part_10pct"
    return Masked(root, flags, bank.with_suffix(".pt"), bank.with_suffix(".onnx"))


def load(masked: Masked, **changes: object):
    settings = masked.settings(**changes)
    detector, _ = load_detector(settings, "part", 0.1, build_net(settings))
    return detector, at_depth_of([detector], settings)


def pictures(settings) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches(samples_for_test(settings, "part"), settings)])


# --- the mask ---


def test_a_patch_is_inside_if_its_centre_and_its_neighbours_are():
    inside = torch.zeros(32, 32)
    inside[:21, :20] = 1  # the centres are at 4, 12, 20 and 28 pixels
    expected = [[True, False, False, False]] * 2 + [[False] * 4] * 2
    assert patches_inside(inside, (4, 4)).view(4, 4).tolist() == expected
    inside[:21, :21] = 1
    assert patches_inside(inside, (4, 4)).sum() == 4
    inside[5:] = 0  # too narrow for neighbours
    assert patches_inside(inside, (4, 4)).view(4, 4).tolist() == [[True, True, True, False]] + [[False] * 4] * 3


def test_outside_is_shown_what_is_inside_mirrored_at_the_border():
    inside = torch.zeros(2, 8)
    inside[:, 3:5] = 1
    row = torch.arange(8.0).expand(1, 3, 2, 8)
    (shown,) = RegionOfInterest(inside, {2: (1, 4)})(row)
    # 2 is mirrored at 3 and 5 at 4; of those that lie farther out the mirror image is outside again
    assert torch.equal(shown, torch.tensor([3.0, 3, 4, 3, 4, 3, 4, 4]).expand(3, 2, 8))
    assert torch.equal(RegionOfInterest(torch.ones(2, 8), {2: (1, 4)})(row), row)


def test_a_region_that_leaves_out_a_corner_judges_the_rest_as_without():
    """Its border is no edge to the network: features inside are nearly what they are without it."""
    net = WedgeNet(build_backbone("efficientnet_lite0"))
    inside = torch.ones(96, 96)
    inside[64:, 64:] = 0
    x, y = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="xy")
    stripes = 0.5 + 0.3 * torch.sin(x / 3) * torch.sin(y / 4)
    images = stripes.expand(1, 3, 96, 96)
    own = net.with_region(inside)
    for found, wanted, stride in zip(own.embed(images), net.embed(images), net.strides, strict=True):
        wanted = own.region.select(wanted, stride)
        spread = (wanted - wanted.mean(dim=1, keepdim=True)).square().mean().sqrt()
        assert (found - wanted).square().mean().sqrt() < 0.5 * spread


def test_a_map_is_0_outside_and_as_high_at_the_border_as_in_the_midst():
    inside = torch.zeros(64, 64)
    inside[:40] = 1
    anomaly_map = AnomalyMap((8, 8), (64, 64), inside=inside)
    (drawn,) = anomaly_map(anomaly_map.on_grid(torch.full((1, 32), 3.0)))
    torch.testing.assert_close(drawn[:40], torch.full((40, 64), 3.0))
    assert not drawn[40:].any()


def test_all_inside_is_no_region_to_the_bit():
    distances = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    whole, plain = AnomalyMap((8, 8), (64, 64), inside=torch.ones(64, 64)), AnomalyMap((8, 8), (64, 64))
    assert torch.equal(whole.on_grid(distances), plain.on_grid(distances))
    torch.testing.assert_close(whole(whole.on_grid(distances)), plain(plain.on_grid(distances)))


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("rows", [40, 6])  # of the second no coefficient of the coarsest level sees only what is inside
def test_light_and_condition_are_told_by_what_is_inside(wavelet, rows):
    stream = ConditionStream(wavelet, ["clean", "noise20"], True, (64, 96))
    inside = torch.zeros(64, 96)
    inside[:rows] = 1
    stream.look_inside(inside)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    other = images.clone()
    other[:, :, rows:] = 1
    if rows == 40:
        torch.testing.assert_close(stream.measure(images)[1], stream.measure(other)[1], rtol=0, atol=1e-6)
        assert torch.equal(stream.measure_light(images), stream.measure_light(other))
    assert stream.measure(images)[1].isfinite().all()


# --- from file to verdict ---


def test_what_is_outside_changes_nothing_to_the_bit(masked):
    detector, settings = load(masked)
    images = pictures(settings)
    before = detector.predict(images)
    for other in (torch.rand(len(images), 3, HEIGHT - LABEL, WIDTH), torch.ones(1), torch.zeros(1)):
        images[:, :, LABEL:] = other
        after = detector.predict(images)
        assert torch.equal(before.scores, after.scores) and torch.equal(before.maps, after.maps)
        assert torch.equal(before.conditions, after.conditions)
    assert not before.maps[:, LABEL:].any() and (before.maps[:, :LABEL] > 0).all()


def test_patches_outside_are_neither_remembered_nor_embedded(masked):
    detector, settings = load(masked)
    shapes = [tuple(scale.shape[:2]) for scale in detector.net.embed(pictures(settings))]
    # The last rows of patches, of 8 and of 16 pixels, have neighbours outside.
    assert shapes == [(12, (LABEL // 8 - 1) * WIDTH // 8), (12, (LABEL // 16 - 1) * WIDTH // 16)]
    kept = [len(bank) for bank in load_checkpoint(masked.checkpoint).memory_banks]
    assert kept == [int(16 * count * 0.2) for _, count in shapes]  # two scales, each with twice the ratio


def test_a_changing_label_costs_neither_alarms_nor_detections(masked, tmp_path):
    """As without the label in training and test; without the region it takes the margin from the defects."""
    found = {}
    for name, changes in {
        "label": {},
        "no label": {"data_path": masked.plain, "region": masked.data / "part/region.png"},
    }.items():
        own = {"save_dir": tmp_path / name, **changes}
        assert train.main(masked.with_(**own)) == evaluation.main(masked.with_(**own)) == 0
        (found[name],) = read_csv(tmp_path / name / "final_evaluation_results.csv")
    for column in ("image_auroc", "pixel_auroc", "aupro", "threshold", "false_alarm_rate", "detection_rate"):
        assert found["label"][column] == pytest.approx(found["no label"][column], rel=1e-3), column
    shutil.copytree(masked.data, tmp_path / "data", ignore=shutil.ignore_patterns("region.png"))
    own = {"save_dir": tmp_path / "everything", "data_path": tmp_path / "data"}
    assert train.main(masked.with_(**own)) == evaluation.main(masked.with_(**own)) == 0
    (everything,) = read_csv(tmp_path / "everything/final_evaluation_results.csv")
    margin = {name: row["f1_threshold"] / row["threshold"] for name, row in (found | {"all": everything}).items()}
    assert margin["all"] < margin["label"] / 2  # of the faintest defect that is told from good parts
    assert found["label"]["image_auroc"] > 0.95


def test_the_exported_model_gives_the_same_verdicts(masked):
    """A rectangle of 12 bits with a region: as much as there is to go wrong."""
    model, reference = OnnxModel(masked.model), TorchModel(masked.checkpoint, config)
    assert model.info.bit_depth == 12
    files = sorted((masked.data / "part/test").rglob("*.png"))
    pixels = np.stack([model.info.geometry.apply(read_image(path, model.info.bit_depth)) for path in files])
    found, wanted = model.predict(pixels), reference.predict(pixels)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
    np.testing.assert_allclose(found.maps, wanted.maps, atol=1e-3)
    np.testing.assert_array_equal(found.conditions, wanted.conditions)
    assert ((found.scores > model.info.threshold) == (wanted.scores > model.info.threshold)).all()
    assert not found.maps[:, LABEL:].any()
    pixels[:, LABEL:] = 255 - pixels[:, LABEL:]
    np.testing.assert_array_equal(model.predict(pixels).scores, found.scores)


def test_the_papers_form_and_its_model_look_inside_too(masked, tmp_path):
    own = masked.with_(form="paper", save_dir=tmp_path)
    assert train.main(own) == export_onnx.main(own) == 0  # which compares them
    detector, settings = load(masked, form="paper", save_dir=tmp_path)
    images = pictures(settings)
    before = detector.predict(images).scores
    images[:, :, LABEL:] = 0.3
    assert torch.equal(before, detector.predict(images).scores)


def test_evaluation_and_predict_need_no_file(masked, tmp_path, capsys):
    assert evaluation.main(masked.flags) == 0
    with_file = capsys.readouterr().out
    shutil.copytree(masked.data, tmp_path / "data", ignore=shutil.ignore_patterns("region.png"))
    assert evaluation.main(masked.with_(data_path=tmp_path / "data")) == 0
    assert capsys.readouterr().out == with_file
    assert "in the region of interest" in with_file
    (row,) = read_csv(masked.root / "out/final_evaluation_results.csv")
    assert row["region_share"] == pytest.approx(LABEL / HEIGHT)
    table = tmp_path / "verdicts.csv"
    assert predict.main([str(masked.model), str(tmp_path / "data/part/test"), "--csv", str(table)]) == 0
    assert all(row["box_y"] + row["box_height"] <= LABEL for row in read_csv(table) if row["box_y"] is not None)


def test_the_baseline_looks_where_ours_does(masked):
    assert train_patchcore.main(masked.flags) == 0
    assert eval_noise_robustness.main([*masked.flags, "--levels", "0"]) == 0
    assert visualize_noise_robustness.main(masked.flags) == 0
    settings = masked.settings()
    baseline = load_patchcore(settings, "part")
    images = pictures(settings)
    before = baseline.predict(images)
    images[:, :, LABEL:] = 0.3
    after = baseline.predict(images)
    assert baseline.net.scoring == PATCHCORE and torch.equal(before.scores, after.scores)
    assert not before.maps[:, LABEL:].any()


def test_figures_show_its_outline(masked):
    assert figure3.main([*masked.flags, "--limit", "1"]) == 0
    folder = bank_path(masked.root / "out", "part", 0.1).parent / "results/part"
    (picture,) = folder.glob("*.png")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    outline = np.abs(pixels - (0xFF, 0x2F, 0xB9)).sum(axis=2) < 30
    assert outline.sum() > 100


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_overlays_show_its_outline_without_a_file(masked, tmp_path, kind):
    picture = masked.plain / "part/test/good/000.png"
    maps = tmp_path / "maps"
    assert predict.main([str(getattr(masked, kind)), str(picture), "--heatmaps", str(maps)]) == 0
    (drawn,) = maps.iterdir()
    pink = (np.asarray(Image.open(drawn)) == (0xFF, 0x2F, 0xB9)).all(axis=2)
    assert pink.shape == (2 * HEIGHT, 2 * WIDTH)
    assert pink[2 * LABEL - 2 : 2 * LABEL].all() and not pink[2 * LABEL :].any()


def test_a_damaged_description_of_it_is_refused(masked):
    info = OnnxModel(masked.model).info
    np.testing.assert_array_equal(info.inside, np.arange(HEIGHT)[:, None] < np.full(WIDTH, LABEL))
    text = info.to_json()
    assert ModelInfo.from_json(text) == info
    nothing = pack_region(np.zeros((HEIGHT, WIDTH), bool))
    for value in ("?", "AAAA", "", 5, [], nothing):
        with pytest.raises(ValueError, match="damaged"):
            ModelInfo.from_json(json.dumps(json.loads(text) | {"region": value}))
    old = json.loads(text)
    del old["region"]
    assert ModelInfo.from_json(json.dumps(old)).inside is None


def test_good_parts_are_remembered_inside_only(masked, tmp_path, capsys):
    model = tmp_path / "model.pt"
    shutil.copy(masked.checkpoint, model)
    # Parts that the memory knows, under labels that it has never seen: nothing is new.
    known = sorted((masked.data / "part/train/good").iterdir())[:3]
    labelled, dotted = tmp_path / "labelled", tmp_path / "dotted"
    rng = np.random.default_rng(0)
    for folder in (labelled, dotted):
        folder.mkdir()
        for path in known:
            pixels = np.array(Image.open(path))
            pixels[LABEL:] = rng.integers(0, GREY + 1, (HEIGHT - LABEL, WIDTH))
            if folder == dotted:
                pixels[20:32, 90:102] = GREY // 3
            Image.fromarray(pixels).save(folder / path.name)
    before = [len(bank) for bank in load_checkpoint(model).memory_banks]
    assert remember.main([str(model), str(labelled), "--yes"]) == 0
    assert [len(bank) for bank in load_checkpoint(model).memory_banks] == before
    capsys.readouterr()
    assert remember.main([str(model), str(dotted), "--yes", "--onnx"]) == 0
    assert "3 NG before, 0 NG now" in capsys.readouterr().out
    found = load_checkpoint(model)
    assert [len(bank) for bank in found.memory_banks] > before
    assert torch.equal(found.state["region.inside"], load_checkpoint(masked.checkpoint).state["region.inside"])
    written = OnnxModel(model.with_suffix(".onnx"))
    np.testing.assert_array_equal(written.info.inside, OnnxModel(masked.model).info.inside)
    pixels = np.stack([written.info.geometry.apply(read_image(path, 12)) for path in sorted(dotted.iterdir())])
    assert (written.predict(pixels).scores <= written.info.threshold).all()


def test_mutated_regions_are_read_or_refused(masked, tmp_path):
    rng, settings = random.Random(5), masked.settings()
    picture = Image.open(masked.data / "part/region.png")
    like = train_samples(settings, "part")[0]
    outcomes = set()
    for suffix in ("png", "tif", "bmp", "jpg"):
        picture.save(tmp_path / f"original.{suffix}")
        contents = (tmp_path / f"original.{suffix}").read_bytes()
        for _ in range(30):
            (tmp_path / f"region.{suffix}").write_bytes(mutate(contents, rng))
            try:
                inside = read_region(tmp_path / f"region.{suffix}", settings, like)
                assert inside.shape == (HEIGHT, WIDTH) and inside.any()
                outcomes.add("read")
            except InputError as error:
                assert f"region.{suffix}" in str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_mutated_models_with_a_region_run_or_are_refused(masked, tmp_path, monkeypatch):
    net = build_net(masked.settings())
    monkeypatch.setattr(utils.line.torch_model, "build_net", lambda settings: net)
    rng, part = random.Random(6), str(masked.plain / "part/test/good/000.png")
    for model in (masked.model, masked.checkpoint):
        contents = model.read_bytes()
        for number in range(30):
            path = tmp_path / f"mutant{model.suffix}"
            path.write_bytes(mutate(contents, rng))
            assert predict.main([str(path), part, "--heatmaps", str(tmp_path / "maps")]) in (0, 2), number


# --- pixel metrics ---


def test_pixel_metrics_count_inside_only():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((3, 16, 16)), np.zeros((3, 16, 16), bool)
    masks[1, 2:6, 2:6] = masks[2, 6:12, 3:5] = True
    inside = np.zeros((16, 16), bool)
    inside[:8, :10] = True
    maps[masks] += 0.3
    labels = np.array([0, 1, 1])
    found = evaluate(labels, maps.max(axis=(1, 2)), masks, maps, inside)
    cut = evaluate(labels, maps.max(axis=(1, 2)), masks[:, :8, :10], maps[:, :8, :10])
    assert found == cut
    assert found.pixel_auroc == pytest.approx(roc_auc_score(masks[:, inside].ravel(), maps[:, inside].ravel()))
    assert aupro(masks, maps, inside=np.ones((16, 16), bool)) == aupro(masks, maps)
    inside[:] = False
    inside[15, 15] = True
    nothing = evaluate(labels, maps.max(axis=(1, 2)), masks, maps, inside)
    assert nothing.pixel_auroc is None and nothing.aupro is None and nothing.image_auroc is not None


# --- the file ---


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2), (1000, 500)])
@pytest.mark.parametrize("crop", [True, False])
def test_any_size_goes_through_its_images_geometry(masked, tmp_path, size, crop):
    settings = masked.settings(center_crop=crop, image_size="64,128", resize=72)
    paint(tmp_path / "region.png", size=size)
    inside = read_region(tmp_path / "region.png", settings, train_samples(settings, "part")[0])
    assert inside.shape == (64, 128)
    rows = inside.any(axis=1)
    assert (inside == rows[:, None]).all()
    scale, top = (72 / HEIGHT, 4) if crop else (64 / HEIGHT, 0)
    assert abs(rows.sum() - min(64, LABEL * scale - top)) <= 1


def refused(code: int, capsys) -> str:
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


def test_an_all_black_region_is_refused(masked, tmp_path, capsys):
    paint(tmp_path / "black.png", rows=0)
    own = masked.with_(region=tmp_path / "black.png", save_dir=tmp_path)
    assert "black.png is all black: white is what is looked at" in refused(train.main(own), capsys)
    paint(tmp_path / "thin.png", rows=2)
    own = masked.with_(region=tmp_path / "thin.png", save_dir=tmp_path)
    assert "the region is too small: of the 12 x 24 patches of 8 pixels none" in refused(train.main(own), capsys)


def test_a_region_that_is_no_picture_or_of_another_shape_is_refused(masked, tmp_path, capsys):
    (tmp_path / "text.png").write_text("white")
    own = masked.with_(save_dir=tmp_path, region=tmp_path / "text.png")
    assert "text.png cannot be read" in refused(train.main(own), capsys)
    own = masked.with_(save_dir=tmp_path, region=tmp_path / "absent.png")
    assert "absent.png is not there" in refused(train.main(own), capsys)
    paint(tmp_path / "square.png", size=(100, 100))
    own = masked.with_(save_dir=tmp_path, region=tmp_path / "square.png")
    assert "square.png is 100 x 100, image" in refused(train.main(own), capsys)
    assert not list(tmp_path.glob("*/*.pt"))


def test_a_region_that_a_bank_was_not_made_with_is_refused_by_name(masked, tmp_path, capsys):
    shutil.copytree(masked.plain, tmp_path / "data")
    own = masked.with_(data_path=tmp_path / "data", save_dir=tmp_path / "out", conditions="clean")
    assert train.main(own) == 0
    bank = tmp_path / "out/10pct/model_data_part_10pct.pt"
    kept = bank.read_bytes()
    region = tmp_path / "data/part/region.png"
    paint(region)
    capsys.readouterr()
    message = f"it was made without a region, and {region} is there now"
    assert message in refused(evaluation.main(own), capsys)
    assert message in refused(train.main(own), capsys) and bank.read_bytes() == kept
    assert train.main([*own, "--overwrite"]) == evaluation.main(own) == 0
    paint(region, rows=32)
    capsys.readouterr()
    assert f"it was made with another region than {region}" in refused(evaluation.main(own), capsys)
    region.unlink()
    assert evaluation.main(own) == 0
    capsys.readouterr()
    assert "it was made with a region, and there is none now" in refused(train.main(own), capsys)


def test_a_damaged_region_is_refused(masked, tmp_path):
    detector, settings = load(masked)
    state = detector.net.state()
    net = build_net(settings)
    with pytest.raises(InputError, match="does not fit the network"):
        net.with_state(state | {"region.inside": torch.ones(8, 8)})
    twin = net.with_state(state)
    assert twin.region is not None and net.region is None and net.with_state(state) is twin
    assert len(make_maps(twin, settings.image_size)) == 2


def test_scores_are_the_same_in_every_batch(masked):
    detector, settings = load(masked)
    images = pictures(settings)
    alone = torch.cat([detector.predict(image[None]).scores for image in images])
    torch.testing.assert_close(alone, detector.predict(images).scores, rtol=1e-4, atol=0)
    (scored,) = score_samples([detector], samples_for_test(settings, "part"), settings, "part")
    np.testing.assert_allclose(scored.scores, alone.numpy(), rtol=1e-4)
