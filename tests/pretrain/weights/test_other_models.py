"""Models that are no VAN: head, export, evaluation and fine-tuning."""

import json
from pathlib import Path

import pytest
import timm
import torch

from pretrain.config import from_dict
from pretrain.evaluation import command
from pretrain.model.formats import FORMATS
from pretrain.weights import export as exports
from pretrain.weights.export import Export, check_formats, load_command, run_formats
from pretrain.weights.initial import start_from
from pretrain.weights.source import formats_of, head_keys, read_source
from tests.support.tiny_runs import CLASSES, assert_same

SETTINGS = {
    "name": "other", "global_batch": 4, "epochs": 1.0, "model": {"name": "van_b0", "classes": len(CLASSES)},
    "data": {"train": "unused", "image_size": 32}, "optim": {"lr": 1e-3}, "engine": {"micro_batch": 4, "device": "cpu"},
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "van_b0", "resnet10t", "test_vit", "convnext_atto", "deit_tiny_distilled_patch16_224", "vgg11", "mobilenetv3_small_050",
        "levit_128s", "caformer_s18",
    ],
)  # fmt: skip
def test_the_head_is_all_that_depends_on_the_classes(name: str) -> None:
    with torch.device("meta"):
        seven, nine, none = (timm.create_model(name, num_classes=number) for number in (7, 9, 0))
    shapes = {key: tensor.shape for key, tensor in nine.state_dict().items()}
    assert set(head_keys(seven)) == {key for key, tensor in seven.state_dict().items() if tensor.shape != shapes[key]} != set()
    assert head_keys(none) == ()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_export_read_and_start(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, config = timm.create_model(name, num_classes=len(CLASSES)), from_dict(SETTINGS)
    config.model.name = name
    trained = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    out = tmp_path / name
    trainer = {"step": 2, "identity": {"steps": 2}, "classes": CLASSES}
    line = exports._write(Export("timm", out), model, config, trainer)
    assert line.startswith(f"{out}: {name}, weights of step 2, fp32, format timm; ")
    assert_same(dict(timm.create_model(f"local-dir:{out}", pretrained=True).state_dict()), trained)
    card = (out / "README.md").read_text()
    assert "Visual Attention Network" not in card
    assert '| load with | `timm.create_model("local-dir:PATH", pretrained=True)` |' in card

    source = read_source(out, model)
    assert (source.architecture, source.classes) == (name, tuple(CLASSES))
    other = timm.create_model(name, num_classes=2)
    start_from(other, out, "map", [CLASSES[3], "new"])
    head = head_keys(other)
    for key, tensor in other.state_dict().items():
        expected = torch.stack([trained[key][3], torch.zeros_like(trained[key][3])]) if key in head else trained[key]
        assert torch.equal(tensor, expected), key


def test_formats_depend_on_the_class_of_the_model() -> None:
    with torch.device("meta"):
        van, other = timm.create_model("van_b0"), timm.create_model("test_resnet")
    assert formats_of(other) == ("timm",)
    assert formats_of(van) == FORMATS
    with pytest.raises(ValueError, match=r"^run\.export: ResNet has no format official, hf, only timm$"):
        check_formats(other, ["official", "timm", "hf"], "run.export")
    check_formats(van, ["official", "timm", "hf"], "run.export")
    job = from_dict(SETTINGS)
    assert (run_formats(job, van), run_formats(job, other)) == (["official", "timm"], ["timm"])
    job.run.export = []
    assert run_formats(job, van) == []
    assert load_command("van_b0", "timm").startswith("`import pretrain.model.van` and ")


def test_weights_for_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, config = timm.create_model("test_vit", num_classes=len(CLASSES)), tmp_path / "job.yaml"
    settings = {"model": {"name": "test_vit", "classes": len(CLASSES)}, "data": {"train": "unused", "image_size": 160}}
    config.write_text(json.dumps(SETTINGS | settings))
    trained = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.save(trained, tmp_path / "whole.pth")
    torch.save({key: tensor for key, tensor in trained.items() if key not in head_keys(model)}, tmp_path / "headless.pth")

    weights = command.open_weights(tmp_path / "whole.pth", config, [], average=False, needs_head=True)
    assert_same(dict(weights.model.state_dict()), trained)
    smaller = command.open_weights(
        tmp_path / "whole.pth", config, ["data.image_size=32"], average=False, needs_head=True
    ).model.state_dict()
    assert smaller["pos_embed"].shape == (1, 5, 64)  # resampled from 10 x 10 positions and the class token
    assert_same({**smaller, "pos_embed": trained["pos_embed"]}, trained)
    with pytest.raises(ValueError, match="holds no head, so it can't classify"):
        command.open_weights(tmp_path / "headless.pth", config, [], average=False, needs_head=True)
    headless = command.open_weights(tmp_path / "headless.pth", config, [], average=False, needs_head=False).model
    images = torch.zeros(2, 3, 160, 160)
    assert headless.forward_head(headless.forward_features(images), pre_logits=True).shape == (2, headless.head_hidden_size)  # type: ignore[operator]
