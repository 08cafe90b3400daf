"""Verdicts: from files, folders, globs, a list on stdin and a folder that a camera writes into."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from models.conformal import conformal_threshold, p_values
from utils.console import printable
from utils.line import watch
from utils.line.edge_model import OnnxModel
from utils.pictures.heatmap import overlay, overlay_path

BOX = ["box_x", "box_y", "box_width", "box_height"]
COLUMNS = ["file", "score", "p_value", "verdict", "milliseconds", "condition", *BOX, "area", "regions"]
ROOT = Path(__file__).parents[1]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


def test_each_image_gets_a_row_and_a_line(line, tmp_path, capsys):
    out = tmp_path / "verdicts.csv", tmp_path / "verdicts.jsonl"
    assert predict.main([str(line.model), str(line.images), "--csv", str(out[0]), "--jsonl", str(out[1])]) == 0
    captured = capsys.readouterr()
    rows = table(out[0])
    info = OnnxModel(line.model).info
    assert [row["file"] for row in rows] == [str(path) for path in sorted(line.images.rglob("*.png"))]
    assert [row["verdict"] for row in rows] == ["OK"] * 4 + ["NG"] * 4
    for row in rows:
        score = float(row["score"])
        assert (score > info.threshold) == (row["verdict"] == "NG")
        assert float(row["p_value"]) == p_values(np.array(info.calibration_scores), np.array([score]))[0]
        assert float(row["milliseconds"]) > 0 and row["condition"] == "clean"
    assert [json.loads(text)["score"] for text in out[1].read_text().splitlines()] == [float(r["score"]) for r in rows]
    assert len(captured.out.splitlines()) == 8
    assert "8 images: 4 OK, 4 NG, 0 unreadable" in captured.err
    assert "[tile] threshold" in captured.err and "false-alarm rate 0.05 (20 good parts)" in captured.err


def test_a_checkpoint_gives_the_same_verdicts(line, tmp_path):
    rows = []
    for number, model in enumerate((line.model, line.checkpoint)):
        target = tmp_path / f"{number}.csv"
        arguments = [str(model), str(line.images), "--csv", str(target), "--false-alarm-rate", "0.05"]
        assert predict.main(arguments) == 0
        rows.append(table(target))
    for one, other in zip(*rows, strict=True):
        assert one["verdict"] == other["verdict"]
        assert float(one["score"]) == pytest.approx(float(other["score"]), rel=1e-4)
        assert one["regions"] == other["regions"] and [one[name] for name in BOX] == [other[name] for name in BOX]


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "milliseconds"} for row in rows]


def test_images_are_named_one_by_one_by_glob_or_on_stdin(line, tmp_path, monkeypatch):
    """Side by side, each by one core, or one after the other by all: the verdicts are the same to the last digit."""
    good = sorted((line.images / "good").iterdir())
    found = []
    for inputs, stdin in (
        ([str(path) for path in good], ""),
        ([str(line.images / "goo?" / "*.png"), str(good[0])], ""),  # one of them twice
        (["-"], "".join(f"{path}\n" for path in good)),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        flags = ["--csv", str(tmp_path / "v.csv"), "--heatmaps", str(tmp_path / "maps")]
        assert predict.main([str(line.model), *inputs, *flags]) == 0
        found.append(without_times(table(tmp_path / "v.csv")))
    assert [row["file"] for row in found[0]] == [str(path) for path in good]
    assert found[0] == found[1] == found[2]


def test_a_file_that_takes_longer_still_comes_first(line, tmp_path, monkeypatch, capsys):
    judge = predict.Judge.__call__

    def slow_at_first(self, path):
        time.sleep(0.3 if path == pictures[0] else 0)
        return judge(self, path)

    pictures = sorted(line.images.rglob("*.png"))
    monkeypatch.setattr(predict, "cores", lambda: 4)
    monkeypatch.setattr(predict.Judge, "__call__", slow_at_first)
    assert predict.main([str(line.model), str(line.images), "--csv", str(tmp_path / "v.csv")]) == 0
    named = [str(path) for path in pictures]
    assert [row["file"] for row in table(tmp_path / "v.csv")] == named
    assert [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()] == named


def test_an_interrupted_folder_keeps_its_rows(line, tmp_path, monkeypatch, capsys):
    add = predict.Results.add

    def interrupted_after_three(self, verdict, error):
        add(self, verdict, error)
        if len(table(tmp_path / "v.csv")) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict.Results, "add", interrupted_after_three)
    assert predict.main([str(line.model), str(line.images), "--csv", str(tmp_path / "v.csv")]) == 130
    assert len(table(tmp_path / "v.csv")) == 3
    shown = capsys.readouterr().err
    assert "3 images: 3 OK" in shown and "what was finished is kept" in shown


def test_a_file_that_is_no_table_of_verdicts_is_not_written_over(line, tmp_path, capsys):
    for flag in ("--csv", "--jsonl"):
        precious = tmp_path / "precious.txt"
        precious.write_text("ten years of notes")
        assert predict.main([str(line.model), str(line.images), flag, str(precious)]) == 2
        assert "no table of verdicts: choose another file" in capsys.readouterr().err
        assert precious.read_text() == "ten years of notes"
        ours = tmp_path / f"ours{flag}"
        assert predict.main([str(line.model), str(line.images), flag, str(ours)]) == 0
        assert predict.main([str(line.model), str(line.images / "good"), flag, str(ours)]) == 0


def test_a_name_on_stdin_need_not_be_text(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff.png\n"), encoding="utf-8"))
    assert predict.main([str(line.model), "-"]) == 2
    assert "image \\udcff.png is not there" in capsys.readouterr().err


def test_exit_code_says_whether_a_part_is_bad(line):
    model, good, bad = str(line.model), str(line.images / "good"), str(line.images / "spot")
    assert predict.main([model, good, "--fail-on-ng"]) == 0
    assert predict.main([model, bad, "--fail-on-ng"]) == 1
    assert predict.main([model, bad]) == 0


@pytest.mark.parametrize(("suffix", "scale"), [(".png", 3), (".jpg", 10)])
def test_the_box_is_where_the_defect_is_in_the_file_as_it_is_seen(line, tmp_path, suffix, scale):
    """The stored picture is rotated and larger; its EXIF data says which side is up. A large JPEG is not read whole."""
    target, folder = tmp_path / "v.csv", tmp_path / "camera"
    folder.mkdir()
    for path in sorted((line.images / "spot").iterdir()):
        picture, exif = Image.open(path), Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        large = picture.convert("RGB").resize((96 * scale, 96 * scale), Image.Resampling.NEAREST)
        large.transpose(Image.Transpose.ROTATE_90).save((folder / path.name).with_suffix(suffix), exif=exif)
    assert predict.main([str(line.model), str(folder), "--csv", str(target)]) == 0
    for row in table(target):
        mask = Image.open(line.images.parent / "ground_truth/spot" / f"{Path(row['file']).stem}_mask.png")
        left, top, right, bottom = (scale * side for side in mask.getbbox())
        x, y, width, height = (int(row[name]) for name in BOX)
        overlap = max(0, min(right, x + width) - max(left, x)) * max(0, min(bottom, y + height) - max(top, y))
        assert overlap > 0.5 * (right - left) * (bottom - top)
        assert 0 <= x < x + width <= 96 * scale and 0 <= y < y + height <= 96 * scale
        assert 1 <= int(row["area"]) <= width * height and int(row["regions"]) >= 1


def test_a_good_part_has_no_box(line, tmp_path):
    target, lines, broken = tmp_path / "v.csv", tmp_path / "v.jsonl", tmp_path / "broken.png"
    broken.write_bytes(b"")
    inputs = [str(line.images / "good/000.png"), str(broken)]
    assert predict.main([str(line.model), *inputs, "--csv", str(target), "--jsonl", str(lines)]) == 0
    good, unreadable = table(target)
    assert [good[name] for name in [*BOX, "area"]] == [""] * 5 and good["regions"] == "0"
    assert [unreadable[name] for name in [*BOX, "area", "regions"]] == [""] * 6
    good, unreadable = map(json.loads, lines.read_text().splitlines())
    assert good["box_x"] is None and good["regions"] == 0 and unreadable["regions"] is None


def test_one_broken_image_never_stops_the_rest(line, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((line.images / "good/000.png").read_bytes()[:500])
    inputs = [str(broken), str(tmp_path / "absent.png"), str(line.images / "good")]
    target = tmp_path / "v.csv"
    assert predict.main([str(line.model), *inputs, "--csv", str(target)]) == 0
    rows = table(target)
    assert [row["verdict"] for row in rows] == ["ERROR"] * 2 + ["OK"] * 4
    assert rows[0]["score"] == rows[0]["p_value"] == ""
    assert capsys.readouterr().err.count("error: image") == 2
    assert predict.main([str(line.model), *inputs, "--fail-on-ng"]) == 1  # what cannot be judged does not pass
    assert predict.main([str(line.model), str(broken)]) == 2


def test_the_threshold_can_be_chosen_anew(line, capsys):
    scores = np.array(OnnxModel(line.model).info.calibration_scores)
    good = str(line.images / "good")
    assert predict.main([str(line.model), good, "--false-alarm-rate", "0.5"]) == 0
    assert f"threshold {conformal_threshold(scores, 0.5):.4f}" in capsys.readouterr().err
    assert predict.main([str(line.model), good, "--false-alarm-rate", "0.001"]) == 0
    assert "false-alarm rate 0.0476, the smallest that 20 good parts can vouch for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL"),
        (["{model}"], "give INPUT"),
        (["{model}", "x.png", "--watch", "."], "give INPUT"),
        (["{model}", "--watch", "."], "--watch needs --csv"),
        (["{model}", "--watch", "nowhere", "--csv", "{tmp}/v.csv"], "is not a folder"),
        (["{model}", "{tmp}"], "holds no image"),
        (["{model}", "{tmp}/*.png"], "holds no image"),
        (["absent.onnx", "x.png"], "model absent.onnx is missing"),
        (["absent.pt", "x.png"], "memory bank absent.pt is missing"),
        (["model.txt", "x.png"], "neither a .onnx file"),
        (["{model}", "x.png", "--false-alarm-rate", "2"], "above 0 and below 1"),
        (["{model}", "x.png", "--false-alarm-rate", "nan"], "above 0 and below 1"),
        (["{model}", "x.png", "--colour"], "unrecognized arguments"),
        (["{model}", "x.png", "--heatmaps", "/proc/none"], "cannot be written to"),
        (["{model}", "x.png", "--gallery", "/proc/none/page.html"], "cannot be written to"),
        (["{model}", "x.png", "--gallery", "{tmp}"], "must end in .html"),
        (["{model}", "x.png", "--gallery", "{tmp}/part.png"], "must end in .html"),
        (["{model}", "--watch", ".", "--csv", "{tmp}/v.csv", "--gallery", "{tmp}/page.html"], "--watch has no end"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(line, tmp_path, arguments, message, capsys):
    arguments = [text.format(model=line.model, tmp=tmp_path) for text in arguments]
    assert predict.main(arguments) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]


def test_heatmaps_outline_what_is_above_the_threshold(line, tmp_path):
    assert predict.main([str(line.model), str(line.images), "--heatmaps", str(tmp_path / "maps")]) == 0
    for path in sorted(line.images.rglob("*.png")):
        drawn = np.asarray(Image.open(overlay_path(tmp_path / "maps", path)))
        assert drawn.shape == (128, 128, 3)
        outlined = (drawn == (0, 255, 0)).all(axis=2).any()
        assert outlined == (path.parent.name == "spot")
    assert len(list((tmp_path / "maps").iterdir())) == 8  # 000.png of both folders has its own


def test_an_overlay_leaves_the_image_where_nothing_is_found():
    image = np.full((8, 8, 3), 90, np.uint8)
    anomaly_map = np.zeros((8, 8), np.float32)
    assert (np.asarray(overlay(image, anomaly_map, 1.0)) == 90).all()
    anomaly_map[2:5, 2:5] = 3.0
    drawn = np.asarray(overlay(image, anomaly_map, 1.0)).astype(int)
    assert (drawn[:2, :2] == 90).all() and (drawn[7, 7] != 90).any()


def test_an_overlay_shows_what_is_looked_at():
    image, region = np.full((8, 8, 3), 90, np.uint8), np.zeros((8, 8), bool)
    region[1:7, :4] = True
    drawn = np.asarray(overlay(image, np.zeros((8, 8), np.float32), 1.0, region))
    pink = (drawn == (255, 47, 185)).all(axis=2)
    assert pink[2:14, :2].all() and pink[2:4, :8].all() and pink[2:14, 6:8].all()
    assert pink.sum() == 4 * (6 * 4 - 4 * 2) and (drawn[~pink] == 90).all()


class Camera:
    """predict.py --watch in a thread, stopped as Ctrl-C would."""

    def __init__(self, line, folder: Path, csv_path: Path, monkeypatch):
        monkeypatch.setattr(watch, "POLL", 0.02)
        monkeypatch.setattr(watch, "SETTLED", 0.15)
        monkeypatch.setattr(watch, "PATIENCE", 0.8)
        self.stop, self.csv, self.code = threading.Event(), csv_path, None
        follow = watch.follow

        def until_stopped(*arguments):
            for arrival in follow(*arguments):
                if self.stop.is_set():
                    raise KeyboardInterrupt
                yield arrival

        monkeypatch.setattr(predict, "follow", until_stopped)
        arguments = [str(line.model), "--watch", str(folder), "--csv", str(csv_path)]
        self.thread = threading.Thread(target=lambda: setattr(self, "code", predict.main(arguments)))
        self.thread.start()

    def wait_for(self, count: int) -> list[dict[str, str]]:
        """The rows, once there are ``count``."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.thread.is_alive():
            if self.csv.exists() and self.csv.read_bytes().count(b"\n") > count:
                return table(self.csv)
            time.sleep(0.02)
        raise AssertionError("no verdict came")

    def end(self) -> list[dict[str, str]]:
        """Ctrl-C; returns the rows."""
        self.stop.set()
        self.thread.join(60)
        assert self.code == 0
        return table(self.csv)


def test_watch_waits_for_files_that_arrive_slowly_and_judges_each_once(line, tmp_path, monkeypatch):
    folder = tmp_path / "camera"
    folder.mkdir()
    part = (line.images / "good/000.png").read_bytes()
    camera = Camera(line, folder, tmp_path / "v.csv", monkeypatch)
    with open(folder / "slow.png", "wb") as slow:
        for start in range(0, len(part), len(part) // 6):
            slow.write(part[start : start + len(part) // 6])
            slow.flush()
            time.sleep(0.2)  # longer than SETTLED: it is tried before it is whole
            if start == 0:  # a later one that is whole at once overtakes it
                (folder / ".hidden.png").write_bytes(part)
                (folder / "late.png").write_bytes((line.images / "spot/000.png").read_bytes())
                (folder / "notes.txt").write_text("no image")
    rows = camera.wait_for(2)
    (folder / "late.png").write_bytes(part)  # judged already: what comes under its name is not judged again
    (folder / "broken.png").write_bytes(part[:100])
    rows = camera.wait_for(3)
    assert [Path(row["file"]).name for row in rows] == ["late.png", "slow.png", "broken.png"]
    assert [row["verdict"] for row in camera.end()] == ["NG", "OK", "ERROR"]


def test_watch_goes_on_where_it_stopped(line, tmp_path, monkeypatch):
    folder, target = tmp_path / "camera", tmp_path / "v.csv"
    folder.mkdir()
    part = (line.images / "good/000.png").read_bytes()
    (folder / "a.png").write_bytes(part)
    camera = Camera(line, folder, target, monkeypatch)
    camera.wait_for(1)
    before = camera.end()
    with open(target, "ab") as file:
        file.write(b"/half/a/row,0.1")  # a power failure while a row was written
    (folder / "b.png").write_bytes(part)
    monkeypatch.undo()
    camera = Camera(line, folder, target, monkeypatch)
    camera.wait_for(2)
    rows = camera.end()
    assert rows[:1] == before and [Path(row["file"]).name for row in rows] == ["a.png", "b.png"]


def test_watch_refuses_a_table_of_before_the_boxes(line, tmp_path, capsys):
    old = tmp_path / "old.csv"
    old.write_text("file,score,p_value,verdict,milliseconds,condition\n")
    assert predict.main([str(line.model), "--watch", str(tmp_path), "--csv", str(old)]) == 2
    assert "no table of verdicts" in capsys.readouterr().err and old.read_text().count("\n") == 1


def test_watch_leaves_a_table_of_another_kind_alone(line, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n3")
    assert predict.main([str(line.model), "--watch", str(tmp_path), "--csv", str(other)]) == 2
    assert "no table of verdicts" in capsys.readouterr().err
    assert other.read_text() == "a,b\n1,2\n3"


def test_ctrl_c_ends_the_program_cleanly(line, tmp_path):
    import signal

    command = [sys.executable, "predict.py", line.model, "--watch", tmp_path, "--csv", tmp_path / "v.csv"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    (tmp_path / "part.png").write_bytes((line.images / "good/000.png").read_bytes())
    assert process.stdout.readline().startswith(str(tmp_path / "part.png"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "1 images: 1 OK" in errors and "Traceback" not in errors


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_with_line_breaks_keep_one_row_each(line, tmp_path, capsys):
    part = (line.images / "good/000.png").read_bytes()
    names = ["two\nlines.png", 'a,"b".png', "\x1b[31mred.png", "=1+1.png", os.fsdecode(b"\xff.png")]
    for name in names:
        (tmp_path / name).write_bytes(part)
    (tmp_path / "broken\nname.png").write_bytes(b"")
    target, lines = tmp_path / "v.csv", tmp_path / "v.jsonl"
    flags = ["--csv", str(target), "--jsonl", str(lines), "--heatmaps", str(tmp_path / "maps")]
    assert predict.main([str(line.model), str(tmp_path), *flags]) == 0
    rows = table(target)
    assert {row["file"] for row in rows} == {printable(str(tmp_path / name)) for name in [*names, "broken\nname.png"]}
    assert len(target.read_bytes().splitlines()) == len(lines.read_bytes().splitlines()) + 1 == 7
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 5 and "\x1b" not in captured.out
    assert captured.err.count("\n") == 3  # threshold, one error, summary
    assert len(list((tmp_path / "maps").iterdir())) == 5


def test_an_overlay_never_leaves_its_folder(tmp_path):
    for name in ("../../x.png", "/etc/passwd", "a/b/c.png", "..", "con\n.png", "ö" * 300 + ".png"):
        assert overlay_path(tmp_path, Path(name)).parent == tmp_path
    assert overlay_path(tmp_path, Path("a/x.png")) != overlay_path(tmp_path, Path("a_x.png"))
