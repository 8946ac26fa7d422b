"""The process behind `proxy.Proxy`: `python proxy_server.py PORT RATE DELAY KEEP`.

One thread per connection, which has a connection of its own to the server.  Heads are read, bodies are spliced through
a pipe: their bytes never enter this process.  A paced connection sends bursts and sleeps; leaving that to the kernel
(SO_MAX_PACING_RATE) was tried: it wakes the client for every 64 KB, which doubled the client's CPU.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from proxy import SHARES, Faults
from proxy_wire import CONTENT_RANGE, LENGTH, Ended, Head, Kept, Reset, Wire

ANSWERS = {"slow_down": (503, "SlowDown", "Please reduce your request rate."),
           "internal": (500, "InternalError", "We encountered an internal error. Please try again.")}  # fmt: skip
PIPE = 2**20  # bytes that wait between two splices, the most that Linux gives without privilege
BURST = 0.006  # seconds' worth of bytes that a paced connection sends at once
CREDIT = 0.020  # seconds by which a paced connection that was held up may be early afterwards
BACKLOG = 1024


class Server:
    """What all connections share."""

    def __init__(self, port: int, rate: float, delay: float, keep: bool) -> None:
        self.target, self.rate, self.delay, self.keep = ("127.0.0.1", port), rate, delay, keep
        self.burst = min(PIPE, max(4096, int(rate * BURST))) if rate else PIPE
        self.kept: dict[str, Kept] = {}
        with socket.create_server(("127.0.0.1", 0)) as any_port:
            port = any_port.getsockname()[1]
        self.listener = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)  # by number: then it is kept
        self.lock = threading.Lock()
        self.changed = threading.Condition()
        self.open: set[Connection] = set()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.sizes: Counter[tuple[str, str]] = Counter()
        self.struck: Counter[str] = Counter()
        self.connections = 0
        self.faults, self.random = Faults(), random.Random(0)

    def set(self, faults: Faults) -> None:
        refused, refuse = self.faults.blackout == "refuse", faults.blackout == "refuse"
        with self.changed:
            self.faults, self.random = faults, random.Random(faults.seed)
            if refused and not refuse:
                self.listener.listen(BACKLOG)  # again: the port stayed bound
            self.changed.notify_all()
        if refuse and not refused:
            self.listener.shutdown(socket.SHUT_RDWR)  # stops listening, wakes `accept`
            with self.lock:
                for connection in self.open:
                    connection.wake()

    def draw(self, key: str) -> tuple[str, float]:
        """The fault of a request, and where in its body."""
        with self.lock:
            left, place = self.random.random(), self.random.random()
        if re.search(self.faults.only, key):
            for kind in SHARES:
                left -= getattr(self.faults, kind)
                if left < 0:
                    return kind, place
        return "", place

    def strike(self, kind: str) -> None:
        with self.lock:
            self.struck[kind] += 1

    def light(self) -> None:
        """Return when there is no black-out.

        Raises:
            Reset: there is one that refuses connections.
        """
        if self.faults.blackout:
            self.strike("blackout")
            with self.changed:
                self.changed.wait_for(lambda: self.faults.blackout != "hang")
            if self.faults.blackout:
                raise Reset

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                with self.changed:
                    self.changed.wait_for(lambda: self.faults.blackout != "refuse")
                continue
            connection = Connection(self, client)
            with self.lock:
                self.connections += 1
                self.open.add(connection)
            threading.Thread(target=connection.run, daemon=True).start()

    def state(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        with self.lock:
            rows = [[*name, count, self.sizes[name]] for name, count in self.requests.items()]
            faults, connections = dict(self.struck), self.connections
        return {"rows": rows, "faults": faults, "connections": connections, "cpu": used.ru_utime + used.ru_stime}


class Connection:
    """One client's, in a thread of its own, with a connection of its own to the server."""

    def __init__(self, server: Server, client: socket.socket) -> None:
        self.server, self.client = server, Wire(client)
        self.upstream: Wire | None = None
        self.kept: Kept | None = None  # whose body is sent, from byte `offset` on; else it comes from upstream
        self.offset = 0
        self.free = 0.0  # when the rate allows the next byte
        self.pipe = os.pipe()
        fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, PIPE)

    def run(self) -> None:
        try:
            while self.exchange(self.client.head()):
                pass
            self.client.sock.close()
        except Ended:
            if self.server.faults.blackout == "refuse":  # it was woken
                self.client.reset()
            self.client.sock.close()
        except (Reset, OSError):  # of the server's sockets too: a server that went is a connection lost
            self.client.reset()
        finally:
            with self.server.lock:
                self.server.open.discard(self)
            self.leave()
            for end in self.pipe:
                os.close(end)

    def wake(self) -> None:
        """Let a blocked read return; called by another thread."""
        for wire in (self.client, self.upstream):
            if wire is not None and wire.sock.fileno() >= 0:
                with suppress(OSError):  # it has just ended
                    wire.sock.shutdown(socket.SHUT_RD)

    def leave(self) -> None:
        if self.upstream is not None:
            self.upstream.sock.close()
            self.upstream = None

    def exchange(self, request: Head) -> bool:
        """One request and its answer; whether the connection goes on."""
        method, key = request.first[0], request.key
        due = time.monotonic() + self.server.delay
        with self.server.lock:
            self.server.requests[method, key] += 1
        self.server.light()
        kind, place = self.server.draw(key)
        if kind in ANSWERS:
            return self.refuse(request, kind, due)
        response = self.respond(request)
        if kind == "reset":
            self.server.strike(kind)
            raise Reset
        self.server.light()
        if request.says("expect", "100-continue") and response.status >= 400:  # its body was perhaps not sent
            response = response.closing()
        time.sleep(max(0.0, due - time.monotonic()))
        self.free = time.monotonic()
        if response.says("transfer-encoding", "chunked"):  # listings: whole, so that all bodies are alike
            assert self.upstream is not None
            self.client.sock.sendall(response.raw + self.upstream.chunked())
        else:
            self.answer(request, response, kind, place)
        return not (request.says("connection", "close") or response.says("connection", "close"))

    def refuse(self, request: Head, kind: str, due: float) -> bool:
        """Answer in the server's place.  A client that waits for leave to send its body does not get it."""
        if not request.says("expect", "100-continue"):
            self.upload(request, None)
        self.server.strike(kind)
        last = request.says("expect", "100-continue")
        head = Head.error(*ANSWERS[kind], *(["Connection: close"] if last else []))
        time.sleep(max(0.0, due - time.monotonic()))
        self.client.sock.sendall(head.raw + (b"" if request.first[0] == "HEAD" else head.body or b""))
        return not last

    def respond(self, request: Head) -> Head:
        """The head of the answer; what is kept is answered here."""
        self.kept = self.server.kept.get(request.key) if request.plain else None
        if self.kept is None:
            response = self.forward(request)
            if not self.server.keep or not request.plain:
                self.server.kept.pop(request.key, None)  # it was perhaps replaced
                return response
            if request.first[0] == "HEAD" or response.status != 200:
                return response
            assert self.upstream is not None
            self.kept = self.server.kept[request.key] = Kept.read(response, self.upstream)
        response, self.offset = self.kept.head(request)
        return response

    def forward(self, request: Head) -> Head:
        """The server's answer, up to its body.  A server may close a connection that was idle: then again, anew."""
        for fresh in (self.upstream is None, True):
            if self.upstream is None:
                self.upstream = Wire(socket.create_connection(self.server.target))
            try:
                self.upstream.sock.sendall(request.raw)
                if not request.says("expect", "100-continue"):
                    self.upload(request, self.upstream)
                response = self.upstream.head()
                while response.status == 100:
                    self.client.sock.sendall(response.raw)
                    self.upload(request, self.upstream)
                    response = self.upstream.head()
                return response
            except (Ended, OSError):
                self.leave()
                if fresh or request.length:
                    raise
        raise AssertionError("unreachable: the second attempt returns or raises")

    def upload(self, request: Head, to: Wire | None) -> None:
        """Pass a request's body on, or drop it."""
        if request.says("transfer-encoding", "chunked"):
            data = self.client.chunked()
            if to is not None:
                to.sock.sendall(data)
        left = request.length
        while left:
            data = self.client.some(left)
            left -= len(data)
            if to is not None:
                to.sock.sendall(data)

    def answer(self, request: Head, response: Head, kind: str, place: float) -> None:
        """Head and body, with at most one fault in the body."""
        method, key = request.first[0], request.key
        head, whole = self.shortened(response, key) if method in ("GET", "HEAD") else (response, True)
        length = 0 if method == "HEAD" or head.status in (204, 304) else head.length
        at = int(place * length)
        for pattern, wrong in self.server.faults.damaged.items():
            found = CONTENT_RANGE.search(head.raw)
            start = int(found[2]) if found else 0
            if head.status < 300 and method == "GET" and start <= wrong < start + length and re.search(pattern, key):
                kind, at = "damaged", wrong - start
        if head.body is not None:
            length = 0
        self.client.sock.sendall(head.raw + (head.body or b"" if method == "GET" else b""))
        if length and kind:
            self.server.strike(kind)
            self.move(method, key, at)
            self.spoil(kind, method, key)
            length -= at + (kind in ("flip", "damaged"))
        self.move(method, key, length)
        if not whole:
            self.server.strike("cut")
            self.leave()  # more of the body would come

    def shortened(self, response: Head, key: str) -> tuple[Head, bool]:
        """The head as if the object ended where a `cut` says, and whether all of the server's body belongs to it."""
        found = CONTENT_RANGE.search(response.raw)
        for pattern, size in self.server.faults.cut.items():
            if response.status not in (200, 206) or not re.search(pattern, key):
                continue
            start, stop = (int(found[2]), int(found[3]) + 1) if found else (0, response.length)
            if stop <= size and not found:
                continue
            if start >= size and found:
                return Head.no_range(size), False
            stop = min(stop, size)
            raw = CONTENT_RANGE.sub(rb"\g<1>%d-%d/%d" % (start, stop - 1, size), response.raw)
            head = Head(LENGTH.sub(rb"\g<1>%d" % (stop - start), raw))
            return head, head.length == response.length
        return response, True

    def spoil(self, kind: str, method: str, key: str) -> None:
        """Do what `kind` does between two bytes of a body."""
        if kind == "broken":
            raise Reset
        if kind == "short":
            raise Ended
        if kind == "stall":
            time.sleep(self.server.faults.stall_seconds)
        else:
            self.load(method, key, 1)
            self.client.sock.sendall(bytes([os.read(self.pipe[0], 1)[0] ^ 1]))

    def move(self, method: str, key: str, length: int) -> None:
        """`length` bytes of the body to the client, at the server's rate."""
        while length:
            size = self.load(method, key, length)
            length -= size
            while size:
                size -= os.splice(self.pipe[0], self.client.sock.fileno(), size)
            if self.server.rate and self.free > (now := time.monotonic()):
                time.sleep(self.free - now)

    def load(self, method: str, key: str, length: int) -> int:
        """Some of the next `length` bytes into the pipe.  They count before they are sent: counts are never late."""
        length = min(length, self.server.burst)
        if self.kept is not None:
            size = os.splice(self.kept.file.fileno(), self.pipe[1], length, offset_src=self.offset)
            self.offset += size
        else:
            assert self.upstream is not None
            if self.upstream.rest:
                size = os.write(self.pipe[1], self.upstream.some(length))
            else:
                size = os.splice(self.upstream.sock.fileno(), self.pipe[1], length)
        if not size:
            raise Ended
        with self.server.lock:
            self.server.sizes[method, key] += size
        if self.server.rate:
            self.free = max(self.free, time.monotonic() - CREDIT) + size / self.server.rate
        self.server.light()
        return size


def main(port: str, rate: str, delay: str, keep: str) -> None:
    """Obey the lines of standard input; the port is the first line of the output."""
    threading.stack_size(2**18)
    server = Server(int(port), float(rate), float(delay), keep == "True")
    threading.Thread(target=server.serve, daemon=True).start()
    print(server.listener.getsockname()[1], flush=True)
    while line := sys.stdin.readline().strip():
        asked = json.loads(line)
        if asked is not None:
            server.set(Faults(**asked))
        print(json.dumps(None if asked is not None else server.state()), flush=True)
    os._exit(0)  # threads that wait for a socket need not be asked


if __name__ == "__main__":
    main(*sys.argv[1:])
