"""Measures the CPU time of each stage of the loader's graph, and of RandAugment here, in DALI and in timm.

    python -m benchmarks.loader.augmentation_cpu [--images 256]

The result is the CPU time of one thread in microseconds per image, for JPEGs of 500 x 375 pixels and 110 kB, cropped and resized to 224 px.
The cases take turns and the shortest time over the rounds counts. A case that begins with "…" includes the stages before it.
"""

import io
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.auto_aug import rand_augment as dali_rand_augment
from nvidia.dali.types import DALIDataType, DALIInterpType
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from benchmarks.harness import format_command, make_parser, report, run_in_turns
from data.augment.operators import CpuResizer, apply_layer, compute_operator_inputs, resize
from data.augment.randaugment import draw_rand_augment
from data.augment.sampling import draw_crops
from data.settings import parse_policy
from data.synthetic.drawings import PHOTOGRAPH
from data.synthetic.synthesize import draw_images

MODULE = "benchmarks.loader.augmentation_cpu"
ROUNDS, SIZE, BATCH = 5, 224, 64
POLICY = "rand-m9-mstd0.5-inc1"
MEAN, STD = [123.0, 116.0, 103.0], [58.0, 57.0, 57.0]


def cpu_seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def shortest_times(cases: dict[str, Callable[[], None]], count: int) -> list[dict[str, Any]]:
    """Returns a row for each case; every case processes `count` images."""
    times = run_in_turns({name: partial(cpu_seconds, run) for name, run in cases.items()}, ROUNDS, warm_up=True)
    return [{"case": name, "us_per_image": round(1e6 * min(case) / count)} for name, case in times.items()]


def dali(graph: Callable[..., Any], feeds: Sequence[Any], batches: int, **inputs: Any) -> Callable[[], None]:
    """Returns a function that runs a DALI graph over `batches` batches of the feeds; each feed has one row per image."""
    starts = itertools.cycle(range(0, batches * BATCH, BATCH))

    def feed() -> list[Any]:
        start = next(starts)
        return [rows[start : start + BATCH] for rows in feeds]

    @pipeline_def(  # type: ignore[call-overload]  # its stub lacks exec_dynamic
        batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True, enable_conditionals=True
    )
    def pipeline() -> Any:
        return graph(*fn.external_source(feed, num_outputs=len(feeds), batch=True, **inputs))

    built = pipeline()
    built.build()

    def run() -> None:
        for _ in range(batches):
            built.run()

    return run


def sliced(encoded: Any, start: Any, shape: Any) -> Any:
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", adjust_orientation=False)


def normalized(pixels: Any) -> Any:
    return fn.crop_mirror_normalize(pixels, mean=MEAN, std=STD, dtype=DALIDataType.FLOAT, output_layout="HWC")


def stage_cases(encoded: list[np.ndarray], resizer: CpuResizer) -> dict[str, Callable[[], None]]:
    """Returns the cases of decoding, cropping, resizing and normalizing, with the resize by DALI and by torch."""
    count = len(encoded)
    ids, (width, height) = np.arange(count), PHOTOGRAPH
    crops = draw_crops(0, 0, ids, np.full(count, width), np.full(count, height))
    feeds = [encoded, np.ascontiguousarray(crops[:, :2]), np.ascontiguousarray(crops[:, 2:])]
    sizes = [*feeds, np.full((count, 2), SIZE, np.int32), np.zeros(count, np.int32)]

    def with_torch(*nodes: Any) -> Any:
        return resize(sliced(*nodes[:3]), nodes[3], nodes[4], resizer)

    def with_dali(*nodes: Any) -> Any:
        return fn.resize(sliced(*nodes), size=[SIZE, SIZE], interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)

    run = partial(dali, batches=count // BATCH)
    return {
        "decode a crop, DALI": run(sliced, feeds),
        "… and resize it, DALI": run(with_dali, feeds),
        "… and resize it, torch": run(with_torch, sizes),
        "… and normalize that": run(lambda *nodes: normalized(with_torch(*nodes)), sizes),
    }


def augmentation_cases(pixels: list[np.ndarray]) -> dict[str, Callable[[], None]]:
    """Returns the cases of RandAugment by this project, DALI and timm."""
    count = len(pixels)
    never = np.zeros(count, bool)
    run = partial(dali, batches=count // BATCH, layout=["HWC"])
    layers = draw_rand_augment(0, 0, np.arange(count), parse_policy(POLICY))
    inputs = [part for layer in layers for part in compute_operator_inputs(layer, never, never, SIZE)]

    def graph(images: Any, *parts: Any) -> Any:
        for first in range(0, len(parts), 3):
            branch, matrix, value = parts[first : first + 3]
            images = apply_layer(images, branch, matrix, value, MEAN)
        return images

    photos = [Image.fromarray(image) for image in pixels]
    timm_transform = rand_augment_transform(
        POLICY, {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    )

    def with_timm() -> None:
        for photo in photos:
            timm_transform(photo)

    return {
        "nothing": run(lambda images: images, [pixels]),
        f"{POLICY}, this project": run(graph, [pixels, *inputs]),
        "rand_augment(n=2, m=9), DALI": run(lambda images: dali_rand_augment.rand_augment(images, n=2, m=9), [pixels]),
        f"{POLICY}, timm": with_timm,
    }


def main() -> None:
    options = make_parser(MODULE, __doc__)
    options.add_argument("--images", type=int, default=256, help="a multiple of 64 (%(default)s)")
    args = options.parse_args()
    torch.set_num_threads(1)
    encoded = [np.frombuffer(image, np.uint8) for image, _ in draw_images(10, args.images, 0, 0, photographs=True)]
    pixels = [np.array(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB").resize((SIZE, SIZE))) for jpeg in encoded]
    resizer = CpuResizer(1)
    rows = shortest_times(stage_cases(encoded, resizer), args.images) + shortest_times(augmentation_cases(pixels), args.images)
    resizer.close()
    packages = ["torch", "nvidia-dali-cuda130", "timm", "pillow"]
    report(args.out / "augmentation_cpu.json", format_command(MODULE, {"images": args.images}), packages, rows=rows)


if __name__ == "__main__":
    main()
