"""The cache keeps its bound, writes a file once, and survives killed processes."""

import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from data.storage.cache import Cache, choose_cache_root, release
from data.storage.remote import Stopped

SIZE = 10_000


def writer_of(letter: str) -> Callable[[Path], None]:
    return lambda part: part.write_bytes(letter.encode() * SIZE) and None


def fill(cache: Cache, letters: str) -> None:
    """Pins and releases files, one after another."""
    for letter in letters:
        release(cache.pin(f"{letter}.tar", SIZE, writer_of(letter)))


def shards(cache: Cache) -> str:
    return "".join(sorted(path.stem for path in cache.folder.glob("*.tar")))


def must_not_write(part: Path) -> None:
    raise AssertionError("is there already")


def test_file_is_written_once_and_appears_whole(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "down", bound=10 * SIZE)

    def write(part: Path) -> None:
        assert part.stat().st_size == SIZE  # the room is allocated before the download
        assert not (cache.folder / "a.tar").exists()
        writer_of("a")(part)

    one = cache.pin("a.tar", SIZE, write)
    two = cache.pin("a.tar", SIZE, must_not_write)
    assert os.pread(one, 3, 5) == os.pread(two, 3, SIZE - 3) == b"aaa"
    release(one)
    release(two)
    assert not list(cache.folder.glob("*.part"))


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=SIZE)

    def fails(part: Path) -> None:
        part.write_bytes(b"half")
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        cache.pin("a.tar", SIZE, fails)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    fill(cache, "a")


def test_least_recently_used_shard_is_evicted_and_pinned_ones_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=4 * SIZE)
    fill(cache, "abcd")
    in_use = cache.pin("a.tar", SIZE, must_not_write)
    fill(cache, "b")  # used again: now c is the oldest
    fill(cache, "e")
    assert shards(cache) == "abde"
    fill(cache, "f")
    assert shards(cache) == "abef"
    assert os.pread(in_use, 1, 0) == b"a"
    release(in_use)
    fill(cache, "gh")  # a was released last
    assert shards(cache) == "afgh"


def test_index_is_never_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=SIZE)
    path = cache.keep("index.npy", writer_of("i"))
    assert cache.keep("index.npy", must_not_write) == path
    fill(cache, "ab")
    assert path.read_bytes() == b"i" * SIZE
    assert shards(cache) == "b"


def test_pin_waits_while_the_cache_is_full(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=2 * SIZE)
    first, second = (cache.pin(f"{letter}.tar", SIZE, writer_of(letter)) for letter in "ab")
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(cache.pin("c.tar", SIZE, writer_of("c"))))
    thread.start()
    time.sleep(0.2)
    assert not found
    assert shards(cache) == "ab"
    release(first)
    thread.join(10)
    assert shards(cache) == "bc"
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped):
        cache.pin("d.tar", SIZE, writer_of("d"), stop)
    release(second)
    release(found[0])


SLOW = """
import sys, time
from pathlib import Path
from data.storage.cache import Cache
cache, size, go_on = Cache(Path(sys.argv[1]), bound=30_000), 10_000, Path(sys.argv[2])
def write(part):
    part.write_bytes(b"y" * (size // 2))
    print("writing", flush=True)
    while not go_on.exists():
        time.sleep(0.01)
    part.write_bytes(b"x" * size)
with cache.reserve(size, size):
    cache.pin("x.tar", size, write)
    print("has it", flush=True)
"""


def test_file_is_written_once_although_a_writer_is_killed(tmp_path: Path) -> None:
    folder, go_on = tmp_path / "cache", tmp_path / "go_on"
    command = [sys.executable, "-c", SLOW, str(folder), str(go_on)]
    with ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) for _ in range(3)]
        try:
            while len(list(folder.glob("reserved-*"))) < 3:
                time.sleep(0.01)
            time.sleep(0.3)
            writing = [process for process in processes if select.select([process.stdout], [], [], 0)[0]]
            assert len(writing) == 1  # the others wait
            with pytest.raises(ValueError, match="have reserved"), Cache(folder, bound=3 * SIZE).reserve(1, 1):
                pass
            writing[0].kill()
            others = [process for process in processes if process is not writing[0]]
            assert len(select.select([process.stdout for process in others], [], [], 10)[0]) == 1  # one of them takes over
            go_on.touch()
            assert sorted(process.communicate(timeout=30)[0] for process in others) == ["has it\n", "writing\nhas it\n"]
            assert [process.returncode for process in others] == [0, 0]
        finally:
            for process in processes:
                process.kill()
    assert (folder / "x.tar").read_bytes() == b"x" * SIZE
    with Cache(folder, bound=3 * SIZE).reserve(3 * SIZE, 3 * SIZE):  # killed processes have no reservations
        assert len(list(folder.glob("reserved-*"))) == 1


def test_partial_file_of_a_killed_process_is_evicted(tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").write_bytes(b"a" * SIZE)
    cache = Cache(tmp_path, bound=2 * SIZE)
    fill(cache, "bc")
    assert shards(cache) == "bc"
    assert not list(tmp_path.glob("*.part"))


def test_reservations_never_exceed_the_bound(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=100)
    with cache.reserve(30, 60) as one:
        assert one == 60
        with cache.reserve(30, 60) as two:
            assert two == 30
            with pytest.raises(ValueError, match=r"too small for all processes that use it.*Raise data\.cache_gb"), cache.reserve(30, 60):
                pass
        with cache.reserve(40, 40) as three:
            assert three == 40
    assert not list(tmp_path.glob("reserved-*"))


def test_disk_too_small_for_the_bound_is_an_error(tmp_path: Path) -> None:
    cache = Cache(tmp_path, bound=1 << 60)
    cache.check_disk(SIZE)
    with pytest.raises(ValueError, match=r"its disk has room for .* less than data\.cache_gb"):
        cache.check_disk(1 << 60)


FULL_DISK = """
import errno, sys
from pathlib import Path
from data.storage.cache import Cache, release
cache = Cache(Path(sys.argv[1]), bound=1e9)
def pin(name, megabytes):
    return cache.pin(name, megabytes << 20, lambda part: part.write_bytes(bytes(megabytes << 20)))
release(pin("a.tar", 3))
kept = pin("b.tar", 3)
release(pin("c.tar", 4))            # a must go, by the disk, not by the bound
print(sorted(path.name for path in cache.folder.glob("*.tar*")))
try:
    pin("d.tar", 6)
except ValueError as error:
    print(error)
print(sorted(path.name for path in cache.folder.glob("*.tar*")))
"""


def test_full_disk_evicts_and_then_is_an_error(tmp_path: Path) -> None:
    """On a real file system of 8 MB."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    mount = 'mount -t tmpfs -o size=8m none "$0" && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path)]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    done = subprocess.run([*inside, sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    first, error, last = done.stdout.splitlines()
    assert first == "['b.tar', 'c.tar']"
    assert "d.tar.part: no room for 0.01 GB beside 0.00 GB of shards in use (No space left on device); lower data.cache_gb" in error
    assert last == "['b.tar']"


def test_cache_folder_is_configured_or_scratch_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", "/job")
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert choose_cache_root("/here") == Path("/here")
    assert choose_cache_root(None).parent == Path("/job")
    monkeypatch.delenv("SLURM_TMPDIR")
    assert choose_cache_root(None).parent == Path("/scratch")
    monkeypatch.delenv("TMPDIR")
    with pytest.raises(ValueError, match=r"set data\.cache=FOLDER"):
        choose_cache_root(None)
