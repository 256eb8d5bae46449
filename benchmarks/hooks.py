"""What the engine costs the host for each parameter, by ZeRO stage, on this machine's CPU.

    python -m benchmarks.hooks

A model of 500 parameters of four values each, which takes no time to compute, is trained by `pretrain/engine.py` on one rank, in turns
with a plain backward pass. What is left is Python and the launching of small operators, which no GPU takes over, so it stands beside
the cost of launching one operator. Results go to benchmarks/results/hooks.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.results import record
from pretrain import config as settings
from pretrain import engine as engines

PARAMETERS = 500
STAGES = (0, 1, 2, 3)
LAUNCHES = 20_000
RESULT = Path(__file__).parent / "results" / "hooks.json"


class Chain(nn.Module):
    """Multiplies by one parameter after another."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterList(nn.Parameter(torch.ones(4)) for _ in range(PARAMETERS))

    def forward(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = x * factor
        return x.sum()


def plain() -> Callable[[], tuple[float, float]]:
    model = Chain()

    def run() -> tuple[float, float]:
        model.zero_grad()
        loss = model(torch.ones(4))
        began = time.perf_counter()
        loss.backward()
        return time.perf_counter() - began, 0.0

    return run


def by_engine(stage: int) -> Callable[[], tuple[float, float]]:
    """Seconds of a backward pass with all that its hooks do, and of the update."""
    config = settings.from_dict(
        {
            "name": "hooks", "global_batch": 1, "epochs": 1.0, "model": {"name": "van_b0", "classes": 10}, "data": {"train": "none"},
            "optim": {"lr": 1e-3}, "engine": {"micro_batch": 1, "device": "cpu", "precision": "fp32", "zero_stage": stage},
        }
    )  # fmt: skip
    engines.start(config.engine)
    engine: Any = engines.build(config, Chain(), 1)
    engine.train()

    def run() -> tuple[float, float]:
        loss = engine(torch.ones(4))
        began = time.perf_counter()
        engine.backward(loss)
        ended = time.perf_counter()
        engine.step()
        return ended - began, time.perf_counter() - ended

    return run


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
    engines.join()
    runs = {"plain": plain()} | {f"ZeRO-{stage}": by_engine(stage) for stage in STAGES}
    for run in runs.values():
        run()
    rounds = [{name: run() for name, run in runs.items()} | {"launch": launch_s()} for _ in range(args.rounds)]
    launch = statistics.median(one["launch"] for one in rounds)
    print(f"launching an operator: {launch * 1e6:.1f} us")
    rows = []
    for stage in STAGES:
        backward = [(one[f"ZeRO-{stage}"][0] - one["plain"][0]) / PARAMETERS for one in rounds]
        update = [one[f"ZeRO-{stage}"][1] / PARAMETERS for one in rounds]
        found = {
            f"{what}_launches": statistics.median(seconds / one["launch"] for seconds, one in zip(times, rounds, strict=True))
            for what, times in (("backward", backward), ("update", update))
        }
        us = statistics.median(backward) * 1e6
        rows.append({"stage": stage, "backward_us": us, "update_us": statistics.median(update) * 1e6, **found})
        print(
            f"ZeRO-{stage}, a parameter: {us:.0f} us more in the backward pass, {found['backward_launches']:.0f} launches; "
            f"{rows[-1]['update_us']:.0f} us in the update, {found['update_launches']:.0f} launches"
        )
    packages = ["torch", "deepspeed"]
    record(RESULT, f"python -m benchmarks.hooks --rounds {args.rounds}", packages, parameters=PARAMETERS, launch_us=launch * 1e6, rows=rows)


if __name__ == "__main__":
    main()
