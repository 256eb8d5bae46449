"""Memory of one process after each of ten epochs of the full recipe's data, with an evaluation in between: it must not grow.

    python -m benchmarks.loader.memory [--images 512] [--image-size 224] [--micro-batch 64]

Batches are dropped as soon as they come, so what is left is what the loaders, DALI and its decoders keep. The first epochs fill
buffers that never shrink; what counts is growth after them. The result goes to benchmarks/results/memory.json.
"""

import argparse
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data.common.placement import Placement
from data.common.results import record_result
from data.dataset.index import Index
from data.loader.loaders import EvalLoader, TrainLoader
from data.loader.order import SampleOrder
from data.loader.pipeline import Batch
from data.settings import DataConfig
from data.synthetic.synthesize import synthesize

RESULT = Path(__file__).parents[1] / "results" / "memory.json"
EPOCHS = 10


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def epochs(
    train: Index, val: Index, *, image_size: int, micro_batch: int, use: Callable[[Batch], None] = lambda batch: None
) -> Iterator[int]:
    """Resident bytes after each epoch and the evaluation that follows it. `use` is given every batch of training."""
    order = SampleOrder(train.shard_start, seed=0, global_batch=micro_batch)
    recipe = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}
    settings = DataConfig(image_size=image_size, decode_threads=1, read_threads=2, **recipe)
    placement = Placement(torch.device("cpu"), micro_batch)
    with (
        TrainLoader(train, order, settings, placement, end=EPOCHS * order.steps_per_epoch) as loader,
        EvalLoader(val, settings, placement) as evaluation,
    ):
        for number, batch in enumerate(loader, 1):
            use(batch)
            del batch
            if number % order.steps_per_epoch == 0:
                for _ in evaluation:
                    pass
                yield resident_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--micro-batch", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train, val = synthesize(Path(folder), train=args.images, val=args.images // 4)
        sizes = []
        for size in epochs(train, val, image_size=args.image_size, micro_batch=args.micro_batch):
            sizes.append(round(size / 1e6, 1))
            print(f"epoch {len(sizes):2}  {sizes[-1]:7.1f} MB", flush=True)
    batch_mb = args.micro_batch * 3 * args.image_size**2 * 4 / 1e6
    print(f"growth from epoch 3 to {EPOCHS}: {sizes[-1] - sizes[2]:.1f} MB; one batch is {batch_mb:.1f} MB")
    command = f"python -m benchmarks.loader.memory --images {args.images} --image-size {args.image_size} --micro-batch {args.micro_batch}"
    record_result(RESULT, command, ["torch", "nvidia-dali-cuda130"], batch_mb=batch_mb, epochs_mb=sizes)


if __name__ == "__main__":
    main()
