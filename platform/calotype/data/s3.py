"""Buckets: the only room that knows boto3."""

from __future__ import annotations

import io
import os
import ssl
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import botocore.httpsession
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from calotype.data.files import PART, Entry, Missing, Names, Store, checked
from calotype.data.get import AGAIN, EXPIRED, Getter, Gone, Refused, counted
from calotype.errors import CalotypeError, Unreachable

SINGLE_PUT = 5 * 2**30  # bytes of one put, S3's limit; bigger files are published in parts
CONNECTIONS = 64  # pool of one client: parallel range GETs must not queue for a socket
ATTEMPTS = 5  # of a read whose body broke off, and of a put that met another writer

Parts: TypeAlias = list[dict[str, Any]]

_clients: dict[tuple[Any, ...], Any] = {}
_clients_lock = threading.Lock()


def _forked() -> None:
    """Another thread may have held the lock when this process was forked, and there is none here to free it."""
    global _clients_lock
    _clients_lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)
_BROKEN_BODY = (
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ReadTimeoutError,
    botocore.exceptions.ResponseStreamingError,
)


def _client(attempts: int = 8) -> Any:
    """One client per process and account: sockets do not survive a fork, and clients are slow to make.

    Eight attempts ride out about a minute without the server.  Not botocore's `standard` mode: all requests of a client
    share its quota of retries, which a few parallel readers use up in a fraction of a second.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    account = (attempts, os.getpid(), endpoint, os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_PROFILE"))
    with _clients_lock:  # making a client is not thread-safe, using one is
        if account not in _clients:
            config = Config(
                retries={"mode": "legacy", "total_max_attempts": attempts},
                connect_timeout=5,
                read_timeout=60,
                max_pool_connections=CONNECTIONS,
                signature_version="s3v4",
                tcp_keepalive=True,
                # a host name of one's own rarely has a wildcard DNS entry for BUCKET.host
                s3={"addressing_style": "path" if endpoint else "auto"},
                # newer checksum trailers are unknown to many S3 servers; shards carry hashes of their own
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            )
            _clients[account] = boto3.session.Session().client("s3", config=config)
        return _clients[account]


_getters: dict[tuple[int, str, str], Getter | None] = {}


def _getter(bucket: str) -> Getter | None:
    """What reads ranges of a bucket's keys fast; None behind an HTTP proxy, which boto3 knows how to pass."""
    client = _client()
    endpoint = str(client.meta.endpoint_url)
    name = (os.getpid(), endpoint, bucket)
    with _clients_lock:
        if name not in _getters:
            parts = urlsplit(endpoint)
            proxied = parts.scheme in urllib.request.getproxies()
            if proxied and not urllib.request.proxy_bypass(parts.hostname or ""):
                _getters[name] = None
            else:
                session = boto3.session.Session()._session  # botocore's own, which reads ca_bundle from every source
                trusted = session.get_config_variable("ca_bundle") or botocore.httpsession.get_cert_path(True)
                context = ssl.create_default_context(cafile=trusted) if parts.scheme == "https" else None

                def sign(key: str) -> str:
                    params = {"Bucket": bucket, "Key": key}
                    try:
                        return str(_client().generate_presigned_url("get_object", Params=params, ExpiresIn=3600))
                    except botocore.exceptions.CredentialRetrievalError as error:  # such services have bad moments
                        raise ConnectionError(str(error)) from error

                _getters[name] = Getter(sign, context)
        return _getters[name]


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """boto3's exceptions as sentences."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = _code(error)
        if code in ("NoSuchKey", "404", "NotFound"):
            raise Missing(f"{uri} does not exist") from error
        if code == "NoSuchBucket":
            raise Missing(f"the bucket of {uri} does not exist: create it, or correct root") from error
        if code in ("AccessDenied", "403", "SignatureDoesNotMatch", "InvalidAccessKeyId", "Forbidden", "ExpiredToken"):
            raise CalotypeError(f"{uri} is refused ({code}): check AWS_ACCESS_KEY_ID and its secret") from error
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in AGAIN:  # throttled, or unwell: it passes
            raise Unreachable(f"{uri} failed at every try ({error}): look at the server's log, and its disk") from error
        raise CalotypeError(f"{uri} failed: {error}") from error
    except botocore.exceptions.NoCredentialsError as error:
        raise CalotypeError(
            f"no S3 is known here for {uri}: run `calotype up`, in the folder where this runs, or set "
            "AWS_ENDPOINT_URL_S3 and AWS_ACCESS_KEY_ID; in Python call calotype.environment.load_services() first"
        ) from error
    except (botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error) as error:
        raise Unreachable(f"{uri} cannot be reached ({error}): check AWS_ENDPOINT_URL_S3 and the server") from error


def _opened(data: bytes | Path) -> BinaryIO:
    return open(data, "rb") if isinstance(data, Path) else io.BytesIO(data)


@dataclass(frozen=True)
class S3Store(Store):
    """Any S3 that knows `If-None-Match: *` on put and on completing a multipart upload.  Standard AWS_* settings."""

    bucket: str
    prefix: str = ""

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def at(self, *parts: str) -> Store:
        return S3Store(self.bucket, self._name("/".join(parts))) if parts else self

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        last = "" if length is None else start + length - 1
        span = {"Range": f"bytes={start}-{last}"} if start or length else {}

        with _explained(f"{self.uri}/{key}"):
            for attempt in range(ATTEMPTS):
                try:
                    found = _client().get_object(Bucket=self.bucket, Key=self._name(key), **span)
                    counted(found["ResponseMetadata"]["RetryAttempts"])
                    return bytes(found["Body"].read())
                except _BROKEN_BODY:  # boto3 retries requests, not bodies that break off
                    if attempt == ATTEMPTS - 1:
                        raise
                    counted(1)
                    time.sleep(0.1 * 2**attempt)
                except botocore.exceptions.ClientError as error:
                    if _code(error) in ("InvalidRange", "416"):  # starts at or behind the end
                        return b""
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def read_into(self, key: str, start: int, buffer: memoryview, stop: threading.Event | None = None) -> int:
        if (getter := _getter(self.bucket)) is None or not len(buffer):
            return super().read_into(key, start, buffer, stop)
        uri = f"{self.uri}/{key}"
        try:
            with _explained(uri):
                return getter.into(self._name(key), start, buffer, uri, stop)
        except Gone as error:
            raise Missing(f"{uri} does not exist ({error})") from error
        except Refused as error:
            check = "AWS_ENDPOINT_URL_S3, and what stands before it"
            if str(error).startswith(("401", *EXPIRED)):
                check = "AWS_ACCESS_KEY_ID, its secret and the clock"
            elif str(error).startswith(("301", "307", "400 Authorization")):
                check = "AWS_REGION: the bucket is in another region"
            raise CalotypeError(f"{uri} is refused ({error}): check {check}") from error

    def publish(self, key: str, data: bytes | Path) -> bool:
        with _explained(f"{self.uri}/{key}"):
            if (data.stat().st_size if isinstance(data, Path) else len(data)) > SINGLE_PUT:
                return not self.exists(key) and self._publish_parts(self._name(key), data)
            token = uuid.uuid4().hex
            headers = {"IfNoneMatch": "*", "Metadata": {"writer": token}}
            return self._conditional(self._name(key), token, lambda: self._put(key, data, **headers))

    def write(self, key: str, data: bytes | Path) -> None:
        with _explained(f"{self.uri}/{key}"), _opened(data) as body:  # in parts where it is big
            _client().upload_fileobj(body, self.bucket, self._name(key), Config=TransferConfig(max_concurrency=4))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for page in self._pages(Prefix=self._below() + prefix):
            for item in page.get("Contents", ()):
                yield Entry(item["Key"][len(self._below()) :], item["Size"], item["LastModified"].timestamp())

    def folders(self, prefix: str = "") -> Names:
        base = self._below() + (f"{prefix.rstrip('/')}/" if prefix else "")
        pages = self._pages(Prefix=base, Delimiter="/")
        return sorted(item["Prefix"][len(base) : -1] for page in pages for item in page.get("CommonPrefixes", ()))

    def exists(self, key: str) -> bool:
        try:
            with _explained(f"{self.uri}/{key}"):
                _client().head_object(Bucket=self.bucket, Key=self._name(key))
        except Missing:
            return False
        return True

    def delete(self, key: str) -> None:
        with _explained(f"{self.uri}/{key}"):
            _client().delete_object(Bucket=self.bucket, Key=self._name(key))

    def ensure(self) -> None:
        with _explained(self.uri):
            try:
                _client(attempts=2).head_bucket(Bucket=self.bucket)
            except botocore.exceptions.ClientError as error:
                if _code(error) not in ("404", "NoSuchBucket", "NotFound"):
                    raise
                self._create_bucket()

    def _create_bucket(self) -> None:
        region = _client().meta.region_name
        place: dict[str, Any] = {}
        if region and region not in ("us-east-1", "aws-global"):
            place = {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            _client().create_bucket(Bucket=self.bucket, **place)
        except botocore.exceptions.ClientError as error:
            if _code(error) != "BucketAlreadyOwnedByYou":  # another process was faster
                raise

    def _below(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _name(self, key: str) -> str:
        return self._below() + checked(key, self.uri)

    def _pages(self, **query: str) -> Iterator[dict[str, Any]]:
        with _explained(self.uri):
            yield from _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, **query)

    def _put(self, key: str, data: bytes | Path, **headers: Any) -> None:
        with _opened(data) as body:
            _client().put_object(Bucket=self.bucket, Key=self._name(key), Body=body, **headers)

    def _publish_parts(self, name: str, data: bytes | Path) -> bool:
        """A file too big for one put; nothing is visible, and nothing decided, before the conditional completion.

        SeaweedFS 4.48 can tell two writers that complete at one moment that both made the key; it never errs on
        single puts, so those are used wherever S3 allows.
        """
        client, token = _client(), uuid.uuid4().hex
        parts: Parts = []
        where = {"Bucket": self.bucket, "Key": name}
        where["UploadId"] = client.create_multipart_upload(**where, Metadata={"writer": token})["UploadId"]
        try:
            with _opened(data) as body:
                while piece := body.read(PART):
                    part = client.upload_part(**where, PartNumber=len(parts) + 1, Body=piece)
                    parts.append({"ETag": part["ETag"], "PartNumber": len(parts) + 1})
            done = {"MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
            return self._conditional(name, token, lambda: client.complete_multipart_upload(**where, **done))
        finally:
            with suppress(botocore.exceptions.ClientError):  # parts left behind cost money; none are after success
                client.abort_multipart_upload(**where)

    def _conditional(self, name: str, token: str, put: Callable[[], Any]) -> bool:
        """Whether this put made the key.  A retry whose first try arrived meets its own object: the token tells."""
        for attempt in range(ATTEMPTS):
            try:
                put()
                return True
            except botocore.exceptions.ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "NoSuchUpload"):
                    raise
                if self._writer(name) == token:
                    return True
                if _code(error) in ("PreconditionFailed", "412"):
                    return False
                if _code(error) == "NoSuchUpload" or attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.1 * 2**attempt)  # another writer is in the middle of it
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _writer(self, name: str) -> str | None:
        try:
            found = _client().head_object(Bucket=self.bucket, Key=name)
        except botocore.exceptions.ClientError:
            return None
        return found["Metadata"].get("writer")
