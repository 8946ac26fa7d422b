"""The proxy against the real S3: it passes everything on, keeps its pace, and each fault is what it says."""

from __future__ import annotations

import functools
import http.client
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError, ResponseStreamingError

from tests.proxy import Faults, Proxy

MIB = 2**20
DATA = random.Random(0).randbytes(3 * MIB)


@functools.cache
def session() -> Any:
    """Made when the stack is up; what it has read of S3's description makes later clients cheap."""
    return boto3.session.Session()


def client(url: str, read_timeout: float = 20, **account: str) -> Any:
    """Without retries (one call, one request) and checksums (what comes is what is seen)."""
    config = Config(
        retries={"mode": "legacy", "total_max_attempts": 1},
        s3={"addressing_style": "path"},
        read_timeout=read_timeout,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session().client("s3", endpoint_url=url, config=config, **account)


@pytest.fixture(scope="module")
def one(stack: Any) -> str:
    """One bucket for all of this file: each takes several of SeaweedFS's volumes."""
    name = f"test-{secrets.token_hex(6)}"
    client(os.environ["AWS_ENDPOINT_URL_S3"]).create_bucket(Bucket=name)
    return name


@pytest.fixture
def name(one: str) -> str:
    """A bucket with nothing but DATA, under the key `a b/data`: one that has to be quoted in a URL."""
    s3 = client(os.environ["AWS_ENDPOINT_URL_S3"])
    for item in s3.list_objects_v2(Bucket=one).get("Contents", ()):
        s3.delete_object(Bucket=one, Key=item["Key"])
    s3.put_object(Bucket=one, Key="a b/data", Body=DATA)
    return one


@pytest.fixture
def proxy(name: str) -> Iterator[Proxy]:
    with Proxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        yield proxy


def get(s3: Any, bucket: str, key: str = "a b/data", span: str = "") -> bytes:
    return bytes(s3.get_object(Bucket=bucket, Key=key, **({"Range": f"bytes={span}"} if span else {}))["Body"].read())


def ends(s3: Any, bucket: str) -> str:
    """How a GET ends: `whole`, `damaged`, S3's error code or the exception's name."""
    try:
        return "whole" if get(s3, bucket) == DATA else "damaged"
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    except Exception as error:
        return type(error).__name__


def test_passes_everything_through_and_counts_it(name: str, proxy: Proxy) -> None:
    s3 = client(proxy.url)
    assert get(s3, name) == DATA
    assert (get(s3, name, span="5-9"), get(s3, name, span="-3")) == (DATA[5:10], DATA[-3:])
    assert s3.head_object(Bucket=name, Key="a b/data")["ContentLength"] == len(DATA)
    s3.put_object(Bucket=name, Key="new", Body=DATA, IfNoneMatch="*")  # botocore waits for `100 Continue`
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.put_object(Bucket=name, Key="new", Body=DATA, IfNoneMatch="*")
    with pytest.raises(ClientError, match="NoSuchKey"):
        get(s3, name, "none")
    assert get(s3, name, "new") == DATA
    assert [item["Key"] for item in s3.list_objects_v2(Bucket=name)["Contents"]] == ["a b/data", "new"]
    s3.upload_fileobj(open(__file__, "rb"), name, "file")  # noqa: SIM115  in chunks or not, as boto3 likes
    assert get(s3, name, "file") == Path(__file__).read_bytes()

    counts = proxy.counts()
    assert counts.requests["GET", f"{name}/a b/data"] == 3
    assert counts.bytes["GET", f"{name}/a b/data"] == len(DATA) + 5 + 3
    assert (counts.requests["HEAD", f"{name}/a b/data"], counts.bytes["HEAD", f"{name}/a b/data"]) == (1, 0)
    assert (counts.requests["PUT", f"{name}/new"], counts.bytes["GET", f"{name}/new"]) == (2, len(DATA))
    assert not counts.faults


def test_connections_are_parallel_and_kept(name: str, proxy: Proxy) -> None:
    s3 = client(proxy.url)
    with ThreadPoolExecutor(8) as pool:
        assert all(data == DATA for data in pool.map(lambda _: get(s3, name), range(24)))
    counts = proxy.counts()
    assert counts.requests["GET", f"{name}/a b/data"] == 24
    assert counts.connections <= 10  # botocore's own pool


def test_wrong_keys_are_still_refused(name: str, proxy: Proxy) -> None:
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        get(client(proxy.url, aws_access_key_id=os.environ["AWS_ACCESS_KEY_ID"], aws_secret_access_key="wrong"), name)


def test_answers_from_memory_are_those_of_the_server(name: str) -> None:
    url = os.environ["AWS_ENDPOINT_URL_S3"]
    with Proxy(url, keep=True) as proxy:
        plain, kept = client(url), client(proxy.url)
        assert get(kept, name) == DATA
        plain.put_object(Bucket=name, Key="a b/data", Body=b"other")  # the proxy cannot know
        assert get(kept, name) == DATA
        for span in ("0-0", f"{MIB}-", "-7", f"{len(DATA) - 1}-{10 * MIB}"):
            start, stop = re.fullmatch(r"(\d*)-(\d*)", span).groups()  # type: ignore[union-attr]
            place = slice(int(start), int(stop or len(DATA)) + 1) if start else slice(-int(stop), None)
            assert get(kept, name, span=span) == DATA[place]
        with pytest.raises(ClientError, match="InvalidRange"):
            get(kept, name, span=f"{len(DATA)}-")
        head = kept.head_object(Bucket=name, Key="a b/data")
        assert head["ContentLength"] == len(DATA)
        assert head["ETag"] != plain.head_object(Bucket=name, Key="a b/data")["ETag"]
        kept.put_object(Bucket=name, Key="a b/data", Body=b"new")  # now it does
        assert get(kept, name) == b"new"


def test_rate_and_delay_are_kept(name: str) -> None:
    for keep in (False, True):
        with Proxy(os.environ["AWS_ENDPOINT_URL_S3"], rate=4 * MIB, delay=0.2, keep=keep) as proxy:
            s3 = client(proxy.url)
            began = time.monotonic()
            body = s3.get_object(Bucket=name, Key="a b/data")["Body"]
            first = time.monotonic() - began
            assert body.read() == DATA
            whole = time.monotonic() - began
            assert first >= 0.2  # never faster; slower is the machine's affair
            assert whole >= 0.2 + 3 / 4 - 0.1


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("slow_down", "SlowDown"),
        ("internal", "InternalError"),
        ("reset", "ConnectionClosedError"),
        ("broken", "ResponseStreamingError"),
        ("short", "ResponseStreamingError"),
        ("flip", "damaged"),
    ],
)
def test_a_share_of_requests_fails(name: str, proxy: Proxy, kind: str, end: str) -> None:
    s3 = client(proxy.url)
    found = []
    for _ in range(2):
        proxy.faults(Faults(seed=5, **{kind: 0.5}))
        found.append([ends(s3, name) for _ in range(16)])
        proxy.faults(Faults(seed=5, only="another", **{kind: 1.0}))
        assert ends(s3, name) == "whole"
    assert found[0] == found[1]  # one seed, one client: the same requests fail
    assert set(found[0]) == {"whole", end}
    counts = proxy.counts()
    assert counts.faults == {kind: 2 * found[0].count(end)}
    proxy.faults(Faults())
    assert ends(s3, name) == "whole"


def test_faults_lie_where_they_should(name: str, proxy: Proxy) -> None:
    """Short and broken bodies begin well and promise all; a flipped bit is one; a damaged byte stays where it is."""
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
    url = client(proxy.url).generate_presigned_url("get_object", Params={"Bucket": name, "Key": "a b/data"})

    def ask() -> http.client.HTTPResponse:
        connection.request("GET", url.removeprefix(proxy.url))
        return connection.getresponse()

    proxy.faults(Faults(short=1.0))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask().read()
    assert DATA.startswith(caught.value.partial)
    assert len(caught.value.partial) + (caught.value.expected or 0) == len(DATA)
    connection.close()
    proxy.faults(Faults(broken=1.0))
    with pytest.raises(ConnectionResetError):
        ask().read()
    connection.close()
    proxy.faults(Faults(flip=1.0))
    sent = ask().read()
    assert sum((a ^ b).bit_count() for a, b in zip(sent, DATA)) == 1

    proxy.faults(Faults(damaged={r"/data$": MIB}))
    s3 = client(proxy.url)
    wrong = bytes([DATA[MIB] ^ 1])
    assert get(s3, name) == DATA[:MIB] + wrong + DATA[MIB + 1 :]
    assert get(s3, name, span=f"{MIB - 1}-{MIB + 1}") == DATA[MIB - 1 : MIB] + wrong + DATA[MIB + 1 : MIB + 2]
    assert get(s3, name, span=f"{MIB + 1}-") == DATA[MIB + 1 :]
    assert proxy.counts().faults == {"short": 1, "broken": 1, "flip": 1, "damaged": 2}


def test_an_object_seems_to_end_early(name: str, proxy: Proxy) -> None:
    s3 = client(proxy.url)
    for size in (0, 1, 512, len(DATA) - 1):
        proxy.faults(Faults(cut={"data": size}))
        assert get(s3, name) == DATA[:size]
        assert s3.head_object(Bucket=name, Key="a b/data")["ContentLength"] == size
        if size:
            found = s3.get_object(Bucket=name, Key="a b/data", Range=f"bytes=0-{len(DATA)}")
            assert (found["ContentRange"], found["Body"].read()) == (f"bytes 0-{size - 1}/{size}", DATA[:size])
        with pytest.raises(ClientError, match="InvalidRange"):
            get(s3, name, span=f"{size}-{len(DATA)}")
    proxy.faults(Faults(cut={"data": len(DATA)}))
    assert get(s3, name) == DATA


def test_a_stalled_body_goes_on(name: str, proxy: Proxy) -> None:
    proxy.faults(Faults(stall=1.0, stall_seconds=1.5))
    began = time.monotonic()
    with pytest.raises(Exception, match=r"Read timeout"):
        get(client(proxy.url, read_timeout=0.5), name)
    assert get(client(proxy.url), name) == DATA
    assert time.monotonic() - began >= 0.5 + 1.5


def test_a_put_whose_answer_is_lost_was_made(name: str, proxy: Proxy) -> None:
    s3 = client(proxy.url)
    proxy.faults(Faults(reset=1.0))
    with pytest.raises(ConnectionClosedError):
        s3.put_object(Bucket=name, Key="new", Body=DATA, IfNoneMatch="*")
    proxy.faults(Faults(slow_down=1.0))
    with pytest.raises(ClientError, match="SlowDown"):
        s3.put_object(Bucket=name, Key="newer", Body=DATA)
    proxy.faults(Faults())
    assert get(s3, name, "new") == DATA
    with pytest.raises(ClientError, match="NoSuchKey"):
        get(s3, name, "newer")


def test_black_out_that_refuses(name: str, proxy: Proxy) -> None:
    s3, idle = client(proxy.url), http.client.HTTPConnection(urlsplit(proxy.url).netloc)
    idle.connect()
    assert ends(s3, name) == "whole"
    for _ in range(3):
        proxy.faults(Faults(blackout="refuse"))
        assert {ends(s3, name) for _ in range(3)} <= {EndpointConnectionError.__name__, ConnectionClosedError.__name__}
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection(urlsplit(proxy.url).netloc).connect()
        proxy.faults(Faults())
        assert ends(s3, name) == "whole"
    with pytest.raises(OSError):  # noqa: PT011  reset or closed: the connection from before is gone
        idle.request("GET", "/"), idle.getresponse()


def test_black_out_breaks_what_is_on_its_way(name: str) -> None:
    with Proxy(os.environ["AWS_ENDPOINT_URL_S3"], rate=MIB) as proxy:
        body = client(proxy.url).get_object(Bucket=name, Key="a b/data")["Body"]
        proxy.faults(Faults(blackout="refuse"))
        with pytest.raises(ResponseStreamingError):
            body.read()


def test_black_out_that_hangs(name: str, proxy: Proxy) -> None:
    s3 = client(proxy.url)
    proxy.faults(Faults(blackout="hang"))
    with pytest.raises(Exception, match=r"Read timeout"):
        get(client(proxy.url, read_timeout=0.3), name)
    began = time.monotonic()
    timer = threading.Timer(0.5, proxy.faults, [Faults()])
    timer.start()
    assert get(s3, name) == DATA  # it waited, and got its answer
    assert time.monotonic() - began >= 0.5
    timer.join()
    assert proxy.counts().faults["blackout"] == 2


def test_nothing_is_left_running(stack: Any) -> None:
    with Proxy(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc)
        connection.connect()
        assert Path(f"/proc/{proxy.pid}").exists()
        child = os.fork()
        if not child:  # a fork holds the pipes open: the end must not depend on them
            time.sleep(60)
            os._exit(0)
    try:
        assert not Path(f"/proc/{proxy.pid}").exists()
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection(urlsplit(proxy.url).netloc).connect()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_refuses_what_is_not_of_this_machine() -> None:
    with pytest.raises(ValueError, match="of this machine"):
        Proxy("https://s3.amazonaws.com")
    with pytest.raises(ValueError, match="together too"):
        Faults(short=0.6, reset=0.6)
