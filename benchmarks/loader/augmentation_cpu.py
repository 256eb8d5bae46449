"""What each stage of the loader's graph costs on a CPU, beside DALI's own way to do it and Pillow's.

    python -m benchmarks.loader.augmentation_cpu [--images 256]

CPU time of one thread, in microseconds an image, of JPEGs of 500 x 375 pixels and 110 kB, cropped and resized to 224 px: the smallest
of several rounds in which all take turns. DALI's stages are what they add to the stages before them. The result goes to
benchmarks/results/augmentation_cpu.json.
"""

import argparse
import io
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.auto_aug import rand_augment as dali_rand_augment
from nvidia.dali.types import DALIDataType, DALIInterpType
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from data.augment.operators import CpuResizer, apply_layer, compute_operator_inputs, resize
from data.augment.randaugment import Layer, Operator, draw_rand_augment, parse_policy
from data.augment.sampling import draw_crops
from data.common.results import record_result
from data.synthetic.drawings import PHOTOGRAPH
from data.synthetic.synthesize import draw_images

RESULT = Path(__file__).parents[1] / "results" / "augmentation_cpu.json"
ROUNDS, SIZE, BATCH = 5, 224, 64
POLICY = "rand-m9-mstd0.5-inc1"
MEAN, STD = [123.0, 116.0, 103.0], [58.0, 57.0, 57.0]


def smallest_times(ways: dict[str, Callable[[], None]], images_each: int) -> dict[str, float]:
    """Microseconds of CPU time an image, of each."""
    found: dict[str, float] = {}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn > 0:  # the first warms up
                found[name] = min(found.get(name, float("inf")), 1e6 * (time.process_time() - began) / images_each)
    return found


def dali(graph: Callable[..., Any], feeds: Sequence[Sequence[Any]], batches: int, **inputs: Any) -> Callable[[], None]:
    """Runs a graph over `batches` batches. `feeds` are what its inputs are given: of each a sequence with a row an image."""
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
    return lambda: [built.run() for _ in range(batches)] and None


def sliced(encoded: Any, start: Any, shape: Any) -> Any:
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", adjust_orientation=False)


def normalised(pixels: Any) -> Any:
    return fn.crop_mirror_normalize(pixels, mean=MEAN, std=STD, dtype=DALIDataType.FLOAT, output_layout="HWC")


def stages(encoded: list[np.ndarray], resizer: CpuResizer) -> dict[str, Callable[[], None]]:
    count = len(encoded)
    ids, (width, height) = np.arange(count), PHOTOGRAPH
    crops = draw_crops(0, 0, ids, np.full(count, width), np.full(count, height))
    feeds = [encoded, np.ascontiguousarray(crops[:, :2]), np.ascontiguousarray(crops[:, 2:])]
    sizes = [*feeds, np.full((count, 2), SIZE, np.int32), np.zeros(count, np.int32)]

    def by_pillow(resized: bool) -> None:
        for one, (y, x, h, w) in zip(encoded, crops.tolist(), strict=True):
            image = Image.open(io.BytesIO(one.tobytes())).convert("RGB")
            if resized:
                image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    def by_torch(*nodes: Any) -> Any:
        return resize(sliced(*nodes[:3]), nodes[3], nodes[4], resizer)

    def by_dali(*nodes: Any) -> Any:
        return fn.resize(sliced(*nodes), size=[SIZE, SIZE], interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)

    run = partial(dali, batches=count // BATCH)
    return {
        "decode a crop, DALI": run(sliced, feeds),
        "… and resize it, DALI": run(by_dali, feeds),
        "… and resize it, torch": run(by_torch, sizes),
        "… and normalise that": run(lambda *nodes: normalised(by_torch(*nodes)), sizes),
        "decode, Pillow": partial(by_pillow, False),
        "decode, crop and resize, Pillow": partial(by_pillow, True),
    }


def augmentations(pixels: list[np.ndarray]) -> dict[str, Callable[[], None]]:
    """RandAugment, and each of its operators at the arguments that are drawn for it."""
    count = len(pixels)
    never = np.zeros(count, bool)
    run = partial(dali, batches=count // BATCH, layout=["HWC"])

    def layered(layers: list[Layer]) -> Callable[[], None]:
        inputs = [part for layer in layers for part in compute_operator_inputs(layer, never, never, SIZE)]

        def graph(*nodes: Any) -> Any:
            result, *parts = nodes
            for first in range(0, len(parts), 3):
                result = apply_layer(result, *parts[first : first + 3], MEAN)
            return result

        return run(graph, [pixels, *inputs]) if inputs else run(lambda *nodes: nodes[0], [pixels])

    drawn = draw_rand_augment(0, 0, np.arange(50_000), parse_policy(POLICY))
    photos = [Image.fromarray(one) for one in pixels]
    by_timm = rand_augment_transform(
        POLICY, {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    )
    ways: dict[str, Callable[[], None]] = {
        "nothing": layered([]),
        f"{POLICY}, here": layered([Layer(layer.operator[:count], layer.argument[:count]) for layer in drawn]),
        "rand_augment(n=2, m=9), DALI's": run(lambda *nodes: dali_rand_augment.rand_augment(nodes[0], n=2, m=9), [pixels]),
        f"{POLICY}, timm": lambda: [by_timm(photo) for photo in photos] and None,
    }
    for operator in list(Operator)[1:]:
        own = np.resize(np.flatnonzero(drawn[0].operator == operator), count)
        ways[f"{operator.name.lower()}, here"] = layered([Layer(drawn[0].operator[own], drawn[0].argument[own])])
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="a multiple of 64 (%(default)s)")
    count = parser.parse_args().images
    torch.set_num_threads(1)
    encoded = [np.frombuffer(image, np.uint8) for image, _ in draw_images(10, count, 0, 0, photographs=True)]
    pixels = [np.array(Image.open(io.BytesIO(one.tobytes())).convert("RGB").resize((SIZE, SIZE))) for one in encoded]
    resizer = CpuResizer(1)
    found = smallest_times(stages(encoded, resizer), count) | smallest_times(augmentations(pixels), count)
    resizer.close()
    for name, microseconds in found.items():
        print(f"{name:40}{microseconds:8.0f} us")
    rounded = {name: round(microseconds) for name, microseconds in found.items()}
    packages = ["torch", "nvidia-dali-cuda130", "timm", "pillow"]
    record_result(RESULT, f"python -m benchmarks.loader.augmentation_cpu --images {count}", packages, microseconds_an_image=rounded)


if __name__ == "__main__":
    main()
