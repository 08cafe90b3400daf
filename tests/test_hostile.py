"""Files that are broken, or made to do harm: one clear line each, and nothing runs, hangs or leaves its folder."""

import pickle
import random
import shutil
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import config
import evaluation
import export_onnx
import predict
import utils.line.torch_model
from utils.data import image as image_module
from utils.data.image import read_image
from utils.line.edge_model import KEY
from utils.pipeline.checkpoint import build_net
from utils.settings import SettingsParser

MUTANTS = {"images": 300, "models": 100, "checkpoints": 100}


def error_of(arguments, capsys) -> str:
    """The one line that a call of predict.py which must fail prints."""
    assert predict.main([str(argument) for argument in arguments]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1
    return errors[0]


def mutate(contents: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat or overwrite: what disks, networks and attackers do to a file."""
    data = bytearray(contents)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place, length = rng.randrange(len(data)), rng.randint(1, 64)
        match rng.randrange(5):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + length] = rng.randbytes(length)
            case 2:
                data[place:place] = data[place : place + length]
            case 3:
                del data[place : place + length]
            case 4:
                del data[max(place, 1) :]
    return bytes(data)


# --- images ---


def test_three_hundred_mutated_images_each_get_a_row(line, tmp_path):
    rng = random.Random(0)
    picture = Image.open(line.images / "good/000.png")
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        picture.save(tmp_path / f"original.{suffix}")
        contents = (tmp_path / f"original.{suffix}").read_bytes()
        (tmp_path / f"original.{suffix}").unlink()
        for number in range(MUTANTS["images"] // 5):
            (tmp_path / f"{number}.{suffix}").write_bytes(mutate(contents, rng))
    start = time.monotonic()
    assert predict.main([str(line.model), str(tmp_path), "--csv", str(tmp_path / "v.csv")]) == 0
    assert time.monotonic() - start < 120
    assert len((tmp_path / "v.csv").read_text().splitlines()) == 1 + MUTANTS["images"]


def test_a_huge_image_is_refused_before_it_is_decoded(line, tmp_path, capsys):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))))
    assert predict.main([str(line.model), str(tmp_path / "bomb.png")]) == 2
    assert "bomb.png" in capsys.readouterr().err
    wide = Image.new("1", (20_000, 5_001))
    wide.save(tmp_path / "wide.png")
    assert predict.main([str(line.model), str(tmp_path / "wide.png")]) == 2
    assert "more than 100 megapixels" in capsys.readouterr().err


def test_formats_that_start_programs_are_no_images(tmp_path):
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(image_module.InputError, match="cannot be read"):
        read_image(tmp_path / "page.png")


def test_unusual_images_are_judged_as_they_look(line, tmp_path, capsys):
    picture = Image.open(line.images / "good/000.png")
    rotated = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    rotated.save(tmp_path / "turned.png", exif=exif)
    grey = np.asarray(picture.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    picture.save(tmp_path / "film.webp", save_all=True, append_images=[rotated], lossless=True)
    picture.save(tmp_path / "plain.png")
    picture.convert("CMYK").save(tmp_path / "print.tif")
    assert predict.main([str(line.model), str(tmp_path), "--jsonl", str(tmp_path / "v.jsonl")]) == 0
    lines = (tmp_path / "v.jsonl").read_text().splitlines()
    score = {Path(row["file"]).name: row["score"] for row in map(predict.json.loads, lines)}
    assert score["turned.png"] == score["film.webp"] == score["plain.png"]
    assert score["deep.png"] is None  # the model was trained on 8 bits
    assert "deep.png has values up to" in capsys.readouterr().err
    assert score["print.tif"] == pytest.approx(score["plain.png"], rel=0.05)


def test_an_image_that_vanishes_while_it_is_read(line, tmp_path, monkeypatch, capsys):
    path = tmp_path / "part.png"
    shutil.copy(line.images / "good/000.png", path)

    def vanish(image):
        path.unlink()
        raise OSError("stale file handle")

    monkeypatch.setattr(image_module.ImageOps, "exif_transpose", vanish)
    assert predict.main([str(line.model), str(path)]) == 2
    assert "part.png cannot be read (stale file handle)" in capsys.readouterr().err


# --- models ---


def test_a_hundred_mutated_models_run_or_are_refused(line, tmp_path, capsys):
    rng = random.Random(1)
    contents, part = line.model.read_bytes(), str(line.images / "good/000.png")
    for number in range(MUTANTS["models"]):
        (tmp_path / "m.onnx").write_bytes(mutate(contents, rng))
        start = time.monotonic()
        assert predict.main([str(tmp_path / "m.onnx"), part]) in (0, 2), number
        assert time.monotonic() - start < 60


def test_a_model_of_somebody_else_is_refused(line, tmp_path, capsys):
    model = onnx.load(line.model)
    path = tmp_path / "m.onnx"
    entry = model.metadata_props[0]
    text = entry.value
    for value, message in (
        (text.replace('"format": 1', '"format": 2'), "newer than this program's 1"),
        (text.replace('"category"', '"kategorie"'), "incomplete or damaged"),
        (text.replace('"IMAGE_SIZE": 64', '"IMAGE_SIZE": 32'), "not what its description says"),
        ("[1]", "damaged"),
        ("{", "cannot be used"),
    ):
        assert value != text
        entry.value = value
        onnx.save(model, path)
        assert message in error_of([path, line.images], capsys)
    entry.key = "other"
    onnx.save(model, path)
    assert KEY != "other" and "is no WEDGE-Net model" in error_of([path, line.images], capsys)


def test_a_model_whose_external_data_is_missing_or_elsewhere_is_refused(line, tmp_path, capsys):
    model = onnx.load(line.model)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    assert "cannot be read" in error_of([tmp_path / "m.onnx", line.images], capsys)


@pytest.mark.parametrize("contents", [b"", b"no model", b"\x80\x04."])
@pytest.mark.parametrize("name", ["m.onnx", "m.pt"])
def test_what_is_no_model_is_refused(line, tmp_path, capsys, name, contents):
    (tmp_path / name).write_bytes(contents)
    assert name in error_of([tmp_path / name, line.images], capsys)


# --- checkpoints ---


@pytest.fixture
def one_network(line, monkeypatch):
    """Building a network takes a second, and none of these tests is about that."""
    settings, _ = SettingsParser(config, "").read(line.flags)
    net = build_net(settings)
    monkeypatch.setattr(utils.line.torch_model, "build_net", lambda settings: net)


def test_a_hundred_mutated_checkpoints_run_or_are_refused(line, tmp_path, one_network, capsys):
    rng = random.Random(2)
    contents, part = line.checkpoint.read_bytes(), str(line.images / "good/000.png")
    for number in range(MUTANTS["checkpoints"]):
        (tmp_path / "m.pt").write_bytes(mutate(contents, rng))
        start = time.monotonic()
        assert predict.main([str(tmp_path / "m.pt"), part]) in (0, 2), number
        assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "newer than this program's"),
        ({"format": "1"}, "no format version"),
        ({"format": 3}, "older version of this program: train it again"),
        ({"memory_banks": torch.zeros(3, 4)}, "its memory_banks is of type Tensor"),
        ({"memory_banks": []}, "its memory_banks are not matrices"),
        ({"memory_banks": [1.0, 2.0]}, "its memory_banks are not matrices"),
        ({"memory_banks": [torch.zeros(3), torch.zeros(3)]}, "its memory_banks are not matrices"),
        ({"memory_banks": [torch.zeros(3, 5), torch.zeros(3, 6)]}, "its vectors have 5 and 6 dimensions, its metric "),
        (
            {"memory_banks": [torch.zeros(3, 5)], "scales": torch.ones(10, 1)},
            "its vectors have 5 dimensions",
        ),
        ({"memory_banks": [torch.full((3, 5), torch.nan)] * 2}, "m.pt cannot be used: the memory bank holds NaN"),
        ({"memory_banks": [torch.ones(3, 5).long()] * 2}, "m.pt cannot be used: a memory bank must be float32 or"),
        ({"settings": None}, "its settings is of type NoneType"),
        ({"settings": {"BACKBONE": ["resnet50"]}}, "BACKBONE is"),
        ({"state": {}}, "does not fit the network"),
        ({"state": {"maps.0.matrices": torch.zeros(5)}}, "does not fit the network"),
        (
            {"state": {"maps.0.matrices": torch.zeros(2, 3, 4), "maps.0.offsets": torch.zeros(2, 1, 4)}},
            "does not fit the",
        ),
        (
            {"state": {f"maps.{k}.{part}": 1 for k in range(2) for part in ("matrices", "offsets")}},
            "holds what is no tensor",
        ),
        ({"scales": torch.ones(7)}, "have a wrong shape"),
        ({"scales": torch.ones(10, 3)}, "have a wrong shape"),
        ({"offsets": torch.zeros(10, 1)}, "have a wrong shape"),
        ({"offsets": torch.zeros(3), "scales": torch.ones(3, 2)}, "it holds 3 conditions, the settings 10"),
        ({"scales": torch.full((10, 2), torch.nan)}, "its scales or offsets are not finite"),
        ({"offsets": torch.full((10,), torch.inf)}, "its scales or offsets are not finite"),
        ({"fingerprint": "0"}, "other backbone weights"),
        ({"calibration_scores": torch.zeros(0)}, "no threshold can be set"),
        ({"calibration_scores": torch.full((9,), torch.inf)}, "no threshold can be set"),
    ],
)
def test_a_checkpoint_with_a_wrong_part_is_refused(line, tmp_path, one_network, capsys, change, message):
    contents = torch.load(line.checkpoint, weights_only=True)
    torch.save(contents | change, tmp_path / "m.pt")
    assert message in error_of([tmp_path / "m.pt", line.images], capsys)


class Malice:
    """Unpickled, it creates a file: what a malicious checkpoint does."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(line, tmp_path, capsys):
    trace = tmp_path / "it ran"
    malice = {"format": 1, "memory_bank": Malice(trace)}
    bank = tmp_path / "out/10pct/model_data_tile_10pct.pt"
    bank.parent.mkdir(parents=True)
    for write in (torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents))):
        write(malice, bank)
        assert "cannot be read" in error_of([bank, line.images], capsys)
        for script in (evaluation, export_onnx):
            assert script.main([*line.flags, "--save-dir", str(tmp_path / "out")]) == 2
            assert "cannot be read" in capsys.readouterr().err
        assert not trace.exists()
    pickle.loads(pickle.dumps(malice))
    assert trace.exists()  # it does work


def test_a_category_never_leads_outside(line, tmp_path, capsys, monkeypatch):
    contents = torch.load(line.checkpoint, weights_only=True)
    save_dir = tmp_path / "a/b/out"
    target = save_dir / "10pct/model_data_tile_10pct.pt"
    target.parent.mkdir(parents=True)
    torch.save(contents | {"category": "../../../evil\n\x1b[2J"}, target)
    graph = onnx.load(line.model)
    monkeypatch.setattr(export_onnx, "detector_graph", lambda *_, **__: graph)  # its own, but not written once more
    assert export_onnx.main([*line.flags, "--save-dir", str(save_dir)]) == 0
    assert predict.main([str(target.with_suffix(".onnx")), str(line.images), "--heatmaps", str(tmp_path / "a/m")]) == 0
    assert "\x1b" not in capsys.readouterr().err
    written = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {("a", "b"), ("a", "m")}
    for name in ("..", "../tile", "/etc", "a/b", "tile\0"):
        assert export_onnx.main([*line.flags, "--category", name]) == 2
