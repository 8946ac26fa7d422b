"""Ranges of objects over HTTP, straight into the reader's memory, with patience.

What every failure is, and what is done about it:

    404                                          the object is missing: said at once
    403, 400 ExpiredToken and the like           asked again with a new signature, then refused
    other 4xx, answers in pieces                 refused: said at once
    429, 500, 502, 503 (SlowDown), 504           asked again after a pause
    refused, reset, closed early, short bodies   asked again from the byte where it broke off
    no byte for STALL seconds                    the same, on a new connection

Pauses double from 0.1 s to 10 s, each between half and all of that (so that readers that failed together do not return
together), until PATIENCE seconds have passed without a byte.
"""

from __future__ import annotations

import logging
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from calotype.errors import CalotypeError, Unreachable

log = logging.getLogger(__name__)

STALL = 20.0  # seconds without a byte after which a connection has failed
CONNECT = 5.0  # seconds to connect
PATIENCE = 120.0  # seconds without a byte after which the object cannot be had
PAUSES = (0.1, 10.0)  # seconds: the first, and the longest
SIGNED = 600.0  # seconds for which a signed URL is used: less than what is left of credentials when they are renewed
EXPIRED = ("403", "400 ExpiredToken", "400 InvalidToken", "400 TokenRefreshRequired")  # answers to a signature too old
REMEMBERED = 4096  # signed URLs
EXPLAINED = 4096  # bytes read of an answer that is no data
MAX_HEAD = 2**16  # bytes
AGAIN = (429, 500, 502, 503, 504)


class Gone(CalotypeError):
    """404."""


class Refused(CalotypeError):
    """A status that no patience mends; its code is the message."""


@dataclass
class Counts:
    """What all reading of this process has met since it began."""

    retries: int = 0


counts = Counts()
_counting = threading.Lock()


def counted(retries: int) -> None:
    """So many requests were made again."""
    with _counting:
        counts.retries += retries


_Place = tuple[str, str]  # scheme, host with its port


class Getter:
    """Ranges of keys, by signed URLs; one connection per thread and server."""

    def __init__(self, sign: Callable[[str], str], context: ssl.SSLContext | None = None) -> None:
        """
        Args:
            sign: key -> a URL that may be read for more than SIGNED seconds, with any range.
            context: for https.
        """
        self._sign, self._context = sign, context
        self._urls: OrderedDict[str, tuple[float, str]] = OrderedDict()
        self._lock = threading.Lock()
        self._mine = threading.local()

    def into(self, key: str, start: int, buffer: memoryview, name: str, stop: threading.Event | None = None) -> int:
        """Fill `buffer` from byte `start` on; how many bytes there were.

        Raises:
            Gone, Refused: at once.
            Unreachable: after PATIENCE seconds, or when `stop` is set; names `name` and the last failure.
        """
        stop = stop or threading.Event()
        have, pause, signed_again = 0, PAUSES[0], False
        last = time.monotonic()  # when the last byte came
        while True:
            before = have
            try:
                have, more = self._once(key, start, buffer, have)
                if not more:
                    return have
                failure = "the body broke off"
            except Refused as error:
                self._forget(key)
                if signed_again or not str(error).startswith(EXPIRED):
                    raise
                signed_again = True
                continue
            except _Broken as error:
                have = error.have
                failure = str(error)
            counted(1)
            self.close()
            if counts.retries & (counts.retries - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: seen, and no flood
                log.warning("%s: %s; asks again (%d times so far, over all)", name, failure, counts.retries)
            if have > before:
                last, pause = time.monotonic(), PAUSES[0]
            if time.monotonic() - last > PATIENCE:
                raise Unreachable(f"{name} cannot be read: for {PATIENCE:.0f} s {failure}; check server and network")
            if stop.wait(pause * random.uniform(0.5, 1.0)):
                raise Unreachable(f"{name} was not read to its end: {failure}, and reading was stopped")
            pause = min(2 * pause, PAUSES[1])

    def close(self) -> None:
        """Close this thread's connection."""
        if (old := self._taken()) is not None:
            old[1].close()

    def _once(self, key: str, start: int, buffer: memoryview, have: int) -> tuple[int, bool]:
        """(bytes in the buffer, whether more should have come)."""
        sock = None
        try:
            place, sock, target = self._connected(key)
            span = f"bytes={start + have}-{start + len(buffer) - 1}"
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {place[1]}\r\nRange: {span}\r\n\r\n".encode())
            head, early = _head(sock)
            if head.status not in (200, 206):
                return self._unhappy(sock, head, early, have)
            if head.status == 200 and start + have:
                raise Refused("200: the server ignores ranges")
            if head.pieces:
                raise Refused(f"{head.status}: the server sends ranges in pieces (Transfer-Encoding)")
            room = len(buffer) - have
            until = have + (room if head.length is None else min(head.length, room))
            whole = head.length == until - have and len(early) <= until - have  # nothing of it stays on the connection
            early = early[: until - have]
            buffer[have : have + len(early)] = early
            have += len(early)
            while have < until:
                # In one call where that can be: each gives up the interpreter's lock, and must win it again from
                # threads that hold it for some milliseconds.  TLS comes in records of 16 KiB anyway.
                got = sock.recv_into(buffer[have:until], 0, 0 if self._context else socket.MSG_WAITALL)
                if not got:
                    return have, True
                have += got
            if whole and not head.closes:
                self._mine.connection, sock = (place, sock), None
            return have, False
        except BlockingIOError as error:
            raise _Broken(have, f"no byte for {STALL:g} s") from error
        except OSError as error:
            raise _Broken(have, f"{type(error).__name__}: {error}".rstrip(": ")) from error
        except _Garbled as error:
            raise _Broken(have, str(error)) from error
        finally:
            if sock is not None:  # whatever happened, the next answer on it might be this one
                sock.close()

    def _unhappy(self, sock: socket.socket, head: _Head, early: bytes, have: int) -> tuple[int, bool]:
        """An answer that is no data."""
        body = bytearray(early)
        most = EXPLAINED if head.length is None else min(head.length, EXPLAINED)
        with suppress(OSError):  # what it says is not worth a failure of its own
            while len(body) < most and b"</Error>" not in body and (more := sock.recv(EXPLAINED)):
                body += more
        if head.status == 416:  # begins at or behind the end
            return have, False
        code = body.decode(errors="replace").partition("<Code>")[2].partition("</Code>")[0]
        said = f"{head.status} {code or head.reason}"
        if head.status == 404:
            raise Gone(said)
        if head.status in AGAIN:
            raise _Broken(have, said)
        raise Refused(said)

    def _connected(self, key: str) -> tuple[_Place, socket.socket, str]:
        """A connection to the key's server that no answer is under way on, and the key's target there."""
        parts = urlsplit(self._url(key))
        secure = parts.scheme == "https"
        usual = 443 if secure else 80
        host = parts.netloc.lower().removesuffix(f":{usual}")  # as it was signed
        place, target = (parts.scheme, host), f"{parts.path}?{parts.query}"
        old = self._taken()
        if old is not None:
            if old[0] == place:
                return place, old[1], target
            old[1].close()
        made = socket.create_connection((parts.hostname, parts.port or usual), CONNECT)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secure:
                assert self._context is not None
                made = self._context.wrap_socket(made, server_hostname=parts.hostname)
                made.settimeout(STALL)
            else:  # the kernel's own limit, so that one call may wait for a whole chunk
                made.settimeout(None)
                limit = struct.pack("ll", int(STALL), int(STALL % 1 * 1e6))
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        except BaseException:
            made.close()
            raise
        return place, made, target

    def _taken(self) -> tuple[_Place, socket.socket] | None:
        """This thread's connection, which is nobody's until an answer was read to its end."""
        old: tuple[_Place, socket.socket] | None = getattr(self._mine, "connection", None)
        self._mine.connection = None
        return old

    def _url(self, key: str) -> str:
        now = time.monotonic()
        with self._lock:
            found = self._urls.get(key)
            if found is None or now - found[0] > SIGNED:
                found = self._urls[key] = (now, self._sign(key))
                while len(self._urls) > REMEMBERED:
                    self._urls.popitem(last=False)
            return found[1]

    def _forget(self, key: str) -> None:
        with self._lock:
            self._urls.pop(key, None)


class _Head(NamedTuple):
    """Of an answer: what a reader of ranges needs to know of it."""

    status: int
    reason: str
    length: int | None  # of its body; None: it ends with the connection
    pieces: bool  # Transfer-Encoding
    closes: bool


def _head(sock: socket.socket) -> tuple[_Head, bytes]:
    """The head of the next answer, and what came with it of the body.  http.client's takes as long as a chunk takes to
    be copied, and holds the interpreter's lock meanwhile.

    Raises:
        _Garbled: it is none.
    """
    data = b""
    while True:
        head, end, rest = data.partition(b"\r\n\r\n")
        if end:
            first = _FIRST.match(head)
            if first is None:
                raise _Garbled(f"the answer is not HTTP: {data[:40]!r}")
            if first[2].startswith(b"1"):  # 100 Continue: the answer follows
                data = rest
                continue
            length, pieces = _LENGTH.search(head), _PIECES.search(head) is not None
            closes = first[1] == b"1.0" or _CLOSES.search(head) is not None
            reason = first[3].decode("latin-1").strip()
            return _Head(int(first[2]), reason, int(length[1]) if length else None, pieces, closes), rest
        more = sock.recv(EXPLAINED)
        if not more or len(data) > MAX_HEAD:
            raise _Garbled("it closed the connection" if not more else "the head of the answer does not end")
        data += more


_FIRST = re.compile(rb"HTTP/(1\.[01]) (\d{3})([^\r\n]*)")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*(?=\r\n|$)")
_PIECES = re.compile(rb"(?i)\r\ntransfer-encoding:")
_CLOSES = re.compile(rb"(?i)\r\nconnection:[^\r\n]*\bclose\b")


class _Garbled(Exception):
    """What came is no answer."""


class _Broken(Exception):
    """A failure that passes; `have` bytes had come."""

    def __init__(self, have: int, message: str) -> None:
        super().__init__(message)
        self.have = have
