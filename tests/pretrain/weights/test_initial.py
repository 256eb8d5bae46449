"""Initial weights in every format, and the initialization of the head."""

import argparse
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.model.formats import FORMATS, to_format
from pretrain.weights.export import EXPORT_FORMATS, export
from pretrain.weights.initial import start_from
from tests.support.tiny_runs import CLASSES, assert_same, new_model, trained_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights in all formats, as exported and as others write them; not to be changed."""
    folder = tmp_path_factory.mktemp("weights")
    for fmt in FORMATS:
        export(runs / "averaged", fmt, folder / (fmt if EXPORT_FORMATS[fmt].is_folder else f"{fmt}.pth"))
    state = trained_weights(runs, "raw")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "wrapped.pth")
    # As transformers 4.30 saves a model.
    (folder / "bin").mkdir()
    shutil.copy(folder / "hf" / "config.json", folder / "bin")
    torch.save(load_file(folder / "hf" / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    # As the authors' training code saves a checkpoint (timm's CheckpointSaver).
    beside = {"epoch": 300, "arch": "van_b0", "args": argparse.Namespace(mean=(0.5,), lr=1e-3), "metric": 75.4, "version": 2}
    torch.save({"state_dict": to_format(state, "official"), **beside}, folder / "authors.pth")
    return folder


OTHERS = [*CLASSES[3:], "new", *CLASSES[:1]]  # five of the seven, in another order, and one that they lack
NAMED = ["official.pth", "mmpretrain.pth", "timm", "hf", "bin", "run", "checkpoint"]
NAMELESS = ["authors.pth", "wrapped.pth", "timm/model.safetensors"]


def place(written: Path, runs: Path, name: str) -> Path:
    run = runs / "averaged"
    return {"run": run, "checkpoint": run / "checkpoints" / "step-000000002"}.get(name, written / name)


def started(model: nn.Module, source: Path, head_init: str, classes: list[str]) -> list[str]:
    """Returns the lines that `start_from` logs, without the first."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # no tensor may be equal by chance
    first, *lines = start_from(model, source, head_init, classes)
    assert first == f"starting from {source}: all {len(model.state_dict()) - 2} tensors of the backbone loaded"
    if source.name in ("hf", "bin"):
        unused = "  van.layernorm.weight, van.layernorm.bias: dropped; transformers saves them and never uses them"
        assert lines.pop() == unused
    return lines


@pytest.mark.parametrize("name", [*NAMED, *NAMELESS])
def test_head_kept(written: Path, runs: Path, name: str) -> None:
    model = new_model()
    assert started(model, place(written, runs, name), "keep", CLASSES) == ["  head.weight, head.bias: kept"]
    assert_same(dict(model.state_dict()), trained_weights(runs, "raw"))


@pytest.mark.parametrize("name", [*NAMED, *NAMELESS, "mmseg.pth"])
def test_head_of_zeros(written: Path, runs: Path, name: str) -> None:
    model = new_model(9)
    theirs = "missing" if name == "mmseg.pth" else "dropped"
    lines = started(model, place(written, runs, name), "zero", [str(n) for n in range(9)])
    assert lines == [f"  head.weight, head.bias: new, all zeros; {theirs} in the source: head.weight, head.bias"]
    expected = trained_weights(runs, "raw") | {"head.weight": torch.zeros(9, 256), "head.bias": torch.zeros(9)}
    assert_same(dict(model.state_dict()), expected)


@pytest.mark.parametrize("name", NAMED)
def test_head_mapped_by_class_name(written: Path, runs: Path, name: str) -> None:
    model = new_model(len(OTHERS))
    (line,) = started(model, place(written, runs, name), "map", OTHERS)
    assert line == "  head.weight, head.bias: 5 of 6 rows copied by class name; zeros for new; 2 rows of the source dropped"
    theirs = trained_weights(runs, "raw")
    for row, class_name in enumerate(OTHERS):
        known = class_name in CLASSES
        weight, bias = (theirs[f"head.{kind}"][CLASSES.index(class_name)] if known else torch.tensor(0.0) for kind in ("weight", "bias"))
        assert torch.equal(model.head.weight[row], weight.expand(256))  # type: ignore[union-attr,operator]
        assert model.head.bias[row] == bias  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "head_init", "classes", "message"),
    [
        ("mmseg.pth", "keep", CLASSES, "holds no head.weight and no head.bias; use model.head_init=zero"),
        ("mmseg.pth", "map", CLASSES, "holds no head.weight and no head.bias; use model.head_init=zero"),
        ("official.pth", "keep", CLASSES[::-1], "is for other classes than the data; use map or zero"),
        ("authors.pth", "map", CLASSES, "does not name its classes; use model.head_init=zero"),
        ("run", "map", ["a", "b"], r"has none of the data's classes \(a, …\); it has class 0, …"),
        ("authors.pth", "keep", OTHERS, r"head.weight has shape \(7, 256\) instead of \(6, 256\)"),
    ],
)
def test_a_head_that_does_not_fit(written: Path, runs: Path, name: str, head_init: str, classes: list[str], message: str) -> None:
    model = new_model(len(classes))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start_from(model, place(written, runs, name), head_init, classes)
    assert_same(dict(model.state_dict()), before)


def damage(folder: Path, kind: str, out: Path) -> Path:
    """A file in OUT that can't be started from."""
    whole = folder / "official.pth"
    state = torch.load(whole)["state_dict"]
    path = out / ("bad.safetensors" if kind == "truncated safetensors" else "bad.pth")
    if kind == "truncated":
        path.write_bytes(whole.read_bytes()[:-10_000])
    elif kind == "truncated safetensors":
        path.write_bytes((folder / "timm" / "model.safetensors").read_bytes()[:-10_000])
    elif kind == "text":
        path.write_text("<!DOCTYPE html>\n")
    elif kind == "empty":
        path.touch()
    elif kind == "pickled":
        torch.save(new_model(), path)
    elif kind == "list":
        torch.save([state], path)
    elif kind == "foreign":
        torch.save({"conv1.weight": torch.ones(1), "layer1.0.bias": torch.ones(1)}, path)
    elif kind == "shape":
        torch.save(state | {"block1.0.attn.proj_1.weight": torch.ones(32, 32, 3, 3)}, path)
    elif kind == "missing":
        torch.save({key: tensor for key, tensor in state.items() if key != "norm3.bias"}, path)
    elif kind == "rows":
        torch.save({"state_dict": state, "classes": CLASSES[:-1]}, path)
    elif kind == "wide":
        torch.save({"state_dict": state | {"head.weight": torch.ones(7, 512)}, "classes": CLASSES}, path)
    elif kind == "numbered":
        torch.save({0: torch.ones(1)}, path)
    elif kind == "deeper":
        torch.save(state | {"block1.3.layer_scale_1": torch.ones(32)}, path)
    elif kind == "no tensor":
        torch.save(state | {"norm3.bias": 3.0}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "{} can't be read as weights: "),
        ("truncated safetensors", "{} can't be read as weights: "),
        ("empty", "{} can't be read as weights: it is empty"),
        ("text", "{} can't be read as weights: not a file of torch.save, or one with more in it than tensors"),
        ("pickled", "{} can't be read as weights: not a file of torch.save, or one with more in it than tensors"),
        ("absent", "{} can't be read as weights: "),
        ("list", "{} holds a list instead of a dictionary of weights"),
        ("foreign", "{}: these weights are in none of the formats "),
        ("no tensor", "{} holds other things than tensors: stages.2.norm.bias is a float"),
        ("shape", "model.init_from={} does not fit the model: stages.0.blocks.0.attn.proj_1.weight has shape (32, 32, 3, 3) instead of "),
        ("missing", "model.init_from={} does not fit the model: stages.2.norm.bias is missing"),
        ("rows", "model.init_from={} does not fit the model: head.weight has shape (7, 256) instead of (6, 256)"),
        ("wide", "model.init_from={} does not fit the model: head.weight has shape (7, 512) instead of (7, 256)"),
        ("numbered", "{}: these weights are in none of the formats "),
        ("deeper", "model.init_from={} does not fit the model: stages.0.blocks.3.layer_scale_1 is not in the model"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_unchanged(written: Path, tmp_path: Path, kind: str, message: str) -> None:
    source = damage(written, kind, tmp_path)
    model = new_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(source))}"):
        start_from(model, source, "map" if kind in ("rows", "wide") else "keep", CLASSES)
    assert_same(dict(model.state_dict()), before)


def test_weights_of_another_model_are_called_by_its_name(written: Path) -> None:
    """As files of `export`, folders of timm and checkpoints of the authors' code name it."""
    with torch.device("meta"):
        model = timm.create_model("van_b3", num_classes=7)
    for name in ("official.pth", "timm", "authors.pth"):
        message = f"model.init_from={written / name} does not fit the model: these are weights of van_b0, the job's model is van_b3; "
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            start_from(model, written / name, "zero", CLASSES)
