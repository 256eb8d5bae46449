"""Layers for channels-last activations: the same values, the same state dict, and back again."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pretrain.model.fast.channels_last import ChannelsLastConv2d, restore_reference, use_channels_last
from tests.pretrain.model.test_van import images, small_model


def swapped(conv: nn.Conv2d) -> nn.Conv2d:
    use_channels_last(conv)
    assert type(conv) is ChannelsLastConv2d
    return conv


def test_convolution_computes_what_conv2d_computes() -> None:
    plain = nn.Conv2d(3, 8, 7, stride=4, padding=3).double()
    conv = swapped(nn.Conv2d(3, 8, 7, stride=4, padding=3).double())
    conv.load_state_dict(plain.state_dict())
    x = images().double()
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-12, atol=1e-12)
    conv(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.permute(0, 3, 1, 2), plain.weight.grad, rtol=1e-12, atol=1e-12)


def test_convolution_weight_lies_channels_last_as_a_contiguous_parameter() -> None:
    conv = swapped(nn.Conv2d(4, 8, 3, padding=1))
    assert conv.weight.shape == (8, 3, 3, 4)
    assert conv.weight.is_contiguous()
    conv.weight.data.view(torch.uint8)  # as DeepSpeed's broadcast does
    assert conv.weight.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)
    conv(torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    assert conv.weight.grad.is_contiguous()


def test_convolution_state_dict_has_the_usual_shape() -> None:
    conv = swapped(nn.Conv2d(4, 8, 3))
    weight = conv.state_dict()["weight"]
    assert weight.shape == (8, 4, 3, 3)
    assert weight.is_contiguous()
    assert not weight.requires_grad

    other = swapped(nn.Conv2d(4, 8, 3))
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other.weight, conv.weight)
    assert other.weight.shape == (8, 3, 3, 4)

    clone = copy.deepcopy(conv).double()
    assert clone.state_dict()["weight"].shape == (8, 4, 3, 3)
    assert clone.weight.is_contiguous()
    assert torch.equal(clone.weight.float(), conv.weight)

    with torch.device("meta"):
        empty = swapped(nn.Conv2d(4, 8, 3))
    empty.load_state_dict(conv.state_dict(), assign=True)
    assert torch.equal(empty.weight, conv.weight)
    assert isinstance(empty.weight, nn.Parameter)
    assert empty.weight.requires_grad


def test_convolution_state_dict_keep_vars_reaches_the_parameter() -> None:
    conv = swapped(nn.Conv2d(4, 8, 3))
    weight = conv.state_dict(keep_vars=True)["weight"]
    assert weight.shape == (8, 4, 3, 3)
    assert weight.data_ptr() == conv.weight.data_ptr()
    weight.sum().backward()
    assert torch.equal(conv.weight.grad, torch.ones_like(conv.weight))


def test_convolution_refuses_other_shapes() -> None:
    conv = swapped(nn.Conv2d(4, 8, 3))
    for shape in [(8, 5, 3, 3), (8, 4, 3), (8, 3, 3, 4)]:
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            conv.load_state_dict({"weight": torch.zeros(shape), "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        conv.load_state_dict({"bias": torch.zeros(8)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["van_b0", "resnet10t", "convnext_atto"])
def test_a_model_stays_the_same_and_can_be_restored(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double().eval()
    reference = copy.deepcopy(model)
    use_channels_last(model)
    assert any(isinstance(module, ChannelsLastConv2d) for module in model.modules())
    x = images().double()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)
    expected = reference.state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    model.load_state_dict(expected)

    restore_reference(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in reference.modules()]
    assert torch.equal(model(x), reference(x))
    assert all(p.shape == q.shape for p, q in zip(model.parameters(), reference.parameters(), strict=True))


@pytest.mark.slow
def test_layer_norm_of_a_van_computes_the_same() -> None:
    model, fused = small_model(), small_model()
    use_channels_last(fused)
    x = torch.randn(2, 32, 5, 7).to(memory_format=torch.channels_last)
    gradients = []
    for norm in (model.stages[0].norm, fused.stages[0].norm):
        torch.manual_seed(1)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        y = norm(x.requires_grad_())
        gradients.append(torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias]))
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert type(model.stages[0].norm) is not type(fused.stages[0].norm)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_convolutions_that_compute_with_their_weight_stay() -> None:
    depthwise, pointwise = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1)
    parametrized = parametrizations.weight_norm(nn.Conv2d(4, 8, 3))
    standardized = timm.layers.StdConv2d(4, 8, 3)
    model = nn.Sequential(depthwise, pointwise, parametrized, standardized)
    types = [type(layer) for layer in model]
    use_channels_last(model)
    assert [type(layer) for layer in model] == types
