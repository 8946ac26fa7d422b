"""A loader process: its arguments are CONNECTION and MEMORY, two file descriptors of its parent's.

It writes the arrays of each batch into a slot of shared memory and sends where they lie, not the bytes (but those of
whole samples, where neither arrays nor `decode` were asked for).  It ends when its parent does, or closes the
connection.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from calotype.data.chunks import Reading
from calotype.data.dataset import Dataset
from calotype.data.reader import Array, Decode, OrderSettings, Reader, Rows
from calotype.errors import CalotypeError

SLOTS = 4  # batches that a worker is ahead
ALIGN = 64  # bytes
SWITCH = 0.002  # seconds until a thread gives the interpreter to one that waits: readers, with what has just come


@dataclass(frozen=True)
class Task:
    """What a worker is to do."""

    slots: range
    datasets: Sequence[Dataset]
    order: OrderSettings
    reading: Reading
    arrays: Sequence[str]
    decode: Decode | None
    position: int


@dataclass(frozen=True)
class Sent:
    """A batch's rows: `fields` lie in shared memory of `size` bytes in all, name -> (offset, shape, dtype)."""

    rows: Rows
    slot: int
    size: int
    fields: dict[str, tuple[int, tuple[int, ...], str]]


class _Ring:
    """SLOTS pieces of shared memory; both ends map them again when they had to grow."""

    def __init__(self, memory: int, connection: Connection) -> None:
        self.memory, self.connection = memory, connection
        self.free = deque(range(SLOTS))
        self.each, self.map = 0, mmap.mmap(-1, 1)
        self.current, self.filled = -1, 0
        self.fields: dict[str, tuple[int, tuple[int, ...], str]] = {}

    def allocate(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Room for the rows of the batch that is being made: in shared memory, once it is known how much they need."""
        size = -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGN) * ALIGN
        if self.current < 0 and self.each:
            self.current = self.slot()
        if self.filled + size > self.each:
            return np.empty(shape, dtype)
        at = self.current * self.each + self.filled
        self.filled += size
        self.fields[name] = (at, shape, np.dtype(dtype).str)
        return placed(self.map, at, shape, dtype)

    def sent(self, rows: Rows) -> Sent:
        """The batch, with all of its arrays in shared memory."""
        if rows.arrays.keys() - self.fields.keys():  # the first batch, or one that is bigger than any before
            size = sum(-(-array.nbytes // ALIGN) * ALIGN for array in rows.arrays.values())
            arrays = {name: array.copy() for name, array in rows.arrays.items()}
            if self.current >= 0:
                self.free.append(self.current)
            self.fields, self.filled, self.current = {}, 0, -1
            self.grow(size)
            for name, array in arrays.items():
                self.allocate(name, array.shape, array.dtype)[...] = array
        made = Sent(replace(rows, arrays={}), self.current, self.each * SLOTS, self.fields)
        self.fields, self.filled, self.current = {}, 0, -1
        return made

    def grow(self, size: int) -> None:
        """At least `size` bytes per slot; waits until all of them are free."""
        while len(self.free) < SLOTS:
            self.free.append(self.connection.recv())
        self.each = max(self.each, -(-size * 5 // 4 // mmap.PAGESIZE) * mmap.PAGESIZE)
        os.ftruncate(self.memory, self.each * SLOTS)
        self.map = mmap.mmap(self.memory, self.each * SLOTS)

    def slot(self) -> int:
        """A free slot; waits for the parent."""
        while not self.free or self.connection.poll():
            self.free.append(self.connection.recv())
        return self.free.popleft()


def main() -> None:
    sys.setswitchinterval(SWITCH)
    connection, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    try:
        task: Task = connection.recv()
        for sent in _sent(task, _Ring(memory, connection)):
            connection.send(sent)
        connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has what it wanted, or is gone
    except BaseException as error:  # whatever it is, the parent must get it
        with suppress(BrokenPipeError):
            connection.send(_portable(error))
    os._exit(0)  # threads may hang in a read


def _portable(error: BaseException) -> BaseException:
    """The error, if it is ours; else one that says what it was, for not all of them survive the journey."""
    if isinstance(error, CalotypeError):
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    made = CalotypeError(f"a loader process failed ({type(error).__name__}: {error})")
    made.add_note("".join(traceback.format_exception(error)))
    return made


def _sent(task: Task, ring: _Ring) -> Iterator[Sent]:
    reader = Reader(task.datasets, task.order, task.slots, task.reading, task.arrays, task.decode, 1, ring.allocate)
    for rows in reader.rows(task.position, threading.Event()):
        yield ring.sent(rows)


def placed(memory: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """The array that lies there."""
    return np.frombuffer(memory, dtype, math.prod(shape), offset).reshape(shape)
