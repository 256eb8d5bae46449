"""An epoch from an S3 server on this machine beside the same epoch from a local folder: with the cache empty, and with it full.

    python -m benchmarks.loader.remote [--images 9000] [--image-size 224]

Measured twice: reading alone (order, augmentation parameters and bytes, as the training thread is given them) and with DALI's
decoding. The server (moto) is a process of its own that shares this machine's cores, so an empty cache also pays for it. All
ways take turns; times are the smallest of several rounds, and what counts is their ratio to the folder. The result goes to
benchmarks/results/remote.json.
"""

import argparse
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import torch

from data.common.placement import Placement
from data.common.results import record_result
from data.dataset.index import Index, open_index
from data.dataset.shards import Sample, write_dataset
from data.loader.loaders import TrainLoader
from data.loader.order import SampleOrder
from data.settings import DataConfig
from data.synthetic.drawings import PATTERNS
from data.synthetic.synthesize import draw_images

RESULT = Path(__file__).parents[1] / "results" / "remote.json"
URL = "s3://bucket/train"
ROUNDS = 3


def dataset(folder: Path, count: int) -> Index:
    """300 drawn images over and over, in shards of 4 MiB."""
    folder.mkdir()
    drawn = itertools.cycle(list(draw_images(10, 300, 0, 0)))
    samples = (Sample(f"{number:09d}", *next(drawn)) for number in range(count))
    return write_dataset(folder, samples, list(PATTERNS), shard_bytes=4 << 20, name="train")


def start_server() -> subprocess.Popen:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "-",
        "AWS_SECRET_ACCESS_KEY": "-",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return server
        except ConnectionRefusedError:
            time.sleep(0.1)


def epoch(index: Index, image_size: int, cache_gb: float, decode: bool) -> tuple[float, float]:
    """Seconds of an epoch in one process, and seconds that its reading threads waited for shards."""
    order = SampleOrder(index.shard_start, seed=0, global_batch=64, lanes=8, window=256)
    settings = DataConfig(image_size=image_size, decode_threads=1, read_threads=2, cache_gb=cache_gb)
    device = torch.device("cpu")
    began = time.perf_counter()
    with TrainLoader(index, order, settings, Placement(device, micro_batch=64), end=order.steps_per_epoch) as loader:
        for _ in loader if decode else range(order.steps_per_epoch):
            if not decode:
                loader._feed()
                loader._inside.clear()
        return time.perf_counter() - began, loader.waited_for_shards_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=9000)
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    server = start_server()
    rows = []
    try:
        local = dataset(scratch / "train", args.images)
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        store.put(str(local.folder), "bucket/train", recursive=True)
        bytes_ = int(local.shard_bytes.sum())
        cache_gb = 2.2 * bytes_ / 1e9

        def empty(decode: bool) -> tuple[float, float]:
            shutil.rmtree(scratch / "cache", ignore_errors=True)
            return epoch(open_index(URL, str(scratch / "cache")), args.image_size, cache_gb, decode)

        def full(decode: bool) -> tuple[float, float]:
            return epoch(open_index(URL, str(scratch / "cache")), args.image_size, cache_gb, decode)

        ways: dict[str, Callable[[bool], tuple[float, float]]] = {
            "folder": lambda decode: epoch(local, args.image_size, cache_gb, decode),
            "S3, empty cache": empty,
            "S3, full cache": full,
        }
        print(f"{args.images} images, {len(local.shards)} shards, {bytes_ / 1e6:.0f} MB")
        for decode in (False, True):
            best = {name: min(result) for name, result in _in_turn(ways, decode).items()}
            for name, (seconds, waited) in best.items():
                ratio = best["folder"][0] / seconds
                what = "with decoding" if decode else "reading alone"
                rows.append({"what": what, "way": name, "images_per_s": round(args.images / seconds), "ratio": round(ratio, 2)})
                print(f"{what:14} {name:16} {args.images / seconds:8.0f} images/s   {ratio:5.2f} of the folder's   waited {waited:.2f} s")
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(scratch)
    command = f"python -m benchmarks.loader.remote --images {args.images} --image-size {args.image_size}"
    record_result(RESULT, command, ["nvidia-dali-cuda130", "s3fs", "torch"], rows=rows)


def _in_turn(ways: dict[str, Callable[[bool], tuple[float, float]]], decode: bool) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found[name].append(way(decode))
    return found


if __name__ == "__main__":
    main()
