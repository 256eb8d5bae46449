"""An interrupted run ends bit for bit as an undisturbed one: after kill -9 or a stop signal, in every ZeRO stage."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.run.directory import step_of
from tests.support import REFERENCE, jobs
from tests.support.jobs import wait_until
from tests.support.ranks import join, kill

pytestmark = pytest.mark.slow

STEPS = 20
STAGES = (0, 1, 2, 3)
TESTED = [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 2, 3))]
GOLDEN = REFERENCE / "golden_losses.json"


def this_cpu() -> str:
    """Names the properties that the bits of a bf16 convolution depend on, as oneDNN has other kernels for each."""
    amx = torch.cpu._is_amx_tile_supported()
    bf16 = torch.cpu._is_avx512_bf16_supported()
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, bf16 {bf16}, AMX {amx}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Callable[[int], Path]:
    """Returns the folder of an undisturbed run of a ZeRO stage, on two ranks."""

    @cache
    def of_stage(stage: int) -> Path:
        folder = tmp_path_factory.mktemp(f"zero-{stage}")
        jobs.run(folder, drawn, f"steps={STEPS}", f"engine.zero_stage={stage}", ranks=2)
        return folder

    return of_stage


@pytest.mark.parametrize("stage", TESTED)
def test_killed_and_resumed_is_bit_identical(undisturbed: Callable[[int], Path], tmp_path: Path, drawn: Path, stage: int) -> None:
    options = (f"steps={STEPS}", f"engine.zero_stage={stage}")
    job = jobs.start(tmp_path, drawn, *options, ranks=2)
    try:
        wait_until((tmp_path / "run" / "checkpoints" / "step-000000012").exists, job, tmp_path)
    finally:
        kill(job)
    output = jobs.run(tmp_path, drawn, *options, ranks=2)
    assert "resumed at step 12 of 20" in output or "resumed at step 16 of 20" in output
    assert jobs.differing(jobs.final_state(tmp_path, STEPS), jobs.final_state(undisturbed(stage), STEPS)) == []
    # The steps after the resume were the same ones, seen from outside too.
    resumed = {record["step"]: record["loss"] for record in jobs.metrics(tmp_path, "train")}
    assert resumed == {record["step"]: record["loss"] for record in jobs.metrics(undisturbed(stage), "train")}


def test_stopped_by_a_signal_to_one_rank_and_resumed_is_bit_identical(
    undisturbed: Callable[[int], Path], tmp_path: Path, drawn: Path
) -> None:
    job = jobs.start(tmp_path, drawn, f"steps={STEPS}", "run.save_every=1000", ranks=2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and bool(jobs.metrics(tmp_path, "train")), job, tmp_path)
        os.kill(job[1].pid or 0, signal.SIGUSR1)
        assert join(job).codes == [85, 85], (tmp_path / "log").read_text()[-4000:]
    finally:
        kill(job)
    assert "stopped at step" in (tmp_path / "log").read_text()
    jobs.run(tmp_path, drawn, f"steps={STEPS}", "run.save_every=1000", ranks=2)
    assert jobs.differing(jobs.final_state(tmp_path, STEPS), jobs.final_state(undisturbed(1), STEPS)) == []


def count_steps_as_minutes(rank: int) -> None:
    """Makes each step take a minute by rank 0's clock, and no time by rank 1's. For a rank's process."""
    from pretrain import train

    rate, requests, minutes = train.learning_rate, train.Requests, [0]

    def learning_rate(step: int, *args: Any) -> float:
        minutes[0] = step if rank == 0 else 0
        return rate(step, *args)

    train.learning_rate = learning_rate
    train.Requests = partial(requests, clock=lambda: 60.0 * minutes[0])  # type: ignore[assignment,misc]


def test_saved_by_the_clock_and_resumed_is_bit_identical(undisturbed: Callable[[int], Path], tmp_path: Path, drawn: Path) -> None:
    saves = ("run.save_minutes=2.5", "run.save_every=10", "run.keep=20")
    jobs.run(tmp_path, drawn, f"steps={STEPS}", *saves, ranks=2, prepare=count_steps_as_minutes)
    # Each save restarts the clock; ranks agree in the step after that in which the time is up.
    saved = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [step_of(path) for path in saved] == [5, 9, 10, 14, 18, 20]
    for later in saved[-2:]:
        shutil.rmtree(later)
    assert "resumed at step 14 of 20" in jobs.run(tmp_path, drawn, f"steps={STEPS}", ranks=2)
    assert jobs.differing(jobs.final_state(tmp_path, STEPS), jobs.final_state(undisturbed(1), STEPS)) == []


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES[:2])
def test_killed_on_three_ranks_and_resumed_is_bit_identical(tmp_path: Path, drawn: Path, stage: int) -> None:
    """With three ranks the order of a sum changes its bits."""
    options = (f"engine.zero_stage={stage}", "global_batch=12", "engine.micro_batch=2", "steps=8")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    jobs.run(whole, drawn, *options, ranks=3)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "run" / "checkpoints" / "step-000000008")
    assert "resumed at step 4 of 8" in jobs.run(resumed, drawn, *options, ranks=3)
    assert jobs.differing(jobs.final_state(resumed, 8), jobs.final_state(whole, 8)) == []


@pytest.mark.long
def test_on_other_ranks_and_stage_it_resumes_with_the_same_samples(undisturbed: Callable[[int], Path], tmp_path: Path, drawn: Path) -> None:
    """Only the order of sums differs: the random numbers and statistics of a rank are off here."""
    alike = (f"steps={STEPS}", "model.drop_path=0", "engine.precision=fp32", "engine.micro_batch=8", "run.keep=20")
    two = tmp_path / "two"
    jobs.run(two, drawn, *alike, ranks=2)
    four = tmp_path / "four"
    shutil.copytree(two, four)
    for later in checkpoint.list_checkpoints(four / "run" / "checkpoints"):
        if later.name > "step-000000012":
            shutil.rmtree(later)
    (four / "run" / "metrics.jsonl").unlink()
    output = jobs.run(four, drawn, *alike, "engine.zero_stage=3", ranks=1)
    assert "resumed at step 12 of 20 from a checkpoint of 2 ranks, ZeRO-1" in output
    before = {record["step"]: record["loss"] for record in jobs.metrics(two, "train")}
    after = {record["step"]: record["loss"] for record in jobs.metrics(four, "train")}
    assert list(after) == list(range(13, 21))
    for step, loss in after.items():
        assert loss == pytest.approx(before[step], rel=1e-3)
    # The control: other samples, or the same in another order of steps, differ in this comparison.
    assert after[13] != pytest.approx(before[14], rel=1e-3)
    # And the bits do differ, so the comparisons of the tests above can see a difference.
    assert jobs.differing(jobs.final_state(four, STEPS), jobs.final_state(two, STEPS)) != []


@pytest.mark.parametrize("stage", TESTED)
def test_golden_losses(undisturbed: Callable[[int], Path], stage: int) -> None:
    """Every loss stays as it was recorded, unless a change is about the computation. Then record new ones:

    python -m tests.pretrain.test_resume
    """
    golden = json.loads(GOLDEN.read_text())
    losses = [record["loss"] for record in jobs.metrics(undisturbed(stage), "train")]
    assert len(losses) == STEPS
    if golden["cpu"] == this_cpu():
        assert losses == golden["losses"][str(stage)]
    else:
        assert losses == pytest.approx(golden["losses"][str(stage)], rel=2e-2)


if __name__ == "__main__":
    import tempfile

    from data.synthetic.synthesize import synthesize

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        synthesize(place / "drawn", classes=10, train=120, val=20)
        losses = {}
        for stage in STAGES:
            jobs.run(place / str(stage), place / "drawn", f"steps={STEPS}", f"engine.zero_stage={stage}", ranks=2)
            losses[stage] = [record["loss"] for record in jobs.metrics(place / str(stage), "train")]
    GOLDEN.write_text(json.dumps({"cpu": this_cpu(), "losses": losses}, indent=1) + "\n")
