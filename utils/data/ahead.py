"""Files read while the model works on those before them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, most: int) -> Iterator[Result]:
    """``function`` of each item, in their order, by so many threads, at most ``most`` items before their turn.

    0 threads: each in its turn. Pillow gives Python's lock back while it decodes and scales, so that threads do here
    what processes would, and start at once. What the function raises is raised in its item's turn.
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
