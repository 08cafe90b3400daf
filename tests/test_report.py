"""make_report.py as a user runs it, and the page as a browser reads it."""

import base64
import io
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import benchmark_fps
import eval_blur_robustness
import eval_color_robustness
import eval_gap_score
import eval_noise_robustness
import evaluation
import make_report
import test as draw_results
import train
import visualize_color_robustness
import visualize_noise_robustness
from utils.data.sample_data import is_rendered, render_image
from utils.pictures.report import cell, picture, table
from utils.pictures.tables import format_cell, read_csv, write_csv

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """A document's text, pictures, sections and links; fails on tags that are not closed in order."""

    def __init__(self, document):
        super().__init__()
        self.open, self.texts, self.images, self.links, self.sections = [], [], [], [], []
        self.feed(document)
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object")
        assert not [name for name in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "section":
            self.sections.append(attributes["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


def report(flags, tmp_path, *more):
    assert make_report.main([*flags, *more]) == 0
    document = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    return document, Page(document)


@pytest.fixture
def every(flags, tmp_path):
    """The flags of all scripts."""
    return [*flags, "--semanticoff-dir", str(tmp_path / "out"), "--semanticon-dir", str(tmp_path / "on")]


def test_before_anything_is_made_each_section_names_its_command(every, tmp_path, capsys):
    document, page = report(every, tmp_path)
    assert page.sections == [
        "look-at-these-first", "beside-the-paper", "detection", "beside-patchcore-same-backbone", "speed-and-memory",
        "what-it-sees", "which-condition", "sensor-noise", "focus", "light-and-colour", "semantic-attention",
        "what-each-part-is-worth", "how-it-was-made",
    ]  # fmt: skip
    assert page.links == ["#" + name for name in page.sections]
    assert page.text.count("Not made yet") == 12
    for script in ("evaluation", "benchmark_fps", "test", "eval_noise_robustness", "visualize_color_robustness"):
        assert f"python {script}.py --data-path {tmp_path / 'data'}" in page.text
    assert "SAMPLING_RATIO 0.1" in page.text
    assert "rendered" not in page.text
    assert '<meta name="viewport"' in document
    assert "@media print" in document
    assert f"report: {tmp_path / 'out/report.html'}" in capsys.readouterr().out


def test_every_script_has_its_place(every, tmp_path, trained, patchcore_bank):
    """But the ablation and benchmarks.real, which are tested by themselves."""
    assert train.main([*every, "--use-semantic", "True", "--save-dir", str(tmp_path / "on")]) == 0
    assert draw_results.main([*every, "--limit", "1"]) == benchmark_fps.main([*every, "--calls", "2"]) == 0
    assert evaluation.main(every) == eval_gap_score.main(every) == 0
    for script, levels in (
        (eval_noise_robustness, "0,10"), (eval_color_robustness, "0,1"), (eval_blur_robustness, "0,1"),
    ):  # fmt: skip
        assert script.main([*every, "--levels", levels]) == 0
    assert visualize_noise_robustness.main(every) == visualize_color_robustness.main(every) == 0
    document, page = report(every, tmp_path)
    assert page.text.count("Not made yet") == 2

    shown = {
        "out/final_evaluation_results.csv": (
            "image_auroc", "pixel_auroc", "aupro", "f1_max", "f1_threshold", "bank_mb",
        ),
        "out/benchmark_fps_results_10pct.csv": (
            "image_auroc", "fps", "p95_ms", "end_to_end_fps", "backbone_fps", "machine",
        ),
        "out/full_noise_comparison_smoothed_tile_10pct.csv": ("level", "wedge_net_auroc", "patchcore_detection_rate"),
        "out/final_color_comparison_tile_10pct.csv": ("level", "patchcore_auroc", "wedge_net_false_alarm_rate"),
        "out/full_blur_comparison_tile_10pct.csv": ("level", "wedge_net_auroc", "wedge_net_false_alarm_rate"),
        "on/result_gap_via_sem_onoff.csv": ("gap_off", "gap_on", "separation_on", "auroc_off"),
    }  # fmt: skip
    for file, columns in shown.items():
        assert str(tmp_path / file) in page.text
        for row in read_csv(tmp_path / file):
            for column in columns:
                assert format_cell(column, row[column]) in page.text, (file, column)

    pictures = [*tmp_path.glob("o*/*.png"), *tmp_path.glob("out/10pct/results/tile/*.png")]
    pictures += tmp_path.glob("out/10pct/odd_images_tile_10pct.png")
    assert len(page.images) == len(pictures) == 12
    for uri in page.images:
        kind, data = uri.removeprefix("data:image/").split(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format.lower() == kind
            image.load()
    assert "://" not in document.replace("tcp://host:8786", "")  # in the meaning of SCHEDULER

    # The paper's figures are the paper's, and stand in rows of their own where nothing here was measured.
    assert "the paper: RTX 4090, MVTec AD" in page.text
    for figure in ("0.992", "0.991", "0.985", "37", "265", "687"):
        assert figure in page.texts


def test_several_categories_have_means(every, data, tmp_path):
    for category, auroc in (("tile", 0.9), ("bolt", 0.6)):
        row = {"category": category, "ratio": 0.1, "level": 10, "wedge_net_auroc": auroc, "patchcore_auroc": None}
        write_csv(tmp_path / f"out/full_noise_comparison_smoothed_{category}_10pct.csv", [row])
    _, page = report([*every, "--category", "all"], tmp_path)
    assert {"0.7500", "0.9000", "0.6000", "\N{EN DASH}"} <= set(page.texts)
    _, page = report(every, tmp_path)
    assert "0.7500" not in page.texts


def test_names_are_text_whatever_they_hold(every, data, tmp_path):
    name = "<script>alert('x')&amp;\"tile\""
    (data / "tile").rename(data / name)
    write_csv(tmp_path / "out/final_evaluation_results.csv", [{"category": name, "ratio": 0.1, "image_auroc": 0.5}])
    _, page = report([*every, "--category", "all"], tmp_path)
    assert name in page.texts


@pytest.mark.parametrize("both", [True, False])
def test_rendered_images_are_called_rendered(every, data, tmp_path, both):
    Image.fromarray(render_image("tile", "train/good", 0).image).save(data / "tile/train/good/000.png")
    _, page = report([*every, "--category", "tile" if both else "all"], tmp_path)
    assert ("These images are rendered." if both else "The images of tile are rendered.") in page.texts


def test_is_rendered_allows_for_rounding_only(tmp_path):
    image = render_image("wood", "train/good", 0).image
    folder = tmp_path / "wood/train/good"
    folder.mkdir(parents=True)
    for pixels, expected in ((image ^ 1, True), (image[::-1], False), (image[:128], False)):
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "000.png")
        assert is_rendered(tmp_path, "wood") == expected
    assert not is_rendered(tmp_path, "tile")


def test_a_folder_that_cannot_be_written_is_one_line(every, tmp_path, capsys):
    (tmp_path / "out").write_text("a file, not a folder")
    assert make_report.main(every) == 2
    assert "error: SAVE_DIR" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_one_line(every, tmp_path, capsys):
    write_csv(tmp_path / "out/final_evaluation_results.csv", [{"category": "tile", "ratio": 0.1}])
    (tmp_path / "out/final_evaluation_results.png").write_bytes(b"")
    assert make_report.main(every) == 2
    assert str(tmp_path / "out/final_evaluation_results.png") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("image_auroc", 0.99123, "0.9912"),
        ("image_auroc", None, "\N{EN DASH}"),
        ("ratio", 0.1, "10\N{NO-BREAK SPACE}%"),
        ("fps", 265.26, "265.3"),
        ("bank_mb", 12.345, "12.3"),
        ("improvement_percent", -1.26, "\N{MINUS SIGN}1.3"),
        ("improvement_percent", 12.0, "+12.0"),
        ("level", 10, "10"),
        ("category", "metal-nut", "metal-nut"),
    ],
)
def test_cells(column, value, expected):
    assert cell(column, value) == expected


def test_a_table_aligns_numbers_and_marks_means():
    rows = [{"category": "tile", "fps": 2.0}, {"category": "mean", "fps": None}]
    shown = table(rows, {"category": "Category", "fps": "FPS"}, [("", 1), ("speed", 1)])
    assert '<th class="group" colspan="1">speed</th>' in shown
    assert '<tr><td>tile</td><td class="number">2.0</td></tr>' in shown
    assert '<tr class="mean"><td>mean</td><td class="number">\N{EN DASH}</td></tr>' in shown


def test_photographs_are_embedded_as_jpeg_and_drawings_as_they_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 2000, 3), dtype=np.uint8)
    drawing = np.full((300, 400, 3), 255, np.uint8)
    drawing[100:200, 100:110] = 0
    for name, pixels in (("photo", noise), ("drawing", drawing)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    assert 'src="data:image/jpeg;base64,' in (photo := picture(tmp_path / "photo.png", "noise"))
    assert 'width="1400"' in photo
    encoded = base64.b64encode((tmp_path / "drawing.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{encoded}"' in picture(tmp_path / "drawing.png", "a bar")


def test_the_conditions_of_the_test_images_are_shown(every, tmp_path):
    own = [*every, "--conditions", "clean,blur1"]
    assert train.main(own) == evaluation.main(own) == 0
    _, page = report(own, tmp_path)
    found = Counter(row["condition"] for row in read_csv(tmp_path / "out/conditions_tile.csv"))
    caption = ", ".join(f"{count} {name}" for name, count in found.most_common())
    assert f"tile: {caption}" in page.text and found["clean"] > 4
    _, page = report([*every, "--form", "paper"], tmp_path)
    assert "FORM is 'paper': it knows no conditions." in page.text
