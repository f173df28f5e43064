"""A workspace in a bucket: what `storage.Storage` promises, on S3 and what speaks its language."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import botocore.session
import pyarrow.fs
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ParamValidationError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

from mixer_platform.errors import MissingError, StorageError, published_already

_ATTEMPTS = 8  # of a request, over some 3 seconds; over half a minute where the store asks to slow down
_ARROW_ATTEMPTS = 5  # its waits are longer
_CUT = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)  # what reading half a body raises
_FAILED = (ClientError, BotoCoreError, Boto3Error, RetriesExceededError, S3DownloadFailedError)
_WHOLE = 2**30  # bytes of a put; S3 takes 5 GB, and more in parts only
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP}


class S3Storage:
    """A workspace under `s3://bucket/prefix`; endpoint, region and credentials are found the standard AWS way.

    Requests that fail for a while are tried again, `max_attempts` times in all where the AWS settings have it.
    """

    def __init__(self, uri: str, check: bool = True) -> None:
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")  # urlsplit would cut it at a # or ?
        self.prefix = prefix.strip("/")
        self.uri = uri.rstrip("/")
        self._connect()
        if check:
            self._check_bucket()

    def _connect(self) -> None:
        self.attempts = botocore.session.Session().get_config_variable("max_attempts") or _ATTEMPTS
        retries = {"mode": "standard", "total_max_attempts": self.attempts}
        self.client = boto3.client("s3", config=Config(retries=retries, connect_timeout=5, read_timeout=30))
        # Arrow finds credentials by the same chain, but of the endpoint settings it reads only some.
        self.filesystem = pyarrow.fs.S3FileSystem(
            endpoint_override=self.client.meta.endpoint_url,
            region=self.client.meta.region_name,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=min(self.attempts, _ARROW_ATTEMPTS)),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "uri": self.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def path(self, key: str = "") -> str:
        return "/".join(part for part in (self.bucket, self.prefix, key) if part)

    def read(self, key: str) -> bytes:
        with self._explained(key):
            left = self.attempts
            while True:
                body = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"]
                left -= 1
                try:
                    return body.read()
                except _CUT:  # the client tries again only what fails before the body
                    if not left:
                        raise

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            if len(data) > _WHOLE:
                self.client.upload_fileobj(io.BytesIO(data), self.bucket, self._key(key))
            else:
                self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def upload(self, key: str, path: Path) -> None:
        with local_errors(str(path)), self._explained(key):
            self.client.upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        with local_errors(str(path)), self._explained(key), staged(path) as file:
            self.client.download_fileobj(self.bucket, self._key(key), file)

    def modified(self, prefix: str) -> float | None:
        return max((entry["LastModified"].timestamp() for entry in self._entries(prefix)), default=None)

    def list(self, prefix: str, most: int | None = None) -> dict[str, str]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        return {entry["Key"][skip:]: entry["ETag"] for entry in islice(self._entries(prefix), most)}

    def folders(self, prefix: str) -> Sequence[str]:
        pages = self._pages(prefix, Delimiter="/")
        return [entry["Prefix"].split("/")[-2] for page in pages for entry in page.get("CommonPrefixes", [])]

    def tag(self, key: str) -> str | None:
        with self._explained(key):
            try:
                return self.client.head_object(Bucket=self.bucket, Key=self._key(key))["ETag"]
            except ClientError as error:
                if _is_missing(error):
                    return None
                raise

    def publish(self, key: str, data: bytes, replaces: str | None) -> None:
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        with self._explained(key):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
            except ClientError as error:
                conflicts = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"}
                if error.response["Error"]["Code"] not in conflicts:
                    raise
                # Where the answer to a put was lost, the next attempt meets what it wrote. The same bytes are ours:
                # a manifest names its run, and whoever points to the same version agrees with us.
                retried = error.response["ResponseMetadata"]["RetryAttempts"]
                if not (retried and self._holds(key, data)):
                    raise published_already(f"{self.uri}/{key}") from error

    def delete(self, prefix: str) -> None:
        with self._explained(prefix):
            for key in self.list(prefix):
                self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key) == data
        except MissingError:
            return False

    def _entries(self, prefix: str) -> Iterator[dict[str, Any]]:
        for page in self._pages(prefix):
            yield from page.get("Contents", [])

    def _pages(self, prefix: str, **settings: str) -> Iterator[dict[str, Any]]:
        folder = self._key(prefix).rstrip("/") + "/" if self._key(prefix) else ""
        with self._explained(prefix):
            pages = self.client.get_paginator("list_objects_v2")
            yield from pages.paginate(Bucket=self.bucket, Prefix=folder, **settings)

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key) if part)

    def _check_bucket(self) -> None:
        try:
            self.client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            reason = {"404": "the bucket does not exist: create it", "403": "access denied: check the credentials"}
            kind = MissingError if code in reason else StorageError
            raise kind(f"s3://{self.bucket}: {reason.get(code, str(error))}") from error
        except BotoCoreError as error:
            raise StorageError(f"s3://{self.bucket}: {error}") from error

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except _FAILED as error:
            kind = MissingError if _is_missing(error) else StorageError
            reason = getattr(error, "last_exception", error)  # where transfers gave up
            raise kind(f"{self.uri}/{key}: {' '.join(str(reason).split())}") from error


@contextmanager
def staged(target: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which becomes `target` whole once it is on the disk, or not at all. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".staged-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the rename must not become durable before the bytes
        os.chmod(name, 0o644)  # mkstemp makes it private
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def local_errors(address: str) -> Iterator[None]:
    """Turn what this machine's file system says into a MissingError or a StorageError with the address."""
    try:
        yield
    except ValueError as error:  # a name with a null byte
        raise MissingError(f"{address!r}: {error}") from error
    except OSError as error:
        kind = MissingError if error.errno in _NOT_THERE else StorageError
        mend = "; free some and run again" if error.errno in _FULL else ""
        raise kind(f"{address}: {error.strerror or error}{mend}") from error


def _is_missing(error: Exception) -> bool:
    if isinstance(error, ParamValidationError):  # no bucket or key can have this name
        return True
    code = error.response["Error"]["Code"] if isinstance(error, ClientError) else None
    return code in {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
