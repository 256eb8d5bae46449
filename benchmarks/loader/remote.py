"""Speed of an epoch from an S3 server on this machine, with an empty and with a full cache, relative to the same epoch from a folder.

    python -m benchmarks.loader.remote [--images 9000] [--image-size 224]

Measured twice: reading alone (order, augmentation parameters and bytes, as the training thread gets them) and with DALI's decoding. The
server (moto) is a process of its own that shares this machine's cores, so an epoch with an empty cache also pays for the server. The cases
take turns. The shortest time over the rounds counts, and the ratios matter most.
"""

import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import torch

from benchmarks.harness import command_line, in_turns, parser, report
from data.common.placement import Placement
from data.dataset.index import Index, open_index
from data.dataset.shards import Sample, write_dataset
from data.loader.loaders import TrainLoader
from data.loader.order import SampleOrder
from data.settings import DataConfig
from data.synthetic.drawings import PATTERNS
from data.synthetic.synthesize import draw_images

MODULE = "benchmarks.loader.remote"
URL = "s3://bucket/train"
ROUNDS = 3


def write_images(folder: Path, count: int) -> Index:
    """Writes 300 drawn images, repeated, to shards of 4 MiB."""
    folder.mkdir()
    drawn = itertools.cycle(list(draw_images(10, 300, 0, 0)))
    samples = (Sample(f"{number:09d}", *next(drawn)) for number in range(count))
    return write_dataset(folder, samples, list(PATTERNS), shard_bytes=4 << 20, name="train")


@contextmanager
def s3_server() -> Iterator[None]:
    """Runs an S3 server and points this process's S3 clients to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "-", "AWS_SECRET_ACCESS_KEY": "-"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


def epoch(index: Index, image_size: int, cache_gb: float, decode: bool) -> tuple[float, float]:
    """Returns the seconds of an epoch in one process, and the seconds that its reading threads waited for shards."""
    order = SampleOrder(index.shard_start, seed=0, global_batch=64, lanes=8, window=256)
    settings = DataConfig(image_size=image_size, decode_threads=1, read_threads=2, cache_gb=cache_gb)
    start = time.perf_counter()
    placement = Placement(torch.device("cpu"), micro_batch=64)
    with TrainLoader(index, order, settings, placement, end=order.steps_per_epoch) as loader:
        for _ in loader if decode else range(order.steps_per_epoch):
            if not decode:
                loader._feed()
                loader._inside.clear()
        return time.perf_counter() - start, loader.waited_for_shards_s


def measure(scratch: Path, count: int, image_size: int) -> list[dict[str, Any]]:
    """Returns a row for each case, first reading alone, then with decoding."""
    local = write_images(scratch / "train", count)
    store = fsspec.filesystem("s3")
    store.mkdir("bucket")
    store.put(str(local.folder), "bucket/train", recursive=True)
    cache, cache_gb = scratch / "cache", 2.2e-9 * int(local.shard_bytes.sum())

    def from_s3(decode: bool, *, empty: bool) -> tuple[float, float]:
        if empty:
            shutil.rmtree(cache, ignore_errors=True)
        return epoch(open_index(URL, str(cache)), image_size, cache_gb, decode)

    rows = []
    for decode in (False, True):
        cases = {
            "S3, empty cache": partial(from_s3, decode, empty=True),
            "S3, full cache": partial(from_s3, decode, empty=False),
            "folder": partial(epoch, local, image_size, cache_gb, decode),
        }
        fastest = {case: min(times) for case, times in in_turns(cases, ROUNDS).items()}
        for case, (duration, waited) in fastest.items():
            rates = {"images_per_s": count / duration, "to_folder": fastest["folder"][0] / duration, "waited_for_shards_s": waited}
            rows.append({"epoch": "with decoding" if decode else "reading alone", "case": case, **rates})
    return rows


def main() -> None:
    options = parser(MODULE, __doc__)
    options.add_argument("--images", type=int, default=9000)
    options.add_argument("--image-size", type=int, default=224)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch, s3_server():
        rows = measure(Path(scratch), args.images, args.image_size)
    command = command_line(MODULE, {"images": args.images, "image_size": args.image_size})
    report(args.out / "remote.json", command, ["nvidia-dali-cuda130", "s3fs", "torch"], rows=rows)


if __name__ == "__main__":
    main()
