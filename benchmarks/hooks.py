"""What the engine costs the host in a step, by ZeRO stage, on this machine's CPU.

    python -m benchmarks.hooks

A VAN-B3 of eight channels, which takes little time to compute, is trained by `pretrain/engine.py` on one rank, in turns with the same model
without an engine. What an engine takes longer is Python and the launching of small operators, which no GPU takes over, so it stands beside
the cost of launching one operator. Results go to benchmarks/results/hooks.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from data.results import record
from pretrain import config as settings
from pretrain import engine as engines
from pretrain.van import VAN, VARIANTS

PARTS = ("forward", "backward", "update")
LAUNCHES = 20_000
RESULT = Path(__file__).parent / "results" / "hooks.json"
Run = Callable[[], dict[str, float]]


def narrow() -> VAN:
    return VAN(num_classes=10, embed_dims=(8, 8, 8, 8), mlp_ratios=(1, 1, 1, 1), depths=VARIANTS["van_b3"]["depths"])


def timed(forward: Callable[[torch.Tensor], torch.Tensor], backward: Callable[[torch.Tensor], None], update: Callable[[], None]) -> Run:
    """Seconds of each part of a step."""
    images = torch.randn(2, 3, 32, 32)

    def run() -> dict[str, float]:
        times = [time.perf_counter()]
        loss = forward(images).sum()
        times.append(time.perf_counter())
        backward(loss)
        times.append(time.perf_counter())
        update()
        times.append(time.perf_counter())
        return {part: end - begin for part, (begin, end) in zip(PARTS, pairwise(times), strict=True)}

    return run


def plain() -> Run:
    """Without an update."""
    model = narrow()
    return timed(model, torch.Tensor.backward, model.zero_grad)


def by_engine(stage: int) -> Run:
    config = settings.from_dict(
        {
            "name": "hooks", "global_batch": 2, "epochs": 1.0, "model": {"name": "van_b3", "classes": 10}, "data": {"train": "none"},
            "optim": {"lr": 1e-3}, "engine": {"micro_batch": 2, "device": "cpu", "precision": "fp32", "zero_stage": stage},
        }
    )  # fmt: skip
    engines.start(config.engine)
    engine: Any = engines.build(config, narrow(), 1)
    return timed(engine, engine.backward, engine.step)


def by_layer() -> Run:
    """ZeRO-3 with DeepSpeed's hooks on every layer, as by default."""
    with patch("deepspeed.utils.set_z3_leaf_module"):
        return by_engine(3)


def launch_s() -> float:
    one = torch.ones(4)
    began = time.perf_counter()
    for _ in range(LAUNCHES):
        one * one
    return (time.perf_counter() - began) / LAUNCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = {"plain": plain()} | {f"ZeRO-{stage}": by_engine(stage) for stage in range(4)} | {"ZeRO-3 by layer": by_layer()}
    for _ in range(3):  # ZeRO-3 learns in its first steps what to gather when
        for run in runs.values():
            run()
    launch = statistics.median(launch_s() for _ in range(args.rounds))
    rounds = [{name: run() for name, run in runs.items()} for _ in range(args.rounds)]
    print(f"launching an operator: {launch * 1e6:.1f} us")
    rows: list[dict[str, Any]] = []
    for name in list(runs)[1:]:
        more = {part: statistics.median(times[name][part] - times["plain"][part] for times in rounds) for part in PARTS}
        rows.append({"engine": name} | {f"{part}_ms": 1e3 * more[part] for part in PARTS} | {"launches": sum(more.values()) / launch})
        print(name, *(f"{part} {1e3 * more[part]:.1f} ms" for part in PARTS), f"{rows[-1]['launches']:.0f} launches", sep=", ")
    parameters = len(list(narrow().parameters()))
    plain_ms = {part: statistics.median(times["plain"][part] for times in rounds) * 1e3 for part in PARTS[:2]}
    record(
        RESULT, f"python -m benchmarks.hooks --rounds {args.rounds}", ["torch", "deepspeed"],
        parameters=parameters, launch_us=launch * 1e6, plain_ms=plain_ms, rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
