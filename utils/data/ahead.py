"""Files read while the model works on those before them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, most: int) -> Iterator[Result]:
    """Yields ``function(item)`` for each item, in order, computed by threads that run at most ``most`` items ahead.

    With 0 threads nothing runs ahead. Threads do what processes would, since Pillow releases Python's lock while it
    decodes and resizes, and they start at once. What the function raises is raised in its item's turn.
    """
    if not threads:
        yield from map(function, items)
        return
    pool, waiting = ThreadPoolExecutor(threads), deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also of whoever stops asking
        pool.shutdown(cancel_futures=True)
