"""Datasets that live at URLs (s3://, gs://, https://, file:// and what else fsspec knows): listing, reading, downloading.

    remote = Remote("s3://bucket/in22k/train")
    json.loads(remote.read("dataset.json"))
    remote.download("train-000000.tar", path, check=check, limit=shard.bytes, stop=stop)

Credentials and endpoints are found as the store's own tools find them (AWS_PROFILE, AWS_ENDPOINT_URL, …) or come from fsspec's
configuration (FSSPEC_S3_ANON=true, ~/.config/fsspec). What fails for a while is tried again here, with growing pauses.
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
FIRST_PAUSE = 1.0  # seconds; each pause is twice the one before, the last of five 16: an outage of half a minute is outlived
STALL = 15.0  # seconds without a byte, after which a request has failed
_BLOCK_BYTES = 16 << 20  # of one request, and so of memory a download


class Stopped(Exception):
    """The program is done with what was being downloaded."""


def is_url(place: str | os.PathLike[str]) -> bool:
    return "://" in str(place)


class Remote:
    """A folder at a URL.

    Raises ValueError for a protocol that is unknown or whose package is not installed. Its methods raise ValueError, with the
    URL, what was wrong and how often it was tried.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self._fs, self._path = fsspec.core.url_to_fs(self.url, **_options(protocol))
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: can't be opened: {error}. s3, http, https and file work; gs needs: pip install gcsfs") from error

    def read(self, name: str) -> bytes:
        """The bytes of a small file."""
        return self._persist(name, lambda: self._fs.cat_file(f"{self._path}/{name}"))

    def read_part(self, name: str, offset: int, size: int, stop: threading.Event) -> bytes:
        """Some bytes of a file. Raises Stopped soon after `stop` is set."""

        def once() -> bytes:
            data = self._fs.cat_file(f"{self._path}/{name}", start=offset, end=offset + size)
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes instead of {size} at {offset}")
            return data

        return self._persist(name, once, stop)

    def sizes(self) -> dict[str, int] | None:
        """Bytes of each file, by name, from one listing; None where there is none: web servers, or no permission to list."""
        if self.url.startswith("http"):
            return None
        self._fs.invalidate_cache(self._path)
        try:
            entries = self._persist("", lambda: self._fs.ls(self._path, detail=True))
        except ValueError as error:
            if error.__cause__ is not None and _refused(error.__cause__):
                return None
            raise
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def download(
        self, name: str, to: Path, *, check: Callable[[Path], None], limit: float = math.inf, stop: threading.Event | None = None
    ) -> None:
        """Writes a file's bytes over those of `to`, and again until `check`, which is given `to`, raises nothing.

        Raises ValueError when no try gave a good file, of `limit` bytes at most, and Stopped soon after `stop` is set.
        """
        stop = stop or threading.Event()

        def once() -> None:
            with self._fs.open(f"{self._path}/{name}", "rb", block_size=_BLOCK_BYTES, cache_type="none") as source, open(to, "r+b") as file:
                while block := source.read(_BLOCK_BYTES):
                    if stop.is_set():
                        raise Stopped
                    if file.tell() + len(block) > limit:
                        raise ValueError(f"more than the {limit} bytes that dataset.json speaks of")
                    file.write(block)
                file.truncate()
            check(to)

        self._persist(name, once, stop)

    def _persist(self, name: str, action: Callable[[], T], stop: threading.Event | None = None) -> T:
        """The result of `action`, tried until it succeeds or has failed TRIES times."""
        for tried in range(1, TRIES + 1):
            try:
                return action()
            except Stopped:
                raise
            except Exception as error:  # every protocol's package has kinds of its own
                if isinstance(error, FileNotFoundError) or _refused(error) or tried == TRIES:
                    tries = "1 try" if tried == 1 else f"{tried} tries"
                    raise ValueError(f"{self.url}/{name}: {_reason(error)} ({tries}){_advice(error)}") from error
                pause = FIRST_PAUSE * 2 ** (tried - 1) * random.SystemRandom().uniform(0.75, 1.25)  # ranks must not come back as one
                if (stop or threading.Event()).wait(pause):
                    raise Stopped from error
        raise AssertionError("unreachable")


def _options(protocol: str) -> dict[str, Any]:
    """What a file system is opened with, beside what the user has configured for it."""
    configured = fsspec.config.conf.get(protocol, {})
    if protocol in ("s3", "s3a"):
        # botocore's own retries, of up to 20 s each, would multiply with those here.
        own = {"retries": {"total_max_attempts": 1}, "read_timeout": STALL}
        return {"config_kwargs": own | configured.get("config_kwargs", {})}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)  # by default 5 minutes in all
        return {"client_kwargs": {"timeout": timeout} | configured.get("client_kwargs", {})}
    return {}


def _refused(error: BaseException) -> bool:
    """Whether the store wants other credentials; those of botocore and aiohttp can't be named before they are imported."""
    return (
        isinstance(error, PermissionError)
        or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
        or getattr(error, "status", None) in (401, 403)
    )


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _advice(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "; is it the folder of a packed dataset (dataset.json, index.npy, shards), wholly copied?"
    if _refused(error):
        return (
            "; credentials are found as by the store's own tools, such as AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
            "a public bucket needs FSSPEC_S3_ANON=true"
        )
    return ""
