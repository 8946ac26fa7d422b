"""Loader processes, as the stream that starts them sees them; worker.py is what runs in them."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe

import numpy as np

import calotype.data.worker as worker
from calotype.data.reader import Array, Rows
from calotype.errors import CalotypeError, DataError


@contextmanager
def joined(tasks: Sequence[worker.Task]) -> Iterator[Iterator[Rows]]:
    """The rows of a process for each task, as if one had made them; the processes end with the context."""
    processes: list[_Process] = []
    try:
        for _ in tasks:
            processes.append(_Process())
        for process, task in zip(processes, tasks):
            process.begin(task)
        yield _joined(processes)
    finally:
        for process in processes:
            process.connection.close()  # it ends then: all of them at once
        until = time.monotonic() + 2
        for process in processes:
            process.end(until)


class _Process:
    """A loader process, its end of the connection, and the memory that it shares."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.memory, self.map, self.size = _memory(), mmap.mmap(-1, 1), 0
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        program = "from calotype.data.worker import main; main()"
        command = [sys.executable, "-c", program, str(theirs.fileno()), str(self.memory)]
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(), self.memory), env=environment)
        theirs.close()

    def begin(self, task: worker.Task) -> None:
        with suppress(BrokenPipeError):  # it died: `take` says how
            self.connection.send(task)

    def end(self, until: float) -> None:
        try:
            self.process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.memory)

    def take(self) -> worker.Sent | None:
        """The next batch's rows; None behind the last.

        Raises:
            CalotypeError: what the process met, or that it died.
        """
        try:
            item = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            status = self.process.wait()
            said = f"signal {-status}" if status < 0 else f"exit {status}"
            raise CalotypeError(f"a loader process died ({said}): if memory ran out, lower the memory of reading or "
                                "its workers (stream.memory_mb, stream.workers)") from error  # fmt: skip
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        assert isinstance(item, worker.Sent)
        if item.size != self.size:
            self.map, self.size = mmap.mmap(self.memory, item.size), item.size
        return item

    def arrays(self, sent: worker.Sent) -> dict[str, Array]:
        """Views of the shared memory; good until `done`."""
        return {name: worker.placed(self.map, *place) for name, place in sent.fields.items()}

    def done(self, sent: worker.Sent) -> None:
        if sent.slot >= 0:  # else there was nothing in the shared memory, and nobody waits for it
            with suppress(BrokenPipeError):
                self.connection.send(sent.slot)


def _memory() -> int:
    """A descriptor of memory that processes can share; the last one of it to be closed frees it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("calotype")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _shapes(sent: worker.Sent) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, shape[1:]) for name, (_, shape, dtype) in sent.fields.items()}


def _joined(processes: list[_Process]) -> Iterator[Rows]:
    """The rows of all processes, as if one had made them: copied once, so that the memory may be used again."""
    while True:
        sent = [one for one in [process.take() for process in processes] if one is not None]
        if not sent:
            return
        assert len(sent) == len(processes), "all take the same steps: part of a batch must not pass for one"
        made, first = Rows(sent[0].rows.step, np.concatenate([one.rows.positions for one in sent]), []), 0
        made.retries = sum(one.rows.retries for one in sent)
        like = _shapes(sent[0])
        for one in sent:
            if _shapes(one) != like:
                raise DataError(f"the arrays of one batch differ: {like} from sample {sent[0].rows.keys[0]} on, "
                                f"{_shapes(one)} from {one.rows.keys[0]} on")  # fmt: skip
        parts = [process.arrays(one) for process, one in zip(processes, sent)]
        for one in sent:
            made.keys += one.rows.keys
            made.samples += one.rows.samples
            made.skipped += [(first + row, name, reason) for row, name, reason in one.rows.skipped]
            first += len(one.rows.keys)
        for name in parts[0]:
            made.arrays[name] = np.concatenate([part[name] for part in parts])
        for process, one in zip(processes, sent):
            process.done(one)
        yield made
