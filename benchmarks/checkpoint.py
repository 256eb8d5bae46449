"""Measures the cost of saving a checkpoint: blocking time against a plain copy, background write against a plain write.

    python -m benchmarks.checkpoint [--model van_b6] [--rounds 8] [--folder FOLDER]

One rank, ZeRO-1, fp32 weights and both moments, on the CPU; FOLDER (default: a temporary one) selects the disk. The three measurements
take turns, each write is synced to the disk, and every file is removed again. Ratios compare measurements of the same round. The result is
the medians over the rounds.
"""

import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import format_command, make_parser, report, run_in_turns, time_call
from launch.__main__ import free_port
from pretrain import checkpoint
from pretrain import config as settings
from pretrain.engine import distributed
from pretrain.engine.batch_stats import BatchStats
from pretrain.engine.engine import build_engine
from pretrain.model.build import build_model
from pretrain.run.log import RunLog

MODULE = "benchmarks.checkpoint"
BLOCK = 8 << 20


class LastRecord(RunLog):
    """A run log that keeps only the last record."""

    def __init__(self) -> None:
        super().__init__(None)
        self.last: dict[str, Any] = {}

    def record(self, kind: str, **values: Any) -> None:
        self.last = {"kind": kind, **values}


def plain_write(path: Path, content: torch.Tensor) -> float:
    """Writes and syncs one file block by block; returns the seconds."""
    view = content.numpy().data

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(view), BLOCK):
                file.write(view[start : start + BLOCK])
            os.fsync(file.fileno())

    os.sync()
    duration = time_call(write)
    path.unlink()
    return duration


def measure(model_name: str, folder: Path, rounds: int) -> tuple[int, list[dict[str, float]]]:
    """Returns the size of a checkpoint in bytes, and a row per round."""
    config = settings.from_dict(
        {
            "name": "bench", "global_batch": 2, "epochs": 1.0, "model": {"name": model_name, "classes": 21841}, "data": {"train": "unused"},
            "optim": {"lr": 1e-3}, "engine": {"micro_batch": 2, "device": "cpu"},
        }
    )  # fmt: skip
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    distributed.start(config.engine)
    model = build_model(config)
    engine = build_engine(config, model, 1)
    log = LastRecord()
    lock = checkpoint.lock_run(folder / "run", log.line)
    stats = BatchStats(model, 0.0)
    saved = folder / "run" / "checkpoints"
    checkpoints = checkpoint.Checkpoints(saved, engine, stats, retention=checkpoint.Retention(1), lock=lock, log=log)
    size = checkpoints.bytes
    source = torch.empty(size, dtype=torch.uint8).random_()
    target = torch.empty_like(source).fill_(0)

    def copy() -> dict[str, float]:
        return {"plain_copy_s": time_call(lambda: target.copy_(source))}

    def write() -> dict[str, float]:
        return {"plain_write_mb_per_s": size / 1e6 / plain_write(folder / "plain", source)}

    def save() -> dict[str, float]:
        os.sync()
        checkpoints.save({"step": 1, "identity": {}, "evaluation": None})
        checkpoints.close()
        shutil.rmtree(saved / "step-000000001")
        return {"blocked_s": log.last["blocked_s"], "save_mb_per_s": log.last["mb_per_s"]}

    results = run_in_turns({"copy": copy, "save": save, "write": write}, rounds, warm_up=True)
    lock.release()
    distributed.stop()
    rows = [copied | saving | writing for copied, saving, writing in zip(*results.values(), strict=True)]
    for row in rows:
        row["blocked_to_copy"] = row["blocked_s"] / row["plain_copy_s"]
        row["save_to_plain_write"] = row["save_mb_per_s"] / row["plain_write_mb_per_s"]
    return size, rows


def main() -> None:
    options = make_parser(MODULE, __doc__)
    options.add_argument("--model", default="van_b6")
    options.add_argument("--rounds", type=int, default=8)
    options.add_argument("--folder", type=Path, help="on the disk to measure")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size, rows = measure(args.model, Path(folder), args.rounds)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    command = format_command(MODULE, {"model": args.model, "rounds": args.rounds, "folder": args.folder})
    report(args.out / "checkpoint.json", command, ["torch", "deepspeed"], state_mb=round(size / 1e6), rows=rows, medians=[medians])


if __name__ == "__main__":
    main()
