"""The model on Triton's kernels: which layers take them, and that it is the same model."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from pretrain.engine.batch_stats import synchronize_batch_norms
from pretrain.model import depthwise, lka
from pretrain.model.convolutions import PointwiseConv2d
from pretrain.model.depthwise import DepthwiseConv2d
from pretrain.model.fast import cpu as on_cpu
from pretrain.model.fast import kernel_choice
from pretrain.model.fast.kernel_choice import compile_blocks, use_kernels
from pretrain.model.fast.triton import Normed
from pretrain.model.lka import LKA
from pretrain.model.van import VAN, Block, VANStage
from tests.support import REPOSITORY
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

DEVICE = "cpu" if knobs.runtime.interpret else "cuda"
HERE = torch.device(DEVICE)
ALL = "kernels: Triton for 15 of 15 depth-wise convolutions, 5 of 5 gates, 10 of 10 shortcuts, with 6 norms behind them"


def tiny(drop_path_rate: float = 0.5, **others: float) -> VAN:
    torch.manual_seed(0)
    sizes = {"embed_dims": (8, 12, 16, 40), "depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 2, 2)}
    return VAN(num_classes=3, drop_path_rate=drop_path_rate, **sizes, **others)


def outcome(model: VAN, images: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(3)  # of the dropped paths
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = model(images)
    torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0, 2, 1], device=DEVICE)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return {"logits": logits.detach().float()} | grads


def choose(model: torch.nn.Module, choice: str = "auto") -> str:
    return use_kernels(model, choice, HERE, 32, torch.float32)


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter passes for a GPU."""
    monkeypatch.setattr(kernel_choice, "unusable", lambda device: None)


@pytest.fixture
def plain_and_fast(usable: None) -> tuple[VAN, VAN]:
    return pair()


def pair(**others: float) -> tuple[VAN, VAN]:
    """A model on PyTorch's operators, and the same one on Triton's."""
    plain = tiny(**others).to(DEVICE).train()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "layer_scale" in name:
                p.fill_(1.0)  # at its initial 0.01 an error of a branch would be a hundredth of itself
            elif "norm" in name:
                p.add_(torch.linspace(-0.9, 0.3, len(p)))  # or most of what folds a norm would multiply by 1 and add 0
    fast = copy.deepcopy(plain)
    assert choose(fast, "triton") == ALL
    assert fast.state_dict().keys() == plain.state_dict().keys()
    return plain, fast


IMAGES = torch.randn(3, 3, 32, 44, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


def test_the_model_computes_the_same(plain_and_fast: tuple[VAN, VAN]) -> None:
    """In training, with paths dropped: the same samples drop them, and all gradients and running statistics are those of PyTorch's
    operators."""
    check_alike(*plain_and_fast)


@pytest.mark.long
def test_with_dropout_it_computes_the_same(usable: None) -> None:
    """Then no sum stands right behind the MLP's last convolution. (Without dropped paths, which are drawn in another order.)"""
    check_alike(*pair(proj_drop_rate=0.2, drop_path_rate=0.0))


def check_alike(plain: VAN, fast: VAN) -> None:
    expected, found = (outcome(model, IMAGES.to(DEVICE), torch.float32) | dict(model.named_buffers()) for model in (plain, fast))
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()) + 1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


class BiasSums(TorchDispatchMode):
    """Counts how often the gradient of a map is read for a bias of a linear layer alone."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.count += function is torch.ops.aten.sum.dim_IntList and arguments[0].ndim == 2
        return function(*arguments, **(named or {}))


def test_biases_need_no_pass_of_their_own(monkeypatch: pytest.MonkeyPatch, plain_and_fast: tuple[VAN, VAN]) -> None:
    """Their gradients come out of the kernels; without these, as the control has it, each of a block's 1x1 convolutions reads a map."""
    monkeypatch.setattr(on_cpu, "trains", lambda _module, _x: False)  # as on a GPU
    plain, fast = plain_and_fast
    for module in plain.modules():
        if isinstance(module, PointwiseConv2d):
            module.by_linear = True
    for model, a_block in ((plain, 5), (fast, 0)):
        with BiasSums() as sums:
            model.forward_features(IMAGES.to(DEVICE)).mean().backward()
        assert sums.count == 5 * a_block


@pytest.mark.long
def test_under_autocast_it_is_as_close_to_fp32(plain_and_fast: tuple[VAN, VAN]) -> None:
    """As PyTorch's operators in bf16 are, but for the interpreter, which cuts bf16 off where a GPU rounds."""
    plain, fast = plain_and_fast
    exact = outcome(copy.deepcopy(plain), IMAGES.to(DEVICE), torch.float32)
    distances = []
    for model in (plain, fast):
        found = outcome(model, IMAGES.to(DEVICE), torch.bfloat16)
        distances.append(torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm())
    assert distances[1] < 2 * distances[0]
    assert 2 * distances[0] < 0.2 * torch.cat([value.flatten() for value in exact.values()]).norm()  # so the bound says something


@pytest.mark.long
def test_recomputed_blocks_give_the_same(plain_and_fast: tuple[VAN, VAN]) -> None:
    """Gradient checkpointing on the kernels changes no bit, and moves running statistics once."""
    _, fast = plain_and_fast
    again = copy.deepcopy(fast)
    again.set_grad_checkpointing(True)
    expected, found = (outcome(model, IMAGES.to(DEVICE), torch.float32) | dict(model.named_buffers()) for model in (fast, again))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_evaluation_is_the_same(plain_and_fast: tuple[VAN, VAN]) -> None:
    with torch.no_grad():
        expected, found = (model.eval()(IMAGES.to(DEVICE)) for model in plain_and_fast)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators go through torch.compile whole, without a graph break; what it makes of the rest is not wanted here."""
    graphs: list[torch.fx.GraphModule] = []

    def keeping(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.manual_seed(0)
    stage = VANStage(3, 8, depth=2, mlp_ratio=2, patch_size=7, stride=4, drop=0.0, drop_path=[0.0, 0.0]).to(
        DEVICE
    )  # dropped paths are drawn otherwise
    for module in stage.modules():
        if isinstance(module, DepthwiseConv2d | LKA | Block):
            module.triton = True
        elif isinstance(module, PointwiseConv2d):
            module.by_linear = True
    stage.joins = True
    compiled = copy.deepcopy(stage)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, **how | {"backend": keeping, "fullgraph": True}))
    compile_blocks(compiled)
    outcomes = []
    for each in (stage, compiled):
        torch.manual_seed(1)
        each(IMAGES.to(DEVICE)).square().mean().backward()
        outcomes.append({name: p.grad for name, p in each.named_parameters()} | dict(each.named_buffers()))
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-5, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}")
    assert len(graphs) == 2
    assert all(graph.code.count("van.residual_norm") + graph.code.count("van.scaled_residual") == 2 for graph in graphs)
    assert all(graph.code.count("van.gelu_conv2d") == graph.code.count("van.gate") == 1 for graph in graphs)


@pytest.mark.long
def test_joints_that_differ_in_drop_path_alone_share_what_is_compiled() -> None:
    """As blocks do (test_van.py): else the compiler's limit would leave the blocks behind it uncompiled."""
    stage = VANStage(3, 8, depth=6, mlp_ratio=2, patch_size=7, stride=4, drop=0.0, drop_path=[0, 0.1, 0.2, 0.3, 0.4, 0.5]).to(DEVICE)
    counter = CompileCounter()
    for module in stage.modules():
        if isinstance(module, DepthwiseConv2d | LKA | Block):
            module.triton = True
        if isinstance(module, Block):
            module.joined = torch.compile(module.joined, backend=counter)  # type: ignore[method-assign]
    stage.joins = True
    stage(IMAGES.to(DEVICE))
    assert counter.frame_count <= 4  # without a path to drop, with one, with any, and the last


def chosen(model: torch.nn.Module) -> list[bool]:
    kinds = {DepthwiseConv2d: "triton", LKA: "triton", Block: "triton", VANStage: "joins", PointwiseConv2d: "by_linear"}
    return [getattr(m, kinds[type(m)]) for m in model.modules() if type(m) in kinds]


def test_auto_is_pytorch_on_a_cpu() -> None:
    model = tiny()
    assert use_kernels(model, "auto", torch.device("cpu"), 32, torch.float32) == "kernels: PyTorch's, the device is cpu"
    assert not any(chosen(model))


def test_torch_is_pytorch_everywhere(usable: None) -> None:
    model = tiny().to(DEVICE)
    assert choose(model) == ALL
    assert all(chosen(model))
    assert choose(model, "torch") == "kernels: PyTorch's, as model.kernels=torch asks"
    assert not any(chosen(model))


def test_triton_is_an_error_where_it_cant_run() -> None:
    with pytest.raises(ValueError, match=r"model\.kernels=triton can't be: the device is cpu; model\.kernels=auto takes"):
        use_kernels(tiny(), "triton", torch.device("cpu"), 32, torch.float32)


def test_a_layer_without_a_kernel_falls_back_alone(usable: None) -> None:
    model = tiny()
    model.stages[0].blocks[0].attn.spatial_gating_unit.conv_spatial = DepthwiseConv2d(8, 9, 2)  # type: ignore[union-attr, index]
    told = choose(model)
    assert told.startswith("kernels: Triton for 14 of 15 depth-wise convolutions, 5 of 5 gates, 10 of 10 shortcuts")
    assert told.endswith("; not for 9x9 dilation 2, 8 channels, 8 px (there is no such kernel)")
    assert chosen(model).count(False) == 1
    with pytest.raises(ValueError, match=r"9x9 dilation 2.*there is no such kernel"):
        choose(model, "triton")


@pytest.mark.parametrize("wrong", ["fails", "differs"])
def test_a_kernel_that_does_not_work_here_is_left_out(usable: None, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """One that can't be launched, and one whose results are wrong: each is found before the first step, and the model computes as ever."""
    from pretrain.model.fast.triton import trial

    right = trial.depthwise_conv2d

    def broken(x: Tensor, weight: Tensor, *others: object) -> Tensor:
        if weight.shape[-1] == 7 and wrong == "fails":
            raise RuntimeError("out of resource: shared memory\nRequired: …")
        y = right(x, weight, *others)  # type: ignore[arg-type]
        return torch.cat([y[:, :, :1] * 1.2, y[:, :, 1:]], 2) if weight.shape[-1] == 7 else y

    trial.convolution_fault.cache_clear()
    monkeypatch.setattr(trial, "depthwise_conv2d", broken)
    model = tiny().to(DEVICE)
    told = choose(model)
    trial.convolution_fault.cache_clear()
    reason = "RuntimeError: out of resource: shared memory" if wrong == "fails" else "differs from PyTorch's by"
    assert f"7x7 dilation 3, 8 channels, 8 px ({reason}" in told
    assert told.startswith("kernels: Triton for 10 of 15 depth-wise convolutions, 5 of 5 gates, 10 of 10 shortcuts")
    assert {m.kernel_size[0] for m in model.modules() if isinstance(m, DepthwiseConv2d) and not m.triton} == {7}
    assert model(IMAGES.to(DEVICE)).isfinite().all()


@pytest.mark.parametrize("wrong", [*Normed._fields, "not a number"])
def test_a_joint_with_wrong_results_is_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """One that lets no gradient through a part of what is normed, or gives one that is not a number."""
    from pretrain.model.fast.triton import trial

    right = trial.residual_norm

    def broken(x: Tensor, *others: object) -> tuple[Tensor, Normed, object]:
        y, normed, found = right(x, *others)  # type: ignore[arg-type]
        if wrong == "not a number":  # of the last gradients alone
            scale = others[2]
            scale.register_hook(lambda grad: grad * torch.nan)  # type: ignore[attr-defined]
            return y, normed, found
        return y, normed._replace(**{wrong: getattr(normed, wrong).detach()}), found

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert trial.joint_fault.__wrapped__(40, dtype, HERE) is None
    monkeypatch.setattr(trial, "residual_norm", broken)
    assert str(trial.joint_fault.__wrapped__(40, torch.float32, HERE)).startswith("differs from PyTorch's by")


def test_a_joint_that_does_not_work_here_is_left_out(usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "joint_fault", lambda channels, *_: "no" if channels == 12 else None)
    model = tiny().to(DEVICE)
    assert choose(model).endswith("6 of 10 shortcuts, with 3 norms behind them; not for shortcuts of 12 channels (no)")
    assert [stage.joins for stage in model.stages] == [True, False, True, True]


@pytest.mark.long
def test_a_gate_that_does_not_work_here_is_left_out(usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its convolutions are the kernels' all the same, and it computes the same."""
    plain, fast = pair()
    monkeypatch.setattr(lka, "attention_fault", lambda channels, *_: "no" if channels > 8 else None)
    told = choose(fast)
    assert "15 of 15 depth-wise convolutions, 1 of 5 gates, 10 of 10 shortcuts, with 1 norms" in told
    assert told.endswith("; not for gates of 12 channels, 4 px (no); gates of 16 channels, 2 px (no); gates of 40 channels, 1 px (no)")
    check_alike(plain, fast)


@pytest.mark.parametrize("wrong", ["gelu_conv2d", "gated"])
def test_wrong_gradients_around_a_gate_are_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    from pretrain.model.fast.triton import trial

    right = getattr(trial, wrong)

    def broken(x: Tensor, *others: Tensor) -> object:
        others[-1].register_hook(lambda grad: grad * 1.1)  # the bias's
        return right(x, *others)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert trial.attention_fault.__wrapped__(12, 7, 5, dtype, HERE) is None
    monkeypatch.setattr(trial, wrong, broken)
    assert str(trial.attention_fault.__wrapped__(12, 7, 5, torch.float32, HERE)).startswith("differs from PyTorch's by")


def test_norms_over_all_ranks_stay_pytorchs(usable: None) -> None:
    model = tiny().to(DEVICE)
    synchronize_batch_norms(model)
    assert choose(model).endswith("10 of 10 shortcuts, with 0 norms behind them")


def test_in_zero_3_norms_stay_pytorchs(usable: None) -> None:
    """The next block's weights are not there yet."""
    model = tiny().to(DEVICE)
    assert use_kernels(model, "auto", HERE, 32, torch.float32, 3).endswith("10 of 10 shortcuts, with 0 norms behind them")
    assert not any(stage.joins for stage in model.stages)


def test_old_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    told = use_kernels(tiny(), "auto", gpu, 32, torch.float32)
    assert told == "kernels: PyTorch's, compute capability 7.5 is below 8.0, which bf16 needs"


def test_all_layers_of_the_published_models_have_kernels(usable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((depthwise, "convolution_fault"), (lka, "attention_fault"), (kernel_choice, "joint_fault")):
        monkeypatch.setattr(module, name, lambda *_: None)  # too slow in the interpreter
    for name in ("van_b3", "van_b6"):
        with torch.device("meta"):
            model = timm.create_model(name)
        choose(model, "triton")
        assert all(chosen(model))


def losses_in_deepspeed(stage: int, fast: bool) -> list[float]:
    """One rank: two steps, with gradient checkpointing in the last stage."""
    from pretrain import config as settings
    from pretrain.engine import distributed
    from pretrain.engine.engine import build_engine

    config = settings.from_dict(
        {
            "name": "tiny", "global_batch": 3, "epochs": 1.0, "model": {"name": "van_b0", "classes": 3}, "data": {"train": "unused"},
            "optim": {"lr": 1e-2}, "engine": {"micro_batch": 3, "device": "cpu", "zero_stage": stage},
        }
    )  # fmt: skip
    distributed.start(config.engine)
    model = tiny()
    model.set_grad_checkpointing([False, False, False, True])
    kernel_choice.unusable = lambda device: None  # type: ignore[assignment]
    engine = build_engine(config, model, 1)
    use_kernels(model, "triton" if fast else "torch", HERE, 32, torch.float32, stage)  # tried in the type that takes least time
    engine.train()
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        loss = torch.nn.functional.cross_entropy(engine(IMAGES).double(), torch.tensor([0, 2, 1]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    distributed.stop()
    return losses


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.full)])
def test_trains_in_deepspeed_as_pytorchs_operators_do(stage: int) -> None:
    """In bf16. Stage 3 takes weights away between forward and backward; the operators find them again."""
    fast, plain = (run_on_ranks(1, losses_in_deepspeed, stage=stage, fast=fast)[0] for fast in (True, False))
    assert fast == pytest.approx(plain, rel=2e-2)
    assert fast != plain  # the kernels round otherwise, so these are others
    assert abs(plain[-1] - plain[0]) > 0.1  # a step's weight updates are seen in the losses


def test_a_job_says_at_its_start_that_triton_cant_run(tmp_path: Path, drawn: Path) -> None:
    """Exit code 2, before anything is trained."""
    settings = (
        f"data.train={drawn / 'train'}", "data.val=null", "data.image_size=32", f"run.dir={tmp_path / 'run'}", "steps=1",
        "model.name=van_b0", "model.classes=10", "global_batch=4", "engine.micro_batch=4", "engine.device=cpu", "model.kernels=triton",
    )  # fmt: skip
    command = [sys.executable, "-m", "launch", "configs/van_b3_in22k.yaml", *settings]
    found = subprocess.run(command, env=os.environ | {"RANKS": "1"}, cwd=REPOSITORY, capture_output=True, text=True)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "model.kernels=triton can't be: the device is cpu" in found.stderr + found.stdout
