"""Many shards at once, in threads that end together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any, TypeVar

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


class Daemons:
    """Threads that do not hold up the end of the process: those of concurrent.futures are joined then, and one that
    waits for a server may take minutes.

    What they work off are generators, each of which says, whenever it yields, in whose threads it goes on.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Steps[Any]] | None] = SimpleQueue()
        self._count, self._closed = count, False
        for number in range(count):
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True).start()

    def submit(self, steps: Steps[R]) -> Future[R]:
        """It begins in these threads."""
        future: Future[R] = Future()
        self._tasks.put((future, steps))
        return future

    def close(self) -> None:
        """Of what waits nothing goes on; what is under way goes on to its next step."""
        self._closed = True
        for _ in range(self._count):
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, steps = task
            if self._closed:
                future.cancel()
                continue
            try:
                next(steps)._tasks.put(task)
            except StopIteration as end:
                future.set_result(end.value)
            except BaseException as error:
                future.set_exception(error)
            del future, steps, task


Steps = Generator[Daemons, None, R]


def in_turn(steps: Steps[R]) -> R:
    """All of it in this thread."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            made: R = end.value
            return made


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
