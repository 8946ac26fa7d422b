"""What a person sees: bars on a terminal, plain lines in a file, tables.

A job on the cluster has no terminal, but the person who follows its log may: with CALOTYPE_PROGRESS=lines a bar is
written as lines for a program (`\\x1eprogress {json}`), and `follow` draws them where the person is.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

SIGN = "\x1eprogress "
LINES = "CALOTYPE_PROGRESS"
PLAIN_SECONDS = 5.0  # between two plain lines about one thing
DRAW_SECONDS = 0.5  # between two lines for a program
# Ray puts this before what a worker prints.
RAY_PREFIX = re.compile(r"^(?:\x1b\[\d+m)*\([\w.:]+ pid=\d+(?:, ip=[^)]*)?\)(?:\x1b\[\d+m)* ?")

# And this before what an entrypoint prints: nothing that its reader did not just type.
RAY_START = re.compile(r"^(\d[\d:, -]+\tINFO job_manager\.py:\d+ -- |Running entrypoint for job )")


@dataclass
class State:
    """How far one thing is."""

    title: str
    unit: str
    total: int
    done: int = 0
    rate: float = 0.0  # units per second since this process began
    figures: dict[str, float | str] = field(default_factory=dict)

    def finished(self) -> bool:
        return self.done >= self.total

    def left(self) -> str:
        """Time to go, as 1:02:03."""
        if not self.rate or self.finished():
            return ""
        seconds = round((self.total - self.done) / self.rate)
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d} left" if hours else f"{minutes}:{seconds % 60:02d} left"

    def told(self) -> str:
        """The figures in one line."""
        words = [f"{figure(self.rate)} {self.unit}/s"] if self.rate else []
        words += [f"{name} {figure(value)}" for name, value in self.figures.items()]
        return "  ".join([*words, *([self.left()] if self.left() else [])])

    def line(self) -> str:
        percent = 100 * self.done // max(self.total, 1)
        return f"{self.title}: {self.done:,}/{self.total:,} {self.unit} ({percent}%)  {self.told()}".rstrip()


class Sink(Protocol):
    """Where states go."""

    def show(self, state: State) -> None: ...
    def close(self) -> None: ...


class Progress:
    """Progress of one thing, told where its process prints; use as a context manager.

        with Progress(config.train.images, "images", "train") as progress:
            progress.update(done, loss=0.12)

    Cheap to call at every step: what is told is limited in rate, the last word never.
    """

    def __init__(self, total: int, unit: str, title: str) -> None:
        self.state = State(title, unit, total)
        self._sink: Sink = LineSink() if os.environ.get(LINES) == "lines" else sink()
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Progress:
        return self

    def update(self, done: int, **figures: float | str) -> None:
        """`done` of `total` units, counted from the very beginning of the thing, restarts included."""
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        began, since = self._first
        self.state.done = done
        self.state.figures.update(figures)
        self.state.rate = (done - began) / (now - since) if now > since else 0.0
        self._sink.show(self.state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sink.close()


def follow(lines: Iterable[str]) -> None:
    """Print a job's log here: its bars as bars on a terminal, as plain lines elsewhere; the rest as it is."""
    shown = sink()
    try:
        for line in lines:
            _, found, data = line.rstrip("\n").partition(SIGN)
            if found and (state := _parsed(data)) is not None:
                shown.show(state)
            elif RAY_START.match(line):
                continue
            elif isinstance(shown, BarSink):
                shown.bars.console.print(Text.from_ansi(RAY_PREFIX.sub("", line.rstrip("\n"))), soft_wrap=True)
            else:
                print(RAY_PREFIX.sub("", line.rstrip("\n")), flush=True)
    finally:
        shown.close()


def _parsed(data: str) -> State | None:
    try:
        return State(**json.loads(data))
    except (ValueError, TypeError):  # half a line, or another version's
        return None


@contextmanager
def megabytes(total: int, title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in MB, told (bytes done, of all)."""
    with Progress(max(total // 10**6, 1), "MB", title) as progress:

        def told(done: int, of: int) -> None:
            whole = progress.state.total = max(of // 10**6, 1)
            progress.update(whole if done >= of else min(done // 10**6, whole - 1))  # the last word is said once

        yield told


# ------------------------------------------------------------------------------------------------------------- sinks


def sink() -> Sink:
    """Bars on a terminal, plain lines elsewhere."""
    return BarSink() if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else PlainSink()


class PlainSink:
    """A line every few seconds, and always the last."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._pending: dict[str, State] = {}

    def show(self, state: State) -> None:
        now = time.monotonic()
        last = self._at.get(state.title)
        if state.finished() or last is None or now - last >= PLAIN_SECONDS:
            self._at[state.title] = now
            self._pending.pop(state.title, None)
            print(state.line(), flush=True)
        else:
            self._pending[state.title] = state

    def close(self) -> None:
        for state in self._pending.values():
            print(state.line(), flush=True)
        self._pending.clear()


class LineSink:
    """Lines for `follow` on another machine; one write each, so that lines of many processes do not mix."""

    def __init__(self) -> None:
        self._at = 0.0
        self._pending: State | None = None

    def show(self, state: State) -> None:
        now = time.monotonic()
        if not state.finished() and now - self._at < DRAW_SECONDS:
            self._pending = state
            return
        self._at, self._pending = now, None
        sys.stdout.write(f"{SIGN}{json.dumps(asdict(state))}\n")
        sys.stdout.flush()

    def close(self) -> None:
        if self._pending is not None:
            self._at = 0.0
            self.show(self._pending)


class BarSink:
    """One bar per title, drawn in place."""

    def __init__(self) -> None:
        self.bars = Bars(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"), Told()
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, state: State) -> None:
        if not self._tasks:
            self.bars.start()
        if state.title not in self._tasks:
            self._tasks[state.title] = self.bars.add_task(state.title, total=state.total, told="")
        told = f"{state.done:,}/{state.total:,} {state.unit}  {state.told()}"
        self.bars.update(self._tasks[state.title], completed=state.done, total=state.total, told=told)

    def close(self) -> None:
        if self._tasks:
            self.bars.stop()


class Told(ProgressColumn):
    """The figures beside a bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["told"], overflow="ellipsis", no_wrap=True)


# ------------------------------------------------------------------------------------------------------------ tables


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table: fitted to a terminal, never cut in a file; NO_COLOR is honoured."""
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else 10_000)
    made = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(figure(cell)) for cell in row))
    console.print(made)


def figure(value: Any) -> str:
    """A number as people read it (0.9731, 12,345, 3.2e-06); anything else as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    return str(value)


def many(count: int, what: str) -> str:
    """1 shard, 2,000 shards."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Bytes as people read them."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def speed(count: int, seconds: float) -> str:
    """So many bytes in so many seconds."""
    return f"{size(count)} in {seconds:.1f} s ({size(round(count / max(seconds, 1e-9)))}/s)"


def age(seconds: float) -> str:
    """Seconds as people read them: 40 s, 12 min, 5 h, 3 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def duration(seconds: float) -> str:
    """A length of time as people read it: 40 s, 12 min, 5.2 h."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"
