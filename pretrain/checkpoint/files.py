"""A checkpoint's files: hashed while they are written, sealed by a manifest, given their name once all is durable, verified on reading.

Nothing here knows what is in a checkpoint, or of ranks.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.common.files import sync
from data.common.hashing import hash_file, hash_json, new_hash
from pretrain.run.directory import LATEST, MANIFEST, checkpoint_name, list_checkpoints

FORMAT = 2
Entry = dict[str, Any]  # {"bytes": size, "xxh3_128": checksum in hex} of a file
_BLOCK_BYTES = 8 << 20  # large: after each the thread has to get the interpreter's lock back from training
_VERIFY_THREADS = 8


class HashedFile:
    """An open file that knows the checksum of what was written to it."""

    def __init__(self, descriptor: int):
        self._descriptor, self._bytes, self._digest = descriptor, 0, new_hash()

    def write(self, data: Any) -> None:
        """Writes all of a buffer."""
        rest = memoryview(data).cast("B")
        while rest:
            written = rest[: os.write(self._descriptor, rest[:_BLOCK_BYTES])]
            self._digest.update(written)
            self._bytes += len(written)
            rest = rest[len(written) :]

    @property
    def entry(self) -> Entry:
        return {"bytes": self._bytes, "xxh3_128": self._digest.hexdigest()}


@contextmanager
def create(path: Path) -> Iterator[HashedFile]:
    """Creates a file, or empties it; what was written is durable once the block ends without an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        yield HashedFile(descriptor)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> Entry:
    """Writes a whole file, durably."""
    with create(path) as file:
        file.write(content)
    return file.entry


def temporary(folder: Path, why: str, name: str) -> Path:
    """A path that no reader looks at and no other process uses; what is left of it is removed by `remove_leftovers`."""
    return folder / f".{why}-{name}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(folder: Path, log: Callable[[str], None]) -> None:
    """Removes what a save or a removal that was cut short left. For who holds the run directory's lock."""
    for leftover in folder.glob(".*-step-*"):
        log(f"removing {leftover}, left over from a save or a removal that was cut short")
        shutil.rmtree(leftover)


def commit(partial: Path, final: Path, files: dict[str, Entry]) -> None:
    """Makes a checkpoint of a directory in which every file is written and synced: manifest, name, pointer.

    Args:
        final: a damaged checkpoint that bears this name already is replaced.
        files: what the manifest says of each file.
    """
    body = {"format": FORMAT, "files": files}
    write(partial / MANIFEST, json.dumps(body | {"xxh3_128": _seal(body)}, indent=1).encode())
    sync(partial)
    if final.exists():
        remove(final)
    partial.rename(final)
    sync(final.parent)
    point(final)


def point(path: Path) -> None:
    """Makes `latest` name this checkpoint."""
    pending = path.parent / f".{LATEST}"
    write(pending, path.name.encode())
    pending.replace(path.parent / LATEST)
    sync(path.parent)


def pointed(folder: Path) -> str | None:
    """What `latest` says, whatever that is; None where it is missing."""
    try:
        return (folder / LATEST).read_text(errors="replace")
    except FileNotFoundError:
        return None


def remove(path: Path) -> None:
    """Deletes a checkpoint so that no reader ever meets half of it."""
    doomed = temporary(path.parent, "removed", path.name)
    path.rename(doomed)
    shutil.rmtree(doomed)


def newest_whole(folder: Path, log: Callable[[str], None], until: int | None = None) -> Path | None:
    """The newest checkpoint, or of those no newer than step `until`, whose files are all there and unchanged; each one that is passed
    over is logged.

    Raises:
        ValueError: there are checkpoints and none is whole. Starting afresh without a word would throw a run away.
    """
    candidates = [path for path in list_checkpoints(folder) if until is None or path.name <= checkpoint_name(until)]
    for path in reversed(candidates):
        faults = verify(path)
        if not faults:
            return path
        log(f"passing over checkpoint {path}: {'; '.join(faults)}")
    if candidates:
        raise ValueError(f"no whole checkpoint in {folder}; restore one, or move the run directory away to start afresh")
    return None


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files, by its manifest; nothing where it is whole. Reads every byte."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} is unreadable ({error})"]
    body = {key: value for key, value in manifest.items() if key != "xxh3_128"} if isinstance(manifest, dict) else {}
    if body.get("format") != FORMAT or manifest.get("xxh3_128") != _seal(body):
        return [f"{MANIFEST} is damaged, or of another format than {FORMAT}, which this version writes and reads"]
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        faults = pool.map(lambda file: _fault(path / file[0], file[1]), body["files"].items())
        return [fault for fault in faults if fault]


def _fault(path: Path, expected: Entry) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes instead of {expected['bytes']}"
        if hash_file(path) != expected["xxh3_128"]:
            return f"{path.name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} can't be read ({error})"
    return None


def _seal(body: dict[str, Any]) -> str:
    """The manifest's checksum of itself: of its content, not of how that is laid out."""
    return hash_json(body)
