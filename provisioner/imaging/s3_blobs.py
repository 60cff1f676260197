"""Blobs in a bucket of S3, or of anything that speaks it. See `blobs.py`.

A put is atomic and durable by the protocol's own promise. Credentials never appear in errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import (
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from provisioner.core.model import Secret
from provisioner.errors import ConfigError, NotFound, Unavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

REQUEST_LIMIT: Final = timedelta(seconds=60)
CONNECT_LIMIT: Final = timedelta(seconds=5)
RETRY_LIMIT: Final = timedelta(seconds=30)
RETRIES_MAX: Final = 5

T = TypeVar("T")


@dataclass(frozen=True)
class S3Place:
    """Where a bucket is: url is `s3://bucket/prefix`; endpoint is empty for AWS itself."""

    url: str
    access_key: str
    secret_key: Secret
    endpoint: str = ""
    region: str = "us-east-1"


class S3Blobs:
    """Blobs as objects below a prefix of one bucket."""

    def __init__(self, place: S3Place) -> None:
        """Connects to nothing yet. Raises ConfigError for a URL that is not s3://bucket."""
        parts = urlsplit(place.url)
        if parts.scheme != "s3" or not parts.netloc:
            raise ConfigError("not a bucket", expected="s3://bucket/prefix", found=place.url)
        client: ClientConfig = {
            "timeout": REQUEST_LIMIT,
            "connect_timeout": CONNECT_LIMIT,
            # A private object store may have no certificate; chunks are checked by digest
            # and manifests by signature, wherever they come from.
            "allow_http": place.endpoint.startswith("http://"),
        }
        retry: RetryConfig = {"max_retries": RETRIES_MAX, "retry_timeout": RETRY_LIMIT}
        self.place = place.url
        self._store = S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            endpoint=place.endpoint or None,
            region=place.region,
            access_key_id=place.access_key,
            secret_access_key=place.secret_key.reveal(),
            virtual_hosted_style_request=not place.endpoint,
            client_options=client,
            retry_config=retry,
        )

    def read(self, name: str, limit_bytes: int) -> bytes:
        def get() -> bytes:
            found = self._store.get(name)
            if found.meta["size"] > limit_bytes:
                return bytes(self._store.get_range(name, start=0, length=limit_bytes))
            return bytes(found.bytes())

        return self._asked(name, get)

    def write(self, name: str, data: bytes) -> None:
        # Never in parts: a blob is at most some hundred megabytes, and parts are not atomic
        # everywhere.
        self._asked(name, lambda: self._store.put(name, data, use_multipart=False))

    def size(self, name: str) -> int | None:
        try:
            return int(self._asked(name, lambda: self._store.head(name)["size"]))
        except NotFound:
            return None

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        listing = self._asked(prefix, lambda: self._store.list(prefix.rstrip("/")).collect())
        yield from ((str(item["path"]), int(item["size"])) for item in listing)

    def delete(self, name: str) -> None:
        try:
            self._asked(name, lambda: self._store.delete(name))
        except NotFound:
            return

    def free_bytes(self) -> int | None:
        return None

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        """Return what the store answers, with its errors as ours."""
        try:
            return ask()
        except (NotFoundError, FileNotFoundError) as error:
            raise NotFound(f"{name} is missing from {self.place}") from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise ConfigError(
                f"the object store refuses access to {self.place}",
                hint="check the credentials, and what they may do in the bucket",
            ) from error
        except BaseError as error:
            raise Unavailable(
                f"the object store does not serve {self.place}",
                found=type(error).__name__,
                hint="check releases.s3_endpoint, and whether it is reachable from here",
            ) from error
