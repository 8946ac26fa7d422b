"""A proxy in front of a real S3 server: a slow network for benchmarks, a bad one for tests.

    with Proxy("http://127.0.0.1:8333", rate=90e6, delay=0.030) as proxy:
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.url
        proxy.faults(Faults(slow_down=0.3, short=0.1))
        ...
        assert proxy.counts().faults["slow_down"] > 0

It runs in a process of its own, so that its CPU is not counted as the client's, and ends with the `with`, or with the
process that began it, however that ends.  Heads pass through unchanged (Host too), so signatures made for `url` hold;
bodies go from socket to socket by `splice` (proxy_server.py).  Loopback and Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SERVER = Path(__file__).with_name("proxy_server.py")
SHARES = ("slow_down", "internal", "reset", "broken", "short", "stall", "flip")


@dataclass(frozen=True)
class Faults:
    """What goes wrong.  Shares are of requests, in [0, 1] and together too; a request has one of these faults at most.

    Those in a body strike at a random byte of it, and not at all where there is no body.  `cut` leaves listings as they
    are, and a range counted from the object's end is that of the whole object.
    """

    seed: int = 0
    only: str = ""  # regular expression: shares are of requests whose BUCKET/KEY it is found in
    slow_down: float = 0.0  # answered 503 SlowDown; the server does not see the request
    internal: float = 0.0  # answered 500 InternalError, likewise
    reset: float = 0.0  # the server does what was asked; then the connection is reset instead of the answer
    broken: float = 0.0  # reset in the middle of a body
    short: float = 0.0  # closed in the middle of a body
    stall: float = 0.0  # no byte for `stall_seconds` in the middle of a body, which then goes on
    stall_seconds: float = 30.0
    flip: float = 0.0  # one bit of the body, flipped on the way
    blackout: str = ""  # "refuse": connections are reset and new ones refused; "hang": nothing moves, until changed
    damaged: dict[str, int] = field(default_factory=dict)  # key pattern -> byte of the object of which one bit is wrong
    cut: dict[str, int] = field(default_factory=dict)  # key pattern -> bytes: GET and HEAD see an object of that size

    def __post_init__(self) -> None:
        shares = [getattr(self, kind) for kind in SHARES]
        if min(shares) < 0 or sum(shares) > 1 + 1e-9 or self.blackout not in ("", "refuse", "hang"):
            raise ValueError("shares are of 1, together too; blackout is '', 'refuse' or 'hang'")


@dataclass(frozen=True)
class Counts:
    """Since the proxy began.  (METHOD, "BUCKET/KEY") -> how often, and bytes of body sent to the client."""

    requests: dict[tuple[str, str], int]
    bytes: dict[tuple[str, str], int]
    faults: Counter[str]  # by name of their field in Faults
    connections: int
    cpu: float  # seconds, of the proxy


class Proxy:
    """Context manager around the process.

    Args:
        target: URL of the S3 server, on this machine.
        rate: bytes per second and connection; 0: as fast as it goes.
        delay: seconds from the request to the first byte of its answer, at least.
        keep: an object that was once read whole is answered from the proxy's memory from then on, so that the server,
            which in reality is another machine, takes no CPU from the client.
    """

    def __init__(self, target: str, *, rate: float = 0.0, delay: float = 0.0, keep: bool = False) -> None:
        at = urlsplit(target)
        if at.scheme != "http" or at.hostname not in ("127.0.0.1", "localhost") or not at.port:
            raise ValueError(f"{target!r} is not http://127.0.0.1:PORT: the proxy is for servers of this machine")
        self._lock = threading.Lock()
        self._words = [sys.executable, "-E", "-S", str(SERVER), str(at.port), str(rate), str(delay), str(keep)]

    def __enter__(self) -> Proxy:
        self._process = subprocess.Popen(self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{self._answer()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("\n")  # not only the end of its input: a fork of this process may hold that open

    @property
    def pid(self) -> int:
        return self._process.pid

    def faults(self, faults: Faults) -> None:
        """Behave like this from now on, whatever was before.  Its effect is there when the call returns."""
        self._ask(asdict(faults))

    def counts(self) -> Counts:
        """What a client has received is in it."""
        found = self._ask(None)
        rows = {(method, key): (requests, size) for method, key, requests, size in found["rows"]}
        return Counts(
            {name: requests for name, (requests, _) in rows.items()},
            {name: size for name, (_, size) in rows.items()},
            Counter(found["faults"]),
            found["connections"],
            found["cpu"],
        )

    def _ask(self, value: Any) -> Any:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())
