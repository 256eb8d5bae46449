"""The command line: options, errors, signals during the start, and garbage collection."""

import argparse
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain.__main__ as command
from tests.support import REPOSITORY


def test_options_may_come_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(sys, "argv", ["pretrain", "train", "job.yaml", "a=1", "--force-config", "b=2"])
    monkeypatch.setattr(command, "_train", lambda args: parsed.append(args) or 0)
    assert command.main() == 0
    assert (parsed[0].config, parsed[0].overrides, parsed[0].force_config) == (Path("job.yaml"), ["a=1", "b=2"], True)


@pytest.mark.parametrize(
    "arguments",
    [["train", "job.yaml", "a=1", "--other"], ["checkpoints", "RUN", "a=1"], ["export", "RUN", "a=1", "--format=hf", "--out=o"]],
)
def test_unknown_options_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_signal_during_the_start_takes_effect_after_the_first_step(tmp_path: Path, drawn: Path) -> None:
    settings = (
        f"data.train={drawn / 'train'}", "data.val=null", "data.image_size=32", f"run.dir={tmp_path / 'run'}", "steps=10000",
        "model.name=van_b0", "model.classes=10", "global_batch=4", "engine.micro_batch=4", "engine.device=cpu",
    )  # fmt: skip
    # Without RANK the job has one rank.
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    rank = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "train", "configs/van_b3_in22k.yaml", *settings],
        cwd=REPOSITORY, env=alone, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert rank.stdout is not None
        assert any("kernels" in line for line in rank.stdout)  # the start has begun; the engine follows
        assert blocks(rank.pid, signal.SIGUSR1)
        rank.send_signal(signal.SIGUSR1)
        output = rank.communicate(timeout=120)[0]
    finally:
        rank.kill()
    assert rank.returncode == 85
    assert "stopped at step 1 of 10000 and saved" in output


def blocks(pid: int, number: signal.Signals) -> bool:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigBlk"], 16) & 1 << (number - 1))


def test_lasting_imports_are_excluded_from_garbage_collection() -> None:
    before = gc.get_freeze_count()
    try:
        with command.lasting_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
