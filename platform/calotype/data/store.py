"""URI -> bytes: ranges, listings and conditional publication, in an S3 bucket (`s3.py`) or a folder (`files.py`)."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from calotype.data.files import Entry, FolderStore, Missing, Store, checked
from calotype.errors import ConfigError

__all__ = ["Entry", "FolderStore", "Missing", "Store", "open_store"]


def open_store(uri: str) -> Store:
    """`s3://BUCKET[/PREFIX]`, `file:///FOLDER` or a folder; nothing else is opened, so no data can name a scheme."""
    scheme, found, rest = uri.partition("://")
    if not uri:
        raise ConfigError("an empty URI names no store: give s3://BUCKET[/PREFIX] or a folder")
    if not found:
        return FolderStore(Path(uri).expanduser().absolute())
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]", bucket):
            raise ConfigError(f"{uri!r} names no S3 bucket (3-63 of a-z 0-9 . -): write s3://BUCKET[/PREFIX]")
        from calotype.data.s3 import S3Store  # boto3 takes a third of a second that folders need not wait

        return S3Store(bucket, checked(prefix.strip("/"), uri) if prefix.strip("/") else "")
    if scheme == "file" and urlsplit(uri).netloc in ("", "localhost"):
        return FolderStore(Path(unquote(urlsplit(uri).path)))
    raise ConfigError(f"{uri!r} is neither s3://BUCKET[/PREFIX] nor a folder: other schemes are not opened")
