"""What a save costs: training's wait beside a plain copy of the same bytes, the background write beside a plain sequential write of them.

    python -m benchmarks.checkpoint [--model van_b6] [--rounds 8] [--folder FOLDER]

One rank, ZeRO-1, fp32 weights and both moments, on the CPU; FOLDER (default: a temporary one) decides which disk is measured. The
ways run in turn, each ends with its bytes synced to the disk, and every file is removed again. A round's ratio compares what ran one
after the other; the medians of the rounds count. The result goes to benchmarks/results/checkpoint.json.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.common.results import record_result
from launch.__main__ import free_port
from pretrain import checkpoint
from pretrain import config as settings
from pretrain.engine import distributed
from pretrain.engine.batch_stats import BatchStats
from pretrain.engine.engine import build_engine
from pretrain.model.build import build_model
from pretrain.run.metrics import RunLog

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
BLOCK = 8 << 20


class Records(RunLog):
    """Keeps the last record."""

    def __init__(self) -> None:
        super().__init__(None)
        self.last: dict[str, Any] = {}

    def record(self, kind: str, **values: Any) -> None:
        self.last = {"kind": kind, **values}


def plain_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    began = time.monotonic()
    target.copy_(source)
    return time.monotonic() - began


def plain_write(path: Path, content: torch.Tensor) -> float:
    """Seconds of writing one file, block after block, and syncing it."""
    os.sync()
    view = content.numpy().data
    began = time.monotonic()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for start in range(0, len(view), BLOCK):
        os.write(descriptor, view[start : start + BLOCK])
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.monotonic() - began
    path.unlink()
    return seconds


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    config = settings.from_dict(
        {
            "name": "bench", "global_batch": 2, "epochs": 1.0, "model": {"name": name, "classes": 21841}, "data": {"train": "unused"},
            "optim": {"lr": 1e-3}, "engine": {"micro_batch": 2, "device": "cpu"},
        }
    )  # fmt: skip
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    distributed.start(config.engine)
    model = build_model(config)
    engine = build_engine(config, model, 1)
    log = Records()
    lock = checkpoint.hold(folder / "run", log.line)
    stats = BatchStats(model, 0.0)
    retention = checkpoint.Retention(1)
    checkpoints = checkpoint.Checkpoints(folder / "run" / "checkpoints", engine, stats, retention=retention, lock=lock, log=log)
    source = torch.empty(checkpoints.bytes, dtype=torch.uint8).random_()
    target = torch.empty_like(source).fill_(0)

    def save(step: int) -> dict[str, Any]:
        os.sync()
        checkpoints.save({"step": step, "identity": {}, "evaluation": None})
        checkpoints.close()
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:09d}")
        return log.last

    rows: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        copy_s = plain_copy(source, target)
        # By turns first, so that neither always meets what the other has left the disk to do.
        if turn % 2:
            write_s = plain_write(folder / "plain", source)
            saved = save(turn)
        else:
            saved = save(turn)
            write_s = plain_write(folder / "plain", source)
        if turn == 0:  # the first warms up
            continue
        rows.append(
            {
                "plain_copy_s": round(copy_s, 3), "blocked_s": round(saved["blocked_s"], 3),
                "plain_write_mb_per_s": round(checkpoints.bytes / 1e6 / write_s), "save_mb_per_s": round(saved["mb_per_s"]),
                "blocked_to_copy": round(saved["blocked_s"] / copy_s, 2),
                "save_to_plain_write": round(saved["mb_per_s"] * 1e6 * write_s / checkpoints.bytes, 2),
            }
        )  # fmt: skip
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep="   ", flush=True)
    lock.release()
    distributed.stop()
    medians = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
    print("medians:", *(f"{key} {value}" for key, value in medians.items()), sep="   ")
    return {"state_mb": round(checkpoints.bytes / 1e6), "medians": medians, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="van_b6")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.model, Path(folder), args.rounds)
    where = f" --folder {args.folder}" if args.folder else ""
    record_result(
        RESULT, f"python -m benchmarks.checkpoint --model {args.model} --rounds {args.rounds}{where}", ["torch", "deepspeed"], **result
    )


if __name__ == "__main__":
    main()
