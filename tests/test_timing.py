"""Fair timing: whose turn it is, and what is kept."""

import time

import numpy
import torch

from utils.pipeline.timing import alternate, describe_machine, describe_versions


def test_each_round_starts_with_another_function_and_warmups_are_not_kept():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = alternate(functions, repeats=3, warmups=1)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_seconds_are_those_of_the_call():
    seconds = alternate({"short": lambda: None, "long": lambda: time.sleep(0.02)}, 2, 0, torch.device("cpu"))
    assert min(seconds["long"]) >= 0.02
    assert min(seconds["short"]) < 0.01


def test_machine_and_versions_are_named():
    assert f"{torch.get_num_threads()} threads" in describe_machine(torch.device("cpu"))
    assert describe_versions("numpy", "no-such-package").endswith(f"numpy {numpy.__version__}, no-such-package absent")
