"""SCHEDULER: a script's tasks on Dask's workers, in threads of this process and in processes of their own."""

import _thread
import ast
import contextlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import torch
from conftest import make_category, small_flags
from distributed import LocalCluster

import config
import evaluation
import train
import train_patchcore
from models.errors import InputError
from utils.console import for_each
from utils.pipeline import cluster
from utils.pipeline.checkpoint import build_net
from utils.pipeline.cluster import workers
from utils.pipeline.training import train_category, wedge_net_method
from utils.settings import SettingsParser

ROOT = Path(__file__).parents[1]
QUIET = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}
SCRIPTS = [(train,), (train_patchcore,), (evaluation,)]


@pytest.fixture(scope="module")
def threads():
    """Two workers in this process, of one thread each."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, **QUIET) as local:
        yield local.scheduler_address


@pytest.fixture(scope="module")
def started():
    """What 'local:2' starts: two workers in processes of their own. None that dies here is started again: that takes
    seconds."""
    settings = settings_of(["--scheduler", "local:2", "--backbone", "efficientnet_lite0", "--device", "cpu"])
    with cluster._connect(settings) as client:
        for nanny in client.cluster.workers.values():
            nanny.auto_restart = False
        yield client.cluster
        there = [nanny.pid for nanny in client.cluster.workers.values()]
    assert not any(Path(f"/proc/{process}").exists() for process in there if process)


@pytest.fixture(scope="module")
def processes(started):
    return started.scheduler_address


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder, and exit codes, files, lines and errors of SCRIPTS without a scheduler; one category fails."""
    root = tmp_path_factory.mktemp("alone")
    for seed, name in enumerate(("tile", "bolt")):
        make_category(root / "data", name, seed)
    next((root / "data/bolt/test/spot").glob("*.png")).write_bytes(b"no image")
    found = results(root, SCRIPTS)
    assert found[0] == [0, 0, 1] and found[3].count("1 of 2 failed: bolt") == 1
    return root, found


def settings_of(flags, *more):
    return SettingsParser(config, "").read([*flags, *more])[0]


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("data/")}


def results(root: Path, scripts, *more: str) -> tuple:
    """Exit codes, files, lines and errors of some scripts, from nothing; the folders are empty again afterwards."""
    own = [*small_flags(root), "--category", "tile,bolt", *more]
    with contextlib.redirect_stdout(io.StringIO()) as lines, contextlib.redirect_stderr(io.StringIO()) as errors:
        codes = [script.main([*own, *some]) for script, *some in scripts]
    found = files(root)
    for folder in ("out", "patchcore"):
        shutil.rmtree(root / folder, ignore_errors=True)
    errors = [line for line in errors.getvalue().splitlines() if "workers, threads" not in line]
    return codes, found, lines.getvalue().splitlines(), errors


def test_tables_files_and_lines_are_those_of_a_run_without_in_threads(alone, threads):
    root, (codes, wanted, lines, errors) = alone
    found = results(root, SCRIPTS, "--scheduler", threads)
    assert found[0] == codes and found[3] == errors
    assert found[1].keys() == wanted.keys() and [name for name in wanted if found[1][name] != wanted[name]] == []
    assert sorted(found[2]) == sorted(lines)  # what threads print is not caught: it is this process's own


def test_tables_files_and_lines_are_those_of_a_run_without_in_processes(alone, processes):
    root, (codes, wanted, lines, errors) = alone
    found = results(root, SCRIPTS[::2], "--scheduler", processes)
    assert found[0] == codes[::2] and found[3] == errors
    wanted = {name: contents for name, contents in wanted.items() if "patchcore" not in name}
    assert found[1].keys() == wanted.keys() and [name for name in wanted if found[1][name] != wanted[name]] == []
    assert [line for line in found[2] if line] == [line for line in lines if line and line in found[2]] != []


def test_a_training_in_shards_is_the_same_whoever_does_them(flags, tmp_path, threads):
    found = []
    for scheduler in ("None", threads):
        own = [*flags, "--shard-images", "3", "--save-dir", str(tmp_path / str(len(found))), "--scheduler", scheduler]
        assert train.main(own) == 0
        found.append(files(tmp_path / str(len(found))))
    assert found[0] == found[1] and len(found[0]) >= 2


def test_local_workers_share_the_cores(flags, tmp_path, started, processes):
    (tmp_path / "out").mkdir()
    with workers(settings_of(flags, "--scheduler", processes)) as run:
        found = list(run(lambda _: (os.getpid(), torch.get_num_threads()), list(range(8))))
    assert {process for process, _ in found} <= {nanny.pid for nanny in started.workers.values()}
    assert {count for _, count in found} == {max(1, torch.get_num_threads() // 2)}


def test_an_interrupt_cancels_what_has_not_begun(flags, tmp_path, threads):
    begun = tmp_path / "begun"
    begun.mkdir()

    def work(name: str) -> None:
        (begun / name).touch()
        if name == "2":
            _thread.interrupt_main()
        time.sleep(0.5)  # of 16 it would be eight seconds

    with pytest.raises(KeyboardInterrupt), workers(settings_of(flags, "--scheduler", threads)) as run:
        for_each([str(number) for number in range(16)], work, None, run)
    time.sleep(1)
    there = len(list(begun.iterdir()))
    assert 3 <= there < 14
    time.sleep(1)
    assert len(list(begun.iterdir())) == there


@pytest.mark.parametrize("wrong", ["tcp://127.0.0.1:1", "there/is/none.json", "gopher://127.0.0.1:1"])
def test_a_scheduler_that_is_not_there(wrong, flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "CONNECT", "0.5s")
    assert train.main([*flags, "--scheduler", wrong]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: SCHEDULER {wrong}") and "dask scheduler" in line
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_workers_that_are_not_like_this_process_are_refused(flags, capsys, monkeypatch, processes, tmp_path):
    def refused() -> str:
        assert train.main([*flags, "--scheduler", processes]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: worker tcp://") and line.endswith("(and 1 of the 2 workers more)")
        assert not list((tmp_path / "out").rglob("*.pt"))
        return line

    own = cluster._versions()
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "_versions", lambda: own | {"version of the project": "0123456789ab"})
        assert f"has another version of the project ({own['version of the project']}, here 0123456789ab)" in refused()
        patch.setattr(cluster, "_versions", lambda: own | {"torch": "1.0"})
        assert f"has another torch ({own['torch']}, here 1.0)" in refused()
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "_listing", lambda folder: ["tile", "wood"])
        assert f"does not see DATA_PATH {tmp_path / 'data'}" in refused()


def test_a_folder_that_only_this_process_has_is_refused_by_name(flags, processes, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    own = f"/proc/self/fd/{os.dup2(folder, 900)}"  # a name that says something else in each process
    with (
        pytest.raises(InputError, match=f"does not see SAVE_DIR {own} as it is here"),
        workers(settings_of(flags, "--save-dir", own, "--scheduler", processes)),
    ):
        pass
    os.close(folder)
    os.close(900)
    assert not list(tmp_path.glob(".workers-*"))


def test_a_worker_with_another_backbone_is_refused_by_its_fingerprint(flags, threads):
    own = settings_of(flags, "--scheduler", threads)
    net = build_net(own)
    right, net.fingerprint = net.fingerprint, "another"
    with (
        pytest.raises(InputError, match=rf"worker .* other weights of efficientnet_lite0 \({right}, here another\)"),
        workers(own, net),
    ):
        pass


def test_what_a_worker_is_sent_can_be_read_where_the_project_is_not(tmp_path):
    sent = cloudpickle.dumps((cluster._errand(str(ROOT), str(tmp_path)), "report", cluster._pack(Path("some"))))
    code = "import pickle, sys; errand, *_ = pickle.loads(sys.stdin.buffer.read()); print('utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=sent, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.split() == [b"False"]
    code = "import pickle, sys; errand, *call = pickle.loads(sys.stdin.buffer.read()); print(errand(*call))"
    sent = cloudpickle.dumps((cluster._errand(str(tmp_path), str(tmp_path)), "report", b""))
    done = subprocess.run([sys.executable, "-c", code], input=sent, cwd=tmp_path, capture_output=True, check=True)
    assert b"cannot import the project (No module named 'utils')" in done.stdout


def test_a_worker_that_takes_several_tasks_at_a_time_is_refused(flags):
    with LocalCluster(n_workers=1, threads_per_worker=3, processes=False, **QUIET) as local:
        wrong = pytest.raises(InputError, match="takes 3 tasks at a time: start it with --nthreads 1")
        with wrong, workers(settings_of(flags, "--scheduler", local.scheduler_address)):
            pass


def test_without_a_scheduler_dask_is_not_needed(flags, capsys, monkeypatch):
    for name in ("dask", "distributed", "cloudpickle"):
        monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    assert train.main(flags) == 0
    capsys.readouterr()
    assert train.main([*flags, "--scheduler", "local:2", "--overwrite"]) == 2
    assert capsys.readouterr().err.startswith("error: SCHEDULER needs Dask: pip install 'dask[distributed]'")


def test_no_module_imports_dask_when_it_is_loaded():
    found = [
        (file.name, ast.unparse(node))
        for folder in ("models", "utils", "benchmarks", ".")
        for file in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None) or node.names[0].name]
        if name.split(".")[0] in ("dask", "distributed", "cloudpickle")
    ]
    assert found == []


@pytest.mark.parametrize("value", ["local", "local:0", "local:x", "host", "8786", "4"])
def test_a_scheduler_that_is_none_is_refused_by_name(value, flags, capsys):
    assert train.main([*flags, "--scheduler", value]) == 2
    assert capsys.readouterr().err.startswith("error: SCHEDULER is ")


# --- these leave no worker alive ---


def test_a_worker_that_dies_in_the_midst_of_a_file_loses_nothing(alone, processes):
    root, (_, wanted, *_) = alone
    own = settings_of(small_flags(root), "--scheduler", processes)
    marker = root / "out/died"
    marker.parent.mkdir()
    method = wedge_net_method(own)

    def work(category: str) -> str:
        def half(contents, file):
            file.write(b"PK" * 1000)
            file.flush()
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        if category == "tile" and not marker.exists():
            torch.save = half  # of that process alone, which ends with it
        train_category(own, category, method)
        return category

    done = []
    with workers(own, method.net) as run:
        assert for_each(["tile", "bolt"], work, done.append, run) == 0
    assert marker.exists() and done == ["tile", "bolt"]
    marker.unlink()
    found = files(root)
    shutil.rmtree(root / "out")
    assert len(found) == 2 and found == {name: wanted[name] for name in found}  # nothing half-written is left


def test_a_task_that_kills_whoever_takes_it_is_told(flags, started, processes, monkeypatch):
    monkeypatch.setattr(started.scheduler, "allowed_failures", 0)  # Dask's own are three lives, of seconds each
    died = pytest.raises(InputError, match="each worker that took it died: has it enough memory")
    with workers(settings_of(flags, "--scheduler", processes)) as run, died:
        for_each(["a"], lambda _: os.kill(os.getpid(), signal.SIGKILL), None, run)
