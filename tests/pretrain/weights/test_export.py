"""Exports of a run's weights: content, place, model card, and what happens to existing files."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import pretrain.weights.export
from pretrain import checkpoint
from pretrain.__main__ import main
from pretrain.model.formats import FORMATS, has_head
from pretrain.weights.export import DTYPES, EXPORT_FORMATS, Export, export, export_run, model_card
from pretrain.weights.run_model import build_trained, open_run
from pretrain.weights.source import read_source
from tests.support.tiny_runs import CLASSES, assert_same, assert_trained, new_model, trained_weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_exported_weights_are_the_trained_ones(runs: Path, tmp_path: Path, fmt: str, average: bool) -> None:
    out = tmp_path / "deep" / "weights"
    line = export(runs / "averaged", fmt, out, average=average)
    assert line.startswith(f"{out}: van_b0, {'moving average' if average else 'weights'} of step 2, fp32, format {fmt}; ")
    weights = read_source(out, new_model()).weights
    kind = "ema" if average else "raw"
    if not has_head(fmt):
        assert not [name for name in weights if name.startswith("head.")]
        weights |= {name: trained_weights(runs, kind)[name] for name in ("head.weight", "head.bias")}
    assert_trained(weights, runs, kind)
    beside = ["weights"] if EXPORT_FORMATS[fmt].is_folder else ["weights", "weights.md", "weights.sha256"]
    assert sorted(path.name for path in out.parent.iterdir()) == beside


def test_weights_and_average_differ(runs: Path) -> None:
    raw, ema = trained_weights(runs, "raw"), trained_weights(runs, "ema")
    for name in ("head.weight", "stages.0.blocks.0.norm1.running_mean"):
        assert not torch.allclose(raw[name], ema[name], rtol=1e-4, atol=1e-5)


def test_timm_builds_the_model_from_its_folder(runs: Path, tmp_path: Path) -> None:
    export(runs / "averaged", "timm", tmp_path / "van")
    model = timm.create_model(f"local-dir:{tmp_path / 'van'}", pretrained=True).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trained = new_model().eval()
    trained.load_state_dict(trained_weights(runs, "raw"))
    with torch.no_grad():
        assert torch.equal(model(images), trained(images))
    transform = timm.data.resolve_model_data_config(model)
    assert (transform["input_size"], tuple(transform["mean"])) == ((3, 32, 32), (0.4, 0.5, 0.6))
    assert (transform["crop_pct"], transform["crop_mode"]) == (0.875, "center")
    assert json.loads((tmp_path / "van" / "config.json").read_text())["label_names"] == CLASSES

    export(runs / "plain", "timm", tmp_path / "squashed")  # its evaluation resizes without a crop
    transform = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'squashed'}", pretrained=True))
    assert (transform["crop_pct"], transform["crop_mode"]) == (1.0, "squash")


@pytest.mark.parametrize("fmt", ["official", "timm"])
def test_an_export_is_replaced_only_with_force(runs: Path, tmp_path: Path, fmt: str) -> None:
    out, leftover = tmp_path / "weights", tmp_path / ".partial-weights"
    out.write_text("precious")
    leftover.mkdir()  # of an export that was killed
    with pytest.raises(ValueError, match=f"^{out} exists; give another --out, or --force to replace it$"):
        export(runs / "averaged", fmt, out)
    assert out.read_text() == "precious"
    for other in ("official", "timm", fmt):  # a file by a folder, a folder by a file
        export(runs / "averaged", other, out, force=True)
        assert_same(read_source(out, new_model()).weights, trained_weights(runs, "raw"))
        assert not leftover.exists()


@pytest.mark.parametrize("beside", ["weights.pth.md", "weights.pth.sha256"])
def test_model_card_and_checksum_are_not_overwritten_either(runs: Path, tmp_path: Path, beside: str) -> None:
    (tmp_path / beside).write_text("precious")
    with pytest.raises(ValueError, match=f"^{tmp_path / beside} exists; "):
        export(runs / "plain", "official", tmp_path / "weights.pth")
    assert (tmp_path / beside).read_text() == "precious"


@pytest.mark.parametrize("fmt", ["official", "timm"])
def test_a_folder_that_is_no_export_is_never_replaced(runs: Path, tmp_path: Path, fmt: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("precious")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'run'} is not replaced: it holds more than an export: checkpoints; "):
        export(runs / "plain", fmt, tmp_path / "run", force=True)
    assert (tmp_path / "run" / "checkpoints").read_text() == "precious"


@pytest.mark.parametrize("fmt", ["official", "timm"])
def test_a_corrupted_export_is_not_published(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    written = EXPORT_FORMATS[fmt]

    def damaging(path: Path, fmt: str, model: nn.Module, *rest: Any) -> None:
        other = copy.deepcopy(model)
        other.stages[2].norm.bias.data[7] += 1e-6  # type: ignore[union-attr,index,operator]
        written.write(path, fmt, other, *rest)

    monkeypatch.setitem(EXPORT_FORMATS, fmt, replace(written, write=damaging))
    with pytest.raises(RuntimeError, match=r"the export reads back differently: stages\.2\.norm\.bias; is the disk sound"):
        export(runs / "plain", fmt, tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("file/weights.pth", {}, r"^\S+/file/weights\.pth can't be written: "),
        ("van.safetensors", {}, r"van\.safetensors: format official is a file of torch\.save; call it .*van\.pth$"),
        ("weights.pth", {"average": True}, r"plain keeps no moving average of its weights .*--weights raw"),
    ],
)
def test_an_export_that_can_not_be_made(runs: Path, tmp_path: Path, out: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        export(runs / "plain", "official", tmp_path / out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_checkpoint(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "plain", run)
    (path,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert open_run(run)[0] == open_run(path)[0] == path
    (shard,) = path.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"^checkpoint {path} is damaged: {shard.name} has another checksum"):
        export(path, "official", tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"^no whole checkpoint in {run / 'checkpoints'}"):
        export(run, "official", tmp_path / "weights.pth")
    assert f"skipping checkpoint {path}: {shard.name} has another checksum" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"^{tmp_path} is neither a checkpoint nor a run directory"):
        export(tmp_path, "official", tmp_path / "weights.pth")


def test_the_command(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "van.pth"
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(
        sys, "argv", ["pretrain", "export", str(runs / "averaged"), "--format", "official", "--weights", "ema", "--out", str(out)]
    )
    assert main() == 0
    assert capsys.readouterr().out.startswith(f"{out}: van_b0, moving average of step 2, fp32, format official; ")
    assert_trained(read_source(out, new_model()).weights, runs, "ema")
    assert main() == 2
    assert capsys.readouterr().err == f"error: {out} exists; give another --out, or --force to replace it\n"


@pytest.mark.parametrize(("fmt", "dtype"), [*((fmt, "bf16") for fmt in FORMATS), ("official", "fp16")])
def test_other_dtypes_without_a_head(runs: Path, tmp_path: Path, fmt: str, dtype: str) -> None:
    export(runs / "averaged", fmt, tmp_path / "weights", dtype=dtype, features_only=True)
    expected = {name: tensor for name, tensor in trained_weights(runs, "raw").items() if not name.startswith("head.")}
    floats = {name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor for name, tensor in expected.items()}
    assert_same(read_source(tmp_path / "weights", new_model()).weights, floats)


@pytest.mark.parametrize("fmt", ["official", "timm"])
def test_checksum_and_model_card(runs: Path, tmp_path: Path, fmt: str) -> None:
    out = tmp_path / "weights"
    export(runs / "averaged", fmt, out, average=True, license="Apache-2.0")
    folder, sums = (out, "SHA256SUMS") if EXPORT_FORMATS[fmt].is_folder else (tmp_path, "weights.sha256")
    subprocess.run(["sha256sum", "--check", "--strict", sums], cwd=folder, check=True)
    card = (out / "README.md" if EXPORT_FORMATS[fmt].is_folder else Path(f"{out}.md")).read_text()
    assert (folder / sums).read_text().split()[0] in card
    for stated in ("van_b0, 7 classes, fp32", "moving average, decay 0.9, of step 2", "not measured", "learning rate 0.001", "Apache-2.0"):
        assert stated in card
    assert EXPORT_FORMATS[fmt].load_with in card
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read the card may read the weights


def test_accuracy_in_the_model_card(runs: Path) -> None:
    model, config, trainer = build_trained(runs / "averaged", average=False)
    one = {"top1": 0.5, "top5": 0.75, "images": 8, "loss": 1.0}
    trainer |= {"evaluation": {"step": 1, "weight": one, "ema": one | {"top1": 0.625}}}
    card = model_card(Export("timm", Path("out"), average=True), model, config, trainer, digest="")
    assert card.startswith("# tiny\n\nVisual Attention Network (arXiv:2202.09741), trained with van-pretrain.\n")
    assert '| load with | `import pretrain.model.van` and `timm.create_model("local-dir:PATH", pretrained=True)` |' in card
    assert "| accuracy | top-1 62.50%, top-5 75.00% on 8 images of None, at step 1 |" in card


def test_transformers_config(runs: Path, tmp_path: Path) -> None:
    """config.json has the values of VanConfig (transformers 4.30, models/van/configuration_van.py) for this model."""
    export(runs / "averaged", "hf", tmp_path / "van")
    settings = json.loads((tmp_path / "van" / "config.json").read_text())
    assert settings["hidden_sizes"] == [32, 64, 160, 256]
    assert settings["depths"] == [3, 3, 5, 2]
    assert settings["mlp_ratios"] == [8, 8, 4, 4]
    assert settings["id2label"] == {str(number): name for number, name in enumerate(CLASSES)}
    assert read_source(tmp_path / "van", new_model()).classes == tuple(CLASSES)


# ---------------------------------------------------------------- a finished run


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(runs / "averaged", tmp_path / "run")


def set_formats(monkeypatch: pytest.MonkeyPatch, *formats: str, steps: int = 2) -> None:
    """Changes run.export and the number of steps of the tiny runs."""

    def opened(run: Path) -> tuple[Path, dict[str, Any]]:
        path, trainer = open_run(run)
        return path, trainer | {
            "config": trainer["config"] | {"run": trainer["config"]["run"] | {"export": list(formats)}},
            "identity": {"steps": steps},
        }

    monkeypatch.setattr("pretrain.weights.export.open_run", opened)


def test_a_finished_run_exports_its_average_in_place_of_earlier_exports(runs: Path, run: Path) -> None:
    paths = [run / "weights" / name for name in ("tiny.pth", "tiny_timm")]
    for _ in range(2):
        logged: list[str] = []
        assert export_run(run, logged.append) == paths
        for path, line in zip(paths, logged, strict=True):
            assert_trained(read_source(path, new_model()).weights, runs, "ema")
            assert line.startswith(f"{path}: van_b0, moving average of step 2, fp32, format ")


def test_a_run_without_a_moving_average_exports_its_weights(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "plain", tmp_path / "run")
    export_run(run, lambda line: None)
    assert_same(read_source(run / "weights" / "tiny.pth", new_model()).weights, torch.load(runs / "plain.pt")["raw"])


def test_every_format_of_run_export(runs: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_formats(monkeypatch, *FORMATS)
    paths = export_run(run, lambda line: None)
    assert [path.name for path in paths] == [f"tiny{EXPORT_FORMATS[fmt].suffix}" for fmt in FORMATS]
    for path in paths:
        weights = read_source(path, new_model()).weights
        if path.name == "tiny_mmseg.pth":  # removing its head must not change the others
            weights |= {name: trained_weights(runs, "ema")[name] for name in ("head.weight", "head.bias")}
        assert_trained(weights, runs, "ema")


def test_no_format_in_run_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_formats(monkeypatch)
    assert export_run(run) == []
    assert not (run / "weights").exists()


@pytest.mark.parametrize("fmt", ["official", "timm"])
def test_a_killed_replacement_leaves_a_complete_export_or_none(runs: Path, tmp_path: Path, fmt: str) -> None:
    """Kills the process at each of its file operations in turn."""
    for kind in ("old", "new"):
        export(runs / "averaged", fmt, tmp_path / kind / "van", average=kind == "new")
    names = [path.name for path in (tmp_path / "old").iterdir()]

    def content(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path)
        }

    wholes, seen, died = [content(tmp_path / kind) for kind in ("old", "new")], set(), True
    for operation in range(40):
        place = tmp_path / str(operation)
        shutil.copytree(tmp_path / "old", place)
        (shutil.copytree if EXPORT_FORMATS[fmt].is_folder else shutil.copy)(tmp_path / "new" / "van", place / ".partial-van")
        child = os.fork()
        if child == 0:
            die_at(operation)
            pretrain.weights.export._publish(Export(fmt, place / "van"), place / ".partial-van", *card_and_checksum(tmp_path / "new", fmt))
            os._exit(0)
        died = os.waitpid(child, 0)[1] != 0
        found = {name: data for name, data in content(place).items() if not name.startswith(".removed")}
        assert any(found.items() <= whole.items() for whole in wholes), sorted(found)
        if EXPORT_FORMATS[fmt].is_folder:
            assert found in ({}, *wholes)
        seen.add("none" if not found.keys() & {"van", "van/config.json"} else ("old" if found.items() <= wholes[0].items() else "new"))
        if not died:
            assert found == wholes[1]
            assert sorted(path.name for path in place.iterdir()) == sorted(names)
            break
    assert not died
    assert operation > 4
    assert {"old", "new"} <= seen


def die_at(operation: int) -> None:
    """Kills this process before that operation of those that change files, counted from 0."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("os.rename", "os.remove", "os.rmdir") or (event == "open" and "w" in str(arguments[1])):
            if count == operation:
                os._exit(1)
            count += 1

    sys.addaudithook(hook)


def card_and_checksum(folder: Path, fmt: str) -> tuple[str, str]:
    names = ("van/README.md", "van/SHA256SUMS") if EXPORT_FORMATS[fmt].is_folder else ("van.md", "van.sha256")
    card, sums = ((folder / name).read_text() for name in names)
    return card, sums


def test_an_unfinished_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_formats(monkeypatch, "official", steps=3)
    with pytest.raises(ValueError, match=f"^{run} is not finished: step 2 of 3; use --format and --out to export its weights as they are"):
        export_run(run)
    (checkpoint_path,) = checkpoint.list_checkpoints(run / "checkpoints")
    with pytest.raises(ValueError, match="is a checkpoint: give --format and --out"):
        export_run(checkpoint_path)
    assert not (run / "weights").exists()


def test_the_command_for_a_finished_run(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain", "export", str(run)])
    assert main() == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(run / "weights" / name) for name in ("tiny.pth", "tiny_timm")
    ]
    for options in (["--format", "timm"], ["--out", "a"], ["--force"], ["--weights", "ema", "--dtype", "bf16"]):
        monkeypatch.setattr(sys, "argv", ["pretrain", "export", str(run), *options])
        with pytest.raises(SystemExit, match="2"):
            main()
        named = ", ".join(option for option in options if option.startswith("--"))
        assert f"error: {named}: options need both --format and --out" in capsys.readouterr().err
