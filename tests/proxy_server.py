"""The process behind `proxy.Proxy`: `python proxy_server.py PORT RATE DELAY`.

One thread per connection, which has a connection of its own to the server.  Heads are read, bodies are spliced through
a pipe: their bytes never enter this process.  The kernel paces (SO_MAX_PACING_RATE) better than a token bucket could.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from proxy import SHARES, Faults

ANSWERS = {"slow_down": (503, "SlowDown", "Please reduce your request rate."),
           "internal": (500, "InternalError", "We encountered an internal error. Please try again.")}  # fmt: skip
PIPE = 2**20  # bytes that wait between two splices, the most that Linux gives without privilege
HEAD = 2**16  # bytes read at once while a head is looked for, and the longest head
SNDBUF = 2**19  # bytes the kernel holds for a paced client: what is still delivered after a stall or black-out began
BACKLOG = 1024
SO_MAX_PACING_RATE = 47  # socket.h; Python has no name for it
LENGTH = re.compile(rb"(?i)(\r\ncontent-length: *)(\d+)")
RANGE = re.compile(rb"(?i)(\r\ncontent-range: *bytes )(\d+)-(\d+)/(\d+|\*)")


class Reset(Exception):
    """The client's connection is to end at once, with a reset."""


class Ended(Exception):
    """The peer, or a fault, ended the connection where more bytes should have come."""


@dataclass(frozen=True)
class Head:
    """Of a request or a response, as it came."""

    raw: bytes

    @property
    def first(self) -> list[str]:
        """The words of the first line."""
        return self.raw.split(b"\r\n", 1)[0].decode("latin-1").split(" ")

    @property
    def status(self) -> int:
        return int(self.first[1])

    @property
    def key(self) -> str:
        """BUCKET/KEY of a request."""
        return unquote(self.first[1].split("?")[0]).lstrip("/")

    @property
    def length(self) -> int:
        found = LENGTH.search(self.raw)
        return int(found[2]) if found else 0

    def says(self, name: str, value: str) -> bool:
        return re.search(rf"(?i)\r\n{name}: *{value}".encode(), self.raw) is not None


class Wire:
    """A socket, and what was read from it together with a head."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.rest = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def until(self, end: bytes) -> bytes:
        """Bytes up to and with `end`."""
        while end not in self.rest:
            found = self.sock.recv(HEAD)
            if not found or len(self.rest) > HEAD:
                raise Ended
            self.rest += found
        data, self.rest = self.rest[: self.rest.index(end) + len(end)], self.rest[self.rest.index(end) + len(end) :]
        return data

    def head(self) -> Head:
        return Head(self.until(b"\r\n\r\n"))

    def some(self, size: int) -> bytes:
        """At most `size` bytes, at least one."""
        data, self.rest = self.rest[:size], self.rest[size:]
        data = data or self.sock.recv(min(size, HEAD))
        if not data:
            raise Ended
        return data

    def chunked(self) -> bytes:
        """A body in Transfer-Encoding: chunked, as it comes, to the end of its trailers."""
        parts = []
        while True:
            parts.append(self.until(b"\r\n"))
            size = int(parts[-1].split(b";")[0], 16)
            if not size:
                break
            size += 2
            while size:
                parts.append(self.some(size))
                size -= len(parts[-1])
        while parts[-1] != b"\r\n":
            parts.append(self.until(b"\r\n"))
        return b"".join(parts)

    def reset(self) -> None:
        """Close with RST: Linux sends it where a socket that lingers for 0 s is closed."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Server:
    """What all connections share."""

    def __init__(self, port: int, rate: float, delay: float) -> None:
        self.target, self.rate, self.delay = ("127.0.0.1", port), int(rate), delay
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
        if server.rate:
            client.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, server.rate)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SNDBUF)
        self.server, self.client = server, Wire(client)
        self.upstream: Wire | None = None
        self.pipe = os.pipe()

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
        response = self.forward(request)
        if kind == "reset":
            self.server.strike(kind)
            raise Reset
        self.server.light()
        time.sleep(max(0.0, due - time.monotonic()))
        assert self.upstream is not None
        if response.says("transfer-encoding", "chunked"):  # listings: whole, so that all bodies are alike
            self.client.sock.sendall(response.raw + self.upstream.chunked())
        else:
            self.answer(request, response, kind, place)
        if request.says("connection", "close") or response.says("connection", "close"):
            return False
        return not (request.says("expect", "100-continue") and response.status >= 400)  # its body was perhaps not sent

    def refuse(self, request: Head, kind: str, due: float) -> bool:
        """Answer in the server's place.  A client that waits for leave to send its body does not get it."""
        if not request.says("expect", "100-continue"):
            self.upload(request, None)
        self.server.strike(kind)
        status, code, text = ANSWERS[kind]
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{text}</Message></Error>'
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        time.sleep(max(0.0, due - time.monotonic()))
        last = request.says("expect", "100-continue")
        sent = "" if request.first[0] == "HEAD" else body
        self.client.sock.sendall(f"{head}{'Connection: close' + chr(13) + chr(10) if last else ''}\r\n{sent}".encode())
        return not last

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
            found = RANGE.search(head.raw)
            start = int(found[2]) if found else 0
            if head.status < 300 and method == "GET" and start <= wrong < start + length and re.search(pattern, key):
                kind, at = "damaged", wrong - start
        self.client.sock.sendall(head.raw)
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
        found = RANGE.search(response.raw)
        for pattern, size in self.server.faults.cut.items():
            if response.status not in (200, 206) or not re.search(pattern, key):
                continue
            start, stop = (int(found[2]), int(found[3]) + 1) if found else (0, response.length)
            if stop <= size and not found:
                continue
            if start >= size and found:
                said = f"HTTP/1.1 416 InvalidRange\r\nContent-Range: bytes */{size}\r\nContent-Length: 0\r\n\r\n"
                return Head(said.encode()), False
            stop = min(stop, size)
            raw = RANGE.sub(rb"\g<1>%d-%d/%d" % (start, stop - 1, size), response.raw)
            head = Head(LENGTH.sub(rb"\g<1>%d" % (stop - start), raw))
            return head, head.length == response.length
        return response, True

    def spoil(self, kind: str, method: str, key: str) -> None:
        """Do what `kind` does between two bytes of a body."""
        assert self.upstream is not None
        if kind == "broken":
            raise Reset
        if kind == "short":
            raise Ended
        if kind == "stall":
            time.sleep(self.server.faults.stall_seconds)
        else:
            with self.server.lock:
                self.server.sizes[method, key] += 1
            self.client.sock.sendall(bytes([self.upstream.some(1)[0] ^ 1]))

    def move(self, method: str, key: str, length: int) -> None:
        """`length` bytes from the server to the client; counted before they are sent, so that counts are never late."""
        assert self.upstream is not None
        while length:
            if self.upstream.rest:
                data = self.upstream.some(length)
                size = len(data)
            else:
                data, size = b"", os.splice(self.upstream.sock.fileno(), self.pipe[1], min(length, PIPE))
                if not size:
                    raise Ended
            with self.server.lock:
                self.server.sizes[method, key] += size
            length -= size
            self.server.light()
            if data:
                self.client.sock.sendall(data)
                continue
            while size:
                size -= os.splice(self.pipe[0], self.client.sock.fileno(), size)


def main(port: str, rate: str, delay: str) -> None:
    """Obey the lines of standard input; the port is the first line of the output."""
    threading.stack_size(2**18)
    server = Server(int(port), float(rate), float(delay))
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
