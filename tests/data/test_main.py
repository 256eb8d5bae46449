"""The command line of the data package, run in this process and as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import main
from data.augment.recipe import Recipe
from data.dataset.index import Index, open_index
from data.inspect.parameters import list_parameters
from data.loader.order import SampleOrder
from data.settings import DataConfig
from data.synthetic.synthesize import draw_images
from tests.support import REPOSITORY
from tests.support.foreign_shards import JPEGS, write_tar

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


def test_every_option_of_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    labels = []
    for number, (encoded, label) in enumerate(draw_images(2, 20, 0, 0)):
        (tmp_path / "flat" / f"{number:02d}.jpg").write_bytes(encoded if number else b"bad")
        labels.append(f"{number:02d}.jpg,{'cat' if label else 'dog'}\n")
    (tmp_path / "labels.csv").write_text("".join(labels))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    command = ["pack", str(tmp_path / "flat"), str(tmp_path / "out"), "--workers", "1", "--labels", str(tmp_path / "labels.csv")]
    command += ["--classes", str(tmp_path / "classes.txt"), "--name", "pets", "--holdout", "0.3", "--seed", "7", "--resize-short", "64"]
    command += ["--max-side", "96", "--max-pixels", "1000000", "--keep-original", "--shard-mb", "0.02"]
    assert main(command) == 2
    assert "too many images are rejected: 1 so far, and --max-rejected allows 0 of 20. The first: 00.jpg: " in capsys.readouterr().err
    command += ["--max-rejected", "0.05"]
    assert main([*command, "--part", "1/2"]) == 0
    assert main([*command, "--merge"]) == 2
    assert "shards are not packed yet" in capsys.readouterr().err
    assert main([*command, "--part", "0/2"]) == 0
    assert main([*command, "--merge"]) == 0
    train, val = open_index(tmp_path / "out" / "train"), open_index(tmp_path / "out" / "val")
    assert train.classes == ("dog", "cat")
    assert len(train) + len(val) == 19
    assert train.samples["width"].max() <= 96
    assert train.shards[0].name == "pets-train-000000.tar"
    made = json.loads((train.folder / "dataset.json").read_text())["made"]
    expected = {"seed": 7, "holdout": 0.3, "max_side": 96, "resize_short": 64, "max_pixels": 1000000, "keep_original": True}
    assert expected.items() <= made.items()


def test_foreign_shards_with_keys_that_are_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shards, out = tmp_path / "shards", tmp_path / "report.html"
    shards.mkdir()
    write_tar(
        shards / "a.tar", [("\udce9.json", b'{"kind": 1}'), ("\udce9.jpg", JPEGS[0]), ("2.json", b'{"kind": 0}'), ("2.jpg", JPEGS[1])]
    )
    (tmp_path / "classes.txt").write_text("tabby\ntiger\n")
    assert main(["index", str(shards)]) == 2
    assert "it has json, jpg, and no cls; --label FIELD takes labels from the .json" in capfd.readouterr().err
    assert main(["index", str(shards), "--label", "kind", "--classes", str(tmp_path / "classes.txt"), "--workers", "1"]) == 0
    assert "classes      2" in capfd.readouterr().out
    assert main(["order", str(write_job(tmp_path, shards, "global_batch: 2"))]) == 0
    assert {line.split("  ")[3] for line in capfd.readouterr().out.splitlines()} == {"key=2", "key=\\udce9"}
    assert main(["stats", str(shards), "--out", str(out)]) == 0
    assert "tiger" in out.read_text()
    assert main(["verify", str(shards), "--deep", "--workers", "1"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith(f"{shards}: 0 faults in 2 samples")


def write_job(folder: Path, train: Path, text: str) -> Path:
    """Writes a job's settings, with keys that the data commands ignore."""
    path = folder / "job.yaml"
    path.write_text(f"name: job\noptim: {{lr: 1}}\n{text}\ndata: {{train: {train}}}\n")
    return path


def test_order_prints_the_samples_of_a_job(dataset: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings come from the file and from any place on the command line."""
    job = write_job(tmp_path, dataset.folder, "seed: 3\nglobal_batch: 10")
    assert main(["order", str(job), "data.lanes=5", "--epoch", "2", "seed=5", "--steps", "3:6", "data.window=4"]) == 0
    order = SampleOrder(dataset.shard_start, seed=5, global_batch=10, lanes=5, window=4)
    expected = []
    for step in (3, 4, 5):
        ids = order.batch(2, step)
        parameters = list_parameters(Recipe(5, DataConfig()), 2, ids, order.copies, dataset)
        for slot, (sample_id, texts) in enumerate(zip(ids.tolist(), parameters, strict=True)):
            name = dataset.classes[sample_id % 10]
            line = f"epoch=2  step={step}  slot={slot}  key={sample_id:09d}  class={name}  crop={texts['crop']}  flip={texts['flip']}"
            expected.append(f"{line}  mix={texts['mix']}")
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "/nowhere"], "/nowhere: no such folder"),
        (["pack", "/nowhere", "/tmp/x"], "/nowhere: no such file or folder"),
        (["order", "{}", "global_batch=9999"], "fewer than one global batch"),
        (["order", "{}", "--steps", "14:16"], "outside of an epoch of 15 steps"),
    ],
)
def test_error_is_one_line(dataset: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    job = write_job(tmp_path, dataset.folder, "global_batch: 10")
    assert main([argument.format(job) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "source", "out", "--holdout", "1.0"], "argument --holdout: "),
        (["pack", "source", "out", "--holdout", "-1"], "argument --holdout: "),
        (["pack", "source", "out", "--max-rejected", "many"], "argument --max-rejected: "),
        (["pack", "source", "out", "--part", "2/2"], "argument --part: "),
        (["pack", "source", "out", "--part", "1"], "argument --part: "),
        (["pack", "source", "out", "--part", "x/y"], "argument --part: "),
        *(
            (["order", "job.yaml", "--steps", steps], f"argument --steps: {steps}: expected A:B")
            for steps in ("0", "3:3", ":3", "a:b", "2:1")
        ),
        (["order", "job.yaml", "--step", "0:1", "--speed"], "unrecognized arguments: --speed"),
        (["stats", "folder", "seed=1"], "unrecognized arguments: seed=1"),
    ],
)
def test_invalid_argument_is_an_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_package_is_a_program(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "data", "synthesize", str(tmp_path / "out"), "--classes", "2", "--train", "4", "--val", "2"]
    first = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT)
    assert first.returncode == 0, first.stderr
    assert "samples      4" in first.stdout
    assert "drawing val: 2 of 2" in first.stderr
    second = subprocess.run(program, capture_output=True, text=True, env=ENVIRONMENT)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert "is not empty" in second.stderr


def test_slow_imports_happen_only_where_they_are_needed() -> None:
    modules = {
        "data": "__main__, settings",
        "data.common": "config_files, counter_rng, files, git, progress",
        "data.dataset": "index, shards, check",
        "data.augment": "recipe, randaugment, sampling",
        "data.loader": "order, store, read_ahead",
        "data.packing": "adopt, images, labels, sources, plan, pack, verify",
        "data.inspect": "report, parameters",
        "data.synthetic": "drawings, synthesize",
    }
    slow = "{'torch', 'webdataset', 'scipy', 'nvidia.dali', 'matplotlib', 'pretrain', 'launch'}"
    imports = [f"from {room} import {names}" for room, names in modules.items()]
    code = "\n".join(["import sys", *imports, f"assert not {slow} & sys.modules.keys()"])
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
