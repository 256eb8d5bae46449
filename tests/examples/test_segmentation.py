from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import pretrain.model.van  # noqa: F401  registers the models with timm
from data.synthetic.drawings import PATTERNS
from examples import segmentation
from examples.segmentation import SIZE, check_features, compute_scores, load_backbone, main

pytestmark = pytest.mark.slow

CLASSES = len(PATTERNS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `export --format timm` writes it, of an untrained model with unusual normalization."""
    torch.manual_seed(0)
    model = timm.create_model("van_b0", num_classes=CLASSES)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    folder = tmp_path_factory.mktemp("weights") / "timm"
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def test_check_features_compares_with_the_classification_model(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = check_features(weights, torch.randn(2, 3, SIZE, SIZE))
    assert "[4, 8, 16, 32]" in line
    assert "[32, 64, 160, 256]" in line
    monkeypatch.setattr(segmentation, "load_backbone", lambda path, pretrained: load_backbone(path, False))
    with pytest.raises(AssertionError):
        check_features(weights, torch.randn(2, 3, SIZE, SIZE))


def test_compute_scores() -> None:
    truth = torch.tensor([[0, 0, 1, 1]])
    assert compute_scores(truth, truth, 3) == (1.0, 1.0)
    accuracy, iou = compute_scores(torch.tensor([[0, 1, 1, 1]]), truth, 3)
    assert accuracy == 0.75
    assert iou == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_main_writes_the_picture(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(segmentation, "TRAIN", 8)
    monkeypatch.setattr(segmentation, "HELD_OUT", 4)
    picture = tmp_path / "folder" / "segmentation.png"
    main(["--weights", str(weights), "--steps", "2", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert "from pretrained weights: pixel accuracy" in printed
    assert "from random weights: pixel accuracy" in printed
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_missing_weights_are_an_error_that_names_make_demo(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make demo"):
        main(["--weights", str(tmp_path / "nothing")])
