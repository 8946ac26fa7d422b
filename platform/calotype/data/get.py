"""Ranges of objects over HTTP, straight into the reader's memory, with patience.

What every failure is, and what is done about it:

    404                                          the object is missing: said at once
    other 4xx                                    refused: said at once, after the URL was signed once more
    429, 500, 502, 503 (SlowDown), 504           asked again after a pause
    refused, reset, closed early, short bodies   asked again from the byte where it broke off
    no byte for STALL seconds                    the same, on a new connection

Pauses double from 0.1 s to 10 s, each between half and all of that (so that readers that failed together do not return
together), until PATIENCE seconds have passed without a byte.
"""

from __future__ import annotations

import http.client
import logging
import random
import socket
import ssl
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from calotype.errors import CalotypeError, Unreachable

log = logging.getLogger(__name__)

STALL = 20.0  # seconds without a byte after which a connection has failed
CONNECT = 5.0  # seconds to connect
PATIENCE = 120.0  # seconds without a byte after which the object cannot be had
PAUSES = (0.1, 10.0)  # seconds: the first, and the longest
SIGNED = 1800.0  # seconds for which a signed URL is used
REMEMBERED = 4096  # signed URLs
AGAIN = (429, 500, 502, 503, 504)


class Gone(CalotypeError):
    """404."""


class Refused(CalotypeError):
    """A status that no patience mends; its code is the message."""


@dataclass
class Counts:
    """What reading has cost since the process began."""

    requests: int = 0
    bytes: int = 0
    retries: int = 0


counts = Counts()


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

    def into(self, key: str, start: int, buffer: memoryview, name: str) -> int:
        """Fill `buffer` from byte `start` on; how many bytes there were.

        Raises:
            Gone, Refused: at once.
            Unreachable: after PATIENCE seconds; names `name` and the last failure.
        """
        have, pause, signed_again = 0, PAUSES[0], False
        last = time.monotonic()  # when the last byte came
        while True:
            before = have
            try:
                have, more = self._once(key, start, buffer, have)
                counts.bytes += have - before
                if not more:
                    return have
                failure = "the body broke off"
            except Refused as error:
                if signed_again or not str(error).startswith("403"):  # the signature may have expired
                    raise
                signed_again = True
                self._forget(key)
                continue
            except _Broken as error:
                have = error.have
                counts.bytes += have - before
                failure = str(error)
            counts.retries += 1
            self.close()
            if counts.retries & (counts.retries - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: seen, and no flood
                log.warning("%s: %s; asks again (%d times so far, over all)", name, failure, counts.retries)
            if have > before:
                last, pause = time.monotonic(), PAUSES[0]
            if time.monotonic() - last > PATIENCE:
                raise Unreachable(f"{name} cannot be read: for {PATIENCE:.0f} s {failure}; check server and network")
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, PAUSES[1])

    def close(self) -> None:
        """Close this thread's connection."""
        if (old := getattr(self._mine, "connection", None)) is not None:
            old[1].close()
            self._mine.connection = None

    def _once(self, key: str, start: int, buffer: memoryview, have: int) -> tuple[int, bool]:
        """(bytes in the buffer, whether more should have come)."""
        counts.requests += 1
        before = have
        try:
            connection, target = self._connected(key)
            connection.request("GET", target, headers={"Range": f"bytes={start + have}-{start + len(buffer) - 1}"})
            response = connection.getresponse()
            if response.status not in (200, 206):
                return self._unhappy(response, have)
            if response.status == 200 and start + have:
                raise Refused("200: the server ignores ranges")
            promised = response.length if response.length is not None else len(buffer) - have
            until = have + min(promised, len(buffer) - have)
            while have < until:
                got = _received(connection, response, buffer[have:until], first=have == before)
                if not got:
                    return have, True
                have += got
            if response.fp is not None and promised == until - before:
                response.close()  # all of it was read: the connection serves the next request
            elif not response.isclosed():  # more came than was asked for
                self.close()
            return have, False
        except BlockingIOError as error:
            raise _Broken(have, f"no byte for {STALL:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(have, f"{type(error).__name__}: {error}".rstrip(": ")) from error

    def _unhappy(self, response: http.client.HTTPResponse, have: int) -> tuple[int, bool]:
        body = response.read(4096).decode(errors="replace")
        if not response.isclosed():
            self.close()
        if response.status == 416:  # begins at or behind the end
            return have, False
        code = body.partition("<Code>")[2].partition("</Code>")[0]
        said = f"{response.status} {code or response.reason}"
        if response.status == 404:
            raise Gone(said)
        if response.status in AGAIN:
            raise _Broken(have, said)
        raise Refused(said)

    def _connected(self, key: str) -> tuple[http.client.HTTPConnection, str]:
        parts = urlsplit(self._url(key))
        place = (parts.scheme, parts.netloc)
        old = getattr(self._mine, "connection", None)
        if old is None or old[0] != place:
            self.close()
            made = (
                http.client.HTTPSConnection(parts.netloc, timeout=CONNECT, context=self._context)
                if parts.scheme == "https"
                else http.client.HTTPConnection(parts.netloc, timeout=CONNECT)
            )
            made.connect()
            if parts.scheme == "https":
                made.sock.settimeout(STALL)
            else:  # the kernel's own limit, so that one call may wait for a whole chunk
                made.sock.settimeout(None)
                limit = struct.pack("ll", int(STALL), int(STALL % 1 * 1e6))
                made.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._mine.connection = old = (place, made)
        return old[1], f"{parts.path}?{parts.query}"

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


def _received(
    connection: http.client.HTTPConnection, response: http.client.HTTPResponse, buffer: memoryview, first: bool
) -> int:
    """Some of the body, in as few calls as can be: each gives up the interpreter's lock, and must win it again from
    threads that hold it for up to 5 ms.  0 at its end."""
    if connection.sock is None or hasattr(connection.sock, "cipher"):  # TLS comes in records of 16 KiB anyway
        return response.readinto(buffer)
    if first:  # what came with the head, and lies in the response's own buffer
        return response.readinto(buffer[: len(response.fp.peek())])
    return connection.sock.recv_into(buffer, len(buffer), socket.MSG_WAITALL)


class _Broken(Exception):
    """A failure that passes; `have` bytes had come."""

    def __init__(self, have: int, message: str) -> None:
        super().__init__(message)
        self.have = have
