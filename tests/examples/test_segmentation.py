from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import pretrain.model.van  # noqa: F401  registers the models with timm
from data.synthetic.drawings import PATTERNS
from examples import segmentation
from examples.segmentation import FPN, SIZE, Segmenter, check_features, compute_scores, draw_set, load_backbone, main, train

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


@pytest.fixture(scope="module")
def small_set() -> tuple[torch.Tensor, torch.Tensor]:
    return draw_set(12, seed=0)


def test_check_features_compares_with_the_classification_model(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = check_features(weights, torch.randn(2, 3, SIZE, SIZE))
    assert "[4, 8, 16, 32]" in line
    assert "[32, 64, 160, 256]" in line
    monkeypatch.setattr(segmentation, "load_backbone", lambda path, pretrained: load_backbone(path, False))
    with pytest.raises(AssertionError):
        check_features(weights, torch.randn(2, 3, SIZE, SIZE))


def test_draw_set_draws_two_classes_per_image_and_repeats(small_set: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, masks = small_set
    assert (images.shape, images.dtype) == ((12, 3, SIZE, SIZE), torch.uint8)
    assert (masks.shape, masks.dtype) == ((12, SIZE, SIZE), torch.int64)
    assert masks.min() >= 0
    assert masks.max() < CLASSES
    for mask in masks:
        counts = torch.bincount(mask.flatten(), minlength=CLASSES)
        shares = sorted(counts[counts > 0].tolist())
        assert len(shares) == 2
        assert shares[0] > 0.08 * SIZE**2
    again = draw_set(12, seed=0)
    assert torch.equal(images, again[0])
    assert torch.equal(masks, again[1])
    assert not torch.equal(images, draw_set(12, seed=1)[0])


def test_fpn_returns_the_finest_stride_and_uses_every_map() -> None:
    maps = [torch.randn(2, channels, size, size) for channels, size in ((32, 25), (64, 13), (160, 7), (256, 4))]
    head = FPN((32, 64, 160, 256), CLASSES)
    assert head(maps).shape == (2, CLASSES, 25, 25)
    before = head.eval()(maps)
    for i in range(4):
        assert not torch.equal(head([x + (j == i) for j, x in enumerate(maps)]), before)


def test_segmenter_takes_its_normalization_from_the_weights(weights: Path) -> None:
    model = Segmenter(load_backbone(weights, pretrained=True), CLASSES)
    torch.testing.assert_close(model.mean.flatten(), 255 * torch.tensor([0.4, 0.5, 0.6]))
    torch.testing.assert_close(model.std.flatten(), 255 * torch.tensor([0.2, 0.25, 0.3]))


def test_both_starts_have_the_same_head(weights: Path) -> None:
    models = []
    for pretrained in (True, False):
        torch.manual_seed(1)
        models.append(Segmenter(load_backbone(weights, pretrained), CLASSES))
    assert all(torch.equal(a, b) for a, b in zip(models[0].head.parameters(), models[1].head.parameters(), strict=True))
    assert not torch.equal(next(models[0].backbone.parameters()), next(models[1].backbone.parameters()))


def test_training_repeats_and_reduces_the_loss(weights: Path, small_set: tuple[torch.Tensor, torch.Tensor]) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(train(Segmenter(load_backbone(weights, pretrained=True), CLASSES), *small_set, steps=6))
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0] - 0.2


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
