"""Any classifier of timm, or of a user's own file, trains, resumes, evaluates, exports and fine-tunes; nothing asks for a VAN."""

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from pretrain import checkpoint
from pretrain.config import Config, from_dict
from pretrain.engine import distributed
from pretrain.engine.batch_stats import SyncBatchNormAct, synchronize_batch_norms
from pretrain.engine.optim import group_parameters
from pretrain.evaluation.command import print_evaluation
from pretrain.model.build import build_empty_model, build_model
from pretrain.monitor.flops import training_flops
from pretrain.monitor.memory import out_of_memory_message
from pretrain.weights.export import export
from pretrain.weights.run_model import build_trained, reject_enclosed_code
from pretrain.weights.source import head_keys
from tests.support import REPOSITORY, jobs
from tests.support.jobs import wait_until
from tests.support.ranks import kill

# A user's model: BatchNorm1d and LayerNorm, a parameter that is never trained, one that must not decay, and a constructor that reads
# a value, which the meta device does not have.
OWN_MODEL = """
import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes=1000, in_chans=3, width=16, drop_rate=0.0):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.drop = nn.Dropout(torch.linspace(0, drop_rate, 2)[1].item())
        self.scale = nn.Parameter(torch.full((1, width), 0.5), requires_grad=False)
        self.token = nn.Parameter(torch.zeros(1, width))
        self.stem = nn.Conv2d(in_chans, width, 8, stride=8)
        self.mix, self.norm1, self.norm2 = nn.Linear(width, width), nn.BatchNorm1d(width), nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)

    def no_weight_decay(self):
        return {"token"}

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes, global_pool=None):
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        return torch.relu(self.stem(x)).mean((2, 3)) * self.scale + self.token

    def forward_head(self, x, pre_logits=False):
        x = self.norm2(torch.relu(self.norm1(self.mix(self.drop(x)))))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@register_model
def my_net(pretrained=False, **kwargs):
    return build_model_with_cfg(Net, "my_net", pretrained, **kwargs)


@register_model
def no_classifier(pretrained=False, num_classes=1000, **kwargs):
    return nn.Linear(3, num_classes)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the path of a user's file of models."""
    path = tmp_path_factory.mktemp("own") / "my_models.py"
    path.write_text(OWN_MODEL)
    return str(path)


def settings(name: str, image_size: int = 32, **model: Any) -> Config:
    values = {
        "name": "any", "global_batch": 4, "epochs": 1.0, "model": {"name": name, "classes": 7, **model},
        "data": {"train": "unused", "image_size": image_size}, "optim": {"lr": 1e-3}, "engine": {"micro_batch": 4, "device": "cpu"},
    }  # fmt: skip
    return from_dict(values)


# ---------------------------------------------------------------- whole jobs


VIT = "model.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"
# By normalization: settings of the job, and its ZeRO stage.
MODELS = {
    "BatchNorm": (["model.name=resnet10t"], 0),
    "LayerNorm": (["model.name=vit_tiny_patch16_224", VIT], 3),
    "both": (["model.name=mobilevit_xxs", "model.checkpoint_stages=[0,1,2,3]"], 1),
    "own file": (["model.name={own}:my_net", "model.drop_path=null"], 1),
}
# The random numbers of a rank and its BatchNorms' micro-batches are the same on two ranks and on one.
ALIKE = ("model.drop_path=0", "engine.precision=fp32", "engine.micro_batch=8", "run.keep=20", "run.save_every=2", "steps=8")


def evaluate(run: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """Returns what `evaluate` prints, in this process."""
    try:
        print_evaluation(run, None, [], **options)
    finally:
        distributed.stop()
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own file", "LayerNorm", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("BatchNorm", "both"))])
def test_a_job_is_killed_resumed_on_fewer_ranks_evaluated_exported_and_fine_tuned(
    kind: str, own: str, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, stage = MODELS[kind]
    options = [*ALIKE, *(text.format(own=own) if "{own}" in text else text for text in named), f"engine.zero_stage={stage}"]
    job = jobs.start(tmp_path, drawn, *options, ranks=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    try:
        wait_until((checkpoints / "step-000000004").exists, job, tmp_path)
    finally:
        kill(job)
    before = {record["step"]: record["loss"] for record in jobs.metrics(tmp_path, "train")}
    for later in checkpoint.list_checkpoints(checkpoints)[1:]:
        shutil.rmtree(later)
    output = jobs.run(tmp_path, drawn, *options, ranks=1)
    assert f"resumed at step 2 of 8 from a checkpoint of 2 ranks, ZeRO-{stage}" in output
    assert "computing: PyTorch's operators (no fast path exists for " in output
    after = {record["step"]: record["loss"] for record in jobs.metrics(tmp_path, "train")}
    assert list(after) == list(range(1, 9))
    for step in set(before) - {1, 2}:
        assert after[step] == pytest.approx(before[step], rel=1e-3)
    assert after[3] != pytest.approx(before[4], rel=1e-3)  # the control: other samples make another loss

    result = jobs.metrics(tmp_path, "evaluation")[-1]
    expected = f"top-1 {result['ema']['top1']:.2%}, top-5 {result['ema']['top5']:.2%}"
    assert expected in evaluate(tmp_path / "run", capsys, average=True, probe=None)
    assert "nearest-neighbor top-1" in evaluate(tmp_path / "run", capsys, average=False, probe=2)

    export(tmp_path / "run", "timm", tmp_path / "exported")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model, config, _ = build_trained(tmp_path / "run", average=False)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-6)
        assert model(images).std() > 0

    tuning = [*options, f"model.init_from={tmp_path / 'exported'}", "model.head_init=map", "optim.layer_decay=0.7", "steps=1"]
    output = jobs.run(tmp_path / "tuned", drawn, *tuning, ranks=1)
    head = head_keys(model)
    assert f"all {len(model.state_dict()) - len(head)} tensors of the backbone loaded" in output
    assert f"{', '.join(head)}: 10 of 10 rows copied by class name" in output
    assert config.model.name == options[len(ALIKE)].partition("=")[2]


# ---------------------------------------------------------------- building


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224", "levit_128s", "test_maxvit"])
def test_models_of_a_fixed_input_size_are_built_for_the_size_of_the_job(name: str) -> None:
    model = build_empty_model(settings(name, 64), torch.device("meta"))
    flops = training_flops(model, 64)
    assert flops is not None
    assert flops > 0


MISTAKES: dict[str, tuple[Callable[[str], Config], str]] = {
    "no such model": (lambda own: settings("resnet5o"), "timm has no model resnet5o; did you mean resnet50 or "),
    "not in the file": (lambda own: settings(f"{own}:mynet"), r"my_models.py registers no model mynet; did you mean my_net"),
    "no file": (lambda own: settings("nowhere.py:net"), "there is no file nowhere.py"),
    "no classifier": (lambda own: settings(f"{own}:no_classifier"), "Linear lacks forward_features, forward_head, get_classifier"),
    "no stochastic depth": (lambda own: settings("vgg11", drop_path=0.1), "unexpected keyword argument 'drop_path_rate'; .*drop_path=null"),
    "unknown argument": (lambda own: settings("resnet10t", kwargs={"depth": 3}), "can't be built with num_classes=7, depth=3: "),
    "no recomputation": (lambda own: settings("convit_tiny", checkpoint_stages=[0, 1, 2, 3]), "convit_tiny can't recompute its blocks"),
    "all or none": (lambda own: settings("resnet10t", checkpoint_stages=[1]), "resnet10t recomputes all of its blocks or none"),
    "a small image": (lambda own: settings("inception_v4", 64), r"can't compute images of 64 x 64 \(RuntimeError: .*data.image_size"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_model_that_does_not_work_is_an_error(kind: str, own: str) -> None:
    config, message = MISTAKES[kind][0](own), MISTAKES[kind][1]
    with pytest.raises(ValueError, match=message):
        training_flops(build_model(config), config.data.image_size)


def test_memory_is_estimated_for_a_model_that_reads_values_while_it_is_built(own: str) -> None:
    config = settings(f"{own}:my_net")
    with torch.device("meta"), pytest.raises(RuntimeError):
        build_model(config)
    assert "Try engine.micro_batch=2" in out_of_memory_message(config, ranks=1, device_type="cpu", state=0, total=10**9)


def test_files_of_one_name_in_two_folders_are_two_files(own: str, tmp_path: Path) -> None:
    build_model(settings(f"{own}:my_net"))
    other = tmp_path / Path(own).name
    other.write_text(OWN_MODEL.replace("my_net", "other_net"))
    assert build_model(settings(f"{other}:other_net")).pretrained_cfg["architecture"] == "other_net"  # type: ignore[index]


def test_a_file_that_fails_is_an_error_with_its_line_each_time(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import timm\nimport no_such_module\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"broken\.py can't be imported: ModuleNotFoundError: .*no_such_module.* \(.*broken\.py:2\)"):
            build_model(settings(f"{file}:net"))


def test_a_frozen_parameter_is_a_buffer_and_others_decay_as_the_model_says(own: str) -> None:
    model = build_model(settings(f"{own}:my_net"))
    assert "scale" in dict(model.named_buffers())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, bare = ([names[id(one)] for one in group["params"]] for group in group_parameters(model, 0.05))
    assert decayed == ["stem.weight", "mix.weight", "fc.weight"]
    assert "token" in bare


def test_a_synchronized_batch_norm_activates_as_before() -> None:
    model = build_model(settings("mobilevit_xxs")).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        before = model(images)
        synchronize_batch_norms(model)
        assert torch.equal(model(images), before)
    assert any(isinstance(module, SyncBatchNormAct) for module in model.modules())


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm3d(4)],
)
def test_a_batch_norm_that_can_not_be_synchronized_is_an_error(norm: nn.Module) -> None:
    with pytest.raises(ValueError, match=rf"engine\.sync_bn: a {type(norm).__name__} of the model can't be synchronized"):
        synchronize_batch_norms(nn.Sequential(norm))


# ---------------------------------------------------------------- rooms


def test_a_checkpoint_brings_no_code_along(own: str) -> None:
    reject_enclosed_code(Path(own).parent / "run", f"{own}:my_net")
    with pytest.raises(ValueError, match="a file inside it, which is not executed"):
        reject_enclosed_code(Path(own).parent, f"{own}:my_net")


def test_no_room_asks_for_a_van() -> None:
    rooms = ["data", "launch", "pretrain/checkpoint", "pretrain/engine", "pretrain/evaluation", "pretrain/monitor", "pretrain/run"]
    files = [REPOSITORY / "pretrain" / "train.py", *(file for room in rooms for file in (REPOSITORY / room).rglob("*.py"))]
    assert len(files) > 80
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "module", None)}
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            assert not names & {"VAN", "pretrain.model.van"}, f"{file}:{getattr(node, 'lineno', 0)}"
