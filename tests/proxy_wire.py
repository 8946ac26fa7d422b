"""HTTP/1.1 as the proxy speaks it: heads as they came, sockets with what was read of them too early, kept bodies."""

from __future__ import annotations

import os
import re
import socket
import struct
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import unquote

HEAD = 2**16  # bytes read at once while a head is looked for, and the longest head
LENGTH = re.compile(rb"(?i)(\r\ncontent-length: *)(\d+)")
CONTENT_RANGE = re.compile(rb"(?i)(\r\ncontent-range: *bytes )(\d+)-(\d+)/(\d+|\*)")
RANGE = re.compile(rb"(?i)\r\nrange: *bytes=(\d*)-(\d*)")
KEPT = re.compile(rb"(?i)\r\n(?:etag|last-modified|content-type):[^\r]*")


class Reset(Exception):
    """The client's connection is to end at once, with a reset."""


class Ended(Exception):
    """The peer, or a fault, ended the connection where more bytes should have come."""


@dataclass(frozen=True)
class Head:
    """Of a request or a response, as it came; `body` only of a response that the proxy made itself."""

    raw: bytes
    body: bytes | None = None

    @staticmethod
    def error(status: int, code: str, text: str, *more: str) -> Head:
        """S3's way to say no."""
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{text}</Message></Error>'
        lines = [f"HTTP/1.1 {status} {code}", "Content-Type: application/xml", f"Content-Length: {len(body)}", *more]
        return Head("".join(f"{line}\r\n" for line in [*lines, ""]).encode(), body.encode())

    @staticmethod
    def no_range(size: int) -> Head:
        """To a range behind the end of an object."""
        text = "The requested range is not satisfiable"
        return Head.error(416, "InvalidRange", text, f"Content-Range: bytes */{size}")

    def closing(self) -> Head:
        """The same, and it says that the connection ends: a client that is not told may ask once more on it."""
        if self.says("connection", "close"):
            return self
        return Head(self.raw.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), self.body)

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
    def plain(self) -> bool:
        """Whether a request is for an object as such: GET or HEAD, no query but a signature or what clients add."""
        path, _, query = self.first[1].partition("?")
        whole = not query or all(word.startswith(("X-Amz-", "x-id=GetObject")) for word in query.split("&"))
        return self.first[0] in ("GET", "HEAD") and path.count("/") > 1 and whole

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


@dataclass(frozen=True)
class Kept:
    """An object in memory: its bytes are pages of a file without a name, that `splice` can send."""

    file: BinaryIO
    size: int
    about: bytes  # header lines

    @staticmethod
    def read(response: Head, wire: Wire) -> Kept:
        """The body of a whole object's response, from its first byte."""
        left = response.length
        file = open(os.memfd_create("kept"), "wb")  # noqa: SIM115  closed when nobody holds it any more
        while left:
            left -= file.write(wire.some(left))
        file.flush()
        return Kept(file, response.length, b"".join(KEPT.findall(response.raw)))

    def head(self, request: Head) -> tuple[Head, int]:
        """The head of the answer, and the object's byte that its body begins with."""
        found = RANGE.search(request.raw)
        start, stop, first = 0, self.size, "200 OK"
        if found:
            start = int(found[1]) if found[1] else max(0, self.size - int(found[2]))
            stop = min(int(found[2]) + 1, self.size) if found[1] and found[2] else self.size
            if start >= stop:
                return Head.no_range(self.size), 0
            first = f"206 Partial Content\r\nContent-Range: bytes {start}-{stop - 1}/{self.size}"
        head = f"HTTP/1.1 {first}\r\nAccept-Ranges: bytes\r\nContent-Length: {stop - start}"
        return Head(head.encode() + self.about + b"\r\n\r\n"), start
