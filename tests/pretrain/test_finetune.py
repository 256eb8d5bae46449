"""Fine-tuning as a user does it: a job from scratch, then jobs on other classes that start from its weights, in several formats."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.packing.pack import pack
from data.packing.plan import Settings
from data.synthetic.drawings import PATTERNS, draw_pattern
from pretrain import checkpoint
from pretrain.weights.export import export
from pretrain.weights.run_model import build_trained
from pretrain.weights.source import read_source
from tests.support import jobs
from tests.support.tiny_runs import new_model

pytestmark = pytest.mark.slow

CLASSES = ["zigzags", "stars", "moons", "checks"]  # three of the ten learned ones, in another order, and a new one
SETTINGS = ["model.classes=4", "model.head_init=map", "epochs=1", "run.save_every=1"]  # two steps of 16 images
UNMOVED = [
    "optim.warmup_lr=0",
    "optim.warmup_epochs=1",
]  # the first step's learning rate is 0: its checkpoint holds what training began with


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with train (32 images of CLASSES) and val (8), packed from class folders."""
    folder = tmp_path_factory.mktemp("others")
    random = np.random.default_rng(0)
    for split, images in (("train", 8), ("val", 2)):
        for name in CLASSES:
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(images):
                draw_pattern(PATTERNS.get(name, PATTERNS["discs"]), random).save(folder / "images" / split / name / f"{number}.jpg")
        pack(folder / "images" / split, folder, Settings(name="others", split=split, classes=tuple(CLASSES)))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Path:
    """Returns a folder with a run of two steps from scratch and its exported weights; not to be changed."""
    folder = tmp_path_factory.mktemp("pretrained")
    jobs.run(folder, drawn, "steps=2", ranks=2)
    export(folder / "run", "official", folder / "van.pth")
    return folder


@pytest.mark.parametrize("name", ["run", "van.pth"])
def test_a_job_starts_from_weights_for_other_classes(sources: Path, others: Path, drawn: Path, tmp_path: Path, name: str) -> None:
    source = sources / name
    output = jobs.run(tmp_path, others, *SETTINGS, *UNMOVED, f"model.init_from={source}", ranks=2)
    expected = read_source(source, new_model())
    assert expected.classes == tuple(PATTERNS)
    backbone = [key for key in expected.weights if not key.startswith("head.")]
    assert f"starting from {source}: all {len(backbone)} tensors of the backbone loaded\n" in output
    assert "  head.weight, head.bias: 3 of 4 rows copied by class name; zeros for moons; 7 rows of the source dropped\n" in output

    first, last = (build_trained(path, average=False)[0] for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"))
    began, ended = first.state_dict(), last.state_dict()
    parameters = [key for key, _ in first.named_parameters() if key in backbone]
    assert [key for key in parameters if not torch.equal(began[key], expected.weights[key])] == []
    for key in ("head.weight", "head.bias"):
        learned = dict(zip(PATTERNS, expected.weights[key], strict=True))
        zero = torch.zeros_like(learned["checks"])
        assert torch.equal(began[key], torch.stack([learned.get(class_name, zero) for class_name in CLASSES]))
    # And it trains: all weights move.
    assert [key for key in [*parameters, "head.weight"] if torch.equal(ended[key], began[key])] == []


def test_a_resumed_job_does_not_need_the_weights_it_started_from(sources: Path, others: Path, tmp_path: Path) -> None:
    source = shutil.copy(sources / "van.pth", tmp_path)
    settings = [*SETTINGS, f"model.init_from={source}"]
    assert "starting from" in jobs.run(tmp_path, others, *settings, ranks=2)
    last = checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    undisturbed = checkpoint.read_tensors(last, ("weight", "exp_avg", "buffer"))
    Path(source).unlink()
    shutil.rmtree(last)
    output = jobs.run(tmp_path, others, *settings, ranks=2)
    assert "resumed at step 1 of 2" in output
    assert "starting from" not in output
    resumed = checkpoint.read_tensors(last, ("weight", "exp_avg", "buffer"))
    assert [key for key, tensor in undisturbed.items() if not torch.equal(tensor, resumed[key])] == []
    shutil.rmtree(tmp_path / "run")
    assert "model.init_from" in jobs.run(tmp_path, others, *settings, ranks=2, code=2)
