"""Threads that leave the result alone: the same numbers to the bit, however many there are.

Of a sum over many rows, and of a decomposition, torch's libraries give each thread a part, and the parts are added: two
threads round otherwise than one. A bank must not depend on the machine that made it, nor on how many others ran there.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def threads_of(device: torch.device) -> Iterator[tuple[int, Callable[..., Iterable]]]:
    """The number of torch's threads, and a ``map`` that spreads its calls over them.

    Each call runs in one thread. The other way round, each operation in all threads, they would wait for each other
    thousands of times, and for long if the machine has something else to do. A GPU takes one call after the other.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield 1, map
        return
    with one_thread(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield threads, pool.map


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Each of torch's operations in one thread; also a decorator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
