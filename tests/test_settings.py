from pathlib import Path
from types import SimpleNamespace

import pytest

import config
from models.errors import InputError
from utils.settings import BY_FORM, CONSTANTS, SettingsParser, make_settings, ratio_name
from utils.settings_table import settings_table

DEFAULTS = {name: getattr(config, name) for name in CONSTANTS}


def read(*argv, constants=config):
    return SettingsParser(constants, "test").read(argv)[0]


def test_config_holds_every_setting_and_only_settings():
    assert set(CONSTANTS) == {name for name in vars(config) if name[0].isupper()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.1, (0.1,)),
        ("0.1", (0.1,)),
        ("all", (1.0, 0.1, 0.01)),
        ("0.01, 0.1", (0.1, 0.01)),
        (1, (1.0,)),
        ([0.5], (0.5,)),
    ],
)
def test_ratios(given, expected):
    assert make_settings(DEFAULTS | {"SAMPLING_RATIO": given}).sampling_ratio == expected


@pytest.mark.parametrize(
    ("ratio", "name"),
    [(1.0, "100pct"), (0.1, "10pct"), (0.01, "1pct"), (0.001, "0_1pct"), (0.025, "2_5pct"), (0.07, "7pct")],
)
def test_ratio_names(ratio, name):
    assert ratio_name(ratio) == name


@pytest.mark.parametrize(
    ("constant", "value", "allowed"),
    [
        ("SAMPLING_RATIO", 0, "(0, 1]"),
        ("SAMPLING_RATIO", 1.5, "(0, 1]"),
        ("SAMPLING_RATIO", "half", "(0, 1]"),
        ("SAMPLING_RATIO", float("nan"), "(0, 1]"),
        ("SAMPLING_RATIO", True, "(0, 1]"),
        ("SAMPLING_METHOD", "greedy", "coreset, random"),
        ("IMAGE_SIZE", "224", "whole number"),
        ("IMAGE_SIZE", 224.5, "whole number"),
        ("BATCH_SIZE", 0, "at least 1"),
        ("NUM_WORKERS", -1, "'auto'"),
        ("CENTER_CROP", 1, "True or False"),
        ("WAVELET_TYPE", "harr", "PyWavelets"),
        ("WAVELET_TYPE", "morl", "discrete"),
        ("BACKBONE", "resnet51", "resnet50"),
        ("ENGINE", "tensorrt", "onnxruntime"),
        ("FORM", "original", "wedge, paper"),
        ("DEVICE", "tpu", "'cuda'"),
        ("DEVICE", "cuda:99", "CUDA devices"),
        ("CATEGORY", "", "text"),
        ("SAVE_DIR", None, "text"),
        ("RESIZE", 200, "IMAGE_SIZE"),
    ],
)
def test_a_wrong_value_is_refused_by_name(constant, value, allowed):
    with pytest.raises(InputError) as caught:
        make_settings(DEFAULTS | {constant: value})
    message = str(caught.value)
    assert constant in message
    assert str(value) in message
    assert allowed in message
    assert "\n" not in message


def test_flags_override_constants():
    settings = read("--image-size", "64", "--center-crop", "false", "--category", "123", "--backbone-weights", "none")
    assert (settings.image_size, settings.center_crop, settings.category) == ((64, 64), False, "123")
    assert settings.backbone_weights is None
    assert read("--semanticon-dir", "on").semanticon_dir.name == "on"


def test_a_config_file_overrides_and_a_flag_overrides_the_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("SEED = 7\nBATCH_SIZE = 3\n")
    settings = read("--config", str(file), "--seed", "8")
    assert (settings.seed, settings.batch_size, settings.image_size) == (8, 3, (config.IMAGE_SIZE,) * 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("SAMPLE_RATIO = 0.1", "SAMPLING_RATIO"), ("SEED = ", "SyntaxError"), ("raise RuntimeError('x')", "RuntimeError")],
)
def test_a_bad_config_file_is_one_line(tmp_path, text, expected):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError, match=expected):
        read("--config", str(file))


@pytest.mark.parametrize("argv", [("--config", "absent.py"), ("--no-such-flag", "1"), ("--seed",), ("extra",)])
def test_a_bad_command_line_is_one_line(argv):
    with pytest.raises(InputError) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("constant", BY_FORM)
def test_a_setting_that_form_replaced_is_refused_by_name(tmp_path, constant):
    file = tmp_path / "mine.py"
    file.write_text(f"{constant} = None\n")
    with pytest.raises(InputError, match=rf"^{constant} in .*mine\.py: no setting any more, FORM decides it"):
        read("--config", str(file))
    flag = "--" + constant.lower().replace("_", "-")
    with pytest.raises(InputError, match=f"{flag}: no setting any more, FORM decides it"):
        read(flag, "x")


def test_help_lists_every_setting_with_its_value(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help", "--seed", "1234")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for constant in CONSTANTS:
        assert "--" + constant.lower().replace("_", "-") in shown
    assert "now: resnet50" in shown
    assert "--metric" not in shown  # it is no setting any more


def test_a_missing_constant_is_named():
    values = {name: value for name, value in DEFAULTS.items() if name != "SEED"}
    with pytest.raises(InputError, match="SEED is missing"):
        read(constants=SimpleNamespace(**values))


def test_the_settings_page_is_up_to_date():
    root = Path(config.__file__).parent
    page = settings_table((root / "config.py").read_text(encoding="utf-8"))
    for constant, value in DEFAULTS.items():
        assert f"| `{constant}` | `{value!r}` |" in page
    command = "python -m utils.settings_table config.py > docs/settings.md"
    assert (root / "docs/settings.md").read_text(encoding="utf-8") == page, f"run: {command}"
    assert command in page
