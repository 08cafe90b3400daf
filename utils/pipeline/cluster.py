"""SCHEDULER: a script's tasks on the workers of a Dask cluster. Without it nothing of Dask is imported, or needed.

One task is one category, or one shard of it (see ``utils.pipeline.shards``). Dask hands tasks to workers, and once more
to another if a worker dies. Files are written by the worker, into folders that all share. Rows and what was printed
come back in the order of the tasks, so that tables, files and lines are those of a run without a cluster.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import logging
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import models.threads  # noqa: F401 - a worker may import this module before all else

import torch
from tqdm import tqdm

from models.detector import Net
from models.errors import InputError, one_line
from utils.console import Run, in_turn, progress
from utils.settings import CONSTANTS, Settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "torchvision", "onnxruntime", "numpy", "scipy", "pillow")  # that results depend on
FOLDERS = ("SAVE_DIR", "PatchCore_DIR", "SemanticON_DIR", "SemanticOFF_DIR")
CONNECT = "20s"
AHEAD = 8  # tasks for each worker that may be sent before the first of them is done: results wait on the workers
_BUSY = threading.Lock()


class Expected(NamedTuple):
    """What a worker must have to do tasks: ``process`` is the script's own, (host, number)."""

    process: tuple[str, int]
    versions: dict[str, str]
    folders: dict[str, tuple[Path, str]]
    data_path: Path
    data: list[str]
    device: torch.device
    nets: bytes


class Outcome(NamedTuple):
    """Of a task: what it returned, or the line of its error; and what it printed, as (stream, text)."""

    result: Any
    error: str | None
    said: list[tuple[str, str]]


@dataclass(frozen=True)
class NeedsNet:
    """Stands for a network on its way to a worker: what builds it, what it has learnt, and its backbone's fingerprint.

    The weights stay where they are: a worker has its own, and they must be the same.
    """

    build: tuple[Any, ...]
    state: dict[str, torch.Tensor]
    fingerprint: str

    def make(self) -> Net:
        """The network, on this worker."""
        net = _built(*self.build)
        if net.fingerprint != self.fingerprint:
            raise InputError(
                f"has other weights of {net.backbone_name} ({net.fingerprint}, here {self.fingerprint}): give it these"
            )
        return net.with_state(self.state)


@functools.lru_cache(maxsize=4)
def _built(function: Callable[..., Net], *arguments: Any) -> Net:
    return function(*arguments)


@contextlib.contextmanager
def workers(settings: Settings, *nets: Net) -> Iterator[Run]:
    """What runs a script's tasks: ``in_turn``, or the workers of SCHEDULER while the context lasts.

    Raises :class:`InputError` if there is no such scheduler, or a worker has another version of the project or of a
    package, other weights than ``nets``, or does not see the same folders.
    """
    if settings.scheduler is None:
        yield in_turn
        return
    try:
        import dask
        import distributed  # noqa: F401 - dask alone is not enough
    except ImportError:
        raise InputError("SCHEDULER needs Dask: pip install 'dask[distributed]', or set SCHEDULER = None") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what a user should know, we say
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.logging.distributed": "critical"}))
        client = stack.enter_context(_connect(settings))
        expected = Expected(
            (socket.gethostname(), os.getpid()),
            _versions(),
            {name: (folder.absolute(), stack.enter_context(_token(folder))) for name, folder in _folders(settings)},
            settings.data_path.absolute(),
            _listing(settings.data_path),
            settings.device,
            _pack(nets),
        )
        if not client.scheduler_info(n_workers=-1)["workers"]:
            print(f"waiting for a worker of {settings.scheduler} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            client.wait_for_workers(1)
        cluster = Cluster(client, settings.scheduler, expected)
        cluster.check()
        yield cluster


@contextlib.contextmanager
def trainers(settings: Settings, *nets: Net) -> Iterator[tuple[Run, Run]]:
    """Of a script that trains: what runs its categories, and what runs the shards of each.

    With SHARD_IMAGES categories are so large that the workers take one after the other, shard by shard.
    """
    with workers(settings, *nets) as run:
        yield (in_turn, run) if settings.shard_images else (run, in_turn)


@contextlib.contextmanager
def _connect(settings: Settings) -> Iterator[Any]:
    """A client of SCHEDULER; 'local:4' starts so many processes, which end with it."""
    from distributed import Client, Nanny, Scheduler, SpecCluster

    address = settings.scheduler
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {"address": address}
        if address.startswith("local:"):
            count = int(address.removeprefix("local:"))
            options = {"nthreads": 1, "memory_limit": 0, "host": "127.0.0.1", "silence_logs": logging.CRITICAL}
            nannies = {
                place: {"cls": Nanny, "options": options | {"env": _environment(settings, place, count)}}
                for place in range(count)
            }
            scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": ":0"}}
            where = {"address": stack.enter_context(SpecCluster(nannies, scheduler, silence_logs=logging.CRITICAL))}
        elif "://" not in address:
            if not Path(address).is_file():
                raise InputError(
                    f"SCHEDULER {address} is not there: 'dask scheduler --scheduler-file {address}' writes it"
                )
            where = {"scheduler_file": address}
        try:
            client = stack.enter_context(Client(**where, timeout=CONNECT, set_as_default=False))
        except (OSError, ValueError) as error:
            raise InputError(
                f"SCHEDULER {address}: no scheduler answers there ({one_line(error)[:200]}); start one with "
                "'dask scheduler', or set SCHEDULER = None"
            ) from None
        if address.startswith("local:"):  # a terminal's Ctrl-C reaches them too, but it is the script's to end them
            client.run(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) and None)
        yield client


def _environment(settings: Settings, place: int, count: int) -> dict[str, str]:
    """Of the process ``place`` of ``count`` on this machine: its share of the cores, and its own GPU."""
    threads = str(max(1, torch.get_num_threads() // count))
    own = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    if settings.device == torch.device("cuda"):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        own["CUDA_VISIBLE_DEVICES"] = seen.split(",")[place % len(seen.split(","))]
    return own


class Cluster:
    """Runs tasks on the workers of a Dask client, like ``in_turn``: outcomes in the order of the tasks."""

    def __init__(self, client: Any, address: str, expected: Expected) -> None:
        self.client, self.address = client, address
        self.there = _errand(str(ROOT), os.getcwd())
        self.expected = _pack(expected)

    def check(self) -> None:
        """Ask every worker that is there, and tell how many there are. Raises :class:`InputError`, see ``workers``."""
        wrong = {
            worker: f"takes {tasks} tasks at a time: start it with --nthreads 1, and --nworkers for more"
            for worker, tasks in self.client.nthreads().items()
            if tasks > 1
        }
        found = self.client.run(self.there, "report", self.expected)
        if wrong := wrong | {worker: own for worker, own in found.items() if isinstance(own, str)}:
            worker = min(wrong)
            more = f" (and {len(wrong) - 1} of the {len(found)} workers more)" if len(wrong) > 1 else ""
            raise InputError(f"worker {worker} {wrong[worker]}{more}")
        threads = sorted(set(found.values()))
        print(
            f"{self.address}: {len(found)} workers, threads of each: {' or '.join(map(str, threads))}",
            file=sys.stderr,
            flush=True,
        )

    def __call__(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """What ``work`` makes of each item, or the :class:`InputError` it ended with; in the order of the items."""
        from distributed import as_completed

        # A task like the others, so that it is done again elsewhere if its worker dies; scattered it would be lost.
        packed = self.client.submit(bytes, _pack(work), pure=False)
        finished = as_completed(loop=self.client.loop)
        futures: list[Any] = []

        def submit(most: int) -> None:
            for item in items[len(futures) : most]:
                futures.append(self.client.submit(self.there, "task", packed, _pack(item), self.expected, pure=False))
                finished.add(futures[-1])

        try:
            bar = progress(finished, "tasks", len(items))
            for place in range(len(items)):
                submit(place + AHEAD * max(1, len(self.client.nthreads())))
                while not futures[place].done():
                    next(bar)
                with tqdm.external_write_mode():
                    yield self._outcome(futures[place])
                futures[place] = None  # its result is no longer needed
        finally:  # after an interrupt: what has not begun
            self.client.cancel([packed, *filter(None, futures)])

    def _outcome(self, future: Any) -> Any:
        from distributed import KilledWorker

        if future.status not in ("finished", "error"):
            return InputError(f"the scheduler at {self.address} went away: run the same command again to go on")
        try:
            found = future.result()
        except KilledWorker:
            return InputError("each worker that took it died: has it enough memory?")
        if isinstance(found, str):  # of a worker that came late
            return InputError(f"a worker {found}")
        for stream, text in found.said:
            getattr(sys, stream).write(text)
        return found.result if found.error is None else InputError(found.error)


# --- on a worker ---


def _errand(root: str, folder: str) -> Callable[..., Any]:
    """What a worker is sent: it need not know the project yet, so that this function travels by value, and what it is
    called with as bytes."""

    def there(name: str, *arguments: bytes) -> Any:
        import importlib
        import os
        import sys

        if os.path.isdir(folder):
            os.chdir(folder)  # paths of the settings are relative to it
        if root not in sys.path:
            sys.path.append(root)
        try:
            cluster = importlib.import_module("utils.pipeline.cluster")
        except ImportError as error:
            return f"cannot import the project ({error}): start it with PYTHONPATH={root}, or that of its own copy"
        return getattr(cluster, name)(*arguments)

    return there


def report(packed: bytes) -> str | int:
    """What is wrong with this worker, by what is ``Expected``, as the end of a sentence; or how many threads it has."""
    expected = _unpack(packed)
    if expected.versions != (own := _versions()):
        name = next(name for name, version in expected.versions.items() if own.get(name) != version)
        return f"has another {name} ({own.get(name)}, here {expected.versions[name]}): give it the same"
    for name, (folder, token) in expected.folders.items():
        if not (folder / token).is_file():
            return f"does not see {name} {folder} as it is here: all must share it, under the same path"
        if not os.access(folder, os.W_OK):
            return f"cannot write to {name} {folder}"
    if not expected.data_path.is_dir() or not set(expected.data) <= set(_listing(expected.data_path)):
        return f"does not see DATA_PATH {expected.data_path} as it is here: all must share it, under the same path"
    try:
        torch.empty(0, device=expected.device)
        _unpack(expected.nets)
    except (InputError, RuntimeError) as error:
        return str(error) if isinstance(error, InputError) else f"cannot use DEVICE {expected.device}"
    return torch.get_num_threads()


def task(work: bytes, item: bytes, expected: bytes) -> Outcome:
    """Do one task on this worker. One at a time: torch's threads, and where prints go, are the whole process's."""
    from distributed import get_worker

    with _BUSY:
        if isinstance(wrong := report(expected), str):  # it may have come late
            return Outcome(None, f"worker {get_worker().address} {wrong}", [])
        lines: list[tuple[str, str]] = []
        with contextlib.ExitStack() as stack:
            if _unpack(expected).process != (socket.gethostname(), os.getpid()):
                stack.enter_context(contextlib.redirect_stdout(_Said("stdout", lines)))
                stack.enter_context(contextlib.redirect_stderr(_Said("stderr", lines)))
            (outcome,) = in_turn(_unpack(work), [_unpack(item)])
        if isinstance(outcome, (InputError, OSError)):
            return Outcome(None, one_line(outcome), lines)
        return Outcome(outcome, None, lines)


class _Said(io.TextIOBase):
    """A stream that keeps what is written, in one list with that of the other stream."""

    def __init__(self, name: str, lines: list[tuple[str, str]]) -> None:
        self.name, self.lines = name, lines

    def write(self, text: str) -> int:
        self.lines.append((self.name, text))
        return len(text)


# --- what both sides compare ---


def _versions() -> dict[str, str]:
    """The project as a digest of its modules, Python, and the packages that results depend on."""
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("models/**/*.py"), *ROOT.glob("utils/**/*.py")]):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    versions = {"version of the project": digest.hexdigest()[:12], "Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _folders(settings: Settings) -> Iterator[tuple[str, Path]]:
    """The folders that are there and can be written to, each once, under their settings' names."""
    seen = set()
    for name in FOLDERS:
        folder = getattr(settings, CONSTANTS[name].name)
        if folder.is_dir() and os.access(folder, os.W_OK) and folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield name, folder


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[str]:
    """The name of a file in the folder, gone afterwards: who sees it, sees the same folder."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".workers-") as file:
        yield Path(file.name).name


def _listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _pack(value: Any) -> bytes:
    """``value`` with its functions, and with networks as what builds them."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        def persistent_id(self, each: Any) -> Any:
            build = getattr(each, "built_by", None) if isinstance(each, Net) else None
            return None if build is None else NeedsNet(build, each.state(), each.fingerprint)

    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _unpack(packed: bytes) -> Any:
    import pickle

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, net: NeedsNet) -> Net:
            return net.make()

    return Unpickler(io.BytesIO(packed)).load()
