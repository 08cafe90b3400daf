"""Cameras of 8 to 16 bits: the depth is found in training, travels with the model, and is used for every picture."""

import dataclasses
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import config
import evaluation
import export_onnx
import predict
import test as figure3
import train
import train_patchcore
import visualize_noise_robustness
from models.errors import InputError
from tests.conftest import SIZE
from tests.test_hostile import mutate
from tests.test_settings import DEFAULTS
from utils.console import warn_once
from utils.data.dataset import Sample, batches, train_samples, with_bit_depth
from utils.data.image import largest_value, read_image, read_mask
from utils.line.edge_model import OnnxModel
from utils.line.torch_model import TorchModel
from utils.pictures.tables import read_csv
from utils.pipeline.checkpoint import bank_path, load_checkpoint
from utils.settings import SettingsParser, make_settings

DEEP = (10, 12, 14, 16)


@pytest.fixture(autouse=True)
def forget_warnings():
    """What is said once in a process is said once in a test."""
    warn_once.cache_clear()


# --- files of 16 bits a channel, which Pillow writes in grey only ---


def save_png(path: Path, values: np.ndarray) -> None:
    """(H, W[, C]) uint16 as a PNG: grey, grey and alpha, RGB or RGBA."""
    values = np.atleast_3d(values)
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def save_tiff(path: Path, values: np.ndarray, order: str = "<", deflate: bool = False, separate: bool = False) -> None:
    """(H, W[, C]) uint16 as a TIFF of one strip, or of one for each channel, bytes in the ``order`` of struct."""
    values = np.atleast_3d(values)
    height, width, channels = values.shape
    planes = np.moveaxis(values, 2, 0) if separate else values[None]
    strips = [plane.astype(f"{order}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    tags = {
        256: [width], 257: [height], 258: [16] * channels, 259: [8 if deflate else 1], 262: [2 if channels > 2 else 1],
        273: [], 277: [channels], 278: [height], 279: [len(strip) for strip in strips], 284: [2 if separate else 1],
    }  # fmt: skip
    place = 8
    for strip in strips:
        tags[273].append(place)
        place += len(strip)
    extra = b""
    entries = b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            extra, packed = extra + packed, struct.pack(f"{order}I", place + len(extra))
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, place + len(extra))
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    path.write_bytes(start + b"".join(strips) + extra + directory)


WRITERS = {
    "png": save_png,
    "tif": save_tiff,
    "big-endian.tif": lambda path, values: save_tiff(path, values, ">"),
    "deflate.tif": lambda path, values: save_tiff(path, values, deflate=True),
    "deflate-big-endian.tif": lambda path, values: save_tiff(path, values, ">", deflate=True),
}


def in_bits(shades: np.ndarray, depth: int) -> np.ndarray:
    """Shades from 0 to 1 as a camera of so many bits writes them."""
    return np.round(shades * (2**depth - 1)).astype(np.uint16)


# --- reading ---


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("depth", DEEP)
def test_every_shade_of_8_bits_comes_back_from_a_deep_file(tmp_path, kind, channels, depth):
    shades = np.random.default_rng(depth).integers(0, 256, (7, 13, channels)).astype(np.uint8)
    shades[0, 0] = 255
    path = tmp_path / f"deep.{kind}"
    WRITERS[kind](path, in_bits(shades / 255, depth))
    found = read_image(path, depth)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.broadcast_to(shades[..., :3], (7, 13, 3)))
    assert largest_value(path) == 2**depth - 1


def test_both_bytes_of_a_colour_are_read(tmp_path):
    values = np.random.default_rng(0).integers(0, 1024, (9, 9, 3)).astype(np.uint16)  # its first byte is 0 to 3
    save_png(tmp_path / "dark.png", values)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "dark.png", 10)), np.round(values * (255 / 1023)))


def test_a_deep_picture_is_turned_upright(tmp_path):
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 800
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(read_image(tmp_path / "turned.png", 12))[..., 0], np.rot90(np.round(values * (255 / 4095)), -1)
    )


def test_values_beyond_the_depth_are_refused(tmp_path):
    save_png(tmp_path / "bright.png", np.full((4, 4, 3), 1024, np.uint16))
    with pytest.raises(InputError, match=r"bright\.png has values up to 1024: training had 10 bits a pixel, 0 to 1023"):
        read_image(tmp_path / "bright.png", 10)
    assert np.asarray(read_image(tmp_path / "bright.png", 12)).max() == round(1024 * 255 / 4095)


@pytest.mark.parametrize("kind", ["separate planes", "grey and alpha"])
def test_what_pillow_cannot_read_whole_is_refused(tmp_path, kind):
    path = tmp_path / "odd.img"
    if kind == "separate planes":
        save_tiff(path, np.full((8, 8, 3), 900, np.uint16), separate=True)
    else:
        save_png(path, np.full((8, 8, 2), 900, np.uint16))
    for read in (read_image, largest_value):
        with pytest.raises(InputError, match=r"odd\.img cannot be read \(16 bits a channel that are neither grey nor"):
            read(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_deep_mask_marks_whatever_is_not_black(tmp_path, channels):
    values = np.zeros((8, 8, channels), np.uint16)
    values[2:4, 3:6] = 1
    save_png(tmp_path / "mask.png", values)
    np.testing.assert_array_equal(np.asarray(read_mask(tmp_path / "mask.png", (8, 8))), values[..., 0] * 255)


# --- the depth is found ---


def settings_of(**values):
    return make_settings(DEFAULTS | {"NUM_WORKERS": 0, "DEVICE": "cpu"} | values)


@pytest.mark.parametrize("depth", (8, *DEEP))
def test_the_depth_is_that_of_the_largest_value(tmp_path, depth):
    samples = []
    for number, brightest in enumerate((0.1, 0.3, 1.0)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(in_bits(np.linspace(0, brightest, 64).reshape(8, 8), depth)).save(path)
        samples.append(Sample(path, "good"))
    assert with_bit_depth(samples, settings_of()).bit_depth == depth
    assert with_bit_depth(samples, settings_of(BIT_DEPTH=14)).bit_depth == 14  # what is set is not looked for


def test_files_of_8_bits_are_known_by_their_header(tmp_path):
    Image.new("RGB", (64, 64), (255, 255, 255)).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:60]
    (tmp_path / "cut.png").write_bytes(cut)
    assert with_bit_depth([Sample(tmp_path / "cut.png", "good")], settings_of()).bit_depth == 8


@pytest.mark.parametrize("given", [9, 32, 0, "12 bits", 12.0, True, (12,)])
def test_a_wrong_depth_is_one_line_and_exit_code_2(flags, capsys, given):
    assert train.main([*flags, "--bit-depth", str(given)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"BIT_DEPTH is {given!r}; it must be None or one of 8, 10, 12, 14, 16" in error


# --- from training to verdict ---


def make_camera(root: Path, depth: int, bright: float = 1.0) -> Path:
    """DATA_PATH with the category 'part' as a grey camera of so many bits sees it: the same scenes for all."""
    rng = np.random.default_rng(7)
    folders = {"train/good": 10, "test/good": 6, "test/spot": 6}
    for folder, count in folders.items():
        (root / "part" / folder).mkdir(parents=True)
        for index in range(count):
            x = np.arange(SIZE) + rng.uniform(0, 8)
            shades = 0.55 + 0.2 * np.sin(2 * np.pi * x / 12)[None] + rng.normal(0, 0.02, (SIZE, SIZE))
            if folder == "test/spot":
                top, left = rng.integers(24, 60, 2)
                shades[top : top + 12, left : left + 12] *= rng.uniform(0.6, 1.1)  # some are hard to tell
            shades = np.round(shades.clip(0, 1) * bright * 255) / 255  # a photograph of 8 bits, for all cameras
            values = in_bits(shades, depth)
            path = root / "part" / folder / f"{index:03d}.png"
            Image.fromarray(values.astype(np.uint8) if depth == 8 else values).save(path)
    return root


@dataclasses.dataclass(frozen=True)
class Camera:
    """A camera's data, and its detector, trained and evaluated."""

    images: Path
    flags: list[str]
    checkpoint: Path
    auroc: float


@pytest.fixture(scope="module")
def cameras(tmp_path_factory) -> dict[int, Camera]:
    made = {}
    for depth in (8, 12, 16):
        root = tmp_path_factory.mktemp(f"bits{depth}")
        pairs = {
            "data-path": make_camera(root / "data", depth),
            "category": "part",
            "save-dir": root / "out",
            "patchcore-dir": root / "patchcore",
            "backbone": "efficientnet_lite0",
            "patchcore-backbone": "efficientnet_lite0",
            "conditions": "clean, noise20",
            "image-size": 64,
            "resize": 72,
            "num-workers": 0,
            "device": "cpu",
            "false-alarm-rate": 0.1,
        }
        flags = [text for name, value in pairs.items() for text in (f"--{name}", str(value))]
        assert train.main(flags) == evaluation.main(flags) == 0
        (row,) = read_csv(root / "out/final_evaluation_results.csv")
        bank = root / "out/10pct/model_data_part_10pct.pt"
        made[depth] = Camera(root / "data/part/test", flags, bank, row["image_auroc"])
    return made


@pytest.fixture(scope="module")
def exported(cameras) -> Path:
    """The detector of the camera of 16 bits as a .onnx file."""
    assert export_onnx.main(cameras[16].flags) == 0
    return cameras[16].checkpoint.with_suffix(".onnx")


def scores(model: Path, images: Path, folder: Path) -> np.ndarray:
    """What predict.py says of all images, by their names."""
    assert predict.main([str(model), str(images), "--jsonl", str(folder / "v.jsonl")]) == 0
    rows = [json.loads(line) for line in (folder / "v.jsonl").read_text().splitlines()]
    return np.array([row["score"] for row in sorted(rows, key=lambda row: row["file"])])


def test_the_same_scenes_score_alike_whatever_the_camera(cameras, exported, tmp_path):
    found = {depth: scores(camera.checkpoint, camera.images, tmp_path) for depth, camera in cameras.items()}
    for depth in (12, 16):
        np.testing.assert_allclose(found[depth], found[8], rtol=1e-3)
        assert cameras[depth].auroc == pytest.approx(cameras[8].auroc)
    np.testing.assert_allclose(scores(exported, cameras[16].images, tmp_path), found[16], 1e-4)


@pytest.mark.parametrize("depth", DEEP)
def test_what_the_bits_beyond_8_say_hardly_changes_a_score(cameras, depth, tmp_path):
    model = TorchModel(cameras[8].checkpoint, config)
    rng = np.random.default_rng(depth)
    scenes = [np.asarray(Image.open(path)) / 255 for path in sorted(cameras[8].images.rglob("*.png"))]
    found = []
    for scene in scenes:
        shades = (scene + rng.uniform(-0.5, 0.5, scene.shape) / 255).clip(0, 1)  # rounded to 8 bits it is the scene
        save_png(tmp_path / "deep.png", in_bits(shades, depth))
        found.append(model.info.geometry.apply(read_image(tmp_path / "deep.png", depth)))
    wanted = scores(cameras[8].checkpoint, cameras[8].images, tmp_path)
    np.testing.assert_allclose(model.predict(np.stack(found)).scores, wanted, rtol=0.02, atol=0.02)


def test_the_depth_travels_in_checkpoint_and_model(cameras, exported):
    for depth, camera in cameras.items():
        assert load_checkpoint(camera.checkpoint).settings["BIT_DEPTH"] == depth
    assert OnnxModel(exported).info.bit_depth == 16


def test_training_again_finds_that_it_is_there(cameras, capsys):
    assert train.main(cameras[12].flags) == 0
    assert "is there and fits" in capsys.readouterr().out
    assert train.main([*cameras[12].flags, "--bit-depth", "14"]) == 2
    assert "it was made with BIT_DEPTH = 12, the setting is 14" in capsys.readouterr().err


def test_a_deeper_picture_is_an_error_of_its_own_row(cameras, tmp_path, capsys):
    target = tmp_path / "v.csv"
    inputs = [str(cameras[16].images / "good"), str(cameras[12].images / "good/000.png")]
    assert predict.main([str(cameras[12].checkpoint), *inputs, "--csv", str(target)]) == 0
    assert [row["verdict"] for row in read_csv(target)] == ["ERROR"] * 6 + ["OK"]
    assert capsys.readouterr().err.count("training had 12 bits a pixel, 0 to 4095") == 6
    assert predict.main([str(cameras[8].checkpoint), inputs[1]]) == 2
    assert "training had 8 bits a pixel, 0 to 255" in capsys.readouterr().err


def test_pictures_of_8_bits_are_told_once(cameras, tmp_path, capsys):
    told = scores(cameras[12].checkpoint, cameras[8].images, tmp_path)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "has 8 bits a pixel, training had 12" in line]
    assert len(warnings) == 1 and "good/000.png" in warnings[0] and "others like it are not named" in warnings[0]
    np.testing.assert_allclose(told, scores(cameras[12].checkpoint, cameras[12].images, tmp_path), rtol=0.02)


def test_test_images_of_another_depth_are_told(cameras, tmp_path, capsys):
    data = make_camera(tmp_path / "data", 12)
    flags = [*cameras[12].flags, "--data-path", str(data)]
    for path in sorted((data / "part/test/good").iterdir())[:3]:
        path.write_bytes((cameras[8].images / "good" / path.name).read_bytes())
    assert evaluation.main(flags) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "good/000.png has 8 bits a pixel" in warnings[0]
    deeper = data / "part/test/spot/003.png"
    deeper.write_bytes((cameras[16].images / "spot/003.png").read_bytes())
    assert evaluation.main(flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "spot/003.png has values up to" in errors[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_8_bit_file_among_deep_ones_is_named_in_training(cameras, tmp_path, capsys, workers):
    data = make_camera(tmp_path / "data", 12)
    odd = data / "part/train/good/004.png"
    Image.fromarray((np.asarray(Image.open(odd)) // 16).astype(np.uint8)).save(odd)
    settings = settings_of(DATA_PATH=data, BATCH_SIZE=3, NUM_WORKERS=workers, IMAGE_SIZE=64, RESIZE=72)
    samples = train_samples(settings, "part")
    settings = with_bit_depth(samples, settings)
    assert settings.bit_depth == 12
    for _ in range(3):  # as it is read for each condition
        means = [image.mean().item() for batch in batches(samples, settings) for image in batch.images]
    assert np.ptp(means) < 0.05  # it is as bright as the others
    assert capsys.readouterr().err.count("004.png has 8 bits a pixel") == 1


def test_a_dark_camera_can_be_told_its_depth(tmp_path, capsys):
    data = make_camera(tmp_path / "data", 12, bright=0.2)  # no value above 1023: 10 bits by the look of it
    assert with_bit_depth(train_samples(settings_of(DATA_PATH=data), "part"), settings_of()).bit_depth == 10
    flags = ["--data-path", str(data), "--category", "part", "--save-dir", str(tmp_path / "out"), "--bit-depth", "12"]
    flags += ["--backbone", "efficientnet_lite0", "--conditions", "clean", "--image-size", "64", "--resize", "72"]
    flags += ["--num-workers", "0", "--device", "cpu"]
    assert train.main(flags) == 0
    assert "12 bits a pixel" in capsys.readouterr().out
    bank = bank_path(tmp_path / "out", "part", 0.1)
    assert load_checkpoint(bank).settings["BIT_DEPTH"] == 12
    save_png(tmp_path / "glare.png", np.full((SIZE, SIZE), 4000, np.uint16))
    assert predict.main([str(bank), str(tmp_path / "glare.png"), "--false-alarm-rate", "0.1"]) == 0


def test_a_model_from_before_reads_files_as_before(cameras, exported, tmp_path, capsys):
    model = onnx.load(exported)
    (entry,) = model.metadata_props
    entry.value = entry.value.replace(', "BIT_DEPTH": 16', "")
    onnx.save(model, tmp_path / "old.onnx")
    assert OnnxModel(tmp_path / "old.onnx").info.bit_depth is None
    wanted = scores(exported, cameras[16].images, tmp_path)
    for depth in (8, 16):
        found = scores(tmp_path / "old.onnx", cameras[depth].images, tmp_path)
        np.testing.assert_allclose(found, wanted, rtol=0.02)
    assert "training had" not in capsys.readouterr().err  # another warning, of light that is unfamiliar, may be there
    entry.value = entry.value.replace('"IMAGE_SIZE"', '"BIT_DEPTH": 11, "IMAGE_SIZE"')
    onnx.save(model, tmp_path / "odd.onnx")
    assert predict.main([str(tmp_path / "odd.onnx"), str(cameras[8].images)]) == 2
    assert "incomplete or damaged" in capsys.readouterr().err


def test_figures_and_the_baseline_see_the_same_pictures(cameras, tmp_path):
    pictures = {}
    for depth in (8, 12):
        flags, out = cameras[depth].flags, cameras[depth].checkpoint.parents[1]
        assert train_patchcore.main(flags) == figure3.main([*flags, "--limit", "1"]) == 0
        assert visualize_noise_robustness.main(flags) == 0
        drawn = [next((out / "10pct/results/part").glob("*.png")), out / "Figure_Noise_Robustness_part.png"]
        pictures[depth] = [np.asarray(Image.open(path).convert("L"), float) for path in drawn]
    for one, other in zip(pictures[8], pictures[12], strict=True):
        assert one.shape == other.shape and np.abs(one - other).mean() < 1
    settings, _ = SettingsParser(config, "").read(cameras[12].flags)
    assert load_checkpoint(settings.patchcore_dir / "model_data_part_10pct.pt").settings["BIT_DEPTH"] == 12


def test_sixty_mutated_deep_images_each_get_a_row(cameras, tmp_path):
    rng = random.Random(3)
    shades = np.random.default_rng(3).uniform(0, 1, (SIZE, SIZE, 3))
    originals = [tmp_path / "colour.png", tmp_path / "colour.tif", tmp_path / "packed.tif"]
    for path, write in zip(originals, (save_png, save_tiff, WRITERS["deflate.tif"]), strict=True):
        write(path, in_bits(shades, 12))
        contents = path.read_bytes()
        for number in range(20):
            path.with_stem(f"{path.stem}{number}").write_bytes(mutate(contents, rng))
        path.unlink()
    assert predict.main([str(cameras[12].checkpoint), str(tmp_path), "--csv", str(tmp_path / "v.csv")]) in (0, 2)
    assert len((tmp_path / "v.csv").read_text().splitlines()) == 61
