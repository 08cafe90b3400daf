"""Fair timing, and the names of what was timed: every benchmark measures alike and says on which machine."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

Key = TypeVar("Key")


def alternate(
    functions: Mapping[Key, Callable[[], object]], repeats: int, warmups: int = 1, device: torch.device | None = None
) -> dict[Key, list[float]]:
    """Time ``functions`` in turn, ``repeats`` rounds of all of them, so that a slow minute hits all alike.

    Each round starts with another function. Returns the seconds of each call, in the order of the rounds; ``warmups``
    rounds before them are not kept. Work on ``device``, or else on the current GPU if there is one, is waited for.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    names = list(functions)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for turn in range(-warmups, repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            functions[name]()
            _wait(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe_machine(device: torch.device | None = None) -> str:
    """One line: processor, cores, threads in use, the GPU if ``device`` is or may be one, operating system."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    has_gpu = torch.cuda.is_available() and (device is None or device.type == "cuda")
    gpu = f", {torch.cuda.get_device_name(device)}" if has_gpu else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, {platform.system()}"


def describe_versions(*packages: str) -> str:
    """One line: the versions of Python and of ``packages``, named as pip names them, or that one is absent."""
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return ", ".join(versions)
