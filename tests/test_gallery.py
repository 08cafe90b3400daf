"""The page of judged pictures as a browser reads it; its script is not run here."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import predict
from models.errors import InputError
from utils.console import printable
from utils.data.image import Geometry
from utils.line import gallery
from utils.line.edge_program import write_program
from utils.line.gallery import Gallery, thumbnail
from utils.size import Size

HOSTILE = ["</script><script>alert(1)</script>.png", "\"quoted\" & 'so'.png", "two\nlines.png", "<!--<script>.png"]


class Page(HTMLParser):
    """A gallery's rows, thumbnails, texts and policy; fails on what such a page must not hold."""

    def __init__(self, path):
        super().__init__()
        self.document = path.read_text(encoding="utf-8")
        self.scripts, self.styles, self.parts, self.texts, self.inside = [], [], [], [], (None, {})
        self.feed(self.document)
        self.close()
        self.thumbnails = [Image.open(io.BytesIO(base64.b64decode(line))) if line else None for line in self.parts]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("link", "iframe", "object", "img")
        assert not [name for name in attributes if name in ("src", "href", "style") or name.startswith("on")]
        self.inside = tag, attributes
        if attributes.get("http-equiv"):
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self.inside = None, {}

    def handle_data(self, data):
        tag, attributes = self.inside
        if attributes.get("id") == "rows":
            self.rows = json.loads(data)
        elif attributes.get("class") == "part":
            self.parts += data.split("\n")[:-1]
        elif tag == "script":
            self.scripts.append(data)
        elif tag == "style":
            self.styles.append(data)
        else:
            self.texts.append(data)


def judged(line, tmp_path, *inputs, model=None, flags=()):
    page = tmp_path / "out/page.html"
    assert predict.main([str(model or line.model), *map(str, inputs), "--gallery", str(page), *flags]) == 0
    return Page(page)


def row(number, score=1.0):
    return {"file": f"{number:05d}.png", "score": score, "p_value": 0.5, "verdict": "OK", "condition": "clean"}


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_the_page_shows_each_picture_worst_first(line, tmp_path, kind, capsys):
    target = tmp_path / "v.csv"
    flags = "--csv", str(target), "--false-alarm-rate", "0.05"
    page = judged(line, tmp_path, line.images, model=getattr(line, kind), flags=flags)
    with open(target, newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["score"]))
    assert [row["file"] for row in page.rows] == [row["file"] for row in rows]
    for shown, told in zip(page.rows, rows, strict=True):
        assert {name: "" if value is None else str(value) for name, value in shown.items() if name in told} == told
        assert shown["size"] == [96, 96]
    assert [row["verdict"] for row in page.rows] == ["NG"] * 4 + ["OK"] * 4
    assert all(picture.size == (2 * gallery.SIDE, gallery.SIDE) for picture in page.thumbnails)
    assert "tile: judged pictures" in page.texts and "false-alarm rate 0.05" in "".join(page.texts)
    assert "page.html: 8 images, worst first" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["page.html"]  # nothing temporary stays


def test_what_cannot_be_read_comes_last_and_says_why(line, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    page = judged(line, tmp_path, broken, line.images / "good", line.images / "spot")
    assert [row["verdict"] for row in page.rows] == ["NG"] * 4 + ["OK"] * 4 + ["ERROR"]
    assert "cannot be read" in page.rows[-1]["error"] and page.thumbnails[-1] is None and page.rows[-1]["size"] is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_of_any_kind_are_text(line, tmp_path):
    for name in [*HOSTILE, os.fsdecode(b"\xff.png")]:
        path = tmp_path / "<i>&" / name  # the first one's slashes make folders; the path is what is shown
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((line.images / "good/000.png").read_bytes())
    page = judged(line, tmp_path, tmp_path / "<i>&")
    assert {row["file"] for row in page.rows} == {printable(str(path)) for path in (tmp_path / "<i>&").rglob("*.png")}
    assert len(page.rows) == 5 and any(HOSTILE[0] in row["file"] for row in page.rows)
    assert len(page.scripts) == len(page.styles) == 1 and HOSTILE[0] not in page.document


def test_a_category_of_any_name_is_text(tmp_path):
    page = tmp_path / "page.html"
    shown = Gallery(page)
    for name in HOSTILE:
        shown.add(row(0) | {"file": name}, (8, 8), Image.new("RGB", (16, 8)))
    shown.write("<b>{{policy}}</b><!-- data -->", "a & b")
    page = Page(page)
    assert [row["file"] for row in page.rows] == HOSTILE
    assert page.texts.count("<b>{{policy}}</b><!-- data -->") == 2 and "a & b" in page.texts
    assert len(page.scripts) == len(page.styles) == 1


def test_the_page_needs_nothing_else_and_runs_only_its_own_script(line, tmp_path):
    page = judged(line, tmp_path, line.images / "good/000.png")
    assert "://" not in page.document and "innerHTML" not in page.document
    for kind, (content,) in (("script", page.scripts), ("style", page.styles)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in page.policy


def test_many_pictures_come_in_parts_and_wait_on_the_disk(tmp_path):
    """Thumbnails of 2 MB in all: neither waiting nor writing holds more than a few of them."""
    import tracemalloc

    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    picture, count = Image.fromarray(pixels), 150
    shown = Gallery(tmp_path / "page.html")
    shown.add(row(0), (64, 64), picture)  # what is imported once does not count
    tracemalloc.start()
    for number in range(1, count):
        shown.add(row(number, number / 7), (64, 64), picture)
    shown.write("many", "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "page.html").stat().st_size > 1e6 and peak < 5e5
    page = Page(tmp_path / "page.html")
    sizes = [len(part.split("\n")) - 1 for part in re.findall('class="part">(.*?)</script>', page.document, re.DOTALL)]
    assert sizes == [60, 60, 30]
    assert [entry["score"] for entry in page.rows] == sorted((entry["score"] for entry in page.rows), reverse=True)
    assert len(page.thumbnails) == count


def test_a_gallery_of_no_picture_is_one_line_and_leaves_what_was_there(line, tmp_path, monkeypatch, capsys):
    page, broken = tmp_path / "page.html", tmp_path / "broken.png"
    page.write_text("of yesterday")
    broken.write_bytes(b"")
    for inputs, stdin in (([str(broken)], ""), (["-"], "")):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        assert predict.main([str(line.model), *inputs, "--gallery", str(page)]) == 2
        assert capsys.readouterr().err.count("there is no picture to show") == 1
        assert page.read_text() == "of yesterday"
    assert {entry.name for entry in tmp_path.iterdir()} == {"page.html", "broken.png"}


def test_a_page_that_cannot_be_written_whole_leaves_what_was_there(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("of yesterday")
    shown = Gallery(page)
    shown.add(row(0), (8, 8), Image.new("RGB", (16, 8)))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Gallery, "_read", full)
    with pytest.raises(OSError, match="no space"):
        shown.write("t", "l")
    assert page.read_text() == "of yesterday" and len(list(tmp_path.iterdir())) == 1


def test_a_picture_is_never_taken_for_the_page(tmp_path):
    picture = tmp_path / "part.png"
    picture.write_bytes(b"a picture")
    with pytest.raises(InputError, match=r"must end in \.html"):
        Gallery(picture)
    assert picture.read_bytes() == b"a picture"


@pytest.mark.parametrize("size", [(400, 300), (30, 700), (2000, 3), (5, 5)])
@pytest.mark.parametrize("crop", [True, False])
def test_the_heat_map_lies_where_the_model_looks(size, crop):
    geometry = Geometry(Size(64, 64), 72 if crop else 64, crop)
    drawn = Image.new("RGB", (128, 128), (255, 0, 0))
    both = np.asarray(thumbnail(Image.new("RGB", size), drawn, geometry, (64, 64))).astype(int)
    height, width = both.shape[0], both.shape[1] // 2
    assert max(height, width) == gallery.SIDE and min(height, width) >= 1
    assert (both[:, :width] == 0).all()
    seen = (both[:, width:] == (255, 0, 0)).all(axis=2)
    if not crop:
        assert seen.all()
        return
    share = (64 / 72) ** 2 * min(size) / max(size)
    assert seen.mean() == pytest.approx(share, abs=0.03) or min(height, width) < 10
    assert abs(np.argwhere(seen).mean(axis=0) - (height / 2, width / 2)).max() < 1.5


def test_the_edge_program_has_the_template_in_it(line, tmp_path):
    import subprocess
    import sys

    program, page = tmp_path / "predict.pyz", tmp_path / "page.html"
    write_program(program)
    assert "utils/line/gallery.html" in zipfile.ZipFile(program).namelist()
    command = [sys.executable, program, line.model, line.images / "spot/000.png", "--gallery", page]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(Page(page).rows) == 1
