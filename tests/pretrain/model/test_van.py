"""The VAN family: against the authors' numbers, and in memory."""

import copy
import json
import math
import zlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import recomputation, van
from pretrain.model.convolutions import ChannelsLastConv2d
from pretrain.model.formats import from_format, to_format
from tests.support import REFERENCE

pytestmark = pytest.mark.slow

GOLDEN = json.loads((REFERENCE / "van_golden.json").read_text())
STATE_DICTS = json.loads((REFERENCE / "van_state_dicts.json").read_text())
VARIANTS = sorted(STATE_DICTS)


def meta_model(variant: str, **kwargs: Any) -> van.VAN:
    """A model without memory behind it: names and shapes only."""
    with torch.device("meta"):
        return timm.create_model(variant, **kwargs)


def small_model(seed: int = 0, **kwargs: Any) -> van.VAN:
    torch.manual_seed(seed)
    return timm.create_model("van_b0", **({"num_classes": 10} | kwargs))


def images(batch: int = 2, size: int = 64, seed: int = 1) -> torch.Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


# Sizes


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count(variant: str) -> None:
    count = sum(p.numel() for p in meta_model(variant).parameters())
    assert count == STATE_DICTS[variant]["parameters"]


# Millions of parameters with 21,841 classes, as the paper and the authors' files have them.
IN22K_MILLIONS = {"van_b3": 55.46, "van_b4": 70.97, "van_b5": 105.99, "van_b6": 215.86}


@pytest.mark.parametrize(("variant", "millions"), IN22K_MILLIONS.items())
def test_parameter_count_with_the_in22k_head(variant: str, millions: float) -> None:
    model = meta_model(variant, num_classes=21841)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == millions
    assert count - STATE_DICTS[variant]["parameters"] == (21841 - 1000) * (model.num_features + 1)


# The authors' numbers (tests/reference/README.md says how they were made)


def filled(name: str, shape: list[int], salt: str) -> torch.Tensor:
    """The made-up weights of one key in the authors' format."""
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
        # The BatchNorm behind a patch embedding takes its convolution's bias out again: that gradient is rounding error.
        check(gradients[name].norm(), expected, absolute=1e-12 if name == "patch_embed1.proj.bias" else 0)
    check(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())), golden["grad_norm_total"])
    state_dict = to_format(model.state_dict(), "official")
    for name, expected in golden["running_stats_after_train"].items():
        check(state_dict[name].norm(), expected)


# The start of training


def test_initialisation() -> None:
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
    """As torch.linspace(0, rate, blocks), which the authors' van.py takes."""
    model = meta_model(variant, drop_path_rate=rate)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([rate * i / (blocks - 1) for i in range(blocks)])


# Gradient checkpointing


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients and buffers after one step's forward and backward pass."""
    torch.manual_seed(5)
    model.train()
    F.cross_entropy(model(images(4)), torch.arange(4)).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | dict(model.named_buffers())


@pytest.mark.parametrize("enable", [True, [False, True, True, False]])
def test_grad_checkpointing_changes_nothing(enable: bool | list[bool]) -> None:
    settings = {"drop_path_rate": 0.3, "proj_drop_rate": 0.1}
    expected = train_step(small_model(**settings))
    model = small_model(**settings)
    model.set_grad_checkpointing(enable)
    actual = train_step(model)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
    for name in (name for name, _ in model.named_buffers()):
        assert torch.equal(actual[name], expected[name]), name


def test_without_care_checkpointing_would_move_the_statistics_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "_RunningStatisticsKept", lambda norms: nullcontext())
    expected = train_step(small_model())
    model = small_model()
    model.set_grad_checkpointing()
    actual = train_step(model)
    assert not torch.equal(actual["stages.0.blocks.0.norm1.running_mean"], expected["stages.0.blocks.0.norm1.running_mean"])


def test_grad_checkpointing_computes_again_for_each_backward_pass() -> None:
    model = small_model()
    model.set_grad_checkpointing()
    loss = model(images()).square().mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, gradient in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
    assert model.stages[0].blocks[0].norm1.num_batches_tracked == 1


def test_grad_checkpointing_wants_a_value_for_each_stage() -> None:
    with pytest.raises(ValueError, match="shorter"):
        meta_model("van_b0").set_grad_checkpointing([True, False])


# Memory layout


def modules_not_channels_last(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the modules that put out a tensor (N, C, H, W) which doesn't lie channels-last."""
    found = []

    def look(name: str, output: torch.Tensor) -> None:
        if output.ndim == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            found.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: look(name, output))
    model(x)
    return found


class Contiguous(nn.Module):
    """What the walk has to notice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_channels_last_from_the_first_convolution_on(training: bool, autocast: bool, memory_format: torch.memory_format) -> None:
    model = small_model(drop_path_rate=0.3).train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert modules_not_channels_last(model, images().contiguous(memory_format=memory_format)) == []


def test_the_walk_notices_another_layout() -> None:
    model = small_model()
    model.stages[1].blocks[0].mlp.drop2 = Contiguous()
    assert modules_not_channels_last(model, images())[0] == "stages.1.blocks.0.mlp.drop2"


class Copies(TorchDispatchMode):
    """Collects the operators that copy a tensor (N, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2]
        if name.startswith(("clone", "_to_copy", "copy_")) and output.ndim == 4:
            self.found.append(name)
        return output


def test_forward_makes_no_copy() -> None:
    # In eval mode: in training on a CPU, on_cpu.py rearranges maps on purpose. On a GPU both modes run the same operators.
    model, x = small_model().eval(), images()
    with Copies() as copies:
        model(x)
    assert copies.found == []
    model.stages[1].blocks[0].mlp.drop1 = Contiguous()
    with Copies() as copies:
        model(x)
    assert "clone" in copies.found


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

    # Batch statistics in bf16 would be off by up to 2**-9. The first patch embedding's are those of its bf16 input, taken in
    # fp32.
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


@pytest.mark.long
def test_blocks_that_differ_in_drop_path_alone_share_what_is_compiled() -> None:
    """A graph for each block would go over the compiler's limit, and the blocks behind it would not be compiled."""
    counter = CompileCounter()
    model = small_model(depths=(3, 3, 9, 3), drop_path_rate=0.3).train()
    for stage in model.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            block.compile(backend=counter)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model(images(2, 64, 64)).sum().backward()
    assert counter.frame_count <= 8


# ChannelsLastConv2d


def test_convolution_computes_what_conv2d_computes() -> None:
    plain = nn.Conv2d(3, 8, 7, stride=4, padding=3).double()
    conv = ChannelsLastConv2d(3, 8, 7, stride=4, padding=3).double()
    conv.load_state_dict(plain.state_dict())
    x = images().double()
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-12, atol=1e-12)
    conv(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.permute(0, 3, 1, 2), plain.weight.grad, rtol=1e-12, atol=1e-12)


def test_convolution_weight_lies_channels_last_as_a_contiguous_parameter() -> None:
    conv = ChannelsLastConv2d(4, 8, 3, padding=1)
    assert conv.weight.shape == (8, 3, 3, 4)
    assert conv.weight.is_contiguous()
    conv.weight.data.view(torch.uint8)  # as DeepSpeed's broadcast does
    assert conv.weight.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
    conv(torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    assert conv.weight.grad.is_contiguous()


def test_convolution_state_dict_has_the_usual_shape() -> None:
    conv = ChannelsLastConv2d(4, 8, 3)
    weight = conv.state_dict()["weight"]
    assert weight.shape == (8, 4, 3, 3)
    assert weight.is_contiguous()
    assert not weight.requires_grad

    other = ChannelsLastConv2d(4, 8, 3)
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other.weight, conv.weight)
    assert other.weight.shape == (8, 3, 3, 4)

    clone = copy.deepcopy(conv).double()
    assert clone.state_dict()["weight"].shape == (8, 4, 3, 3)
    assert clone.weight.is_contiguous()
    assert torch.equal(clone.weight.float(), conv.weight)

    with torch.device("meta"):
        empty = ChannelsLastConv2d(4, 8, 3)
    empty.load_state_dict(conv.state_dict(), assign=True)
    assert torch.equal(empty.weight, conv.weight)
    assert isinstance(empty.weight, nn.Parameter)
    assert empty.weight.requires_grad


def test_convolution_state_dict_keep_vars_reaches_the_parameter() -> None:
    conv = ChannelsLastConv2d(4, 8, 3)
    weight = conv.state_dict(keep_vars=True)["weight"]
    assert weight.shape == (8, 4, 3, 3)
    assert weight.data_ptr() == conv.weight.data_ptr()
    weight.sum().backward()
    assert torch.equal(conv.weight.grad, torch.ones_like(conv.weight))


def test_convolution_refuses_other_shapes() -> None:
    conv = ChannelsLastConv2d(4, 8, 3)
    for shape in [(8, 5, 3, 3), (8, 4, 3), (8, 3, 3, 4)]:
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            conv.load_state_dict({"weight": torch.zeros(shape), "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        conv.load_state_dict({"bias": torch.zeros(8)})
