"""Many shards at once, in threads that end together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Told = Callable[[int, int], None]  # (bytes done, of all)
Passed = Callable[[int], None]  # so many bytes more were read


class Memory(threading.local):
    """A buffer of each thread's own, used again and again."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, size: int) -> memoryview:
        """At least `size` bytes."""
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return memoryview(self._bytes)


class _Stopped(BaseException):
    """An error in another thread, or Ctrl-C."""


def over(
    items: Sequence[T], work: Callable[[T, Passed], R], jobs: int, total: int, done: int = 0, told: Told | None = None
) -> list[R]:
    """`work` of every item, in `jobs` threads, in the order of the items.

    An error, or Ctrl-C, ends it as soon as the other threads call `passed` again, and not when their items are done.

    Args:
        total, done: bytes of all, and before the first item: for `told`.
    """
    lock, stop = threading.Lock(), threading.Event()

    def passed(size: int) -> None:
        nonlocal done
        if stop.is_set():
            raise _Stopped
        with lock:
            done = min(done + size, total)
            if told:
                told(done, total)

    passed(0)
    pool = ThreadPoolExecutor(jobs, "shard")
    try:
        tasks = {pool.submit(work, item, passed): number for number, item in enumerate(items)}
        found = {tasks[task]: task.result() for task in as_completed(tasks)}
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return [found[number] for number in range(len(items))]
