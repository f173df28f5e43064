"""A workspace in a bucket: what `storage.Storage` promises, on S3 and what speaks its language."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import boto3
import pyarrow.fs
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

from mixer_platform.errors import MissingError, StorageError, published_already


class S3Storage:
    """A workspace under `s3://bucket/prefix`; endpoint, region and credentials are found the standard AWS way."""

    def __init__(self, uri: str, check: bool = True) -> None:
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")  # urlsplit would cut it at a # or ?
        self.prefix = prefix.strip("/")
        self.uri = uri.rstrip("/")
        self._connect()
        if check:
            self._check_bucket()

    def _connect(self) -> None:
        self.client = boto3.client("s3")
        endpoint = self.client.meta.endpoint_url
        # Arrow finds credentials by the same chain, but of the endpoint settings it reads only some.
        self.filesystem = pyarrow.fs.S3FileSystem(endpoint_override=endpoint, region=self.client.meta.region_name)

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "uri": self.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def path(self, key: str = "") -> str:
        return "/".join(part for part in (self.bucket, self.prefix, key) if part)

    def read(self, key: str) -> bytes:
        with self._explained(key):
            return self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def list(self, prefix: str) -> dict[str, str]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        pages = self._pages(prefix)
        return {entry["Key"][skip:]: entry["ETag"] for page in pages for entry in page.get("Contents", [])}

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
                if error.response["Error"]["Code"] in {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"}:
                    raise published_already(f"{self.uri}/{key}") from error
                raise

    def delete(self, prefix: str) -> None:
        with self._explained(prefix):
            for key in self.list(prefix):
                self.client.delete_object(Bucket=self.bucket, Key=self._key(key))

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
            raise StorageError(f"s3://{self.bucket}: {reason.get(code, str(error))}") from error
        except BotoCoreError as error:
            raise StorageError(f"s3://{self.bucket}: {error}") from error

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError) as error:
            kind = MissingError if _is_missing(error) else StorageError
            raise kind(f"{self.uri}/{key}: {' '.join(str(error).split())}") from error


def _is_missing(error: Exception) -> bool:
    if isinstance(error, ParamValidationError):  # no bucket or key can have this name
        return True
    code = error.response["Error"]["Code"] if isinstance(error, ClientError) else None
    return code in {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
