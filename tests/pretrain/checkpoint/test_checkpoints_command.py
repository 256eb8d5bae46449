"""`python -m pretrain checkpoints` on the run of a real job, and the checkpoints that this job kept."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain import checkpoint
from pretrain.__main__ import main
from tests.faults import jobs
from tests.faults.test_disk import flip_bit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, four_classes: Path) -> Path:
    """Returns the run directory of a job of seven steps, four an epoch, that keeps the last, one an epoch, and the best."""
    folder = tmp_path_factory.mktemp("job")
    keep = ("run.keep=1", "run.keep_every=1", "run.keep_best=loss", "run.save_every=100")
    assert jobs.run(folder, four_classes, *keep).codes == [0, 0], jobs.log_of(folder)
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def names(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(run / "checkpoints")]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["pretrain", "checkpoints", *map(str, arguments)])
    return main()


def test_a_job_keeps_the_last_one_an_epoch_and_the_best(made: Path) -> None:
    records = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["ema"]["loss"] for record in records if record["kind"] == "evaluation"}
    assert list(losses) == [3, 6, 7]
    assert names(made) == sorted({4, 7, min(losses, key=losses.__getitem__)})
    assert [record["step"] for record in records if record["kind"] == "checkpoint"] == [3, 4, 6, 7]


def test_checkpoints_are_listed(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, run) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == names(run)
    assert [line for line in lines if "<- latest" in line] == [lines[-1]]
    assert all("buffer, buffer_ema, ema, exp_avg, exp_avg_sq, weight" in line for line in lines)
    assert " 1.75 " in lines[-1]  # epochs
    assert "%" in lines[-1]  # evaluated


def test_verify_reports_damage(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, run, "--verify") == 0
    assert all("whole" in line for line in capsys.readouterr().out.splitlines()[1:])
    flip_bit(run / "checkpoints" / "step-000000004" / "__1_0.distcp")
    (run / "checkpoints" / "step-000000007" / "trainer.json").unlink()
    assert command(monkeypatch, run, "--verify") == 1
    output = capsys.readouterr().out
    assert "__1_0.distcp has another checksum than when it was written" in output
    assert "trainer.json is missing" in output


def test_compare_reports_differences(run: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, run, "--compare", 7, made / "checkpoints" / "step-000000007") == 0
    assert "are the same" in capsys.readouterr().out
    assert command(monkeypatch, run, "--compare", 4, 7) == 1
    output = capsys.readouterr().out
    assert "the largest difference is" in output
    assert "are different" in output
    (run / "checkpoints" / "step-000000004" / "trainer.json").unlink()
    assert command(monkeypatch, run, "--compare", 4, 7) == 2
    assert "can't be compared: trainer.json is missing" in capsys.readouterr().err


def test_prune_keeps_the_last_whole_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 6):
        shutil.copytree(run / "checkpoints" / "step-000000007", run / "checkpoints" / f"step-{step:09d}", dirs_exist_ok=True)
    before = names(run)
    assert command(monkeypatch, run, "--prune", 2) == 0
    assert names(run) == [step for step in before if step != 5]  # 4 ends an epoch, 6 and 7 are the newest
    flip_bit(run / "checkpoints" / "step-000000007" / "__0_0.distcp")
    assert command(monkeypatch, run, "--prune", 1) == 0
    assert {6, 7} <= set(names(run))  # 6 is the last whole one now
    assert "skipping checkpoint" in capsys.readouterr().out
    assert command(monkeypatch, run, "--prune", 0) == 2
    assert not list(run.glob("lock-*"))


def test_a_folder_without_checkpoints_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, tmp_path) == 2
    assert f"there are no checkpoints in {tmp_path / 'checkpoints'}" in capsys.readouterr().err
