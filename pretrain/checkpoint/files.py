"""Writes, publishes, verifies and removes the files of a checkpoint: with checksums, a manifest and a rename.

This module depends neither on the content of a checkpoint nor on ranks.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.common.files import sync
from data.common.hashing import hash_file, hash_json, new_hash
from pretrain.run.directory import LATEST, MANIFEST, checkpoint_name, list_checkpoints

FORMAT = 2
Entry = dict[str, Any]  # {"bytes": size, "xxh3_128": checksum in hex} of a file
_BLOCK_BYTES = 8 << 20  # large, because after each block the thread has to reacquire the GIL from training
_VERIFY_THREADS = 8


def write(path: Path, content: Any) -> Entry:
    """Writes a file durably and returns its entry in the manifest. `content` is a buffer of bytes or numbers."""
    digest, rest = new_hash(), memoryview(content).cast("B")
    entry: Entry = {"bytes": len(rest)}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        while rest:
            written = rest[: os.write(descriptor, rest[:_BLOCK_BYTES])]
            digest.update(written)
            rest = rest[len(written) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry | {"xxh3_128": digest.hexdigest()}


def make_temporary_path(folder: Path, purpose: str, name: str) -> Path:
    """Returns an unused path that readers ignore and that `remove_leftovers` removes after an interruption."""
    return folder / f".{purpose}-{name}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(folder: Path, log: Callable[[str], None]) -> None:
    """Removes the remains of interrupted saves and removals; the caller must hold the run directory's lock."""
    for leftover in folder.glob(".*-step-*"):
        log(f"removing {leftover}, left over from an interrupted save or removal")
        shutil.rmtree(leftover)


def commit(partial: Path, final: Path, files: dict[str, Entry]) -> None:
    """Publishes a directory whose files are all written and synced: writes the manifest, renames the directory, updates `latest`.

    Args:
        partial: the directory, under a temporary name.
        final: its name as a checkpoint; a damaged checkpoint of this name is replaced.
        files: the manifest's entry of each file.
    """
    body = {"format": FORMAT, "files": files}
    write(partial / MANIFEST, json.dumps(body | {"xxh3_128": hash_json(body)}, indent=1).encode())
    sync(partial)
    if final.exists():
        remove(final)
    partial.rename(final)
    sync(final.parent)
    write_pointer(final)


def write_pointer(path: Path) -> None:
    """Makes `latest` name this checkpoint."""
    pending = path.parent / f".{LATEST}"
    write(pending, path.name.encode())
    pending.replace(path.parent / LATEST)
    sync(path.parent)


def read_pointer(folder: Path) -> str | None:
    """Returns the content of `latest`, unchecked, or None if the file is missing."""
    try:
        return (folder / LATEST).read_text(errors="replace")
    except FileNotFoundError:
        return None


def remove(path: Path) -> None:
    """Deletes a checkpoint; no reader can see a part of it."""
    doomed = make_temporary_path(path.parent, "removed", path.name)
    path.rename(doomed)
    shutil.rmtree(doomed)


def find_newest_whole(folder: Path, log: Callable[[str], None], until: int | None = None) -> Path | None:
    """Returns the newest checkpoint whose files are all present and unchanged, or None if there are no checkpoints.

    Args:
        folder: RUN/checkpoints.
        log: gets a line for each damaged checkpoint that is skipped.
        until: consider checkpoints up to this step only.

    Raises:
        ValueError: there are checkpoints, but none is whole. Starting afresh instead would lose the run's work.
    """
    candidates = [path for path in list_checkpoints(folder) if until is None or path.name <= checkpoint_name(until)]
    for path in reversed(candidates):
        faults = verify(path)
        if not faults:
            return path
        log(f"skipping checkpoint {path}: {'; '.join(faults)}")
    if candidates:
        raise ValueError(f"no whole checkpoint in {folder}; restore one, or move the run directory away to start afresh")
    return None


def verify(path: Path) -> list[str]:
    """Checks every byte of a checkpoint against its manifest; returns the faults, none for a whole checkpoint."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} is unreadable ({error})"]
    body = {key: value for key, value in manifest.items() if key != "xxh3_128"} if isinstance(manifest, dict) else {}
    if body.get("format") != FORMAT or manifest.get("xxh3_128") != hash_json(body):
        return [f"{MANIFEST} is damaged, or of another format than {FORMAT}, which this version writes and reads"]
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        faults = pool.map(lambda file: _verify_file(path / file[0], file[1]), body["files"].items())
        return [fault for fault in faults if fault]


def _verify_file(path: Path, expected: Entry) -> str | None:
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
