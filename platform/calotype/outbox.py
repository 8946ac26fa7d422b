"""A queue of metric points and one thread that delivers it, however long the server is away.

Promise (DESIGN P6): putting something in takes microseconds, and in the end every (key, step) is there once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

log = logging.getLogger(__name__)

Point = tuple[str, float, int, int]  # key, value, images seen (MLflow's step), milliseconds since 1970
Action = Callable[[Any], None]  # what to do with a connected client

BATCH = 1000  # points in one request: MLflow's limit
PAUSE = 1.0  # seconds in which points gather, so that they travel together
PATIENCE = 30.0  # seconds between two tries, at most


class Server(Protocol):
    """What the outbox needs to know about its server."""

    def connect(self) -> Any:
        """A client; raises while there is none to be had."""

    def held(self, client: Any) -> tuple[float, dict[str, int], list[Point]]:
        """(start of the run in seconds, last step the server holds of each key, points left by an earlier attempt)."""

    def send(self, client: Any, points: Sequence[Point]) -> None:
        """Deliver points in one request."""

    def refused(self, error: Exception) -> bool:
        """Whether asking again cannot help."""

    def gone(self, error: Exception) -> bool:
        """Whether the server does not know the run, when it was asked what it holds: nothing can be told any more."""


class Outbox:
    """What is to be told to the server, in order, by one thread.

    Attributes:
        asked: the server has said what it holds, so that points which an earlier attempt left are among those here.
    """

    def __init__(self, server: Server, pending: Iterable[Sequence[Any]] = ()) -> None:
        self._server = server
        self._points: deque[Point] = deque()
        self._actions: deque[tuple[str, Action]] = deque()  # what it tells, in words, and how
        self._last: dict[str, int] = {}  # key -> newest step queued here or held by the server
        self.asked = False
        self._start: float | None = None  # of the run, in seconds; known once the server has answered
        self._outdated = False  # an answer that is on its way, by a question that came later
        self._size = BATCH
        self._final: Action | None = None
        self._deadline: float | None = None  # set when closing
        self._changed = threading.Condition()
        self.put(as_point(point) for point in pending)
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, points: Iterable[Point]) -> None:
        """Queue points; one at or before the newest step of its key is a replay, and dropped."""
        with self._changed:
            for point in points:
                if point[2] > self._last.get(point[0], -1):
                    self._last[point[0]] = point[2]
                    self._points.append(point)
            self._changed.notify_all()

    def act(self, what: str, action: Action) -> None:
        """Queue something else to tell; done before the points that wait, and again until it succeeds."""
        with self._changed:
            self._actions.append((what, action))
            self._changed.notify_all()

    def ask_again(self) -> None:
        """Learn anew what the server holds before anything is sent: other processes tell it about the run too."""
        with self._changed:
            self._start, self._outdated = None, True
            self._changed.notify_all()

    def pending(self) -> list[Point]:
        """Points that the server has not confirmed."""
        with self._changed:
            return list(self._points)

    def start(self, stop: threading.Event) -> float | None:
        """When the run began, in seconds, once the server has said so; None if `stop` comes first."""
        while not stop.is_set():
            with self._changed:
                if self._start is not None:
                    return self._start
                self._changed.wait(0.2)
        return None

    def close(self, final: Action | None, wait: float) -> tuple[list[Point], list[str]]:
        """Deliver everything, then do `final`; give up after `wait` seconds.

        Returns:
            The points that are left; and what else was not told, in words, which the log says as an error.
        """
        with self._changed:
            self._final, self._deadline = final, time.monotonic() + wait
            self._changed.notify_all()
        self._thread.join(wait)
        with self._changed:
            untold = list(dict.fromkeys(what for what, _ in self._actions))
            untold += ["the end of the run"] if self._final else []
        if untold:
            log.error("the tracking server was never told %s: %.0f s were not enough", " and ".join(untold), wait)
        return self.pending(), untold

    def _run(self) -> None:
        client: Any = None
        delay = 0.0
        while self._wait_for_work():
            try:
                client = client or self._server.connect()
                self._turn(client)
                delay = 0.0
            except Exception as error:  # requests, urllib3, JSON and MLflow errors alike: the server is not well
                final = self._server.gone if self._start is None else self._server.refused
                if final(error):
                    self._drop(error)
                    continue
                if not delay:
                    log.warning("the tracking server is away, its points wait here: %s", str(error)[:300])
                delay = min(max(2 * delay, 0.5), PATIENCE)
                self._sleep(delay)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when it is over."""
        with self._changed:
            if self._deadline is None:
                self._changed.wait_for(
                    lambda: self._points or self._actions or self._start is None or self._deadline is not None
                )
                if not self._actions and self._start is not None:
                    self._changed.wait_for(lambda: self._deadline is not None, PAUSE)
            if self._deadline is None:
                return True
            return time.monotonic() < self._deadline and bool(self._points or self._actions or self._final)

    def _sleep(self, delay: float) -> None:
        with self._changed:
            if self._deadline is None:
                self._changed.wait_for(lambda: self._deadline is not None, delay)
            else:  # closing: there is not much time
                self._changed.wait(max(0.0, min(delay, 1.0, self._deadline - time.monotonic())))

    def _turn(self, client: Any) -> None:
        """One request, or one action: whatever is next."""
        if self._start is None:
            self._outdated = False
            self._sync(*self._server.held(client))
        elif self._actions:
            self._actions[0][1](client)
            self._actions.popleft()
        elif self._points:
            batch = self.pending()[: self._size]
            self._server.send(client, batch)
            with self._changed:
                for _ in batch:
                    self._points.popleft()
                self._size = min(BATCH, 10 * self._size)
        elif self._final is not None:
            self._final(client)
            self._final = None

    def _sync(self, start: float, held: dict[str, int], left: list[Point]) -> None:
        """Forget points that the server holds: replays after a restart, or sent by a request that seemed to fail."""
        with self._changed:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return  # who closes has been told what is left
            self.asked = True
            points, self._points, self._last = [*left, *self._points], deque(), dict(held)
            self._start = None if self._outdated else start
            self.put(points)

    def _drop(self, error: Exception) -> None:
        """The server refuses what is next: find the point it means by sending fewer; what is lost is said."""
        with self._changed:
            lost = "all that waits"
            if self._start is None:
                self._points.clear()
                self._actions.clear()
                self.asked = False  # what an earlier attempt left stays where it is
                self._final, self._start = None, time.time()
            elif self._actions:
                lost = self._actions.popleft()[0]
            elif len(self._points) > 1 and self._size > 1:
                self._size = max(1, min(self._size, len(self._points)) // 10)
                return
            elif self._points:
                lost = str(self._points.popleft())
            else:
                lost, self._final = "the end of the run", None
        log.error("the tracking server refuses %s: %s", lost, str(error)[:300])


def as_point(data: Sequence[Any]) -> Point:
    """A point that came back from JSON."""
    key, value, images, when = data
    return str(key), float(value), int(images), int(when)
