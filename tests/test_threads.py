"""Whichever script is started, torch's threads are told how long to wait before torch is loaded."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from models.threads import session_options

import pytest

ROOT = Path(__file__).parents[1]


def imported(script):
    """The packages that a script imports, in its order."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda script: script.name)
def test_no_script_loads_torch_before_a_package_of_ours(script):
    packages = list(imported(script))
    if "torch" in packages:
        assert {"models", "utils"} & set(packages[: packages.index("torch")])


@pytest.mark.parametrize("package", ["models", "utils", "benchmarks"])
@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["unset", "count", "policy"],
)
def test_the_packages_tell_it_unless_the_user_has(package, own, spins):
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"import os, sys, {package}; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | own, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", spins]


@pytest.mark.parametrize(("version", "spins"), [("1.25.0", False), ("1.26.0", True), ("1.100.1", True)])
def test_onnxruntimes_threads_spin_only_where_that_can_be_limited(monkeypatch, version, spins):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "__version__", version)
    options = session_options(3)
    assert options.intra_op_num_threads == 3
    if spins:
        assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "10"
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    else:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
