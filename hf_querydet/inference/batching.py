"""Batches of what arrives one by one, read ahead by threads."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Lists of so many items that follow one another; the last may be shorter.

    Raises:
        ValueError: If ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, batch_size)), [])


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Iterator[Result]:
    """``read(item)`` of each item in order, computed by threads before it is asked for.

    Args:
        read: Called once per item.
        items: Taken one by one, no more than ``num_workers`` ahead.
        num_workers: Threads; 0 reads when the result is asked for.
    """
    if num_workers == 0:
        yield from map(read, items)
        return
    pool = ThreadPoolExecutor(num_workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
