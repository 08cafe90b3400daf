"""Follow a folder that a camera writes into."""

import os
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.data.image import EXTENSIONS

POLL = 0.2  # seconds between looks
SETTLED = 0.5  # seconds without a change after which a file is taken to be whole
PATIENCE = 10.0  # seconds without a change after which one that cannot be read is given up


@dataclass
class Arrival:
    """An image that has stopped changing, ``last_try`` if it will not be offered again.

    The caller sets ``done`` once it is judged; otherwise the file is offered again, when it has changed or is given up.
    """

    path: Path
    last_try: bool
    done: bool = False


@dataclass
class _Pending:
    stamp: tuple[int, int]  # size and time of the last change
    since: float
    tried: bool = False


def follow(folder: Path, is_judged: Callable[[Path], bool]) -> Iterator[Arrival | None]:
    """Yield each image of ``folder`` that is not judged yet when it has settled, in the order of their completion.

    Half-written files are waited for. None is yielded whenever there is nothing to do, so that the caller can look up;
    the iterator ends never.
    """
    pending: dict[str, _Pending] = {}
    finished: set[str] = set()
    while True:
        now = time.monotonic()
        present = _stamps(folder, finished)
        for name in [name for name in pending if name not in present]:
            del pending[name]  # taken away before it was whole
        ready = []
        for name, stamp in present.items():
            if is_judged(folder / name):
                finished.add(name)
            elif name not in pending or pending[name].stamp != stamp:
                pending[name] = _Pending(stamp, now)
            else:
                quiet = now - pending[name].since
                if quiet >= (PATIENCE if pending[name].tried else SETTLED):
                    ready.append((stamp[1], name, quiet >= PATIENCE))
        for _, name, last_try in sorted(ready):
            arrival = Arrival(folder / name, last_try)
            yield arrival
            if arrival.done or last_try:
                finished.add(name)
                del pending[name]
            else:
                pending[name].tried = True
        if not ready:
            yield None
            time.sleep(POLL)


def _stamps(folder: Path, skip: Container[str]) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each image in the folder."""
    stamps = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in skip or entry.name.startswith(".") or not entry.name.lower().endswith(EXTENSIONS):
                continue
            try:
                if entry.is_file():
                    status = entry.stat()
                    stamps[entry.name] = (status.st_size, status.st_mtime_ns)
            except FileNotFoundError:  # taken away since the folder was listed
                continue
    return stamps
