"""A data set small enough to train on in a second, and the command line that fits it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE = 96


def draw_part(rng: np.random.Generator) -> np.ndarray:
    """A (SIZE, SIZE, 3) uint8 picture of stripes under changing light."""
    x = np.arange(SIZE) + rng.uniform(0, 8)
    stripes = 120 + 40 * np.sin(2 * np.pi * x / 12)[None, :] + rng.uniform(-8, 8)
    grey = stripes + rng.normal(0, 5, (SIZE, SIZE))
    return np.clip(np.stack([grey, grey * 0.9, grey * 0.8], axis=2), 0, 255).astype(np.uint8)


def make_category(
    root: Path, name: str, seed: int, train: int = 8, good: int = 4, bad: int = 4, shade: float = 0.5
) -> Path:
    """Write one category in the MVTec layout; its defects are squares, ``shade`` times as bright."""
    rng = np.random.default_rng(seed)
    for folder, count in {"train/good": train, "test/good": good}.items():
        (root / name / folder).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(draw_part(rng)).save(root / name / folder / f"{index:03d}.png")
    for folder in ("test/spot", "ground_truth/spot"):
        (root / name / folder).mkdir(parents=True)
    for index in range(bad):
        pixels, mask = draw_part(rng), np.zeros((SIZE, SIZE), np.uint8)
        top, left = rng.integers(24, 60, 2)
        mask[top : top + 12, left : left + 12] = 255
        pixels[mask > 0] = pixels[mask > 0] * shade
        Image.fromarray(pixels).save(root / name / "test/spot" / f"{index:03d}.png")
        Image.fromarray(mask).save(root / name / "ground_truth/spot" / f"{index:03d}_mask.png")
    return root / name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """DATA_PATH with the categories 'tile' and 'bolt'."""
    root = tmp_path / "data"
    make_category(root, "tile", 0)
    make_category(root, "bolt", 1)
    return root


def small_flags(root: Path) -> list[str]:
    """The small backbone and pictures, one condition, and folders below ``root``."""
    pairs = {
        "data-path": root / "data",
        "save-dir": root / "out",
        "backbone": "efficientnet_lite0",
        "patchcore-dir": root / "patchcore",
        "patchcore-backbone": "efficientnet_lite0",
        "form": "wedge",
        "conditions": "clean",
        "image-size": 64,
        "resize": 72,
        "batch-size": 5,
        "num-workers": 0,
        "device": "cpu",
    }
    return [text for name, value in pairs.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def flags(data: Path, tmp_path: Path) -> list[str]:
    """What every script is called with here."""
    return small_flags(tmp_path)


@pytest.fixture(scope="session")
def banks_of_tile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what training 'tile' leaves: out/, with 10 % of the patches, and patchcore/, with all of them."""
    import train
    import train_patchcore

    root = tmp_path_factory.mktemp("banks")
    make_category(root / "data", "tile", 0)
    assert train.main(small_flags(root)) == 0
    assert train_patchcore.main([*small_flags(root), "--sampling-ratio", "1"]) == 0
    return root


@pytest.fixture
def trained(flags: list[str], tmp_path: Path, banks_of_tile: Path) -> list[str]:
    """The flags, after training 'tile'."""
    shutil.copytree(banks_of_tile / "out", tmp_path / "out")
    return flags


@pytest.fixture
def patchcore_bank(flags: list[str], tmp_path: Path, banks_of_tile: Path) -> Path:
    """The file of PatchCore's whole bank of 'tile', in its place."""
    shutil.copytree(banks_of_tile / "patchcore", tmp_path / "patchcore")
    return tmp_path / "patchcore/model_data_tile.pt"


@dataclass(frozen=True)
class Line:
    """One category, trained and exported: what a production line has. Tests leave its files as they are."""

    images: Path  # test images: good/ and spot/
    flags: list[str]
    checkpoint: Path
    model: Path


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """Made once for all tests, a lens for each condition; the threshold for false alarms of 0.05, from 20 images."""
    import export_onnx
    import train

    root = tmp_path_factory.mktemp("line")
    make_category(root / "data", "tile", 5, train=20)
    pairs = {
        "data-path": root / "data",
        "category": "tile",
        "save-dir": root / "out",
        "backbone": "efficientnet_lite0",
        "image-size": 64,
        "resize": 72,
        "num-workers": 0,
        "device": "cpu",
        "false-alarm-rate": 0.05,
    }
    flags = [text for name, value in pairs.items() for text in (f"--{name}", str(value))]
    assert train.main(flags) == 0
    assert export_onnx.main(flags) == 0
    bank = root / "out/10pct/model_data_tile_10pct"
    return Line(root / "data/tile/test", flags, bank.with_suffix(".pt"), bank.with_suffix(".onnx"))


@pytest.fixture
def magnetic_tile() -> Path:
    """The real data set, if MTD_ROOT names the folder of its category."""
    root = os.environ.get("MTD_ROOT")
    if not root:
        pytest.skip("MTD_ROOT does not name the magnetic_tile data set")
    return Path(root)
