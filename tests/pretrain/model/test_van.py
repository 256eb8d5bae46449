"""VAN against the authors' numbers, and its memory layout."""

import json
import math
import zlib
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from pretrain.model import van
from pretrain.model.fast.channels_last import use_channels_last
from pretrain.model.formats import from_format, to_format
from tests.support import REFERENCE

pytestmark = pytest.mark.slow

GOLDEN = json.loads((REFERENCE / "van_golden.json").read_text())
STATE_DICTS = json.loads((REFERENCE / "van_state_dicts.json").read_text())
AUTHORS_VARIANTS = sorted(STATE_DICTS)


def meta_model(variant: str, **kwargs: Any) -> van.VAN:
    """Returns a model on the meta device: names and shapes only."""
    with torch.device("meta"):
        return timm.create_model(variant, **kwargs)


def small_model(seed: int = 0, **kwargs: Any) -> van.VAN:
    torch.manual_seed(seed)
    return timm.create_model("van_b0", **({"num_classes": 10} | kwargs))


def images(batch: int = 2, size: int = 64, seed: int = 1) -> torch.Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("variant", AUTHORS_VARIANTS)
def test_parameter_count(variant: str) -> None:
    count = sum(p.numel() for p in meta_model(variant).parameters())
    assert count == STATE_DICTS[variant]["parameters"]


@pytest.mark.parametrize("variant", van.VARIANTS)  # a variant that the authors never published has to state its size too
def test_docstring_states_the_parameter_count(variant: str) -> None:
    millions = sum(p.numel() for p in meta_model(variant).parameters()) / 1e6
    size = f"{variant.removeprefix('van_').upper()}: {millions:.{0 if millions >= 100 else 1}f} M parameters"
    assert getattr(van, variant).__doc__.startswith(f"VAN-{size}, ")


# Millions of parameters with 21,841 classes, as the paper and the authors' files have them.
IN22K_MILLIONS = {"van_b3": 55.46, "van_b4": 70.97, "van_b5": 105.99, "van_b6": 215.86}


@pytest.mark.parametrize(("variant", "millions"), IN22K_MILLIONS.items())
def test_parameter_count_with_the_in22k_head(variant: str, millions: float) -> None:
    model = meta_model(variant, num_classes=21841)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == millions
    assert count - STATE_DICTS[variant]["parameters"] == (21841 - 1000) * (model.num_features + 1)


# ---------------------------------------------------------------- the authors' numbers (tests/reference/README.md says how they were made)


def filled(name: str, shape: list[int], salt: str) -> torch.Tensor:
    """Returns the artificial weights of one key in the authors' format."""
    n = math.prod(shape)
    k = zlib.crc32((salt + name).encode())
    u = np.mod(np.arange(1, n + 1) * 0.6180339887498949 + (k % 99991) / 99991, 1) - 0.5
    if name.endswith("running_var"):
        values = 1 + 0.2 * u
    elif name.endswith("num_batches_tracked"):
        values = np.zeros(n)
    elif "norm" in name and name.endswith("weight"):
        values = 1 + 0.2 * u
    elif "layer_scale" in name:
        values = 0.1 + 0.1 * u
    elif name.endswith(("bias", "running_mean")):
        values = 0.2 * u
    else:
        values = u * math.sqrt(12 / math.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def filled_input(salt: str, shape: tuple[int, ...]) -> torch.Tensor:
    k = zlib.crc32((salt + "input").encode())
    values = 4 * (np.mod(np.arange(1, math.prod(shape) + 1) * 0.7548776662466927 + (k % 9973) / 9973, 1) - 0.5)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


@pytest.mark.parametrize("variant", sorted(GOLDEN["cases"]))
def test_computes_what_the_authors_code_computes(variant: str) -> None:
    golden, salt, size = GOLDEN["cases"][variant], GOLDEN["salt"], GOLDEN["resolution"]
    weights = {name: filled(name, shape, salt) for name, shape in STATE_DICTS[variant]["state_dict"].items()}
    model = timm.create_model(variant)
    model.load_state_dict(from_format(weights))
    model = model.double()
    x = filled_input(salt, (2, 3, size, size)).double()

    def check(actual: Any, expected: Any, absolute: float = 0.0) -> None:
        actual = torch.as_tensor(actual, dtype=torch.float64)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=absolute)

    model.eval()
    with torch.no_grad():
        last, stages = model.forward_intermediates(x)
        logits = model.forward_head(last)
    check(logits[:, :8], golden["eval_logits_first8"])
    check(logits.norm(), golden["eval_logits_norm"])
    assert len(stages) == len(golden["stage_features"]) == 4
    for features, expected in zip(stages, golden["stage_features"], strict=True):
        assert list(features.shape) == expected["shape"]
        check([features.mean(), features.std()], [expected["mean"], expected["std"]])
        check(features.reshape(-1)[:4], expected["first"])

    model.train()
    loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
    loss.backward()
    check(loss.detach(), golden["train_loss"])
    gradients = to_format({name: p.grad for name, p in model.named_parameters()}, "official")
    for name, expected in golden["grad_norms"].items():
        # The BatchNorm of a patch embedding subtracts its convolution's bias again: that gradient is rounding error.
        check(gradients[name].norm(), expected, absolute=1e-12 if name == "patch_embed1.proj.bias" else 0)
    check(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())), golden["grad_norm_total"])
    state_dict = to_format(model.state_dict(), "official")
    for name, expected in golden["running_stats_after_train"].items():
        check(state_dict[name].norm(), expected)


# ---------------------------------------------------------------- initialization


def test_initialization() -> None:
    model = small_model()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            std = math.sqrt(2 / fan_out)
            assert module.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * module.weight.numel())), name
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert all((p == 0.01).all() for name, p in model.named_parameters() if "layer_scale" in name)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.head.bias.any()


@pytest.mark.parametrize(
    ("variant", "blocks", "rate"), [("van_b0", 13, 0.12), ("van_b3", 38, 0.1), ("van_b4", 52, 0.2), ("van_b6", 108, 0.3)]
)
def test_drop_path_rises_linearly_over_all_blocks(variant: str, blocks: int, rate: float) -> None:
    """As torch.linspace(0, rate, blocks), which the authors' van.py uses."""
    model = meta_model(variant, drop_path_rate=rate)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([rate * i / (blocks - 1) for i in range(blocks)])


# ---------------------------------------------------------------- memory layout


def modules_not_channels_last(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Returns the names of the modules whose output (N, C, H, W) does not lie channels-last."""
    names = []

    def look(name: str, output: torch.Tensor) -> None:
        if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            names.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
    model(x)
    return names


class Contiguous(nn.Module):
    """A layer that changes the memory layout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_activations_are_channels_last_from_the_first_convolution_on(memory_format: torch.memory_format) -> None:
    model = small_model(drop_path_rate=0.3)
    use_channels_last(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert modules_not_channels_last(model, images().contiguous(memory_format=memory_format)) == []


def test_another_layout_is_noticed() -> None:
    model = small_model()
    model.stages[1].blocks[0].mlp.drop2 = Contiguous()
    assert modules_not_channels_last(model, images())[0] == "stages.1.blocks.0.mlp.drop2"


def test_norm_statistics_stay_fp32_under_autocast() -> None:
    model = small_model(drop_path_rate=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
        loss = F.cross_entropy(logits, torch.tensor([1, 2]))
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert {buffer.dtype for name, buffer in model.named_buffers() if "running" in name} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    # Batch statistics in bf16 would be off by up to 2**-9. Those of the first patch embedding are computed in fp32 from its bf16 input.
    embed = model.stages[0].patch_embed
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        projected = embed.proj(images())
    assert projected.dtype == torch.bfloat16
    expected = 0.9 + 0.1 * projected.double().var(dim=(0, 2, 3))
    torch.testing.assert_close(embed.norm.running_var.double(), expected, rtol=1e-5, atol=0)
    norm = model.stages[0].norm
    x = projected.permute(0, 2, 3, 1)
    _, mean, rstd = torch.native_layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    assert mean.dtype == rstd.dtype == torch.float32


# ---------------------------------------------------------------- parameters and state dict


def test_load_state_dict_takes_the_authors_names() -> None:
    """Also below a prefix, as in a detector, and with either value of `strict`."""
    source, x = small_model(seed=3).eval(), images()
    official = to_format(source.state_dict(), "official")
    assert official.keys() != source.state_dict().keys()
    for weights in (official, source.state_dict()):
        model = small_model().eval()
        assert str(model.load_state_dict(weights)) == "<All keys matched successfully>"
        assert torch.equal(model(x), source(x))
    wrapped = nn.ModuleDict({"backbone": small_model().eval(), "head": nn.Linear(2, 2)})
    weights = {f"backbone.{key}": value for key, value in official.items()} | {
        f"head.{k}": v for k, v in wrapped["head"].state_dict().items()
    }
    wrapped.load_state_dict(weights)
    assert torch.equal(wrapped["backbone"](x), source(x))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*block9.0.norm1.weight"):
        small_model().load_state_dict(official | {"block9.0.norm1.weight": torch.zeros(1)})
