"""Ranges over HTTP, from a server that answers word for word what it is told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from calotype.data import get
from calotype.data.get import Getter, Refused

DATA = bytes(range(256)) * 40
PART = b"HTTP/1.1 206 Partial Content\r\n"


@contextmanager
def served(
    *answers: bytes | Callable[[bytes], list[bytes]], host: str = "127.0.0.1"
) -> Iterator[tuple[Getter, list[bytes]]]:
    """A getter from a server that gives these answers in turn, on as many connections as it takes; what it was asked.
    An answer that is a function of the request sends its parts one by one."""
    asked: list[bytes] = []
    left = list(answers)

    def serve(listener: socket.socket) -> None:
        while left:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(ConnectionError):
                while left and (request := connection.recv(65536)):
                    asked.append(request)
                    answer = left.pop(0)
                    for part in [answer] if isinstance(answer, bytes) else answer(request):
                        connection.sendall(part)
                        threading.Event().wait(0.02)
                    if isinstance(answer, bytes) and (b"close" in answer or b"Content-Length" not in answer):
                        break

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        port = listener.getsockname()[1]
        yield Getter(lambda key: f"http://{host}:{port}/{key}?signed=1"), asked


def said(data: bytes, *lines: bytes) -> bytes:
    return PART + b"".join(line + b"\r\n" for line in (b"Content-Length: %d" % len(data), *lines)) + b"\r\n" + data


def read(getter: Getter, start: int, size: int) -> bytes:
    buffer = memoryview(bytearray(size))
    return bytes(buffer[: getter.into("key", start, buffer, "the object")])


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get, "PAUSES", (0.001, 0.01))


def test_one_connection_serves_one_range_after_the_other() -> None:
    with served(said(DATA[:100]), said(DATA[100:200]), said(DATA[200:250])) as (getter, asked):
        assert [read(getter, 0, 100), read(getter, 100, 100), read(getter, 200, 100)] == [
            DATA[:100], DATA[100:200], DATA[200:250]
        ]  # fmt: skip
    assert b"Range: bytes=100-199\r\n" in asked[1]


@pytest.mark.parametrize("cut", [1, 20, 40, 60, 70])
def test_an_answer_may_come_in_parts_and_be_announced(cut: int) -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\n" + said(DATA[:500])
    with served(lambda _: [answer[:cut], answer[cut : cut + 30], answer[cut + 30 :]]) as (getter, _):
        assert read(getter, 0, 500) == DATA[:500]


@pytest.mark.parametrize("line", [b"Connection: close", b"connection: keep-alive, Close"])
def test_a_connection_that_is_closed_is_not_used_again(line: bytes) -> None:
    with served(said(DATA[:100], line), said(DATA[100:200])) as (getter, _):
        before = get.counts.retries
        assert read(getter, 0, 100) + read(getter, 100, 100) == DATA[:200]
        assert get.counts.retries == before


def test_what_comes_behind_a_range_is_no_answer_to_the_next() -> None:
    with served(said(DATA[:300]), said(DATA[100:200])) as (getter, _):
        assert read(getter, 0, 100) + read(getter, 100, 100) == DATA[:200]


def test_an_interrupted_read_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(said(DATA[:100]), said(DATA[100:200])) as (getter, _):
        with monkeypatch.context() as patch:
            patch.setattr(get, "_head", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                read(getter, 0, 100)
        assert read(getter, 100, 100) == DATA[100:200]


def test_a_body_that_ends_with_its_connection_is_asked_for_until_it_is_whole() -> None:
    with served(PART + b"\r\n" + DATA[:60], PART + b"\r\n" + DATA[60:100]) as (getter, asked):
        assert read(getter, 0, 100) == DATA[:100]
    assert b"Range: bytes=60-99\r\n" in asked[1]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (PART + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n", "in pieces"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10240\r\n\r\n" + DATA, "ignores ranges"),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 24\r\n\r\n<Code>InvalidURI</Code>\n\n", "400 InvalidURI"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_at_once(answer: bytes, why: str) -> None:
    with served(answer, said(DATA[7:17])) as (getter, _):
        with pytest.raises(Refused, match=why):
            read(getter, 7, 10)
        assert read(getter, 7, 10) == DATA[7:17]


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 206 x\r\nA: " + b"a" * 70_000])
def test_what_is_no_answer_is_asked_for_again(answer: bytes) -> None:
    with served(answer + b"\r\nclose", said(DATA[:10])) as (getter, _):
        assert read(getter, 0, 10) == DATA[:10]


@pytest.mark.parametrize("said_so", [b"403 Forbidden", b"400 Bad Request"])
def test_a_signature_that_is_too_old_is_made_again_and_not_kept(said_so: bytes) -> None:
    body = b"<Code>ExpiredToken</Code></Error>"
    no = b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (said_so, len(body), body)
    signed = iter("abcd")
    with served(no, said(DATA[:10]), no, no, no, said(DATA[:5])) as (getter, asked):
        sign = getter._sign
        getter._sign = lambda key: sign(key) + next(signed)
        assert read(getter, 0, 10) == DATA[:10]
        assert b"signed=1b" in asked[1]
        getter._urls.clear()
        with pytest.raises(Refused, match="ExpiredToken"):
            read(getter, 0, 5)
        assert not getter._urls


def test_a_service_for_credentials_may_have_a_bad_moment() -> None:
    with served(said(DATA[:10])) as (getter, _):
        sign, failures = getter._sign, iter([ConnectionError("IMDS timed out")])

        def signs(key: str) -> str:
            for failure in failures:
                raise failure
            return sign(key)

        getter._sign = signs
        assert read(getter, 0, 10) == DATA[:10]


def test_the_host_is_named_as_it_was_signed() -> None:
    with served(said(DATA[:10]), host="LocalHost") as (getter, asked):
        read(getter, 0, 10)
    assert b"\r\nHost: localhost:" in asked[0]
