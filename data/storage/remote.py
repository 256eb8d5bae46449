"""Lists, reads and downloads files of datasets at URLs (s3://, gs://, https://, file:// and other protocols of fsspec).

    remote = Remote("s3://bucket/in22k/train")
    json.loads(remote.read("dataset.json"))
    remote.download("train-000000.tar", path, check=check, limit=shard.bytes, stop=stop)

Credentials and endpoints come from where the store's tools look for them (AWS_PROFILE, AWS_ENDPOINT_URL, …) or from fsspec's
configuration (FSSPEC_S3_ANON=true, ~/.config/fsspec). A failed request is retried with exponential backoff.
"""

import math
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

T = TypeVar("T")
TRIES = 6
FIRST_PAUSE = 1.0  # seconds; each of the five pauses is twice the one before, so a job survives an outage of half a minute
STALL = 15.0  # seconds without a byte after which a request fails
_BLOCK_BYTES = 16 << 20  # size of one request, which bounds a download's memory


class Stopped(Exception):
    """A wait or download was stopped because its result is no longer needed."""


def is_url(place: str | os.PathLike[str]) -> bool:
    return "://" in str(place)


class Remote:
    """A folder at a URL.

    Raises ValueError if the protocol is unknown or its package is not installed. The methods raise ValueError with the URL, the reason
    and the number of tries.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self._fs, self._path = fsspec.core.url_to_fs(self.url, **_options(protocol))
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: can't be opened: {error}. s3, http, https and file work; gs needs: pip install gcsfs") from error

    def read(self, name: str) -> bytes:
        """Reads a small file."""
        return self._persist(name, lambda: self._fs.cat_file(f"{self._path}/{name}"))

    def read_part(self, name: str, offset: int, size: int, stop: threading.Event) -> bytes:
        """Reads `size` bytes of a file from `offset` on. Raises Stopped soon after `stop` is set."""

        def once() -> bytes:
            data = self._fs.cat_file(f"{self._path}/{name}", start=offset, end=offset + size)
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes instead of {size} at {offset}")
            return data

        return self._persist(name, once, stop)

    def list_sizes(self) -> dict[str, int] | None:
        """Lists the size of each file in bytes, by name; returns None for web servers and without permission to list."""
        if self.url.startswith("http"):
            return None
        self._fs.invalidate_cache(self._path)
        try:
            entries = self._persist("", lambda: self._fs.ls(self._path, detail=True))
        except ValueError as error:
            if error.__cause__ is not None and _is_refused(error.__cause__):
                return None
            raise
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def download(
        self, name: str, to: Path, *, check: Callable[[Path], None], limit: float = math.inf, stop: threading.Event | None = None
    ) -> None:
        """Downloads a file of at most `limit` bytes over an existing file.

        `check` is called with the path of the file; its ValueError counts as a failed try. Raises ValueError if every try failed, and
        Stopped soon after `stop` is set.
        """
        stop = stop or threading.Event()

        def once() -> None:
            with self._fs.open(f"{self._path}/{name}", "rb", block_size=_BLOCK_BYTES, cache_type="none") as source, open(to, "r+b") as file:
                while block := source.read(_BLOCK_BYTES):
                    if stop.is_set():
                        raise Stopped
                    if file.tell() + len(block) > limit:
                        raise ValueError(f"more than the {limit} bytes in dataset.json")
                    file.write(block)
                file.truncate()
            check(to)

        self._persist(name, once, stop)

    def _persist(self, name: str, action: Callable[[], T], stop: threading.Event | None = None) -> T:
        """Calls `action` until it succeeds, at most TRIES times, and returns its result."""
        for tried in range(1, TRIES + 1):
            try:
                return action()
            except Stopped:
                raise
            except Exception as error:  # each protocol's package has its own error types
                if isinstance(error, FileNotFoundError) or _is_refused(error) or tried == TRIES:
                    tries = "1 try" if tried == 1 else f"{tried} tries"
                    raise ValueError(f"{self.url}/{name}: {_format_reason(error)} ({tries}){_format_advice(error)}") from error
                pause = FIRST_PAUSE * 2 ** (tried - 1) * random.SystemRandom().uniform(0.75, 1.25)  # spreads the ranks' next requests
                if (stop or threading.Event()).wait(pause):
                    raise Stopped from error
        raise AssertionError("unreachable")


def _options(protocol: str) -> dict[str, Any]:
    """Returns fsspec's options for a protocol, merged with those that the user has configured."""
    configured = fsspec.config.conf.get(protocol, {})
    if protocol in ("s3", "s3a"):
        # botocore's retries, of up to 20 s each, would multiply with those of `_persist`.
        options = {"retries": {"total_max_attempts": 1}, "read_timeout": STALL}
        return {"config_kwargs": options | configured.get("config_kwargs", {})}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)  # the default is 5 minutes in total
        return {"client_kwargs": {"timeout": timeout} | configured.get("client_kwargs", {})}
    return {}


def _is_refused(error: BaseException) -> bool:
    """Returns whether the store refuses the credentials. botocore and aiohttp may not be imported, so types are compared by name."""
    return (
        isinstance(error, PermissionError)
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
        or getattr(error, "status", None) in (401, 403)
    )


def _format_reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _format_advice(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "; is it the folder of a packed dataset (dataset.json, index.npy, shards), and is the copy complete?"
    if _is_refused(error):
        return (
            "; credentials come from where the store's tools look, such as AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
            "a public bucket needs FSSPEC_S3_ANON=true"
        )
    return ""
