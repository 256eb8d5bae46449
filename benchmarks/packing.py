"""Compares packing with plain tar of the same files and with decoding alone; measures a plan for ImageNet-22K.

    python -m benchmarks.packing [--images 2000] [--rounds 3]
    python -m benchmarks.packing --simulate                        # a plan for 14,197,122 generated names, without files

The cases take turns on the same files in the page cache, and each ends with its output synced to disk. The shortest time over the rounds
counts, and the ratios matter most. CPU time depends less on other load of the machine.
"""

import io
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import data.packing.plan
from benchmarks.harness import format_command, make_parser, report, run_in_turns, time_call
from data.common.files import sync
from data.packing.images import ImageRules, convert_image
from data.packing.pack import pack
from data.packing.plan import Settings, open_plan, write_plan
from data.packing.sources import Container, Listing, Source, encode_key, make_listing
from data.packing.workers import start_workers
from data.synthetic.drawings import PATTERNS, draw_pattern

MODULE = "benchmarks.packing"
CLASSES, FILES = 21_841, 14_197_122  # ImageNet-22K


def draw_source(folder: Path, count: int) -> list[Path]:
    """Draws `count` JPEGs of 500 x 375 pixels and about 60 kB, copies of 40 pictures, in 20 class folders."""
    random = np.random.default_rng(0)
    pictures, paths = [], []
    for pattern in list(PATTERNS.values()) * 4:
        out = io.BytesIO()
        draw_pattern(pattern, random).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=96)
        pictures.append(out.getvalue())
    for number in range(count):
        paths.append(folder / f"n{number % 20:08d}" / f"{number}.JPEG")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(pictures[number % len(pictures)])
    return paths


def decode(paths: list[Path]) -> None:
    for path in paths:
        convert_image(path.read_bytes(), ImageRules())


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def compare(count: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for tar, and rows for decoding and packing in one process and in one for each core."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = draw_source(folder / "source", count)
        total = sum(path.stat().st_size for path in paths)

        def tar() -> None:
            subprocess.run(["tar", "cf", folder / "out.tar", "-C", folder, "source"], check=True)
            sync(folder / "out.tar")

        def decode_only(processes: int) -> None:
            with start_workers(processes) as run:
                list(run(decode, [paths[start : start + 50] for start in range(0, count, 50)]))

        def pack_source(processes: int) -> None:
            # Shards are so small that all processes have work until the end, as with ImageNet's thousands of shards.
            pack(folder / "source", folder / "out", Settings(name="out", shard_bytes=total // 16), workers=processes)

        def timed(run: Callable[[], None]) -> tuple[float, float]:
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out.tar").unlink(missing_ok=True)
            used = cpu_seconds()
            return time_call(run), cpu_seconds() - used

        cases: dict[str, Callable[[], None]] = {"tar": tar}
        for processes in sorted({1, os.cpu_count() or 1}):
            cases[f"decode only, processes: {processes}"] = partial(decode_only, processes)
            cases[f"pack, processes: {processes}"] = partial(pack_source, processes)
        times = run_in_turns({name: partial(timed, run) for name, run in cases.items()}, rounds)
    wall, cpu = ({name: min(pair[kind] for pair in pairs) for name, pairs in times.items()} for kind in (0, 1))
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows.append({"case": case, "images_per_s": count / wall[case], "cpu_ms_per_image": 1000 * cpu[case] / count})
        if case.startswith("pack"):
            decoding = case.replace("pack", "decode only")
            rows[-1] |= {
                "speed_to_tar": wall["tar"] / wall[case],
                "speed_to_decode_only": wall[decoding] / wall[case],
                "cpu_to_decode_only": cpu[case] / cpu[decoding],
            }
    return rows


@dataclass(frozen=True)
class GeneratedNames(Source):
    """A source of names without files."""

    def make_lister(self, *, shard_in_key: bool = False) -> Callable[[Container], Listing]:
        return generated_part


def generated_part(container: Container) -> Listing:
    """Lists names as in ImageNet-22K's class tars, at the cost of listing the members of a real tar."""
    label = int(container.class_name[1:])
    count = FILES // CLASSES + (label < FILES % CLASSES)
    names = [f"{container.class_name}_{number}.JPEG" for number in range(count)]
    sizes = np.random.default_rng(label).integers(20_000, 200_000, count).tolist()
    files = [(name, 512 * (1 + number), size) for number, (name, size) in enumerate(zip(names, sizes, strict=True))]
    keys = [encode_key(f"{container.class_name}/{name[:-5]}") for name in names]
    return make_listing(container, files, keys, [container.class_name] * count)


def simulate() -> list[dict[str, Any]]:
    """Measures time, memory and size of a plan for ImageNet-22K."""
    classes = tuple(f"n{number:08d}" for number in range(CLASSES))
    source = GeneratedNames("class tars", Path("/nowhere"), tuple(Container(f"{name}.tar", name) for name in classes), classes)
    data.packing.plan.measure_size_ratio = lambda plan: 1.0  # there are no images to measure the ratio on
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        duration = time_call(lambda: write_plan(folder, source, Settings(name="in22k", holdout=1), {}, map))
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        plan = open_plan(folder)
        figures = {
            "files": len(plan),
            "shards": len(plan.shards),
            "seconds to list and plan in one process": duration,
            "resident MB at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
            "MB of the plan on disk": on_disk / 1e6,
        }
    return [{"figure": figure, "value": value} for figure, value in figures.items()]


def main() -> None:
    options = make_parser(MODULE, __doc__)
    options.add_argument("--images", type=int, default=2000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--simulate", action="store_true")
    args = options.parse_args()
    command = format_command(MODULE, {"simulate": True} if args.simulate else {"images": args.images, "rounds": args.rounds})
    rows = simulate() if args.simulate else compare(args.images, args.rounds)
    report(args.out / "packing.json", command, ["numpy", "pillow", "simplejpeg"], rows=rows)


if __name__ == "__main__":
    main()
