"""Evaluation: heads for more classes than the data, any number of ranks, bad images, and every kind of source of the command."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

from data.common.placement import Placement
from data.dataset.index import Index, open_index, write_index
from data.loader.loaders import EvalLoader
from data.settings import DataConfig
from data.synthetic.synthesize import PATTERNS
from pretrain.__main__ import main
from pretrain.engine import distributed
from pretrain.evaluation.accuracy import count_correct, describe_restriction, evaluate, match_classes
from pretrain.evaluation.command import open_weights
from pretrain.weights.export import EXPORT_FORMATS, export
from tests.support import REPOSITORY, jobs
from tests.support.damage import damaged_copy
from tests.support.ranks import run_on_ranks
from tests.support.tiny_runs import CLASSES, new_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SETTINGS = DataConfig(image_size=32, decode_threads=1, read_threads=1)
WIDE = [*list(PATTERNS)[::-1], "a", "b", "c"]  # the ten classes of the drawn images in another order, and others


@pytest.fixture
def alone() -> Iterator[None]:
    """Makes this process a job of one rank."""
    distributed.join()
    yield
    distributed.stop()


@pytest.fixture
def leaves() -> Iterator[None]:
    """Leaves the process group that the command joins."""
    yield
    distributed.stop()


def copy_with_classes(index: Index, folder: Path, classes: list[str]) -> Path:
    """Copies a dataset and relabels it: sample i is of class i modulo their number."""
    shutil.copytree(index.folder, folder)
    samples = np.array(index.samples)
    samples["label"] %= len(classes)
    parts = np.split(samples, index.shard_start[1:-1])
    write_index(folder, index.shards, parts, classes)
    return folder


def with_classes(index: Index, classes: tuple[str, ...]) -> Index:
    return Index(index.folder, index.shards, index.shard_start, index.samples, classes, index.fingerprint)


# ---------------------------------------------------------------- classes


def imagenet(subset: str) -> list[str]:
    return ImageNetInfo(subset).label_names()


def test_imagenet_1k_among_the_classes_of_22k(drawn: Path) -> None:
    """In timm's lists of wnids, ImageNet-22K (fall11) has all classes of ImageNet-1K but one."""
    head, val = imagenet("imagenet-22k"), with_classes(open_index(drawn / "val"), tuple(sorted(imagenet("imagenet-1k"))))
    assert (len(head), len(val.classes)) == (21_841, 1000)
    with pytest.raises(ValueError, match=r"1 of 1,000 classes are .* 21,841 .*: n04399382; .* data\.val_except=\[n04399382\]$"):
        describe_restriction(head, val, [])
    line = describe_restriction(head, val, ["n04399382"])
    assert line == f"head of 21,841 classes restricted to the 999 of {val.place}, without n04399382"
    rows, targets = match_classes(head, val, ["n04399382"])
    for label, name in enumerate(val.classes):
        assert name == "n04399382" or head[rows[targets[label]]] == name
    assert len(set(rows.tolist())) == 999


def test_classes_that_the_head_lacks_are_an_error(drawn: Path) -> None:
    index = open_index(drawn / "val")
    assert describe_restriction(index.classes, index, []) is None
    assert describe_restriction(index.classes[::-1], index, []) is None
    with pytest.raises(
        ValueError, match=r"2 of 10 classes are not among the 9 .*: checks, rings; .*data\.val_except=\[dots,checks,rings\]$"
    ):
        describe_restriction(["zigzags", "x", "target", "triangles", "stripes", "stars", "discs", "crosses", "y"], index, ["dots"])
    many = with_classes(index, tuple(f"class {number}" for number in range(30)))
    with pytest.raises(ValueError, match=r"30 of 30 .*: class 0, .* and 25 more; classes are matched by name, and the others are checks, "):
        describe_restriction(index.classes, many, [])


def test_count_correct() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.0]] * 7)
    assert [count_correct(scores[:1], torch.tensor([label])).tolist() for label in range(7)] == [
        [0, 0], [1, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 0],
    ]  # fmt: skip
    assert count_correct(scores, torch.arange(7)).tolist() == [1, 5]
    assert count_correct(scores[:, :3], torch.arange(3).repeat(3)[:7]).tolist() == [2, 7]  # of three classes each is among the five best
    assert count_correct(torch.full((7, 7), torch.nan), torch.arange(7)).tolist() == [0, 0]


def model_of(head: int) -> nn.Module:
    """Returns a model whose highest outputs are those of the classes from 10 on."""
    torch.manual_seed(1)
    model = new_model(head).eval()
    with torch.no_grad():
        model.head.weight.mul_(30)  # type: ignore[union-attr,operator]
        model.head.bias[10:] += 100  # type: ignore[index]
    return model


def expected_result(model: nn.Module, index: Index, head: list[str], without: list[str]) -> dict[str, float]:
    """Computes the expected result image by image, in float64."""
    with EvalLoader(index, SETTINGS, Placement(CPU, micro_batch=5)) as loader, torch.no_grad():
        outputs = [
            (logits, label) for batch in loader for logits, label in zip(model(batch.images).double().numpy(), batch.labels, strict=True)
        ]
    right, right5, loss, images = 0, 0, 0.0, 0
    columns = [head.index(name) for name in index.classes if name not in without]
    for logits, label in outputs:
        if index.classes[label] in without:
            continue
        among, target = logits[columns], logits[head.index(index.classes[label])]
        better = int((among > target).sum())
        right, right5, images = right + (better == 0), right5 + (better < 5), images + 1
        loss += np.log(np.exp(among - target).sum())
    return {
        "images": images,
        "top1": right / images,
        "top5": right5 / images,
        "loss": loss / images,
        "classes": len(columns),
        "skipped": 0,
    }


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("without", [[], ["rings", "checks"]])
def test_a_head_is_restricted_to_the_classes_of_the_data(drawn: Path, without: list[str]) -> None:
    index, model = open_index(drawn / "train"), model_of(len(WIDE))
    settings = DataConfig(image_size=32, decode_threads=1, read_threads=1, val_except=without)
    with EvalLoader(index, settings, Placement(CPU, micro_batch=50)) as loader:
        result = evaluate(model, loader, WIDE, "fp32")
        best = torch.cat([model(batch.images).argmax(1) for batch in loader])
    assert (best >= 10).all()  # without the restriction, nothing would be correct
    expected = expected_result(model, index, WIDE, without)
    assert result == pytest.approx(expected, rel=1e-4)
    assert 0 < result["top1"] < result["top5"] < 1
    assert result["images"] == (96 if without else 120)


def test_val_except_must_name_classes_of_the_data(drawn: Path) -> None:
    settings = DataConfig(val_except=["rings", "ring"])
    with pytest.raises(ValueError, match=r"data\.val_except contains ring, which is not a class of"):
        EvalLoader(open_index(drawn / "val"), settings, Placement(CPU, micro_batch=4))


# ---------------------------------------------------------------- ranks, and bad images


def evaluating(folder: str, without: list[str]) -> dict[str, Any] | str:
    """Evaluates as one rank; returns the result with the rank's images, or the error."""
    distributed.join()
    settings = DataConfig(image_size=32, decode_threads=1, read_threads=1, max_bad=0.99, val_except=without)
    placement = Placement(CPU, 4, torch.distributed.get_rank(), torch.distributed.get_world_size())
    with EvalLoader(open_index(folder), settings, placement) as loader:
        try:
            return evaluate(model_of(len(WIDE)), loader, WIDE, "fp32") | {"share": len(loader.rank_samples)}
        except ValueError as error:
            return str(error)
        finally:
            distributed.stop()


def test_each_image_counts_once_on_any_number_of_ranks(drawn: Path, tmp_path: Path) -> None:
    index = damaged_copy(open_index(drawn / "val"), tmp_path / "val", {3: "cut", 10: "no tables", 12: "zeros"})
    expected = evaluating(str(index.folder), ["dots"])  # in this process alone
    assert isinstance(expected, dict)
    assert (expected["images"], expected["skipped"], expected.pop("share")) == (16, 2, 18)  # image 3 is of class dots
    for ranks, shares in ((2, [9, 9]), (3, [6, 6, 6])):
        results = run_on_ranks(ranks, evaluating, folder=str(index.folder), without=["dots"])
        assert [result.pop("share") for result in results] == shares
        assert all(result == pytest.approx(expected) for result in results)


def test_no_usable_image(drawn: Path, tmp_path: Path) -> None:
    index = damaged_copy(open_index(drawn / "val"), tmp_path / "val", dict.fromkeys(range(1, 20), "zeros"))
    assert evaluating(str(index.folder), ["checks"]) == (  # the two other images are of class checks
        f"{index.folder}: none of 18 images can be used; `python -m data verify --deep {index.folder}` lists the reasons"
    )


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def val(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a dataset of 120 drawn images with the classes of `runs`."""
    return copy_with_classes(open_index(drawn / "train"), tmp_path_factory.mktemp("named") / "val", CLASSES)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns settings that evaluate as those of RUNS/averaged do. A job couldn't start with them."""
    path = tmp_path_factory.mktemp("config") / "evaluation.yaml"
    path.write_text(
        "name: other\nglobal_batch: 8\nepochs: 1\n"
        f"model: {{name: van_b0, classes: {len(CLASSES)}, init_from: /not/there}}\n"
        "data: {train: /not/there, image_size: 32, mean: [0.4, 0.5, 0.6]}\noptim: {lr: 1e-3}\nengine: {device: cpu}\n"
    )
    return path


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of exports, and of a file that does not name its classes."""
    folder = tmp_path_factory.mktemp("weights")
    for fmt in EXPORT_FORMATS:
        export(runs / "averaged", fmt, folder / (fmt if EXPORT_FORMATS[fmt].is_folder else f"{fmt}.pth"))
    torch.save(torch.load(folder / "official.pth")["state_dict"], folder / "nameless.pth")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["pretrain", "evaluate", *map(str, arguments)])
    return main()


RESULT = re.compile(r": (top-1 .* on 120 images of .*)\n$")


@pytest.mark.usefixtures("leaves")
def test_all_sources_of_the_same_weights_give_the_same_result(
    runs: Path, written: Path, val: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = runs / "averaged", f"data.val={val}"

    def result(*arguments: object) -> str:
        assert command(monkeypatch, *arguments) == 0
        output = capsys.readouterr().out
        assert ("does not name its classes: assuming the 7 of" in output) == ("nameless" in str(arguments[0]))
        match = RESULT.search(output)
        assert match, output
        return match[1]

    expected = result(run, data)
    open_run = open_weights(run, None, [data], average=False, needs_head=True)
    distributed.join()
    with EvalLoader(open_index(val), open_run.config.data, Placement(CPU, micro_batch=64)) as loader:
        measured = evaluate(open_run.model, loader, CLASSES, "bf16")
    distributed.stop()
    assert expected == f"top-1 {measured['top1']:.2%}, top-5 {measured['top5']:.2%}, loss {measured['loss']:.4f} on 120 images of {val}"

    assert result(run / "checkpoints" / "step-000000002", data) == expected
    assert result(run, config, data) == expected
    for name in ("official.pth", "mmpretrain.pth", "timm", "hf", "nameless.pth"):
        assert result(written / name, config, data) == expected
    assert result(run, data, "--weights", "ema") != expected
    assert result(run, data, "data.eval_crop=0.5") != expected


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("averaged", [], "its data.val is not set; add data.val=FOLDER"),
        (
            "averaged",
            ["CONFIG", "model.name=van_b1", "VAL"],
            "of another model than the settings: model.name=van_b1, there van_b0. Omit CONFIG",
        ),
        ("averaged", ["model.classes=8", "VAL"], "of another model than the settings: model.classes=8, there 7"),
        ("plain", ["VAL", "--weights", "ema"], "keeps no moving average of its weights"),
        ("averaged", ["data.val=DRAWN"], "10 of 10 classes are not among the 7 that the weights are for: checks, crosses, "),
        ("averaged", ["VAL", "data.val_except=[rings]"], "data.val_except contains rings, which"),
        ("averaged", ["VAL", "--probe", "0"], "--probe 0: must be at least 1 image per class"),
        ("averaged", ["VAL", "--probe", "5"], "unused: no such folder"),
        ("nothing", ["CONFIG", "VAL"], "nothing: no such file or folder"),
        ("official.pth", ["VAL"], "official.pth has no checkpoints; other weights need a CONFIG"),
        ("official.pth", ["CONFIG", "VAL", "--weights", "ema"], "--weights ema is for runs and checkpoints"),
        ("official.pth", ["CONFIG", "VAL", "model.name=van_b4"], "weights of van_b0, but model.name=van_b4; set model.name=van_b0"),
        ("official.pth", ["CONFIG", "VAL", "model.classes=1000"], "has 7 classes, but model.classes=1000; set model.classes=7"),
        ("mmseg.pth", ["CONFIG", "VAL"], "mmseg.pth holds no head, so it can't classify; use --probe 100"),
        ("nameless.pth", ["CONFIG", "data.val=DRAWN"], "does not name its 7 classes, so they could only be those of data.val; "),
        ("official.pth", ["CONFIG", "VAL", "data.vall=x"], "unknown key; did you mean data.val?"),
        ("official.pth", ["CONFIG", "data.val=/not/there"], "data.val = /not/there (command line): no such folder"),
    ],
)
@pytest.mark.usefixtures("leaves")
def test_errors_come_before_any_image_is_read(
    runs: Path, written: Path, val: Path, config: Path, drawn: Path, source: str, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(EvalLoader, "__iter__", lambda self: pytest.fail("images are read"))
    given = {"CONFIG": str(config), "VAL": f"data.val={val}", "data.val=DRAWN": f"data.val={drawn / 'val'}"}
    folder = runs if source in ("averaged", "plain") else written
    assert command(monkeypatch, folder / source, *(given.get(text, text) for text in arguments)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "top-1" not in captured.out


@pytest.mark.usefixtures("leaves")
def test_probe_of_weights_without_a_head(
    written: Path, drawn: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [config, f"data.train={drawn / 'train'}", f"data.val={drawn / 'val'}", "data.val_except=[rings,dots]", "--probe", 5]
    assert command(monkeypatch, written / "mmseg.pth", *arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    place = f"{written / 'mmseg.pth'}, features of 40 images of {drawn / 'train'} (at most 5 a class): 20-nearest-neighbor top-1 "
    assert line.startswith(place)
    assert line.endswith(f"on 16 images of {drawn / 'val'}, 8 classes")


# ---------------------------------------------------------------- whole jobs


@pytest.mark.long
def test_a_job_evaluates_on_a_subset_of_its_classes(drawn: Path, tmp_path: Path) -> None:
    """The command, on the same number of ranks, gets the job's own result."""
    classes = ["zigzags", "crosses", "rings"]
    part = copy_with_classes(open_index(drawn / "val"), tmp_path / "val", classes)
    output = jobs.run(tmp_path / "job", drawn, f"data.val={part}", "steps=2", ranks=2)
    assert f"evaluation: head of 10 classes restricted to the 3 of {part}\n" in output
    (record,) = jobs.metrics(tmp_path / "job", "evaluation")
    measured = record["ema"]
    assert (measured["images"], measured["classes"], measured["top5"]) == (20, 3, 1)  # three classes are all among five

    arguments, environment = [str(tmp_path / "job" / "run"), "--weights", "ema"], os.environ | {"RANKS": "2", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "launch", "evaluate", *arguments], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert f"head of 10 classes restricted to the 3 of {part}\n" in ended.stdout
    result = f"top-1 {measured['top1']:.2%}, top-5 100.00%, loss {measured['loss']:.4f} on 20 images of {part}\n"
    assert ended.stdout.endswith(f"(moving average of step 2): {result}")
    assert ended.stdout.count("top-1") == 1

    strange = copy_with_classes(open_index(drawn / "val"), tmp_path / "strange", [*classes, "moons"])
    output = jobs.run(tmp_path / "other", drawn, f"data.val={strange}", ranks=1, code=2)
    assert "1 of 4 classes are not among the 10 that the weights are for: moons; leave their images out: data.val_except=[moons]" in output
