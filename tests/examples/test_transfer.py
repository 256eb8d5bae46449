from pathlib import Path

import pytest

from data.dataset.index import open_index
from data.synthetic.synthesize import SETS
from examples import transfer
from examples.transfer import CLASSES, IMAGES, STARTS, draw_datasets, format_top1, pretrain, train_on_others
from pretrain import checkpoint
from tests.support.ranks import join, start_training

SMALL = ["steps=2", "run.log_every=1", "run.eval_every=0.01", "global_batch=8", "engine.micro_batch=4", "data.image_size=32"]


@pytest.mark.long
@pytest.mark.slow
def test_datasets_pretraining_and_both_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs are real, with two steps; their processes are forked instead of launched."""
    log = tmp_path / "log"

    class Job:
        def __init__(self, *arguments: str):
            log.unlink(missing_ok=True)
            self.ranks = start_training(1, log, arguments)

        def wait(self) -> int:
            return join(self.ranks).first

    monkeypatch.setattr(transfer, "start_job", Job)
    draw_datasets(tmp_path, train=100, val=20)
    figures, others, others_val = (open_index(tmp_path / place) for place in ("figures/train", "other-figures/train", "other-figures/val"))
    assert (len(figures), len(others), len(others_val)) == (100, CLASSES * IMAGES, 20)
    assert (figures.classes, others.classes) == (tuple(SETS["figures"]), tuple(SETS["other-figures"]))

    run = pretrain(tmp_path, *SMALL)
    (last,) = checkpoint.list_checkpoints(run / "checkpoints")
    for start in STARTS:
        points = train_on_others(tmp_path, start, 0, *SMALL)
        assert (f"starting from {run}: all " in log.read_text()) == (start == "pretrained")
        assert [step for step, _ in points] == [1, 2]
    assert checkpoint.list_checkpoints(run / "checkpoints") == [last]


def test_table_lists_the_last_step_of_each_curve() -> None:
    curves = {"pretrained": [[(10, 0.5), (20, 0.8)], [(10, 0.9), (20, 0.7)]], "from scratch": [[(60, 0.25)], [(60, 0.35)]]}
    header, pretrained, scratch = (line.split() for line in format_top1(curves).splitlines())
    assert header == ["top-1", "steps", "seed", "0", "seed", "1", "mean"]
    assert pretrained == ["pretrained", "20", "80.0%", "70.0%", "75.0%"]
    assert scratch == ["from", "scratch", "60", "25.0%", "35.0%", "30.0%"]
