"""Checkpoints are loaded by any number of ranks in any ZeRO stage; damaged ones are skipped."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from tests.faults.session import Memory
from tests.support.configs import make_config
from tests.support.ranks import run_on_ranks


def session(folder: str, stage: int, micro_batch: int, steps: int, load: bool, save: bool, ema_decay: float) -> dict[str, Any]:
    """Builds an engine on one rank, loads if asked, trains `steps` steps, saves if asked; returns the step and the log."""
    import torch.distributed as dist

    from data.common.counter_rng import hash64
    from pretrain import config as settings
    from pretrain.engine import distributed, zero_state
    from pretrain.engine.batch_stats import BatchStats
    from pretrain.engine.engine import build_engine
    from pretrain.model.build import build_model

    engine_settings = {"zero_stage": stage, "micro_batch": micro_batch, "ema_decay": ema_decay, "precision": "bf16"}
    config = make_config(12, classes=7, lr=1e-3, model={"drop_path": 0.1}, engine=engine_settings)
    distributed.start(config.engine)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(config.seed if not load else 999)  # loading must overwrite these weights
    model = build_model(config)
    engine = build_engine(config, model, settings.accumulation(config, ranks))
    stats = BatchStats(model, config.engine.ema_decay)
    log = Memory()
    lock = checkpoint.lock_run(Path(f"{folder}-lock"), log.line)
    checkpoints = checkpoint.Checkpoints(Path(folder), engine, stats, retention=checkpoint.Retention(3), lock=lock, log=log)
    trainer = checkpoints.load({}) if load else None
    step = trainer["step"] if trainer else 0
    for _ in range(steps):
        images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(step)).to(memory_format=torch.channels_last)
        labels = torch.arange(12) % 7
        own = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        torch.manual_seed(int(hash64(config.seed, step, rank) >> 1))
        for part, target in zip(images[own].split(micro_batch), labels[own].split(micro_batch), strict=True):
            loss = torch.nn.functional.cross_entropy(engine(part).float(), target)
            engine.backward(loss)
            engine.step()
        stats.start_averaging()
        stats.finish()
        step += 1
    if save:
        checkpoints.save({"step": step, "identity": {}, "evaluation": None, "config": settings.as_dict(config)})
        checkpoints.close()
    # Computing with the weights shows that what was loaded reached the tensors that the model computes with.
    model.eval()
    with torch.no_grad():
        output = engine(torch.ones(2, 3, 32, 32).to(memory_format=torch.channels_last)).float()
    whole = {key: zero_state.assemble_tensors(engine, key) for key in ("weight", *engine.basic_optimizer.state_keys)}
    if rank == 0:
        state = {f"{key}/{name}": tensor.flatten().clone() for key, tensors in whole.items() for name, tensor in tensors.items()}
        state |= {f"buffer/{name}": buffer.clone() for name, buffer in model.named_buffers()}
        if ema_decay:
            state |= {f"buffer_ema/{name}": average.clone() for name, average in stats.averages.items()}
        torch.save({"state": state, "output": output, "steps": int(zero_state.get_step_counter(engine))}, Path(folder, "state.pt"))
    distributed.stop()
    return {"step": step, "lines": log.lines}


KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema", "buffer", "buffer_ema")


def run(folder: Path, ranks: int, **kwargs: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    arguments = {"micro_batch": 12 // ranks, "steps": 0, "load": False, "save": False, "ema_decay": 0.9} | kwargs
    results = run_on_ranks(ranks, session, folder=str(folder), **arguments)
    return torch.load(folder / "state.pt") | {"lines": results[0]["lines"], "step": results[0]["step"]}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name].flatten(), other[name].flatten())]
    assert not different, different[:10]


# (ZeRO stage, ranks) that saved, and those that load; the whole matrix is long.
ALL = [(0, 1), (1, 2), (2, 2), (3, 2), (1, 3), (3, 1), (0, 2)]
FEW = [((1, 2), [(3, 1), (1, 3)]), pytest.param((3, 2), [(0, 2), (2, 1)], marks=pytest.mark.long), ((0, 2), [(3, 1)])]
SWEEP = [pytest.param(saved, ALL, marks=pytest.mark.full) for saved in ALL]


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), FEW + SWEEP)
def test_state_is_the_same_on_any_ranks_in_any_stage(tmp_path: Path, saved: tuple[int, int], loaded: list[tuple[int, int]]) -> None:
    stage, ranks = saved
    before = run(tmp_path, ranks, stage=stage, steps=2, save=True)
    assert before["steps"] == 2
    # In one process, without ranks and without DeepSpeed.
    (path,) = checkpoint.list_checkpoints(tmp_path)
    assert_same(checkpoint.read_tensors(path, KINDS), before["state"])
    for other_stage, other_ranks in loaded:
        after = run(tmp_path, other_ranks, stage=other_stage, load=True)
        assert_same(after["state"], before["state"])
        assert after["steps"] == 2
        assert torch.equal(after["output"], before["output"])


@pytest.mark.slow
def test_a_new_or_dropped_moving_average_is_logged(tmp_path: Path) -> None:
    """A new average starts from the weights; one that the job no longer keeps is skipped."""
    folder = tmp_path / "checkpoints"
    with_it = run(folder, 2, stage=1, steps=2, save=True)
    without = run(folder, 1, stage=3, load=True, save=True, steps=1, ema_decay=0.0)
    (line,) = [line for line in without["lines"] if "skipped from here on" in line]
    assert "holds buffer_ema, ema, which this job does not keep" in line
    assert {name.split("/")[0] for name in without["state"]} == {"weight", "exp_avg", "exp_avg_sq", "buffer"}
    assert not torch.equal(without["state"]["weight/head.weight"], with_it["state"]["weight/head.weight"])
    again = run(folder, 2, stage=2, load=True)
    (line,) = [line for line in again["lines"] if "moving average" in line]
    assert "holds no moving average, which this job keeps: it starts from the weights at step 3" in line
    for name, tensor in again["state"].items():
        kind, _, rest = name.partition("/")
        from_saved = {"ema": f"weight/{rest}", "buffer_ema": f"buffer/{rest}"}.get(kind, name)
        assert torch.equal(tensor, without["state"][from_saved]), name


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the checkpoints of steps 1 and 2 of two ranks; tests must copy it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run(folder, 2, stage=1, steps=1, save=True)
    run(folder, 2, stage=1, steps=1, load=True, save=True)
    return folder


@pytest.fixture
def folder(saved_twice: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_twice, tmp_path / "checkpoints")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["__0_0.distcp", "__1_0.distcp", ".metadata", "trainer.json"]
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped bit": flip_bit,
}


@pytest.mark.slow
def test_a_checkpoint_has_a_file_for_each_rank_and_a_manifest(folder: Path) -> None:
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-000000001", "step-000000002"]
    assert (folder / "latest").read_text() == "step-000000002"
    for path in checkpoint.list_checkpoints(folder):
        assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "MANIFEST.json"])
        assert checkpoint.verify(path) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(folder: Path, file: str, damage: str) -> None:
    older, newer = checkpoint.list_checkpoints(folder)
    DAMAGES[damage](newer / file)
    lines: list[str] = []
    assert checkpoint.find_newest_whole(folder, lines.append) == older
    (line,) = lines
    assert str(newer) in line
    assert file in line or file == "MANIFEST.json"
    DAMAGES[damage](older / file)
    with pytest.raises(ValueError, match="no whole checkpoint in"):
        checkpoint.find_newest_whole(folder, lines.append)


@pytest.mark.slow
def test_remains_of_an_interrupted_save_and_old_checkpoints_are_removed(folder: Path) -> None:
    """The run keeps three checkpoints, so the fourth save removes the first."""
    half = folder / ".partial-step-000000003"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    (folder / ".removed-step-000000000").mkdir()
    result = run(folder, 1, stage=1, steps=1, load=True, save=True)
    assert sum("left over" in line for line in result["lines"]) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "state.pt"] + [f"step-00000000{step}" for step in (1, 2, 3)]
    run(folder, 1, stage=1, steps=1, load=True, save=True)
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == [f"step-00000000{step}" for step in (2, 3, 4)]
    assert (folder / "latest").read_text() == "step-000000004"
