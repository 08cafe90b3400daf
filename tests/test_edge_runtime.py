"""predict.py in an environment that holds requirements-edge.txt and nothing else."""

import csv
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 300e6  # bytes that the installed packages may take


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> Path:
    """The interpreter of such an environment."""
    folder = tmp_path_factory.mktemp("edge")
    venv.create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python]  # this one's, which spares putting another there
    command = [*pip, "install", "-q", "--retries", "1", "-r", ROOT / "requirements-edge.txt"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode and "No matching distribution" in result.stderr:
        pytest.skip(f"pip reaches no package index here: {result.stderr.splitlines()[0]}")
    assert result.returncode == 0, result.stderr
    return python


def test_a_model_runs_there_and_gives_the_same_verdicts(edge, line, tmp_path):
    rows = []
    for python, program in ((edge, line.checkpoint.parents[1] / "predict.pyz"), (sys.executable, ROOT / "predict.py")):
        table = tmp_path / f"{program.name}.csv"
        pictures = "--heatmaps", tmp_path / "maps", "--gallery", tmp_path / "page.html"
        command = [python, program, line.model, line.images, "--csv", table, *pictures]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        with open(table, newline="") as file:
            rows.append([(row["file"], row["score"], row["verdict"]) for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and len(rows[0]) == 8


def test_it_is_small(edge):
    packages = next((edge.parents[1] / "lib").glob("python*/site-packages"), edge.parents[1] / "Lib/site-packages")
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
    assert 10e6 < size < LIMIT


def test_without_torch_and_the_like(line):
    forbidden = "torch", "torchvision", "scipy", "pywt", "tqdm", "matplotlib", "sklearn", "config"
    code = (
        "import sys, predict; code = predict.main(sys.argv[1:]); "
        f"print([name for name in {forbidden} if name in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(line.model), str(line.images / "good/000.png")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_checkpoint_there_is_refused_in_one_line(edge, line):
    result = subprocess.run([edge, "predict.py", line.checkpoint, "x.png"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "export_onnx.py" in result.stderr
