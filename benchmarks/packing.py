"""Packing beside plain tar of the same files and beside decoding alone; and what a plan for ImageNet-22K takes.

    python -m benchmarks.packing [--images 2000] [--rounds 3]
    python -m benchmarks.packing --simulate                        the plan for 14,197,122 drawn names, without files

The ways run in turn, on the same files in the page cache, and each ends with its output synced to disk; times are the smallest of
several rounds, and what counts is their ratio. CPU time is less moved by what else the machine does. The result goes to
benchmarks/results/packing.json.
"""

import argparse
import io
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import data.packing.plan
from data.common.files import sync
from data.common.results import record_result
from data.packing.images import ImageRules, convert_image
from data.packing.pack import pack
from data.packing.plan import Settings, open_plan, write_plan
from data.packing.sources import Container, Listing, Source, encode_key, make_listing
from data.packing.workers import start_workers
from data.synthetic.drawings import PATTERNS, draw_pattern

RESULT = Path(__file__).parent / "results" / "packing.json"
CLASSES, FILES = 21_841, 14_197_122  # ImageNet-22K


def draw_source(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 pixels and about 60 kB in 20 class folders; 40 pictures repeat."""
    random = np.random.default_rng(0)
    pictures = []
    for pattern in list(PATTERNS.values()) * 4:
        out = io.BytesIO()
        draw_pattern(pattern, random).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=96)
        pictures.append(out.getvalue())
    for number in range(count):
        path = folder / f"n{number % 20:08d}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % len(pictures)])


def decode(paths: list[Path]) -> None:
    for path in paths:
        convert_image(path.read_bytes(), ImageRules())


def compare(count: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_source(folder / "source", count)
        paths = sorted((folder / "source").rglob("*.JPEG"))

        def tar() -> None:
            subprocess.run(["tar", "cf", folder / "out.tar", "-C", folder, "source"], check=True)
            sync(folder / "out.tar")

        def decode_in(processes: int) -> None:
            with start_workers(processes) as run:
                list(run(decode, [paths[start : start + 50] for start in range(0, count, 50)]))

        def pack_in(processes: int) -> None:
            # Shards so small that all processes have work to the end, as they have with ImageNet's thousands of shards.
            settings = Settings(name="out", shard_bytes=sum(path.stat().st_size for path in paths) // 16)
            pack(folder / "source", folder / "out", settings, workers=processes)

        ways: dict[str, Callable[[], None]] = {"tar": tar}
        for processes in sorted({1, os.cpu_count() or 1}):
            ways[f"decode only, processes: {processes}"] = partial(decode_in, processes)
            ways[f"pack, processes: {processes}"] = partial(pack_in, processes)
        seconds: dict[str, float] = {}
        cpu: dict[str, float] = {}
        for _ in range(rounds):
            for way, function in ways.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                (folder / "out.tar").unlink(missing_ok=True)
                began, used = time.perf_counter(), cpu_seconds()
                function()
                seconds[way] = min(seconds.get(way, float("inf")), time.perf_counter() - began)
                cpu[way] = min(cpu.get(way, float("inf")), cpu_seconds() - used)
        total = sum(path.stat().st_size for path in paths)
    rows = []
    for way in ways:
        rows.append({"way": way, "images_a_second": round(count / seconds[way]), "cpu_ms_an_image": round(1000 * cpu[way] / count, 3)})
        if way.startswith("pack"):
            decoding = way.replace("pack", "decode only")
            rows[-1] |= {
                "speed_to_tar": round(seconds["tar"] / seconds[way], 3),
                "speed_to_decode_only": round(seconds[decoding] / seconds[way], 2),
                "cpu_to_decode_only": round(cpu[way] / cpu[decoding], 2),
            }
        print(*(f"{name} {value}" for name, value in rows[-1].items()), sep="   ")
    return {"images": count, "mean_bytes": total // count, "rows": rows}


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


@dataclass(frozen=True)
class Drawn(Source):
    """A source of names alone."""

    def make_lister(self, *, shard_in_key: bool = False) -> Callable[[Container], Listing]:
        return drawn_part


def drawn_part(container: Container) -> Listing:
    """Names as in ImageNet-22K's class tars, with the work that is done for each of them."""
    label = int(container.class_name[1:])
    count = FILES // CLASSES + (label < FILES % CLASSES)
    names = [f"{container.class_name}_{number}.JPEG" for number in range(count)]
    sizes = np.random.default_rng(label).integers(20_000, 200_000, count).tolist()
    files = [(name, 512 * (1 + number), size) for number, (name, size) in enumerate(zip(names, sizes, strict=True))]
    keys = [encode_key(f"{container.class_name}/{name[:-5]}") for name in names]
    return make_listing(container, files, keys, [container.class_name] * count)


class Memory:
    """The largest private memory of this process, sampled, in MB."""

    def __init__(self) -> None:
        self.most, self.ended = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, private_memory())

    def __enter__(self) -> "Memory":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()


def private_memory() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) // 1000


def simulate() -> dict[str, Any]:
    """Time and memory of a plan; what a worker's part in it takes."""
    classes = tuple(f"n{number:08d}" for number in range(CLASSES))
    source = Drawn("class tars", Path("/nowhere"), tuple(Container(f"{name}.tar", name) for name in classes), classes)
    data.packing.plan.measure_stored_share = lambda plan: 1.0  # there are no images to measure it on
    listing, listed = data.packing.plan.write_listing, 0.0

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal listed
        found = listing(*arguments, **options)
        listed = time.perf_counter()
        return found

    data.packing.plan.write_listing = timed
    before = private_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Memory() as memory:
            began = time.perf_counter()
            write_plan(folder, source, Settings(name="in22k", holdout=1), {}, map)
            planned = time.perf_counter()
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        open_plan.cache_clear()
        private = private_memory()
        began_open = time.perf_counter()
        plan = open_plan(folder)
        shard = plan.shards[2000]
        for entry in plan.order[shard.start : shard.stop].tolist():
            plan.read_key(entry), plan.read_name(entry), plan.read_label(entry)
        opened = time.perf_counter()
        result = {
            "files": len(plan),
            "shards": len(plan.shards),
            "listing_seconds_in_one_process": round(listed - began, 1),
            "order_and_shards_seconds": round(planned - listed, 1),
            "private_mb": memory.most - before,
            "plan_mb": on_disk // 10**6,
            "opening_and_a_shard_s_rows_seconds": round(opened - began_open, 2),
            "worker_private_mb": max(0, private_memory() - private),
        }
    for what, value in result.items():
        print(f"{what:36} {value}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulate", action="store_true")
    args = parser.parse_args()
    command = "python -m benchmarks.packing" + (" --simulate" if args.simulate else f" --images {args.images}")
    result = simulate() if args.simulate else compare(args.images, args.rounds)
    record_result(RESULT, command, ["numpy", "pillow", "simplejpeg"], **result)


if __name__ == "__main__":
    main()
